"""What the tests change in Triton's interpreter: its functions are looked up once, and integers do not overflow."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import INTERPRETED
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="nothing is interpreted")


@triton.jit
def times(x, FACTOR: tl.constexpr):
    # A device function, which calls another, of Triton's.
    return (x + tl.zeros_like(x)) * FACTOR


@triton.jit
def times_kernel(x_ptr, FACTOR: tl.constexpr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + at, times(tl.load(x_ptr + at), FACTOR))


def multiplied(values, factor):
    times_kernel[(values.numel() // 4,)](values, factor)
    # A launch leaves `tl` as it was.
    assert tl.core.is_builtin(tl.load)
    return values


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64], ids=str)
def test_functions_are_looked_up_once_a_launch(dtype, monkeypatch):
    looked, look_up = [], interpreter._patch_builtin

    def noted(of, *arguments):
        looked.append(of)
        return look_up(of, *arguments)

    values = torch.arange(12, dtype=dtype)
    expected = values * 3
    multiplied(values[:4], 3)
    monkeypatch.setattr(interpreter, "_patch_builtin", noted)
    multiplied(values[4:], 3)
    assert torch.equal(values, expected)
    # `tl`, its tensors, its mathematics and its descriptors.
    assert len(looked) == 4


@pytest.mark.smoke
@pytest.mark.parametrize("large", [2**30, -(2**30)])
def test_an_integer_that_overflows(large):
    assert multiplied(torch.full((4,), large // 2, dtype=torch.int32), 2).eq(large).all()
    assert multiplied(torch.full((4,), large, dtype=torch.int64), 4).eq(4 * large).all()
    with pytest.raises(InterpreterError, match=f"int32 overflows in mul: {4 * large} to {4 * large}"):
        multiplied(torch.full((4,), large, dtype=torch.int32), 4)
    assert tl.core.is_builtin(tl.load)
