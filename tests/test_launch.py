"""What a second launch of a plan reuses: the compiled kernel, as long as Triton would choose the same."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from helpers import DEVICE, compare, launches, random
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler import CompiledKernel

import triton_conv as tc
from triton_conv import calls, ops_conv
from triton_conv.kernels import KERNELS, launch, launching
from triton_conv.kernels.arguments import Arguments
from triton_conv.reference import tolerance
from triton_conv.tensors import TensorMeta

FLAT = (1, 1), (1, 1, 1, 1), (1, 1), 4, False, (0, 0), "zeros", "none"


class Compiled:
    """Stands for Triton's function and for what it compiles, and writes down what is called."""

    def __init__(self):
        self.compiled, self.reused = [], []

    def __getitem__(self, grid):
        def first(*tensors, num_warps, num_stages, enable_fp_fusion, **values):
            assert enable_fp_fusion is True
            self.compiled.append((grid, tensors, values, num_warps, num_stages))
            return Reused(self.reused)

        return first


class Reused:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Known(CompiledKernel):
    """The same of a kernel that Triton did compile: all that a launch uses of it."""

    function, packed_metadata, module = "function", "metadata", None

    def __init__(self, run, asked):
        self._run_as, self._asked = run, asked

    @property
    def run(self):
        return lambda *arguments: self._run_as.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments: self._asked.append((grid, arguments))


@pytest.fixture
def stub():
    function = Compiled()
    kernel = replace(KERNELS["depthwise"], function=function)
    return kernel, function, Arguments({"a": 1, "b": "zeros"})


def tensors(dtype=torch.float32, first=0):
    return torch.zeros(64, dtype=dtype)[first:], None, torch.zeros(64, dtype=dtype)


def test_the_second_launch_looks_nothing_up(stub):
    kernel, function, values = stub
    tile, operands = kernel.safe_tile, tensors()
    launches.clear()
    launch(kernel, 3, tile, values, *operands)
    launch(kernel, 3, tile, values, *operands)
    # Another number of programs is no other kernel.
    launch(kernel, 5, tile, values, *operands)
    assert launches == {"depthwise": 3}
    (compiled,) = function.compiled
    assert compiled == ((3, 1, 1), operands, {"a": 1, "b": "zeros"}, tile.num_warps, tile.num_stages)
    assert function.reused == [((grid, 1, 1), (*operands, 1, "zeros")) for grid in (3, 5)]


@pytest.mark.parametrize(
    "other", [tensors(torch.float16), tensors(first=1), (tensors()[0],) * 3], ids=["dtype", "alignment", "presence"]
)
def test_what_triton_compiles_anew_for(stub, other):
    kernel, function, values = stub
    for operands in (tensors(), other, tensors(), other):
        launch(kernel, 3, kernel.safe_tile, values, *operands)
    assert len(function.compiled) == 2 and len(function.reused) == 2
    assert function.compiled[1][1] is not None and len(values.compiled) == 2


def test_another_tile_of_the_same_values(stub):
    kernel, function, values = stub
    for warps in (4, 8, 4):
        launch(kernel, 3, replace(kernel.safe_tile, num_warps=warps), values, *tensors())
    assert [call[3] for call in function.compiled] == [4, 8] and len(function.reused) == 1


def test_other_values_are_compiled_for_themselves(stub):
    kernel, function, values = stub
    for each in (values, Arguments({"a": 2, "b": "zeros"}), values):
        launch(kernel, 3, kernel.safe_tile, each, *tensors())
    assert [call[2]["a"] for call in function.compiled] == [1, 2] and len(function.reused) == 1


def test_memory_that_torch_was_lent_may_begin_anywhere():
    """As through DLPack: such a tensor lies at the begin of its storage, and yet at no multiple of 16 bytes."""
    room = np.zeros(64, dtype=np.uint8)
    own = 16 - room.ctypes.data % 16
    at_16, at_20 = (torch.from_numpy(room[first : first + 16].view(np.float32)) for first in (own, own + 4))
    assert at_20.storage_offset() == 0 and calls.seen(at_16) != calls.seen(at_20)
    assert [TensorMeta.of("input", tensor).aligned for tensor in (at_16, at_20, at_16[1:], at_20[3:])] == [1, 0, 0, 1]


def test_what_has_no_memory_is_judged_by_its_offset():
    found = []

    def look(tensor):
        found.append([TensorMeta.of("input", tensor[first:]).aligned for first in (0, 1, 4)])
        return tensor

    look(torch.empty(8, device="meta"))
    look(FakeTensorMode().from_tensor(torch.empty(8)))
    torch.vmap(look)(torch.empty(2, 8))
    torch.func.functionalize(look)(torch.empty(8))
    assert found == [[True, False, True]] * 4


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_a_product_is_added_in_one_instruction(given, monkeypatch):
    """Asked for at every compilation, or Triton 3.9 warns of it; an environment that says what it wants is obeyed."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    if given is not None:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", given)
    asked = {"enable_fp_fusion": True} if given is None else {}
    assert launching.compiler_options() == asked
    assert launching.compiler_options(4, 2) == {"num_warps": 4, "num_stages": 2} | asked


@pytest.mark.parametrize("told", ["nobody", "a hook", "another hook", "an unknown Triton"])
def test_how_a_compiled_kernel_is_run(stub, told, monkeypatch):
    """Directly, unless somebody is to be told of it."""
    kernel, _, values = stub
    run, asked, operands = [], [], tensors()
    monkeypatch.setattr(Compiled, "__getitem__", lambda self, grid: lambda *tensors, **named: Known(run, asked))
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_stream=lambda device: 7))
    if told.endswith("hook"):
        name = "launch_enter_hook" if told == "a hook" else "launch_exit_hook"
        hooks = triton.knobs.HookChain()
        hooks.add(print)
        monkeypatch.setattr(triton.knobs.runtime, name, hooks)
    elif told != "nobody":
        monkeypatch.setattr(launching, "_KNOWN", False)
    for _ in range(2):
        launch(kernel, 3, kernel.safe_tile, values, *operands)
    if told == "nobody":
        places = (operands[0].data_ptr(), None, operands[2].data_ptr())
        assert run == [(3, 1, 1, 7, "function", "metadata", None, None, None, *places, 1, "zeros")] and not asked
    else:
        assert asked == [((3, 1, 1), (*operands, 1, "zeros"))] and not run


def test_pointers_come_first():
    """A compiled kernel takes its arguments by position."""
    for kernel in KERNELS.values():
        assert kernel.parameters[: len(kernel.pointers)] == kernel.pointers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_plan_again(dtype, conv_precision):
    """Twice each: aligned, moved by one element, and into other memory."""
    conv_precision.fp32_precision = "ieee"
    w, b = random((4, 1, 3, 3), dtype, "weight"), random((4,), dtype, "bias")
    wide = random((2, 4, 9, 10), dtype, "input")
    expected = F.conv2d(wide.double(), w.double(), b.double(), padding=1, groups=4)
    for x in (wide, wide.clone(), torch.empty(wide.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(wide.shape)):
        x = x.copy_(wide)
        for _ in range(2):
            compare(tc.conv2d(x, w, b, padding=1, groups=4), expected, tolerance(dtype, 9))
    plan = ops_conv.plan_conv(wide, w, b, *FLAT)
    assert len(plan.values.compiled) == (0 if plan.target.interpreted else 1)
