"""Device code that kernels of all kinds share: the product, the epilogue, pixels of a tile, where a tap of one lies."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Along which dimension neighbouring threads read a tile when neither is known to be contiguous: the last one, but the
# first one before Triton 3.7. Against the memory's order a warp touches 32 sectors for 64 bytes.
LAST_IS_FASTEST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b.

    The interpreter multiplies the raw 16-bit patterns of bfloat16 (triton issue 11584), so there, and only there, the
    operands are widened first. That is exact: float32 holds every product of two bfloat16 numbers.
    """
    if INTERPRETED:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in the dtype of storage, rounded to nearest.

    The interpreter cuts bfloat16's lower bits off and mistakes numbers below its normal range. There the float32's bits
    are rounded, ties to even, and their upper half is the result.
    """
    if INTERPRETED:
        if tl.bfloat16 == DTYPE:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
            return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x in the dtype of accumulation.

    bfloat16 is moved as bits, of which the compiler then makes one instruction an element; of a conversion one and a
    half (3 x 3 depthwise: 17.4 instead of 18.3 instructions an output).
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The fused activation; NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def wide(stride):
    """A stride as a 64-bit scalar, so that its products are too."""
    return tl.cast(stride, tl.int64)


@triton.jit
def decode_pixel(m, d_size, h_size, w_size, RANK: tl.constexpr):
    """Flattened pixel -> (image, depth, height, width); ranks below 3 divide less."""
    w = m % w_size
    m = m // w_size
    h = tl.zeros_like(m)
    d = tl.zeros_like(m)
    if RANK >= 2:
        h = m % h_size
        m = m // h_size
    if RANK >= 3:
        d = m % d_size
        m = m // d_size
    return m, d, h, w


@triton.jit
def tile_pixels(
    pid_m, batch, d_size, h_size, w_size,
    RANK: tl.constexpr, INDEX_INT64: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr = 1,
):  # fmt: skip
    """The pixels of tile `pid_m` of a batch of images: (first image, images from there, depth, height, width, mask).

    Each of the BLOCK_M pixels stands LANES times side by side.

    Offsets start from the first image's 64-bit base, so that 32 bits are enough inside the tile; where they are not,
    INDEX_INT64 makes every index 64-bit.
    """
    if INDEX_INT64:
        pid_m = pid_m.to(tl.int64)
        d_size = tl.cast(d_size, tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M * LANES) // LANES
    image, d, h, w = decode_pixel(offs_m, d_size, h_size, w_size, RANK)
    mask_m = image < batch
    first = pid_m * BLOCK_M // (d_size * h_size * w_size)
    return first.to(tl.int64), image - first, d, h, w, mask_m


@triton.jit
def tile_digits(d_size, h_size, w_size, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M pixels as (images, rest of an image, depths, rows, columns): what `next_tile` moves on by."""
    size = d_size * h_size * w_size
    by_h = 0
    by_d = 0
    if RANK >= 2:
        by_h = BLOCK_M // w_size % h_size
    if RANK >= 3:
        by_d = BLOCK_M // w_size // h_size % d_size
    return (BLOCK_M // size, BLOCK_M % size, by_d, by_h, BLOCK_M % w_size)


@triton.jit
def next_tile(digits, first, rest, image, d, h, w, batch, d_size, h_size, w_size, RANK: tl.constexpr):
    """The pixels of the next tile after those that `tile_pixels` gave; `rest` is the first one's place in its image.

    Counted up, digit by digit, each of which carries at most one: dividing a pixel's number by sizes known at run time
    takes some twenty instructions a division, for every row of a tile that a thread holds (the packed weight gradient's
    loop has 407 with them, 238 without).
    """
    size = d_size * h_size * w_size
    rest += digits[1]
    moved = rest >= size
    rest = tl.where(moved, rest - size, rest)
    w += digits[4]
    carry = w >= w_size
    w = tl.where(carry, w - w_size, w)
    if RANK >= 2:
        h += digits[3] + carry.to(h.dtype)
        carry = h >= h_size
        h = tl.where(carry, h - h_size, h)
    if RANK >= 3:
        d += digits[2] + carry.to(d.dtype)
        carry = d >= d_size
        d = tl.where(carry, d - d_size, d)
    # Counted from the first image, which moved on itself.
    image += carry.to(image.dtype) - moved.to(image.dtype)
    first += digits[0] + moved.to(tl.int64)
    return first, rest, image, d, h, w, first + image < batch


@triton.jit
def fold(i, size, PADDING_MODE: tl.constexpr):
    """Index map of a border that is not zero: where in the input the element at padded position `i` lies."""
    if PADDING_MODE == "reflect":
        i = tl.abs(i)
        i = (size - 1) - tl.abs(size - 1 - i)
    elif PADDING_MODE == "replicate":
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    elif PADDING_MODE == "circular":
        i = tl.where(i < 0, i + size, i)
        i = tl.where(i >= size, i - size, i)
    return i


@triton.jit
def tap_offset(
    pixel_offset, d0, h0, w0, dd, dh, dw, d_in, h_in, w_in, stride_xd, stride_xh, stride_xw,
    PADDING_MODE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Where the tap at (dd, dh, dw) from corner (d0, h0, w0) lies, from the image's base, and whether it is inside.

    `pixel_offset` is the corner's own offset, computed once a program: zero padding then adds one scalar a tap. A
    folded border needs the whole sum anew, but no mask: every folded index is inside.
    """
    if PADDING_MODE == "zeros":
        offset = pixel_offset + (dd * stride_xd + dh * stride_xh + dw * stride_xw)
        inside = (w0 + dw >= 0) & (w0 + dw < w_in)
        if RANK >= 2:
            inside = inside & (h0 + dh >= 0) & (h0 + dh < h_in)
        if RANK >= 3:
            inside = inside & (d0 + dd >= 0) & (d0 + dd < d_in)
    else:
        offset = fold(w0 + dw, w_in, PADDING_MODE) * stride_xw
        if RANK >= 2:
            offset += fold(h0 + dh, h_in, PADDING_MODE) * stride_xh
        if RANK >= 3:
            offset += fold(d0 + dd, d_in, PADDING_MODE) * stride_xd
        inside = (w0 + dw) == (w0 + dw)
    return offset, inside


@triton.jit
def accumulate_tap(
    acc, x_base, w_base, image_offset, pixel_offset, channel_in, mask_m, mask_c,
    d0, h0, w0, dd, dh, dw, d_in, h_in, w_in, stride_xd, stride_xh, stride_xw,
    PADDING_MODE: tl.constexpr, RANK: tl.constexpr, PIXELS_LAST: tl.constexpr, X_VECTOR: tl.constexpr,
):  # fmt: skip
    """Adds one tap: a tile of the input times one weight a channel."""
    offset, inside = tap_offset(
        pixel_offset, d0, h0, w0, dd, dh, dw, d_in, h_in, w_in, stride_xd, stride_xh, stride_xw, PADDING_MODE, RANK
    )
    x_row = tl.multiple_of(image_offset + offset, X_VECTOR)
    mask_x = inside & mask_m
    w_tap = tl.load(w_base, mask=mask_c, other=0.0).to(acc.dtype)
    if PIXELS_LAST:
        x_tile = tl.load(
            x_base + channel_in[:, None] + x_row[None, :], mask=mask_c[:, None] & mask_x[None, :], other=0.0
        )  # [BLOCK_C, BLOCK_M]
        return acc + x_tile.to(acc.dtype) * w_tap[:, None]
    else:
        x_tile = tl.load(
            x_base + x_row[:, None] + channel_in[None, :], mask=mask_x[:, None] & mask_c[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_C]
        return acc + x_tile.to(acc.dtype) * w_tap[None, :]


@triton.jit
def aligned(offset, VECTOR: tl.constexpr):
    """A scalar known to be a multiple of VECTOR, in a form that shows it: on a scalar the compiler drops a hint."""
    return offset // VECTOR * VECTOR


@triton.jit
def below(index, limit, VECTOR: tl.constexpr):
    """index < limit for index vectors that start at, and a limit that is, a multiple of VECTOR: one truth a vector."""
    return index // VECTOR < limit // VECTOR


@triton.jit
def within(index, size):
    """0 <= index < size in one comparison: a negative index is large as an unsigned number."""
    return tl.cast(index, tl.uint32) < tl.cast(size, tl.uint32)


@triton.constexpr_function
def tap_at(position, output, STRIDE, DIL, TAPS):
    """The tap with which an output of a patch reads this position of the patch's input, or -1."""
    tap, rest = divmod(position - output * STRIDE, DIL)
    return tap if rest == 0 and 0 <= tap < TAPS else -1


@triton.constexpr_function
def is_read(position, OUTPUTS, STRIDE, DIL, TAPS):
    """Whether any output of a patch reads this position: between strides and dilations some are skipped."""
    return any(tap_at(position, output, STRIDE, DIL, TAPS) >= 0 for output in range(OUTPUTS))


@triton.jit
def load_pixels(base, pixel, channel, mask_pixel, mask_channel, PIXELS_LAST: tl.constexpr):
    """A [pixels, channels] tile, read with the dimension that lies contiguous in memory as the fastest one.

    Of an NCHW tile the compiler knows no contiguity: it is read as [channels, pixels] and transposed, if the last
    dimension is the fastest one then.
    """
    if PIXELS_LAST and LAST_IS_FASTEST:
        tile = tl.load(
            base + channel[:, None] + pixel[None, :], mask=mask_channel[:, None] & mask_pixel[None, :], other=0.0
        )
        return tl.trans(tile)
    else:
        return tl.load(
            base + pixel[:, None] + channel[None, :], mask=mask_pixel[:, None] & mask_channel[None, :], other=0.0
        )


@triton.jit
def load_turned(pointers, mask, PIXELS_LAST: tl.constexpr):
    """The same for a tile of [pixels, columns] whose columns are of several taps: each element has its own pointer."""
    if PIXELS_LAST and LAST_IS_FASTEST:
        return tl.trans(tl.load(tl.trans(pointers), mask=tl.trans(mask), other=0.0))
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_spread(pointers, mask, TURNED: tl.constexpr):
    """Loads so that neighbouring threads hold neighbours along the last dimensions: where these are the slowest, with
    dimensions TURNED, which undoes itself. A vector of one thread's stays last.
    """
    if LAST_IS_FASTEST:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.permute(tl.load(tl.permute(pointers, TURNED), mask=tl.permute(mask, TURNED), other=0.0), TURNED)


@triton.jit
def store_pixels(base, pixel, channel, tile, mask_pixel, mask_channel, PIXELS_LAST: tl.constexpr):
    """Writes a [pixels, channels] tile, the contiguous dimension fastest, converted to the output's dtype."""
    tile = narrow(tile, base.dtype.element_ty)
    if PIXELS_LAST and LAST_IS_FASTEST:
        tl.store(
            base + channel[:, None] + pixel[None, :], tl.trans(tile), mask=mask_channel[:, None] & mask_pixel[None, :]
        )
    else:
        tl.store(base + pixel[:, None] + channel[None, :], tile, mask=mask_pixel[:, None] & mask_channel[None, :])


@triton.jit
def epilogue(acc, b_ptr, stride_b, channel, mask_channel, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Bias and activation on a [pixels, channels] accumulator, in the accumulator's precision."""
    if HAS_BIAS:
        bias = tl.load(b_ptr + channel * stride_b, mask=mask_channel, other=0.0)
        acc += bias.to(acc.dtype)[None, :]
    return activate(acc, ACTIVATION)
