"""Any form with any tile on random problems, every address of theirs checked: a GPU faults, or writes what is not ours.

What is checked, and in every other test too, is in `interpreter`; that it is, is tested here.
"""

import random

import pytest
import torch
import triton
import triton.language as tl
from helpers import INTERPRETED, check, compare
from helpers import random as numbers
from test_forced_forms import reason_of
from triton.runtime.errors import InterpreterError

from triton_conv import dispatch, ops, ops_conv, ops_deform
from triton_conv.autotune.space import SPACES
from triton_conv.kernels import KERNELS
from triton_conv.reference import reference, rounding

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import KINDS

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU tells of no address")
# More programs than these say nothing new.
_MOST_PROGRAMS = 64


@triton.jit
def copy_kernel(x_ptr, y_ptr, first, end, OWN: tl.constexpr, WORDS: tl.constexpr):
    at = first + tl.arange(0, 4) + (tl.program_id(0) * 4 if OWN else 0)
    if WORDS:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    value = tl.load(x_ptr + at, mask=at < end, other=0).to(tl.float32)
    tl.store(y_ptr + at, value, mask=at < end)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("first", "end", "own", "words", "message"),
    [
        (0, 8, True, False, None),
        (4, 8, True, False, None),
        (0, 9, True, False, "bytes 16 to 18 of a tensor of 16"),
        (-1, 8, True, False, "bytes -2 to 6 of a tensor of 16"),
        (0, 8, True, True, "bytes 16 to 32 of a tensor of 16"),
        (0, 4, False, False, "program 1 stores what another did"),
    ],
)
def test_what_is_checked(first, end, own, words, message):
    """The input has 8 halves, 16 bytes, the output 12 floats; what a mask leaves out may be anywhere."""
    x, y = torch.arange(8.0).half(), torch.zeros(12)
    if message is None:
        copy_kernel[(3,)](x, y, first, end, own, words)
        assert y.tolist() == [i if first <= i < end else 0 for i in range(12)]
        return
    with pytest.raises(InterpreterError, match=message):
        copy_kernel[(3,)](x, y, first, end, own, words)


def any_plan(problem, target):
    """A form that can run the problem and a tile of its space, the same for the same problem."""
    draw = random.Random(repr(problem))
    names = [name for name in KERNELS if reason_of(name, problem) is None]
    for name in draw.sample(names, len(names)):
        kernel, space = KERNELS[name], SPACES[name]
        for _ in range(100):
            # Less than the space has, so that small problems take several tiles.
            chosen = {key: draw.choice((16, 32, *all) if key[:5] == "BLOCK" else all) for key, all in space.items()}
            tile = kernel.tile_type(**chosen)
            if tile.unfit(problem, target) is None and kernel.grid(problem, tile) <= _MOST_PROGRAMS:
                return dispatch.plan(problem, target, name, tile)
    return dispatch.plan(problem, target)


@pytest.fixture
def any_form(monkeypatch):
    for module in (ops_conv, ops_deform):
        monkeypatch.setattr(module, "plan", any_plan)
    ops.forget_plans()
    yield
    ops.forget_plans()


def weight_gradient(function, arguments):
    """That of a call, in whatever layouts its tensors have, compared with float64."""
    x, w, border = arguments["input"], arguments["weight"], arguments["padding"]
    window = {name: arguments[name] for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    exact = w.double().requires_grad_()
    output = reference(function, {"input": x, "weight": exact, **window})
    grad = numbers(output.shape, x.dtype, "g")
    (expected,) = torch.autograd.grad(output, exact, grad.double())
    flat = [side for pair in border for side in ((pair, pair) if isinstance(pair, int) else pair)]
    given = x, grad, w.shape[2:], window["stride"], flat, window["dilation"], window["groups"], window["padding_mode"]
    made = ops_conv.plan_conv_weight_gradient(*given)
    compare(ops.run_partial(made, x, grad), expected, rounding(made.problem))


def run(kind, data):
    function, arguments = data.draw(KINDS["forward" if kind == "weight gradient" else kind])
    if kind == "weight gradient":
        weight_gradient(function, arguments)
    else:
        check(function, arguments, beside_torch=False)


EACH = (*KINDS, "weight gradient")
_FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@pytest.mark.parametrize("kind", EACH)
@settings(max_examples=4, **_FEW)
@given(data=st.data())
def test_any_form(kind, data, any_form):
    run(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH)
@settings(max_examples=500, **_FEW)
@given(data=st.data())
def test_any_form_often(kind, data, any_form):
    run(kind, data)
