"""The second pass of a split weight gradient: adds partial sums up and rounds; no kernel of a problem of its own."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from .arguments import Arguments
from .common import narrow
from .kernel import cdiv
from .launching import start_kernel

# Numbers that a program reads at once: 32 a thread.
_BLOCK = 4096


@triton.jit
def sum_partials_kernel(
    partial_ptr, dw_ptr, parts, rows, columns, taps,
    stride_pc, stride_pt, stride_wc, stride_wt,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dw[o, c, tap] = sum over s of partial[s, o, c, tap], in one order, whatever order the programs ran in.

    partial: [parts, rows, columns, taps] in float32 (float64 for float64), dw: [rows, columns, taps] in the weight's
    dtype, each with its taps or its columns innermost.

    Grid: one axis of rows x tiles of BLOCK_T taps x tiles of BLOCK_C columns, columns fastest. BLOCK_S parts are read
    at once: one after the other they would cost as many trips to memory.
    """
    tiles_c = tl.cdiv(columns, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    c = (tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    tiles_t = tl.cdiv(taps, BLOCK_T)
    row = (tile // tiles_t).to(tl.int64)
    tap = tl.arange(0, BLOCK_T)[None, :]
    if BLOCK_T > 1:
        # Known to be zero where there is one tap: neighbouring columns are then read 16 bytes at a time.
        tap += tile % tiles_t * BLOCK_T
    mask = (c < columns) & (tap < taps)
    size = tl.cast(columns, tl.int64) * taps
    place = partial_ptr + row * size + (c * stride_pc + tap * stride_pt)[None, :, :]
    total = tl.zeros((BLOCK_C, BLOCK_T), dtype=partial_ptr.dtype.element_ty)
    for step in range(tl.cdiv(parts, BLOCK_S)):
        s = step * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]
        loaded = tl.load(place + s * (size * rows), mask=(s < parts) & mask[None, :, :], other=0.0)
        total += tl.sum(loaded, axis=0)  # [BLOCK_S, BLOCK_C, BLOCK_T] -> [BLOCK_C, BLOCK_T]
    dw = dw_ptr + row * size + c * stride_wc + tap * stride_wt
    tl.store(dw, narrow(total, dw_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial: torch.Tensor, result: torch.Tensor) -> None:
    """Writes the sum of `(parts, rows, columns, *kernel)` over the parts into `(rows, columns, *kernel)`; each part and
    the result are dense in one of torch's memory formats.
    """
    launch = _launch_of(partial.shape, partial.stride(2) == 1, result.stride(1) == 1)
    start_kernel(sum_partials_kernel, *launch, (partial, result))


@functools.lru_cache(maxsize=1024)
def _launch_of(shape: tuple[int, ...], *columns_last: bool) -> tuple[tuple[int, int, int], Arguments]:
    """Grid and arguments of the kernel for partial sums of this shape; of them and of the result, whether columns are
    innermost.
    """
    parts, rows, columns = shape[:3]
    taps = math.prod(shape[3:])
    inner = [(1, columns) if last else (taps, 1) for last in columns_last]
    if columns == 1 or taps == 1 or inner[0] == inner[1]:
        # The same order on both sides: one run, of as many rows as 32-bit indices ask for.
        size = rows * columns * taps
        rows, columns, taps = (1, size, 1) if size < 2**31 else (rows, columns * taps, 1)
        inner = [(1, 1), (1, 1)]
    block_s, block_t = min(triton.next_power_of_2(parts), 64), min(triton.next_power_of_2(taps), 64)
    block_c = min(triton.next_power_of_2(columns), max(_BLOCK // (block_s * block_t), 1))
    (stride_pc, stride_pt), (stride_wc, stride_wt) = inner
    sizes = dict(
        parts=parts, rows=rows, columns=columns, taps=taps,
        stride_pc=stride_pc, stride_pt=stride_pt, stride_wc=stride_wc, stride_wt=stride_wt,
        BLOCK_S=block_s, BLOCK_C=block_c, BLOCK_T=block_t,
    )  # fmt: skip
    return (rows * cdiv(taps, block_t) * cdiv(columns, block_c), 1, 1), Arguments(sizes)
