"""Which input feeds which output, along one dimension: the arithmetic of `triton-conv explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ArgumentError
from ..geometry import ConvGeometry
from .formulas import transposed as as_direct
from .layers import aligned


@dataclass(frozen=True)
class Link:
    """Output `output` reads `source` with weight `tap`; where it lies beyond the border, `at` is outside the input.

    `source` is the input that stands at `at`: itself, the one that the border repeats, or None for a zero.
    """

    output: int
    tap: int
    at: int
    source: int | None


@dataclass(frozen=True)
class Dimension:
    """One dimension of a convolution, forward or transposed, and all of its links."""

    geometry: ConvGeometry
    links: tuple[Link, ...]

    @property
    def size(self) -> int:
        return self.geometry.in_size[2]

    @property
    def out_size(self) -> int:
        return self.geometry.out_size[2]

    def lines(self) -> list[str]:
        """The arithmetic in words and numbers."""
        g = self.geometry
        k, s, d = g.kernel[2], g.stride[2], g.dilation[2]
        before, after = g.padding[2]
        if not g.transposed:
            same = "" if g.padding_mode == "zeros" else f", its border {g.padding_mode}"
            return [
                f"input {self.size}, kernel {k}, stride s = {s}, padding {before} before and {after} after{same}, "
                f"dilation d = {d}",
                f"the kernel spans (k - 1) d + 1 = {g.extent[2]}: {d - 1} zeros between its elements",
                f"output floor(({self.size} + {before} + {after} - {g.extent[2]}) / {s}) + 1 = {self.out_size}",
            ]
        extra = g.output_padding[2]
        direct = as_direct(self.size, k, s, before, extra, d)
        inner = f"({self.size} - 1) {s} + {g.extent[2]} - 2 x {before} + {extra}"
        return [
            f"input i = {self.size}, kernel k = {k}, stride s = {s}, padding p = {before}, output padding {extra}, "
            f"dilation {d}",
            "the same as a direct convolution with the kernel mirrored, over the input with "
            f"z = s - 1 = {direct.zeros} zeros inserted between its elements",
            f"border p' = k - p - 1 = {direct.border}"
            + (f" (after: {direct.border_after})" if direct.border_after != direct.border else "")
            + (f", with k the extent {g.extent[2]}" if d > 1 else "")
            + f", stride s' = {direct.stride}",
            f"output (i - 1) s + k - 2 p = {inner} = {self.out_size}",
        ]

    def table(self) -> str:
        """A line an output: the inputs that it reads, and with which weights."""
        read: list[list[str]] = [[] for _ in range(self.out_size)]
        for link in self.links:
            folded = "" if link.source == link.at else f" (for x[{link.at}])"
            read[link.output].append(f"w[{link.tap}] " + ("0" if link.source is None else f"x[{link.source}]{folded}"))
        rows = [("output", "reads")]
        rows += [(f"y[{output}]", " + ".join(parts) or "nothing") for output, parts in enumerate(read)]
        return aligned(rows, left=2)


def fold(at: int, size: int, mode: str) -> int | None:
    """The input that stands at a place beyond the border; None where a zero does."""
    if 0 <= at < size:
        return at
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(at, 0), size - 1)
    if mode == "circular":
        return at % size
    return -at if at < 0 else 2 * (size - 1) - at


def explain(
    size: int, kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1, *,
    output_padding: int = 0, padding_mode: str = "zeros", transposed: bool = False,
) -> Dimension:  # fmt: skip
    """The links of one dimension; arguments as in `conv1d` and `conv_transpose1d`, checked as there."""
    if transposed and padding_mode != "zeros":
        raise ArgumentError(f"padding_mode: a transposed convolution has no border to fill, got {padding_mode!r}")
    g = ConvGeometry.of(
        (1, 1, size), (1, 1, kernel), (stride,), (padding,), (dilation,), 1,
        transposed=transposed, output_padding=(output_padding,), padding_mode=padding_mode,
    )  # fmt: skip
    links = []
    for output in range(g.out_size[2]):
        for tap in range(kernel):
            if transposed:
                # y[o] sums x[i] w[tap] over o + p = i s + tap d.
                at, rest = divmod(output + padding[0] - tap * dilation, stride)
                if rest == 0 and 0 <= at < size:
                    links.append(Link(output, tap, at, at))
            else:
                at = output * stride - padding[0] + tap * dilation
                links.append(Link(output, tap, at, fold(at, size, padding_mode)))
    return Dimension(g, tuple(links))


def explain_all(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]],
    dilation: Sequence[int], output_padding: Sequence[int], padding_mode: str, transposed: bool,
) -> list[Dimension]:  # fmt: skip
    """Each dimension of a convolution; several that are alike only once."""
    each = dict.fromkeys(zip(sizes, kernel, stride, padding, dilation, output_padding, strict=True))
    return [
        explain(i, k, s, p, d, output_padding=o, padding_mode=padding_mode, transposed=transposed)
        for i, k, s, p, d, o in each
    ]
