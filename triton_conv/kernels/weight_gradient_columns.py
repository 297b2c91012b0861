"""Weight gradient of a convolution in NCHW, rank 1 to 3: channels and taps in one axis, as the weight is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem, vector_of
from ..target import Target
from .arguments import geometry_arguments
from .common import aligned, below, dot, load_turned, next_tile, tile_digits, tile_pixels, wide
from .kernel import Kernel, ProductTile, cdiv
from .row_vectors import no_pixel_gradient, y_vector
from .staging import Operand, partial_bytes, staged_bytes
from .windows import side_by_side

# Neighbouring columns of the product that a thread writes to shared memory at once, and pixels of a warp's load. A step
# of one load alone is turned in shared memory, where a thread then writes each element for itself.
_TOGETHER = 8
_LANES = 32
# Rows, columns and planes of a filter are bits of one word.
_MOST_BITS = 30


@triton.jit
def column_places(
    first_n, columns, stride_xc, stride_xd, stride_xh, stride_xw, RANK: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, INDEX_INT64: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where columns read, from where their output's corner lies: every TOGETHER-th column from each of the first
    TOGETHER on; and the bits of their taps, a set one for each axis. What lies past the last column reads as that does.
    """
    places = ()
    bits = ()
    for i in tl.static_range(TOGETHER):
        column = tl.minimum(first_n + tl.arange(0, BLOCK_N // TOGETHER) * TOGETHER + i, columns - 1).to(tl.uint32)
        channel = (column // (KD * KH * KW)).to(tl.int64 if INDEX_INT64 else tl.int32)
        tap_w = (column % KW).to(tl.int32)
        place = channel * stride_xc + (tap_w * DIL_W - PAD_W) * stride_xw
        bit = 1 << tap_w
        if RANK >= 2:
            tap_h = (column // KW % KH).to(tl.int32)
            place += (tap_h * DIL_H - PAD_H) * stride_xh
            bit |= 1 << (KW + tap_h)
        if RANK >= 3:
            tap_d = (column // (KW * KH) % KD).to(tl.int32)
            place += (tap_d * DIL_D - PAD_D) * stride_xd
            bit |= 1 << (KW + KH + tap_d)
        places = places + (place,)  # type: ignore[assignment]
        bits = bits + (bit,)  # type: ignore[assignment]
    return places, bits


@triton.jit
def taps_outside(corner, size, TAPS: tl.constexpr, DIL: tl.constexpr):
    """The bits of the taps of an axis that lie in the padding, from these corners on."""
    first = tl.minimum((tl.maximum(-corner, 0) + (DIL - 1)) // DIL, TAPS).to(tl.int32)
    end = tl.minimum((tl.maximum(size - corner, 0) + (DIL - 1)) // DIL, TAPS).to(tl.int32)
    return ((1 << TAPS) - 1) - ((1 << end) - (1 << first))


@triton.jit
def put_together(found, COUNT: tl.constexpr, TOGETHER: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """The tiles of PARTS runs of LANES pixels and of every TOGETHER-th column as one: [PARTS LANES, COUNT TOGETHER]."""
    tile = tl.reshape(side_by_side(found, 0, 1, PARTS * TOGETHER), (LANES, COUNT, PARTS, TOGETHER))
    return tl.reshape(tl.permute(tile, (2, 0, 1, 3)), (PARTS * LANES, COUNT * TOGETHER))


@triton.jit
def gathered_columns(
    x_group, pixels, digits, places, bits, batch, d_in, h_in, w_in, d_out, h_out, w_out,
    stride_xn, stride_xd, stride_xh, stride_xw,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PADDED: tl.constexpr, TOGETHER: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the columns read of a step's pixels, [BLOCK_K, BLOCK_N], and the pixels after those."""
    first, rest, image, d, h, w, live = pixels
    found = ()
    for _ in tl.static_range(BLOCK_K // LANES):
        corner = image * stride_xn + w * STRIDE_W * stride_xw
        if RANK >= 2:
            corner += h * STRIDE_H * stride_xh
        if RANK >= 3:
            corner += d * STRIDE_D * stride_xd
        # As integers: of what is reshaped last, the compiler would rather reshape shared memory, and fails.
        x_base = (x_group + first * stride_xn).to(tl.pointer_type(tl.int16), bitcast=True)
        if PADDED:
            outside = taps_outside(w * STRIDE_W - PAD_W, w_in, KW, DIL_W)
            if RANK >= 2:
                outside |= taps_outside(h * STRIDE_H - PAD_H, h_in, KH, DIL_H) << KW
            if RANK >= 3:
                outside |= taps_outside(d * STRIDE_D - PAD_D, d_in, KD, DIL_D) << (KW + KH)
            outside = tl.where(live, outside, -1)
        for i in tl.static_range(TOGETHER):
            pointers = x_base + (corner[:, None] + places[i][None, :])
            if PADDED:
                inside = (outside[:, None] & bits[i][None, :]) == 0
            else:
                inside = tl.broadcast_to(live[:, None], (LANES, BLOCK_N // TOGETHER))
            found = found + (load_turned(pointers, inside, True),)  # type: ignore[assignment]
        first, rest, image, d, h, w, live = next_tile(
            digits, first, rest, image, d, h, w, batch, d_out, h_out, w_out, RANK
        )
    tile = put_together(found, BLOCK_N // TOGETHER, TOGETHER, LANES, BLOCK_K // LANES)
    return tile.to(x_group.dtype.element_ty, bitcast=True), (first, rest, image, d, h, w, live)


@triton.jit
def gathered_rows(
    y_group, pixels, digits, places, batch, in_image, stride_yn,
    TOGETHER: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of the output's gradient, where its pixels are not aligned: [BLOCK_M, BLOCK_K]."""
    first, rest, image, d, h, pixel, live = pixels
    found = ()
    for _ in tl.static_range(BLOCK_K // LANES):
        corner = image * stride_yn + pixel
        y_base = (y_group + first * stride_yn).to(tl.pointer_type(tl.int16), bitcast=True)
        for i in tl.static_range(TOGETHER):
            inside = tl.broadcast_to(live[:, None], (LANES, BLOCK_M // TOGETHER))
            loaded = load_turned(y_base + (corner[:, None] + places[i][None, :]), inside, True)
            found = found + (loaded,)  # type: ignore[assignment]
        first, rest, image, d, h, pixel, live = next_tile(
            digits, first, rest, image, d, h, pixel, batch, 1, 1, in_image, 1
        )
    tile = put_together(found, BLOCK_M // TOGETHER, TOGETHER, LANES, BLOCK_K // LANES)
    return tl.trans(tile.to(y_group.dtype.element_ty, bitcast=True)), (first, rest, image, d, h, pixel, live)


@triton.jit
def weight_gradient_columns_kernel(
    x_ptr, dy_ptr, dw_ptr,
    batch, c_in_group, c_out_group, d_in, h_in, w_in, d_out, h_out, w_out, groups,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_yn, stride_yc,
    RANK: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr,
    PADDED: tl.constexpr, TOGETHER: tl.constexpr, LANES: tl.constexpr, Y_VECTOR: tl.constexpr, W_VECTOR: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[split, o, column] = sum over the split's pixels m of dy[o, m] x_column[m].

    M runs over the output channels of a group, N over pairs of one of its input channels and a tap, in the order in
    which the weight is stored, K over pixels. What a column reads for a pixel lies at the sum of a number of the column
    and one of the pixel: an addition and a load of two bytes an element, from L1 but for the first tap of a channel.
    Lanes of a warp are neighbouring pixels, so that a load touches few sectors and a column's number is the warp's; a
    thread holds eight neighbouring columns, which go to shared memory at once. Whether a tap is in the padding is one
    bit of the pixel and of the tap. A result's row is written in whole vectors.

    Partial sums are float32; the caller adds them up in a fixed order. Grid: one axis of SPLITS x groups x
    cdiv(c_out_group, BLOCK_M) x tiles of N, N fastest: those share dy. The backward filter convolution of cuDNN
    (Chetlur et al. 2014, arXiv:1410.0759).
    """
    columns = c_in_group * (KD * KH * KW)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles_m = tl.cdiv(c_out_group, BLOCK_M)
    pid = tl.program_id(0)
    first_n = pid % tiles_n * BLOCK_N
    pid_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m % groups
    split = pid // tiles_n // tiles_m // groups
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < c_out_group
    if INDEX_INT64:
        offs_m = offs_m.to(tl.int64)
        # A tap's offset is a product of scalars.
        stride_xd, stride_xh, stride_xw = wide(stride_xd), wide(stride_xh), wide(stride_xw)
    x_group = x_ptr + tl.cast(group * c_in_group, tl.int64) * stride_xc
    y_group = dy_ptr + aligned(tl.cast(group * c_out_group, tl.int64) * stride_yc, Y_VECTOR)
    filter_offset = tl.multiple_of(offs_m * stride_yc, Y_VECTOR)
    places, bits = column_places(
        first_n, columns, stride_xc, stride_xd, stride_xh, stride_xw, RANK, KD, KH, KW, PAD_D, PAD_H, PAD_W,
        DIL_D, DIL_H, DIL_W, INDEX_INT64, TOGETHER, BLOCK_N,
    )  # fmt: skip

    in_image = d_out * h_out * w_out
    blocks = tl.cdiv(tl.cast(batch, tl.int64) * in_image, SPLITS * BLOCK_K).to(tl.int32)
    block = split * blocks
    first, image, d, h, w, live = tile_pixels(
        block * (BLOCK_K // LANES), batch, d_out, h_out, w_out, RANK, INDEX_INT64, LANES
    )
    rest = (tl.cast(block, tl.int64) * BLOCK_K - first * in_image).to(w.dtype)
    pixels = (first, rest, image, d, h, w, live)
    digits = tile_digits(d_out, h_out, w_out, RANK, LANES)
    # Images of the output's gradient are one run of pixels each.
    RUN: tl.constexpr = LANES if Y_VECTOR == 1 else BLOCK_K
    y_first, y_image, y_d, y_h, pixel, y_live = tile_pixels(
        block * (BLOCK_K // RUN), batch, 1, 1, in_image, 1, INDEX_INT64, RUN
    )
    y_rest = (tl.cast(block, tl.int64) * BLOCK_K - y_first * in_image).to(pixel.dtype)
    y_digits = tile_digits(1, 1, in_image, 1, RUN)
    y_pixels = (y_first, y_rest, y_image, y_d, y_h, pixel, y_live)

    if Y_VECTOR == 1:
        rows = ()
        for i in tl.static_range(TOGETHER):
            row = tl.minimum(pid_m * BLOCK_M + tl.arange(0, BLOCK_M // TOGETHER) * TOGETHER + i, c_out_group - 1)
            rows = rows + (row.to(offs_m.dtype) * stride_yc,)  # type: ignore[assignment]
        y_next, y_pixels = gathered_rows(
            y_group, y_pixels, y_digits, rows, batch, in_image, stride_yn, TOGETHER, LANES, BLOCK_M, BLOCK_K
        )
    x_next, pixels = gathered_columns(
        x_group, pixels, digits, places, bits, batch, d_in, h_in, w_in, d_out, h_out, w_out,
        stride_xn, stride_xd, stride_xh, stride_xw, RANK, KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W,
        PAD_D, PAD_H, PAD_W, DIL_D, DIL_H, DIL_W, PADDED, TOGETHER, LANES, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for _ in range(tl.maximum(blocks, 1)):
        x_tile = x_next
        if Y_VECTOR == 1:
            y_tile = y_next
            y_next, y_pixels = gathered_rows(
                y_group, y_pixels, y_digits, rows, batch, in_image, stride_yn, TOGETHER, LANES, BLOCK_M, BLOCK_K
            )
        else:
            y_first, y_rest, y_image, y_d, y_h, pixel, y_live = y_pixels
            y_place = tl.max_contiguous(tl.multiple_of(y_image * stride_yn + pixel, Y_VECTOR), Y_VECTOR)
            y_tile = tl.load(
                y_group + y_first * stride_yn + filter_offset[:, None] + y_place[None, :],
                # Said anew, since of what a loop carries the compiler knows nothing.
                mask=mask_m[:, None] & tl.max_constancy(y_first + y_image < batch, Y_VECTOR)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            y_pixels = next_tile(y_digits, y_first, y_rest, y_image, y_d, y_h, pixel, batch, 1, 1, in_image, 1)
        # Loads into registers that no stage carries: asked for before a step's products, used after them.
        x_next, pixels = gathered_columns(
            x_group, pixels, digits, places, bits, batch, d_in, h_in, w_in, d_out, h_out, w_out,
            stride_xn, stride_xd, stride_xh, stride_xw, RANK, KD, KH, KW, STRIDE_D, STRIDE_H, STRIDE_W,
            PAD_D, PAD_H, PAD_W, DIL_D, DIL_H, DIL_W, PADDED, TOGETHER, LANES, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(y_tile, x_tile, acc, PRECISION)

    column = first_n + tl.arange(0, BLOCK_N)
    out_row = (tl.cast(split, tl.int64) * groups + group) * c_out_group + offs_m
    tl.store(
        dw_ptr + out_row[:, None] * aligned(columns, W_VECTOR) + column[None, :],
        acc,
        mask=mask_m[:, None] & below(column, columns, W_VECTOR)[None, :],
    )


@dataclass(frozen=True)
class WeightGradientColumnsTile(ProductTile):
    """BLOCK_M output channels by BLOCK_N pairs of an input channel and a tap, BLOCK_K pixels a step, SPLITS partial
    sums."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "SPLITS"})

    BLOCK_K: int = 64
    SPLITS: int = 1

    def mismatch(self, problem: Problem) -> str | None:
        if self.BLOCK_K < _LANES:
            return f"a warp reads {_LANES} pixels, more than {self.BLOCK_K}"
        if self.BLOCK_N < 16:
            return f"a product has no {self.BLOCK_N} columns"
        return None

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        itemsize = problem.itemsize
        operands = [
            Operand(self.BLOCK_M * self.BLOCK_K * itemsize, y_vector(problem) * itemsize),
            # Gathered into registers.
            Operand(self.BLOCK_N * self.BLOCK_K * itemsize, 0),
        ]
        sums = self.BLOCK_M * self.BLOCK_N, partial_bytes(problem, target)
        return staged_bytes(operands, self.BLOCK_M, self.num_warps, self.num_stages, sums, target)


def _grid(problem: Problem, tile: WeightGradientColumnsTile) -> int:
    g = problem.geometry
    return cdiv(g.c_in_group * g.taps, tile.BLOCK_N) * cdiv(g.c_out_group, tile.BLOCK_M) * g.groups * tile.SPLITS


def padded(problem: Problem) -> bool:
    """Whether a tap of any output lies outside the input."""
    g = problem.geometry
    axes = zip(g.in_size, g.out_size, g.kernel, g.stride, g.pad_before, g.dilation, strict=True)
    return any(
        pad > 0 or (out - 1) * stride - pad + (taps - 1) * dilation >= size
        for size, out, taps, stride, pad, dilation in axes
    )


def _arguments(problem: Problem, tile: WeightGradientColumnsTile) -> dict[str, object]:
    g = problem.geometry
    return (
        geometry_arguments(problem, tile.BLOCK_K)
        | tile.sizes()
        | dict(
            c_in_group=g.c_in_group,
            c_out_group=g.c_out_group,
            groups=g.groups,
            PADDED=padded(problem),
            TOGETHER=_TOGETHER,
            LANES=_LANES,
            Y_VECTOR=y_vector(problem),
            W_VECTOR=vector_of(g.c_in_group * g.taps),
        )
    )


def _unsuited(problem: Problem) -> str | None:
    if reason := no_pixel_gradient(problem):
        return reason
    many = sum(problem.geometry.kernel) > _MOST_BITS
    return f"its filter is more than {_MOST_BITS} taps long, all axes together" if many else None


KERNEL = Kernel(
    name="weight_gradient_columns",
    function=weight_gradient_columns_kernel,
    tile_type=WeightGradientColumnsTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=WeightGradientColumnsTile(num_warps=4, num_stages=1, BLOCK_M=64, BLOCK_N=16, BLOCK_K=32),
    pointers=("x_ptr", "dy_ptr", "dw_ptr"),
)
