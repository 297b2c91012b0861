"""The check of a form's first use: the small problem that it takes, and the comparison with float64."""

from dataclasses import replace

import pytest
import test_first_use
import torch
from helpers import INTERPRETED
from test_first_use import CPU, problem

from triton_conv import dispatch, first_use, target
from triton_conv.reference import rounding
from triton_conv.workloads import FLAGSHIPS, INPUT_GRADIENT, LECTURES, Workload

home = test_first_use.home


def of_the_lectures():
    """Problems of theirs that have more than one form, in their formats and with their borders and epilogues."""
    window, few = {"padding": ((1, 0), (0, 2)), "groups": 2}, (2, 4, 5, 11)
    unshared = {
        "unshared": Workload("l", "local", "locally_connected2d", few, (4, 11, 4, 2, 3, 3), window),
        # From eight images on they are read innermost.
        "images": Workload("l", "local", "locally_connected2d", (9, *few[1:]), (4, 11, 4, 2, 3, 3), window),
        "row": Workload("l", "local", "locally_connected1d", (3, 2, 9), (9, 3, 2, 3), {"padding": 1}),
    }
    for name, layer in unshared.items():
        yield pytest.param(replace(layer, part=INPUT_GRADIENT).problem(), id=name)
    pair = Workload(
        "s", "separable", "separable_conv2d", (2, 16, 9, 12), (16, 1, 3, 3), {"padding": 1, "stride": 2}, pointwise=24,
        channels_last=True,
    )  # fmt: skip
    yield pytest.param(pair.problem(), id="separable")
    epilogues = {"activation": "silu", "mid_activation": "relu"}
    full = replace(pair.problem(), has_bias=True, has_mid_bias=True, **epilogues)
    yield pytest.param(full, id="separable-epilogues")


def small_ones():
    wanted = {
        "narrow_groups_4", "causal_dw1d", "mobile_dw5s2", "convnext_dw7", "dw3d", "dilated_d4", "decoder_t2d",
        "vocoder_t1d_s2",
    }  # fmt: skip
    for workload in FLAGSHIPS:
        if workload.name in wanted:
            for part in workload.shrunk().parts():
                slow = workload.name in ("dw3d", "mobile_dw5s2")
                yield pytest.param(part.problem(), id=part.title, marks=pytest.mark.slow if slow else ())
    folded = {"padding": 1, "padding_mode": "reflect", "activation": "gelu"}
    yield pytest.param(
        Workload("folded", "dense", "conv2d", (2, 16, 6, 7), (8, 16, 3, 3), folded, bias=True).problem(), id="folded"
    )
    lopsided = Workload(
        "lopsided", "dense", "conv2d", (2, 4, 9, 8), (8, 4, 3, 3), {"padding": ((2, 0), (0, 1)), "stride": 2}
    )
    for part in lopsided.parts():
        yield pytest.param(part.problem(), id=part.title)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs every form")
@pytest.mark.parametrize("what", [*small_ones(), *of_the_lectures()])
def test_every_form_agrees_with_float64(what):
    suited, notes = dispatch.forms(what, target.INTERPRETER)
    for kernel in suited:
        made = dispatch.plan(what, target.INTERPRETER, kernel.name)
        assert first_use.difference(made, CPU) <= rounding(what), kernel.name
    assert len(suited) > 1 or "lectures" not in type(what).__module__, notes


@pytest.mark.parametrize("workload", [w for w in LECTURES if w.kind in ("separable", "local")], ids=lambda w: w.title)
def test_a_small_problem_of_the_lectures_is_alike(workload):
    full = (workload if workload.pointwise else replace(workload, part=INPUT_GRADIENT)).problem()
    made = first_use.small(full)
    assert type(made) is type(full)
    assert made.geometry.flops <= full.geometry.flops / 20
    assert (made.pixels_last, made.x_strides.index(1), made.y_strides.index(1)) == (
        full.pixels_last, full.x_strides.index(1), full.y_strides.index(1),
    )  # fmt: skip
    for kernel in dispatch.forms(full, target.KNOWN["sm_90"])[0]:
        assert kernel.unsuited(made) is None
        assert first_use._fitting(dispatch.plan(full, target.KNOWN["sm_90"], kernel.name), made) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "workload", [w for w in FLAGSHIPS + LECTURES if w.kind not in ("deformable", "shuffle")], ids=lambda w: w.title
)
def test_on_a_gpu_every_form_agrees_in_time(workload):
    device = torch.device("cuda")
    here = target.of_device(device)
    for part in workload.parts():
        what = part.problem()
        plain = dispatch.family(what)[0][-1]
        for kernel in dispatch.forms(what, here)[0]:
            if kernel.name == plain:
                continue
            made = replace(dispatch.plan(what, here, kernel.name), pending=True)
            found = [first_use._check(made, device) for _ in range(2)]
            assert found[0] is not None, kernel.name
            assert found[0].right, (kernel.name, str(found[0]))
            # Compiled by then.
            assert found[1].seconds <= 0.2, kernel.name


@pytest.mark.skipif(not INTERPRETED, reason="it runs in the interpreter")
@pytest.mark.parametrize(
    "spoil", [lambda y: y.add_(0.1), lambda y: y[..., -1].fill_(float("nan"))], ids=["off", "unwritten"]
)
def test_a_wrong_kernel_is_told_from_rounding(monkeypatch, spoil):
    real = first_use.launch

    def wrong(kernel, grid, tile, values, *tensors):
        real(kernel, grid, tile, values, *tensors)
        spoil(tensors[-1])

    made = dispatch.plan(problem(), target.INTERPRETER)
    right = first_use.difference(made, CPU)
    monkeypatch.setattr(first_use, "launch", wrong)
    assert right < 0.004 < 0.05 < first_use.difference(made, CPU)


@pytest.mark.parametrize("workload", [w for w in FLAGSHIPS if w.kind != "deformable"], ids=lambda w: w.name)
def test_the_small_problem_is_small_and_alike(workload):
    full = workload.problem()
    made = first_use.small(full)
    g, h = full.geometry, made.geometry
    assert made.geometry.flops / 2 <= 2 * first_use._WORK
    assert (h.kernel, h.stride, h.dilation, h.padding, h.transposed) == (
        g.kernel,
        g.stride,
        g.dilation,
        g.padding,
        g.transposed,
    )
    assert made.pixels_last == full.pixels_last
    assert made.x_vector(h.c_in) == full.x_vector(g.c_in)
    assert made.x_run() == full.x_run()
    for kernel in dispatch.forms(full, target.KNOWN["sm_90"])[0]:
        assert kernel.unsuited(made) is None
