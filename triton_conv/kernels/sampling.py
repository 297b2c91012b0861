"""Bilinear samples at offsets: device code of the deformable kernels, and the arguments that all of them take."""

from __future__ import annotations

import triton
import triton.language as tl

from ..problem_deform import DeformProblem


@triton.jit
def tap_group(pixel_ptr, group, stride, mask_pixel, DTYPE: tl.constexpr):
    """One number a pixel, of channel `group` of an offset or mask."""
    return tl.load(pixel_ptr + group * stride, mask=mask_pixel, other=0.0).to(DTYPE)


@triton.jit
def interpolate(position, size, INDEX_INT64: tl.constexpr):
    """Linear interpolation along one axis: two pixels, their weights, and whether each is inside (1.0 or 0.0).

    Pixels are clamped into the image, so that every address is safe; one that was outside has weight zero. Where the
    second pixel's weight grows with the position by 1, the first one's falls by 1: its slope where it is inside.
    """
    # Two pixels outside, neither is inside: clamping there keeps the conversion to integers defined.
    position = tl.minimum(tl.maximum(position, -2.0), size)
    floor = tl.floor(position)
    part = position - floor
    low = floor.to(tl.int32)
    if INDEX_INT64:
        low = low.to(tl.int64)
    high = low + 1
    low_inside = ((low >= 0) & (low < size)).to(position.dtype)
    high_inside = ((high >= 0) & (high < size)).to(position.dtype)
    low = tl.minimum(tl.maximum(low, 0), size - 1)
    high = tl.minimum(tl.maximum(high, 0), size - 1)
    return low, high, low_inside * (1.0 - part), high_inside * part, low_inside, high_inside


@triton.jit
def corner_rows(image_row, y0, y1, x0, x1, stride_h, stride_w, VECTOR: tl.constexpr):
    """Offsets of the four corners from a tile's base, in the order 00, 01, 10, 11 of (y, x)."""
    row00 = tl.multiple_of(image_row + y0 * stride_h + x0 * stride_w, VECTOR)
    row01 = tl.multiple_of(image_row + y0 * stride_h + x1 * stride_w, VECTOR)
    row10 = tl.multiple_of(image_row + y1 * stride_h + x0 * stride_w, VECTOR)
    row11 = tl.multiple_of(image_row + y1 * stride_h + x1 * stride_w, VECTOR)
    return row00, row01, row10, row11


@triton.jit
def along_pixels(values, PIXELS_LAST: tl.constexpr):
    """One value a pixel, to broadcast over a [pixels, channels] tile, or a [channels, pixels] one for NCHW."""
    if PIXELS_LAST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def corner_tile(x_base, row, column, mask_channel, PIXELS_LAST: tl.constexpr):
    """The input at one corner: a [pixels, channels] tile, or its transpose for NCHW."""
    if PIXELS_LAST:
        return tl.load(x_base + column[:, None] + row[None, :], mask=mask_channel[:, None], other=0.0)
    else:
        return tl.load(x_base + row[:, None] + column[None, :], mask=mask_channel[None, :], other=0.0)


@triton.jit
def gather(x_base, row, column, weight, mask_channel, PIXELS_LAST: tl.constexpr):
    """weight times the input at one corner."""
    tile = corner_tile(x_base, row, column, mask_channel, PIXELS_LAST)
    return tile.to(weight.dtype) * along_pixels(weight, PIXELS_LAST)


@triton.jit
def bilinear(x_base, row00, row01, row10, row11, column, up, down, left, right, mask_channel,
             PIXELS_LAST: tl.constexpr):  # fmt: skip
    """Samples blended of their four corners: a [pixels, channels] tile, or its transpose for NCHW."""
    tile = gather(x_base, row00, column, up * left, mask_channel, PIXELS_LAST)
    tile += gather(x_base, row01, column, up * right, mask_channel, PIXELS_LAST)
    tile += gather(x_base, row10, column, down * left, mask_channel, PIXELS_LAST)
    tile += gather(x_base, row11, column, down * right, mask_channel, PIXELS_LAST)
    return tile


def sampling_arguments(problem: DeformProblem) -> dict[str, object]:
    """The further arguments of every kernel that samples at offsets."""
    g = problem.geometry
    arguments: dict[str, object] = dict(
        c_in_group=g.c_in_group,
        c_out_group=g.c_out_group,
        groups=g.groups,
        segment=problem.segment,
        segments=g.c_in_group // problem.segment,
        channels_per_offset=g.c_in // problem.offset_groups,
        offset_groups=problem.offset_groups,
        HAS_MASK=problem.has_mask,
    )
    for prefix, strides in (("o", problem.offset_strides), ("m", problem.mask_strides or (0, 0, 0, 0))):
        arguments |= {f"stride_{prefix}{axis}": s for axis, s in zip("nchw", strides, strict=True)}
    return arguments
