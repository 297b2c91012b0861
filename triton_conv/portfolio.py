"""A few tiles for every problem that nobody measured: the one that won on the nearest problem somebody did.

Nearness is a distance between descriptions, in doublings: readable, and the same everywhere. Beyond `radius` a
portfolio does not answer.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .kernels import Kernel, Tile

MOST_TILES = 12

# What a doubling of each number counts. Tiles follow from channels and filter rows; how many pixels, groups and images
# there are only says how full the machine is, and a dilation moves addresses alone.
WEIGHTS = {
    "images": 0.25,
    "input channels of a group": 1.0,
    "output channels of a group": 1.0,
    "groups": 0.25,
    "width": 0.5,
    "rows": 0.25,
    "filter width": 1.0,
    "filter rows": 1.0,
    "stride": 1.0,
    "dilation": 0.1,
}

_DESCRIPTION = re.compile(
    r"n(?P<n>\d+) c(?P<c_in>\d+)-(?P<c_out>\d+) [dhw]+(?P<size>[\dx]+) k(?P<kernel>[\dx]+) s(?P<stride>[\dx]+) "
    r"p\S+ d(?P<dilation>[\dx]+) g(?P<groups>\d+)(?P<transposed> t[\dx]+)?(?P<mode> [a-z]+)? (?P<dtype>\S+) "
    r"(?P<layout>NCHW|NHWC)\S*(?P<rest>.*)"
)


@dataclass(frozen=True)
class Place:
    """Where a problem lies: `kind` must be the same for two problems to be compared, `numbers` may differ.

    `aligned` is how many numbers lie side by side at an aligned place: 1 to 8.
    """

    kind: str
    numbers: tuple[float, ...]
    aligned: int = 8

    def distance(self, other: Place) -> float:
        """Weighted doublings from a problem that a tile was found on to one that it may serve; infinite between two
        kinds, and to a problem that is less aligned: with 61 channels each has an address of its own, and a tile of
        aligned ones spilled 3320 bytes.
        """
        if self.kind != other.kind or self.aligned > other.aligned:
            return math.inf
        squares = ((w * (a - b)) ** 2 for w, a, b in zip(WEIGHTS.values(), self.numbers, other.numbers, strict=True))
        return math.sqrt(sum(squares))


@functools.lru_cache(maxsize=4096)
def place(description: str) -> Place:
    """The place of a problem, from `Problem.describe()`; raises `ConfigError` for any other text."""
    match = _DESCRIPTION.fullmatch(description)
    if match is None:
        raise ConfigError(f"{description!r} does not describe a problem")

    def product(name: str) -> int:
        return math.prod(map(int, match[name].split("x")))

    *rows, width = map(int, match["size"].split("x"))
    *filter_rows, filter_width = map(int, match["kernel"].split("x"))
    groups = max(int(match["groups"]), 1)
    numbers = (
        int(match["n"]), int(match["c_in"]) // groups, int(match["c_out"]) // groups, groups, width, math.prod(rows),
        filter_width, math.prod(filter_rows), product("stride"), product("dilation"),
    )  # fmt: skip
    # What there is beside the sizes changes what a tile must hold; whether offsets have a mask too does not.
    rest = "".join(word for word in re.sub(r"og\d+\S*", "og", match["rest"]).split())
    last = (numbers[1], numbers[2]) if match["layout"] == "NHWC" else (width,)
    kind = " ".join((match["dtype"], match["layout"], "transposed" if match["transposed"] else "forward", rest))
    return Place(kind.strip(), tuple(math.log2(max(number, 1)) for number in numbers), math.gcd(8, *last))


@dataclass(frozen=True)
class Portfolio:
    """Tiles of one kernel by name, and which of them serves each problem that was measured, best of them all.

    `regret` is how much slower than the best known tile its answers were on problems left out while it was made:
    `shapes` that could be judged, `geomean`, `p95`, `default_geomean` of the analytic default on the same ones.
    """

    tiles: Mapping[str, Tile]
    shapes: Mapping[str, str]
    radius: float
    regret: Mapping[str, float]

    def nearest(self, description: str) -> tuple[float, str, Tile] | None:
        """(distance, problem, tile) of the nearest problem within the radius, if there is one."""
        here = place(description)
        found = min(((place(shape).distance(here), shape) for shape in self.shapes), default=(math.inf, ""))
        if found[0] > self.radius:
            return None
        return (*found, self.tiles[self.shapes[found[1]]])

    def asdict(self) -> dict[str, Any]:
        return {
            "radius": self.radius,
            "regret": dict(self.regret),
            "shapes": dict(self.shapes),
            "tiles": {name: tile.asdict() for name, tile in self.tiles.items()},
        }

    @classmethod
    def read(cls, raw: Any, kernel: Kernel) -> Portfolio:
        """From a file's content; raises `ConfigError` or what Python raises where it is malformed."""
        tiles = {str(name): kernel.tile_type(**tile) for name, tile in raw["tiles"].items()}
        shapes = {str(shape): str(name) for shape, name in raw["shapes"].items()}
        if len(tiles) > MOST_TILES:
            raise ConfigError(f"portfolio: {len(tiles)} tiles, at most {MOST_TILES}")
        if unknown := set(shapes.values()) - set(tiles):
            raise ConfigError(f"portfolio: no tile is named {', '.join(sorted(unknown))}")
        for shape in shapes:
            place(shape)
        regret = {str(name): float(value) for name, value in raw["regret"].items()}
        return cls(tiles, shapes, float(raw["radius"]), regret)
