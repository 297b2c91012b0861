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

from ..errors import ConfigError
from ..layout import dense_strides, same_places
from ..problem import VECTOR_LIMIT, Problem, WeightGradientProblem
from ..target import Target
from .arguments import Another, Arguments
from .staging import Operand, staged_bytes, staging_of

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
        # Numbers and flags alone: nothing to copy deeply, in what every candidate is asked many times.
        return dict(vars(self))

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
class Ahead:
    """A launch before a kernel's own, of `function`, which lays the weight out anew for it.

    `numbers` and `grid` are functions of the problem: numbers of the weight's dtype, in memory that is asked for at the
    launch, and programs. The function takes `w_ptr`, that memory, and whichever of the kernel's arguments it names; the
    kernel takes that memory for its `w_ptr`.
    """

    function: Any
    numbers: Callable[[Any], int]
    grid: Callable[[Any], int]


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
    """One kernel: its code, its tile, its arguments, and what sets it apart from others."""

    name: str
    """Its name everywhere: file, config file, test id, result file, figure."""
    function: Any
    """The jitted function."""
    tile_type: type[Tile]
    grid: Callable[[Any, Any], int]
    """The number of programs, of (problem, tile)."""
    arguments: Callable[[Any, Any], dict[str, object]]
    """All that the function takes besides pointers, by name, of (problem, tile); more is not passed on."""
    unsuited: Callable[[Any], str | None]
    """Why a problem is not for this kernel, or None."""
    safe_tile: Tile
    """What runs where no other tile fits."""
    pointers: tuple[str, ...] = ("x_ptr", "w_ptr", "b_ptr", "y_ptr")
    """The function's first parameters: the tensors of a launch, in order."""
    descriptors: bool = False
    """Whether it makes descriptors of bulk copies on the device, in memory that Triton asks for at the launch."""
    channels_last_result: bool = False
    """Whether it writes a weight's gradient with channels innermost."""
    fragments: bool = False
    """Whether it loads elements into the very registers from which NVIDIA's matrix instructions take them."""
    products: bool = False
    """Whether it has many products at once that nothing is added to: tensor memory has no room for so many."""
    ahead: Ahead | None = None
    """The launch that comes before it."""
    join: Join | None = None
    """The launch that follows it; such a kernel takes `partial_ptr` behind its pointers."""
    contiguous_weight: bool = False
    """Whether it reads the weight as torch makes it, however the problem has it arranged."""

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
        if self.ahead is not None:
            own = Arguments.of(self.ahead.function, known)
            values.first = Another(self.ahead.numbers(problem), self.ahead.grid(problem), own)
        if self.join is not None and (numbers := self.join.numbers(problem, tile)):
            values.second = Another(numbers, self.join.grid(problem, tile), Arguments.of(self.join.function, known))
        return values
