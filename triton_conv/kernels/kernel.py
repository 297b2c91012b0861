"""What every kernel file declares of itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton.language as tl

from ..errors import ConfigError
from ..layout import dense_strides, same_places
from ..problem import VECTOR_LIMIT, Problem, WeightGradientProblem
from ..problem_deform import DeformProblem
from ..problem_lectures import LocalProblem, SeparableProblem
from ..target import Target
from .arguments import Arguments, Second
from .staging import Operand, staged_bytes, staging_of

_ACCUMULATOR = {torch.float64: tl.float64}
_POWERS = frozenset(2**i for i in range(13))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Tile parameters of one kernel: sizes are powers of two, and the field names are the kernel's own.

    `whole` names the fields that may be any whole number.
    """

    whole: ClassVar[frozenset[str]] = frozenset({"num_stages"})

    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("bool", bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name}: expected true or false, got {value!r}")
            elif type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}: expected a positive integer, got {value!r}")
            elif field.name not in self.whole and value not in _POWERS:
                raise ConfigError(f"{field.name}: expected a power of two of at most 4096, got {value!r}")
        if self.num_warps > 16 or self.num_stages > 8:
            raise ConfigError(f"at most 16 warps and 8 stages, got {self.num_warps} and {self.num_stages}")

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        """Shared memory that the tile takes on a target, by count; without one, on whichever takes most."""
        raise NotImplementedError

    def accumulator_values(self) -> int:
        """Numbers that one program accumulates."""
        raise NotImplementedError

    def parts(self, problem: Problem) -> int:
        """How many partial sums of each result the tile leaves, for a second pass to add up."""
        return int(getattr(self, "SPLITS", 1))

    def load_bytes(self, problem: Problem, target: Target) -> int:
        """Bytes that a thread loads at once where channels are contiguous and aligned."""
        return 16

    def mismatch(self, problem: Problem) -> str | None:
        """Why the tile cannot run this problem anywhere, or None."""
        return None

    def unfit(self, problem: Problem, target: Target) -> str | None:
        """Why the tile cannot run this problem on this target, or None."""
        if reason := self.mismatch(problem):
            return reason
        shared = self.shared_bytes(problem, target)
        if shared > target.shared_bytes:
            return f"takes {shared} bytes of shared memory of {target.shared_bytes}"
        registers = self.accumulator_values() * problem.accumulator_bytes // 4
        # 255 registers a thread, about 40 of them for addresses; a register is 4 bytes.
        if registers > 216 * self.num_warps * target.warp_size and not target.interpreted:
            return f"{registers} accumulator registers do not fit in {self.num_warps} warps"
        parts = self.parts(problem)
        if parts > 1 and isinstance(problem, WeightGradientProblem):
            partial = parts * problem.partial_bytes
            if partial > problem.most_partial_bytes:
                return f"{parts} partial sums take {partial} bytes of at most {problem.most_partial_bytes}"
        return None

    def asdict(self) -> dict[str, int | bool]:
        return dataclasses.asdict(self)

    def sizes(self) -> dict[str, object]:
        """The kernel's own tile arguments: all but those of the launch itself."""
        return {name: value for name, value in self.asdict().items() if name.isupper()}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.asdict().items())


@dataclass(frozen=True)
class ProductTile(Tile):
    """A tile of one matrix product in a pipelined loop: BLOCK_M by BLOCK_N sums, BLOCK_K products a step."""

    gathered: ClassVar[int | None] = None
    """Which factor is read pixel by pixel from the input: 0 along BLOCK_M, 1 along BLOCK_N."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 32

    def runs(self, problem: Problem) -> tuple[int, int]:
        """Elements that lie side by side of what is read along BLOCK_M and along BLOCK_N; as many as a copy takes where
        it is not known."""
        return VECTOR_LIMIT, VECTOR_LIMIT

    def stored_bytes(self, problem: Problem, target: Target | None) -> int:
        """Bytes of a sum as it is stored, as shared memory holds it."""
        # gfx942's matrix unit leaves channels side by side.
        direct = self.gathered == 0 and staging_of(target).turns and not problem.pixels_last
        return 0 if direct else problem.itemsize

    def rows(self) -> int:
        """Rows of the product, as the matrix unit counts them."""
        return self.BLOCK_M

    def factors(self, problem: Problem, target: Target | None) -> list[Operand]:
        """What is read along BLOCK_M and along BLOCK_N, as shared memory holds it."""
        sizes, runs = (self.BLOCK_M, self.BLOCK_N), self.runs(problem)
        size = problem.itemsize
        found = [Operand(n * self.BLOCK_K * size, run * size) for n, run in zip(sizes, runs, strict=True)]
        if self.gathered is not None and runs[self.gathered] == 1 and staging_of(target).turns:
            # Single words of neighbouring pixels that are fetched ahead stay in registers where no two warps share one.
            if size == 4 and problem.pixels_last and self.num_stages > 1 and self._divided():
                found[self.gathered] = Operand(0)
        return found

    def _divided(self) -> bool:
        """Whether gfx942 lays all warps along the pixels that are read, as it does in long tiles."""
        if self.gathered == 0:
            return self.num_warps * max(self.BLOCK_N, 16) <= self.BLOCK_M
        return self.num_warps * self.BLOCK_M < 4 * self.BLOCK_N and 32 * self.num_warps <= self.BLOCK_N

    def shared_bytes(self, problem: Problem, target: Target | None = None) -> int:
        sums = self.BLOCK_M * self.BLOCK_N, self.stored_bytes(problem, target)
        factors = self.factors(problem, target)
        return staged_bytes(factors, self.rows(), self.num_warps, self.num_stages, sums, target)

    def accumulator_values(self) -> int:
        return self.BLOCK_M * self.BLOCK_N


@dataclass(frozen=True)
class Join:
    """A second launch, of `function`, which adds up what a kernel left of some results in `partial_ptr`.

    `numbers` and `grid` are functions of (problem, tile): float32 numbers that are left, in memory that is asked for at
    the launch, and programs. Where nothing is left there is no second launch. The function takes `partial_ptr`, the
    last two of the kernel's pointers and whichever of its arguments it names.
    """

    function: Any
    numbers: Callable[[Any, Any], int]
    grid: Callable[[Any, Any], int]


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name everywhere (config file, test id, result file, figure), its code, its tile, its arguments.

    `grid` and `arguments` are functions of (problem, tile): the number of programs, and everything the kernel takes
    besides pointers. `unsuited` says why a problem is not for this kernel, or None. A kernel with `descriptors` makes
    some on the device, in memory that Triton asks for at the launch; one with `channels_last_result` writes a
    weight's gradient with channels innermost; one with `fragments` loads elements into the registers from which
    NVIDIA's matrix instructions take them; one with `products` makes many of them at once that nothing is added to; one
    with a `join` takes `partial_ptr` behind its `pointers`; one with a `contiguous_weight` reads the weight as torch
    makes it, however the problem has it arranged.
    """

    name: str
    function: Any
    tile_type: type[Tile]
    grid: Callable[[Any, Any], int]
    arguments: Callable[[Any, Any], dict[str, object]]
    unsuited: Callable[[Any], str | None]
    safe_tile: Tile
    pointers: tuple[str, ...] = ("x_ptr", "w_ptr", "b_ptr", "y_ptr")
    descriptors: bool = False
    channels_last_result: bool = False
    fragments: bool = False
    products: bool = False
    join: Join | None = None
    contiguous_weight: bool = False

    def unavailable(self, target: Target) -> str | None:
        """Why the kernel cannot run on a target whatever the problem, or None."""
        if self.descriptors and not target.bulk_copies:
            return f"{target.arch} has no engine for bulk copies"
        if self.products and target.tensor_memory:
            return f"the matrix unit of {target.arch} has no memory for so many products"
        if self.fragments and target.vendor == "amd":
            return f"the matrix instructions of {target.arch} take elements from other registers"
        return None

    def result_strides(self, problem: Problem) -> tuple[int, ...]:
        """Strides of what the kernel writes: of a weight gradient in its own order, whatever the weight's."""
        if isinstance(problem, WeightGradientProblem):
            return dense_strides(problem.result_shape, self.channels_last_result)
        return problem.result_strides

    def partial(
        self, problem: Problem, tile: Tile, interpreted: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape and strides of the partial sums that a second pass adds up; None if the kernel writes the result."""
        if not isinstance(problem, WeightGradientProblem):
            return None
        parts, shape, strides = tile.parts(problem), problem.result_shape, self.result_strides(problem)
        # The interpreter cuts bfloat16's lower bits off in a store; the second pass rounds.
        rounds = not (interpreted and problem.dtype == torch.bfloat16)
        if parts == 1 and rounds and same_places(shape, strides, problem.result_strides):
            return None
        return (parts, *shape), (math.prod(shape), *strides)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the kernel's parameters, in order."""
        return tuple(inspect.signature(self.function.fn).parameters)

    def operands(self, problem: Problem, tile: Tile) -> tuple[torch.dtype | None, ...]:
        """The dtype of the tensor behind each pointer parameter, None for one that this problem does not have."""
        dtypes = {name: problem.operand(name) for name in self.pointers}
        if self.join is not None:
            dtypes["partial_ptr"] = torch.float32 if self.join.numbers(problem, tile) else None
        if self.partial(problem, tile) is not None:
            dtypes["dw_ptr"] = problem.accumulator
        return tuple(dtypes.values())

    def values(self, problem: Problem, tile: Tile, target: Target) -> Arguments:
        """Every parameter that is not a pointer, by name, as the target can compute it; computed once a plan."""
        known = self.arguments(problem, tile)
        if not target.tf32:
            known |= {"PRECISION": "ieee"}
        values = Arguments.of(self.function, known)
        if self.join is not None and (numbers := self.join.numbers(problem, tile)):
            values.second = Second(numbers, self.join.grid(problem, tile), Arguments.of(self.join.function, known))
        return values


def geometry_arguments(problem: Problem, block_m: int) -> dict[str, object]:
    """The arguments that every kernel takes: sizes, strides, convolution constants and flags."""
    g = problem.geometry
    arguments: dict[str, object] = dict(batch=g.batch, stride_b=problem.stride_b, RANK=g.rank)
    for prefix, strides in (("x", problem.x_strides), ("y", problem.y_strides)):
        arguments |= {f"stride_{prefix}{axis}": s for axis, s in zip("ncdhw", strides, strict=True)}
    arguments |= {f"stride_w{axis}": s for axis, s in zip("oidhw", problem.w_strides, strict=True)}
    for i, axis in enumerate("dhw"):
        arguments |= {f"{axis}_in": g.in_size[i], f"{axis}_out": g.out_size[i]}
        upper = axis.upper()
        arguments |= {
            f"K{upper}": g.kernel[i],
            f"STRIDE_{upper}": g.stride[i],
            f"PAD_{upper}": g.pad_before[i],
            f"DIL_{upper}": g.dilation[i],
        }
    return arguments | dict(
        PADDING_MODE=g.padding_mode,
        HAS_BIAS=problem.has_bias,
        ACTIVATION=problem.activation,
        PRECISION=problem.precision,
        ACC_DTYPE=_ACCUMULATOR.get(problem.dtype, tl.float32),
        INDEX_INT64=problem.wide_index(block_m),
        PIXELS_LAST=problem.pixels_last,
        Y_PIXELS_LAST=problem.y_strides[1] != 1 or g.c_out == 1,
    )


def weight_arguments(problem: Problem) -> dict[str, object]:
    """A group's weight as a product of N by K reads it, of a transposed convolution with its first two dimensions the
    other way round, and how many of its channels lie side by side.
    """
    g = problem.geometry
    outer, inner, *_ = problem.w_strides
    stride_wn, stride_wk = (inner, outer) if g.transposed else (outer, inner)
    return dict(
        c_in_group=g.c_in_group,
        c_out_group=g.c_out_group,
        groups=g.groups,
        stride_wg=outer * (g.c_in_group if g.transposed else g.c_out_group),
        stride_wn=stride_wn,
        stride_wk=stride_wk,
        TRANSPOSED=g.transposed,
        K_LAST=stride_wk == 1,
        W_VECTOR=problem.w_vector(g.c_in_group, g.c_out_group),
    )


def deform_arguments(problem: DeformProblem) -> dict[str, object]:
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


def place_arguments(problem: LocalProblem, block_m: int) -> dict[str, object]:
    """The arguments of every kernel with filters for each place: those that all kernels take, places and groups."""
    g = problem.geometry
    places = {f"stride_p{axis}": s for axis, s in zip("dhw", problem.place_strides, strict=True)}
    groups = dict(c_in_group=g.c_in_group, c_out_group=g.c_out_group, groups=g.groups)
    return geometry_arguments(problem, block_m) | places | groups


def separable_arguments(problem: SeparableProblem, block_m: int) -> dict[str, object]:
    """The further arguments of every kernel that multiplies by a 1x1 weight what it has filtered."""
    g = problem.geometry
    outer, inner = problem.pointwise_strides
    return geometry_arguments(problem, block_m) | dict(
        c_mid=g.c_out,
        c_out=problem.c_final,
        stride_mb=problem.stride_mb,
        stride_po=outer,
        stride_pi=inner,
        HAS_MID_BIAS=problem.has_mid_bias,
        MID_ACTIVATION=problem.mid_activation,
        X_VECTOR=problem.x_vector(g.c_out) if g.c_out_group == 1 else 1,
        P_VECTOR=problem.pointwise_vector(g.c_out),
        Y_VECTOR=problem.y_vector(problem.c_final),
        Y_PIXELS_LAST=problem.y_strides[1] != 1 or problem.c_final == 1,
    )


def run_read(problem: Problem) -> int:
    """Input pixels that a banded kernel reads at once."""
    return problem.x_run(16 // problem.itemsize)


def columns_left(problem: Problem) -> int:
    """Columns before a block's own at which its input begins: the padding, up to a whole vector."""
    vector = run_read(problem)
    return cdiv(problem.geometry.pad_before[2], vector) * vector


def columns_read(problem: Problem, block_t: int) -> int:
    """Input columns that `block_t` outputs of a row read, from an aligned one on."""
    g = problem.geometry
    return (block_t - 1) * g.stride[2] + g.extent[2] + columns_left(problem) - g.pad_before[2]


def row_left(problem: Problem, block_t: int) -> int:
    """Columns before a block's own at which its input row begins: a block of a whole row needs none outside the image,
    where all is zero.
    """
    return columns_left(problem) if block_t < problem.geometry.out_size[2] else 0


def row_columns(problem: Problem, block_t: int) -> int:
    """Input columns that a block of `block_t` outputs of a row reads: of a whole row no more than the image has."""
    g = problem.geometry
    if block_t < g.out_size[2]:
        return columns_read(problem, block_t)
    return min((g.out_size[2] - 1) * g.stride[2] + g.extent[2] - g.pad_before[2], g.in_size[2])


def image_group(batch: int, blocks: int, block_m: int) -> int:
    """How many images of `blocks` blocks each share tiles of `block_m` of them: the power of two that leaves the fewest
    blocks of tiles empty.
    """
    sizes = [1 << i for i in range(max(batch, 1).bit_length()) if 1 << i <= block_m]
    return min(sizes, key=lambda n: cdiv(batch, n) * cdiv(n * blocks, block_m))


def no_patches(problem: Problem, widest: int) -> str | None:
    """Why patches of a channels-last depthwise convolution cannot be held in registers, or None."""
    g = problem.geometry
    if g.c_in_group != 1 or g.c_out_group != 1:
        return f"a group has {g.c_in_group} input channels and {g.c_out_group} output channels, not 1 of each"
    if problem.pixels_last:
        return "the channels of its input are not contiguous"
    if g.padding_mode != "zeros":
        return f"its border is {g.padding_mode}, not zero"
    if g.kernel[2] > widest:
        return f"{g.kernel[2]} taps of a filter row do not fit in registers"
    return None
