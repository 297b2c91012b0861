"""Input gradient of a locally connected layer whose filters are plain: read in vectors, shifted into place."""

# Device code grows tuples, whose every length is another type.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ..problem import Problem
from ..problem_lectures import LocalInputGradientProblem
from ..target import Target
from .arguments import place_arguments
from .common import aligned, below, dot, narrow, wide, within
from .kernel import Kernel, Tile, cdiv
from .windows import elements

# Elements of a vector of 16 bytes, and taps of a filter row whose sums fit in registers.
_VECTOR = 8
_WIDEST = 16


@triton.constexpr_function
def words_held(KW):
    """Words that KW taps lie in, the first of which may be the later half of a word."""
    return KW // 2 + 1


@triton.constexpr_function
def vectors_held(KW):
    """Aligned vectors of eight that KW taps lie in, wherever they begin."""
    return (KW + 14) // 8


@triton.jit
def load_words(base, offset, mask, vector, vectors, COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The words of COUNT aligned vectors from the `vector`-th of a filter on, of which it has `vectors`: [ROWS, COLS]
    each."""
    words = ()
    for i in tl.static_range(COUNT):
        place = (offset + (vector + i)[None, :])[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        inside = mask & (vector + i < vectors)[None, :]
        words += elements(tl.load(base + place, mask=inside[:, :, None], other=0), ROWS, COLS, 4)
    return words


@triton.jit
def shifted(words, by, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the words: from STEP further on where `by`."""
    new = ()
    for i in tl.static_range(COUNT):
        new += (tl.where(by, words[i + STEP], words[i]),)
    return new


@triton.jit
def taps_of(words, first, KW: tl.constexpr, DTYPE: tl.constexpr):
    """The KW elements from the `first` one of a vector on, a tile each."""
    HELD: tl.constexpr = words_held(KW)
    words = shifted(words, (first >= 4)[None, :], 2, HELD + 1)
    words = shifted(words, (first % 4 >= 2)[None, :], 1, HELD)
    later = (first % 2 == 1)[None, :]
    taps = ()
    for kw in tl.static_range(KW):
        word = words[kw // 2]
        if kw % 2 == 0:
            word = tl.where(later, word >> 16, word)
        else:
            word = tl.where(later, words[kw // 2 + 1], word >> 16)
        taps += (word.to(tl.int16).to(DTYPE, bitcast=True),)
    return taps


@triton.jit
def locally_connected_input_gradient_shifted_kernel(
    dy_ptr, w_ptr, dx_ptr,
    batch, c_in_group, c_out_group, groups, d_in, h_in, w_in, d_out, h_out, w_out, steps,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_pd, stride_ph, stride_pw,
    stride_wo, stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_D: tl.constexpr, DIL_H: tl.constexpr,
    PRECISION: tl.constexpr, ACC_DTYPE: tl.constexpr, INDEX_INT64: tl.constexpr, IMAGE_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """dx[m, n, q] = sum_{tap, k} dy[m, k, p] w[p, k, n, tap], p the output that reads input pixel q with this tap.

    Grid: one axis of images' tiles x tiles of input channels x groups x rows of the input x runs of COLUMNS of its
    columns, images fastest. As in the rolling form a program goes along a row of outputs and holds KW columns of dx.
    Here tap kw always feeds the kw-th of them: after each output the first is complete and stored, and the others move
    up one, a renaming of registers. So the taps of a filter row need no rotation, and are read in aligned vectors of
    eight, two for nine taps, instead of one by one: a row begins wherever its channel says within the first, and is
    shifted by that in registers, four, two and one places. The vectors of TOGETHER (output channels, filter row) pairs
    are under way at once. No atomics: the same bits every time.

    Counted on compiled code (sm_90, bfloat16, 9 taps, 16 output and 8 input channels, 32 images): 8 loads of weights
    for a filter row, where one by one they are 36.

    Gregor and LeCun, arXiv:1006.0448.
    """
    ROWS: tl.constexpr = KD * KH
    tiles_m = tl.cdiv(batch, BLOCK_M)
    tiles_n = tl.cdiv(c_in_group, BLOCK_N)
    runs = tl.cdiv(w_in, COLUMNS)
    pid = tl.program_id(0)
    pid_m = pid % tiles_m
    pid_n = pid // tiles_m % tiles_n
    pid_g = pid // tiles_m // tiles_n % groups
    place = pid // tiles_m // tiles_n // groups
    first = place % runs * COLUMNS
    h_i = place // runs % h_in
    d_i = place // runs // h_in

    m_first = pid_m * BLOCK_M
    image = tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if INDEX_INT64:
        image = image.to(tl.int64)
        n = n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    mask_m = below(image, batch - m_first, IMAGE_VECTOR)
    mask_n = n < c_in_group
    k_first = tl.cast(pid_g * c_out_group, tl.int64)
    y_base = dy_ptr + aligned(tl.cast(m_first, tl.int64) * stride_yn + k_first * stride_yc, IMAGE_VECTOR)
    # Places, output channels and filters begin at whole vectors, which are counted in words.
    w_base = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + k_first * (stride_wo // 8) * 4
    x_base = dx_ptr + tl.cast(m_first, tl.int64) * stride_xn + wide(stride_xd) * d_i + wide(stride_xh) * h_i
    x_base += tl.cast(pid_g * c_in_group, tl.int64) * stride_xc
    x_tile = (image * stride_xn)[:, None] + (n * stride_xc)[None, :]
    mask_x = mask_m[:, None] & mask_n[None, :]
    vectors = c_in_group * (ROWS * KW) // 8

    # The output pixels that read the run's columns.
    last = tl.minimum(first + COLUMNS, w_in) + PAD_W
    start = tl.maximum(first + PAD_W - (KW - 1), 0)
    end = tl.maximum(tl.minimum(last, w_out), start)
    none = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    columns = ()
    for _ in tl.static_range(KW):
        columns += (none,)
    for w_o in range(start, end):
        for step in range(steps):
            gradients, filters, begins = (), (), ()
            for i in tl.static_range(TOGETHER):
                pair = step * TOGETHER + i
                kd = pair % ROWS // KH
                kh = pair % KH
                channel = pair // ROWS * BLOCK_K + offs_k
                d_t = d_i + PAD_D - kd * DIL_D
                h_t = h_i + PAD_H - kh * DIL_H
                d_o = d_t // STRIDE_D
                h_o = h_t // STRIDE_H
                met = (d_o * STRIDE_D == d_t) & (h_o * STRIDE_H == h_t) & within(d_o, d_out) & within(h_o, h_out)
                mask_k = (channel < c_out_group) & met
                y_row = wide(stride_yd) * d_o + wide(stride_yh) * h_o + wide(stride_yw) * w_o
                dy_tile = tl.load(
                    y_base
                    + aligned(y_row, IMAGE_VECTOR)
                    + tl.multiple_of(channel * stride_yc, IMAGE_VECTOR)[:, None]
                    + image[None, :] * stride_yn,
                    mask=mask_k[:, None] & mask_m[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_M]
                place_vector = wide(stride_pd // 8) * d_o + wide(stride_ph // 8) * h_o + wide(stride_pw // 8) * w_o
                begin = n * (ROWS * KW) + (kd * KH + kh) * KW
                words = load_words(
                    w_base + place_vector * 4, (channel * (stride_wo // 8))[:, None], mask_k[:, None] & mask_n[None, :],
                    begin // 8, vectors, vectors_held(KW), BLOCK_K, BLOCK_N,
                )  # fmt: skip
                gradients += (tl.trans(dy_tile),)
                filters += (words,)
                begins += (begin % 8,)
            for i in tl.static_range(TOGETHER):
                taps = taps_of(filters[i], begins[i], KW, w_ptr.dtype.element_ty)
                new = ()
                for kw in tl.static_range(KW):
                    new += (dot(gradients[i], taps[kw], columns[kw], PRECISION),)
                columns = new
        tl.store(
            x_base + wide(stride_xw) * (w_o - PAD_W) + x_tile, narrow(columns[0], dx_ptr.dtype.element_ty),
            mask=mask_x & (w_o - PAD_W >= first),
        )  # fmt: skip
        new = ()
        for kw in tl.static_range(1, KW):
            new += (columns[kw],)
        columns = new + (none,)
    # Columns that no further output reads.
    for kw in tl.static_range(KW - 1):
        column = end + kw - PAD_W
        tl.store(
            x_base + wide(stride_xw) * column + x_tile, narrow(columns[kw], dx_ptr.dtype.element_ty),
            mask=mask_x & (column >= first) & (column < last - PAD_W),
        )  # fmt: skip
    for w_o in range(end + KW - 1, last):
        tl.store(
            x_base + wide(stride_xw) * (w_o - PAD_W) + x_tile, narrow(none, dx_ptr.dtype.element_ty),
            mask=mask_x & (w_o - PAD_W >= first),
        )  # fmt: skip


@dataclass(frozen=True)
class LocallyConnectedInputGradientShiftedTile(Tile):
    """BLOCK_M images by BLOCK_N input channels, TOGETHER pairs of BLOCK_K output channels and a filter row a step; a
    program writes COLUMNS columns of a row."""

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages", "COLUMNS", "TOGETHER"})

    BLOCK_M: int = 32
    BLOCK_N: int = 8
    BLOCK_K: int = 16
    COLUMNS: int = 24
    TOGETHER: int = 3

    def steps(self, problem: Problem) -> int:
        """Steps that an output pixel's pairs take."""
        g = problem.geometry
        return cdiv(cdiv(g.c_out_group, self.BLOCK_K) * g.kernel[0] * g.kernel[1], self.TOGETHER)

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        # Images of all pairs and weights of all taps pass through it, as far as lanes do not exchange them.
        passed = self.TOGETHER * self.BLOCK_M + problem.geometry.kernel[2] * self.BLOCK_N
        return self.BLOCK_K * passed * problem.itemsize

    def accumulator_values(self) -> int:
        return self.BLOCK_M * self.BLOCK_N

    def unfit(self, problem: Problem, target: Target) -> str | None:
        if reason := super().unfit(problem, target):
            return reason
        taps = problem.geometry.kernel[2]
        # The sums of all taps, and what is read together: halves of images, and words of weights.
        read = self.BLOCK_K * (self.BLOCK_M // 2 + self.BLOCK_N * vectors_held(taps) * _VECTOR // 2)
        values = self.BLOCK_M * self.BLOCK_N * taps + self.TOGETHER * read
        registers = values / (self.num_warps * target.warp_size)
        if registers > 216 and not target.interpreted:
            return f"{registers:.0f} registers a thread for the sums of {taps} taps and what they read"
        return None


def _grid(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientShiftedTile) -> int:
    g = problem.geometry
    tiles = cdiv(g.batch, tile.BLOCK_M) * cdiv(g.c_in_group, tile.BLOCK_N) * g.groups
    return tiles * g.in_size[0] * g.in_size[1] * cdiv(g.in_size[2], tile.COLUMNS)


def _arguments(problem: LocalInputGradientProblem, tile: LocallyConnectedInputGradientShiftedTile) -> dict[str, object]:
    images = problem.image_vector(problem.y_strides, tile.BLOCK_M, problem.geometry.batch)
    arguments = place_arguments(problem, tile.BLOCK_M) | tile.sizes()
    return arguments | dict(steps=tile.steps(problem), IMAGE_VECTOR=images)


def _unsuited(problem: Problem) -> str | None:
    if not isinstance(problem, LocalInputGradientProblem):
        return "it is no input gradient of unshared filters"
    g = problem.geometry
    if problem.itemsize != 2:
        return "only 16-bit numbers are shifted in pairs"
    if not problem.flat:
        return "the filters' taps do not lie side by side"
    if g.stride[2] != 1 or g.dilation[2] != 1:
        return "the outputs of a row do not read each one column further"
    if not problem.aligned or problem.weight_vector() < _VECTOR:
        return "its filters do not begin at whole vectors"
    if g.kernel[2] > _WIDEST:
        return f"the sums of {g.kernel[2]} taps do not fit in registers"
    return None


KERNEL = Kernel(
    name="locally_connected_input_gradient_shifted",
    function=locally_connected_input_gradient_shifted_kernel,
    tile_type=LocallyConnectedInputGradientShiftedTile,
    grid=_grid,
    arguments=_arguments,
    unsuited=_unsuited,
    safe_tile=LocallyConnectedInputGradientShiftedTile(
        num_warps=4, num_stages=1, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, COLUMNS=32, TOGETHER=1
    ),
    pointers=("dy_ptr", "w_ptr", "dx_ptr"),
)
