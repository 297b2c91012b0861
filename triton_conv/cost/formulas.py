"""The formulas of convolution arithmetic, each with a name: what a layer holds, multiplies, reads and sees.

Sizes are in elements. `FORMULAS` lists all of them by name, with the row of the lectures that each one comes from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from ..errors import ArgumentError, WorkloadError

Padding = int | str | tuple[int, int]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Formula:
    """A formula: its function, the row of the lectures (L1 to L13), and how it is written."""

    row: str
    text: str
    function: Callable[..., Any]

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)


FORMULAS: dict[str, Formula] = {}


def _formula(row: str, text: str) -> Callable[[_F], _F]:
    def enter(function: _F) -> _F:
        FORMULAS[function.__name__] = Formula(row, text, function)
        return function

    return enter


def evaluate(name: str, **arguments: Any) -> Any:
    """The value of a formula by name; a name or an argument that it does not have is a `WorkloadError`."""
    if name not in FORMULAS:
        raise WorkloadError(f"formula: {name!r} is not known; choose one of {', '.join(FORMULAS)}")
    try:
        inspect.signature(FORMULAS[name].function).bind(**arguments)
    except TypeError as error:
        raise WorkloadError(
            f"formula: {name} takes {', '.join(FORMULAS[name].arguments)}, got {', '.join(arguments) or 'nothing'} "
            f"({error})"
        ) from error
    try:
        return FORMULAS[name].function(**arguments)
    except (TypeError, ZeroDivisionError) as error:
        given = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
        raise WorkloadError(f"formula: {name} has no value for {given} ({error})") from error


def _divided(name: str, value: int, groups: int) -> int:
    if groups < 1 or value % groups:
        raise ArgumentError(f"groups: {groups} groups do not divide {name}={value}")
    return value // groups


# ---------------------------------------------------------------------------------------- products and parameters


@_formula("L1", "K1 K2 CI CO W H")
def standard_macs(k1: int, k2: int, ci: int, co: int, w: int, h: int) -> int:
    """Products of a standard convolution with a k1 x k2 filter whose output is w x h."""
    return k1 * k2 * ci * co * w * h


@_formula("L4", "(M p q + 1) K")
def parameters(m: int, p: int, q: int, k: int) -> int:
    """Parameters of a standard convolution: k filters of m x p x q weights, and a bias each."""
    return (m * p * q + 1) * k


@_formula("L5", "(M/g p q + 1) K")
def grouped_parameters(m: int, p: int, q: int, k: int, g: int) -> int:
    """Parameters of a grouped convolution: each filter sees the m/g channels of its group."""
    _divided("k", k, g)
    return (_divided("m", m, g) * p * q + 1) * k


@_formula("L5", "p q M/g K W H")
def grouped_macs(m: int, p: int, q: int, k: int, g: int, w: int, h: int) -> int:
    """Products of a grouped convolution: a g-th of the standard one's."""
    _divided("k", k, g)
    return p * q * _divided("m", m, g) * k * w * h


@_formula("L5", "(s - 1) M/g + m'")
def group_channel(s: int, m: int, g: int, m_prime: int) -> int:
    """Which of m input channels is number m' (from 1) of group s (from 1)."""
    of_group = _divided("m", m, g)
    if not (1 <= s <= g and 1 <= m_prime <= of_group):
        raise ArgumentError(f"s, m_prime: expected 1..{g} and 1..{of_group}, got {s} and {m_prime}")
    return (s - 1) * of_group + m_prime


@_formula("L6", "(p q + 1) M")
def depthwise_parameters(m: int, p: int, q: int) -> int:
    """Parameters of a depthwise convolution, where M = K = g."""
    return grouped_parameters(m, p, q, m, m)


@_formula("L6", "p q M W H")
def depthwise_macs(m: int, p: int, q: int, w: int, h: int) -> int:
    """Products of a depthwise convolution."""
    return grouped_macs(m, p, q, m, m, w, h)


@_formula("L7", "K1 K2 CI W H + CI W H CO")
def separable_macs(k1: int, k2: int, ci: int, co: int, w: int, h: int) -> int:
    """Products of a depthwise convolution and the 1x1 convolution after it."""
    return depthwise_macs(ci, k1, k2, w, h) + standard_macs(1, 1, ci, co, w, h)


@_formula("L7", "CI K1 K2 + CI CO")
def separable_weights(k1: int, k2: int, ci: int, co: int) -> int:
    """Weights of the two, without biases."""
    return ci * k1 * k2 + ci * co


@_formula("L7", "1/CO + 1/(K1 K2)")
def separable_ratio(k1: int, k2: int, co: int) -> Fraction:
    """Products of the separable convolution for each one of the standard convolution."""
    return Fraction(1, co) + Fraction(1, k1 * k2)


@_formula("L12", "K1 K2 CI CO + 2 CO against CI K1 K2 + 2 CI + CI CO + 2 CO")
def mobile_block_parameters(k1: int, k2: int, ci: int, co: int) -> tuple[int, int]:
    """Parameters of MobileNet's standard and separable blocks, batch norms (two a channel) included."""
    return k1 * k2 * ci * co + 2 * co, separable_weights(k1, k2, ci, co) + 2 * ci + 2 * co


# --------------------------------------------------------------------------------------------- sharing of parameters


@_formula("L11", "d1 w h d2")
def full_sharing(d1: int, w: int, h: int, d2: int) -> int:
    """Weights of a convolution: one w x h filter for each pair of channels, shared by all outputs."""
    return d1 * w * h * d2


@_formula("L11", "d1 w h d2 w2 h2")
def partial_sharing(d1: int, w: int, h: int, d2: int, w2: int, h2: int) -> int:
    """Weights of a locally connected layer: a filter for each of the w2 x h2 outputs."""
    return full_sharing(d1, w, h, d2) * w2 * h2


@_formula("L11", "d1 w1 h1 d2 w2 h2")
def no_sharing(d1: int, w1: int, h1: int, d2: int, w2: int, h2: int) -> int:
    """Weights of a fully connected layer: one for each pair of an input and an output."""
    return d1 * w1 * h1 * d2 * w2 * h2


@_formula("L11", "N_lc / N_c = w2 h2, N_fc / N_lc = w1 h1 / (w h), N_fc / N_c = w1 h1 w2 h2 / (w h)")
def sharing_ratios(w1: int, h1: int, w: int, h: int, w2: int, h2: int) -> tuple[Fraction, Fraction, Fraction]:
    """How many times the weights of the one before each step of sharing less takes, and of all of them."""
    return Fraction(w2 * h2), Fraction(w1 * h1, w * h), Fraction(w1 * h1 * w2 * h2, w * h)


# --------------------------------------------------------------------------------------------------------------- sizes


def pads(size: int, kernel: int, stride: int, padding: Padding, dilation: int) -> tuple[int, int]:
    """(before, after) of a padding; an odd "same" has the larger half after, as torch has it."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        out = -(-size // stride)
        total = max((out - 1) * stride + dilated_extent(kernel, dilation) - size, 0)
        return total // 2, total - total // 2
    if isinstance(padding, str):
        raise ArgumentError(f"padding: expected 'valid', 'same', an int or (before, after), got {padding!r}")
    return (padding, padding) if isinstance(padding, int) else padding


@_formula("L2", "floor((H + before + after - h_d) / s) + 1; VALID: H - h + 1; SAME: ceil(H / s)")
def output_size(size: int, kernel: int, stride: int = 1, padding: Padding = 0, dilation: int = 1) -> int:
    """Outputs along one dimension. `padding`: an int, (before, after), "valid" (none) or "same" (ceil(size / stride)).

    The border's values, zeros or the mirrored image, do not change the size.
    """
    if stride < 1:
        raise ArgumentError(f"stride: expected a positive int, got {stride}")
    before, after = pads(size, kernel, stride, padding, dilation)
    out = (size + before + after - dilated_extent(kernel, dilation)) // stride + 1
    if out < 1:
        raise ArgumentError(
            f"kernel: a kernel of {dilated_extent(kernel, dilation)} does not fit in {size} + {before} + {after}"
        )
    return out


@_formula("L3", "r = 1 + sum_l (k_l - 1) prod_(i<l) s_i")
def receptive_field(kernels: Sequence[int], strides: Sequence[int] = (), dilations: Sequence[int] = ()) -> int:
    """Inputs along one dimension that a neuron behind a stack of layers sees; strides and dilations of 1 by default."""
    size, jump = 1, 1
    for i, kernel in enumerate(kernels):
        size += (dilated_extent(kernel, dilations[i] if dilations else 1) - 1) * jump
        jump *= strides[i] if strides else 1
    return size


@_formula("L9", "(k - 1) d + 1")
def dilated_extent(kernel: int, dilation: int) -> int:
    """What a filter spans with d - 1 zeros between its elements."""
    return (kernel - 1) * dilation + 1


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution along one dimension as the direct convolution it is the same as.

    `zeros` are inserted between neighbouring inputs, `border` added before and `border_after` behind (less than nothing
    is cut off), and a convolution of `stride` 1 over the result has `size` outputs.
    """

    zeros: int
    border: int
    border_after: int
    stride: int
    size: int


@_formula("L8", "z = s - 1, p' = k - p - 1, s' = 1, output (i - 1) s + k - 2 p")
def transposed(
    size: int, kernel: int, stride: int = 1, padding: int = 0, output_padding: int = 0, dilation: int = 1
) -> Transposed:
    """The direct convolution that a transposed one is; with dilation, k stands for the dilated extent."""
    extent = dilated_extent(kernel, dilation)
    border = extent - padding - 1
    out = (size - 1) * stride + extent - 2 * padding + output_padding
    if out < 0:
        raise ArgumentError(f"padding: {padding} cuts more off than there is of size {size}, stride {stride}")
    return Transposed(stride - 1, border, border + output_padding, 1, out)


# ------------------------------------------------------------------------------------------------- deformable, shuffle


@_formula("L10", "2 p q")
def deformable_offsets(p: int, q: int) -> int:
    """Learned offsets of one output pixel of a deformable convolution: y and x for each tap."""
    return 2 * p * q


@_formula("L10", "max(0, 1 - |a - s|) max(0, 1 - |b - t|)")
def bilinear_weight(a: float, b: float, s: float, t: float) -> float:
    """The weight of pixel (a, b) in a sample at (s, t)."""
    return max(0.0, 1 - abs(a - s)) * max(0.0, 1 - abs(b - t))


@_formula("L13", "j g + s for channel s C/g + j")
def shuffled_channel(channel: int, channels: int, groups: int) -> int:
    """Where a channel (from 0) of a grouped convolution's output stands after the shuffle."""
    of_group = _divided("channels", channels, groups)
    return channel % of_group * groups + channel // of_group


@_formula("L13", "h w (2 c m / g + 9 m)")
def shuffle_unit_macs(h: int, w: int, c: int, m: int, g: int) -> int:
    """Products of ShuffleNet's unit: grouped 1x1 to m channels, depthwise 3x3, grouped 1x1 back to c channels."""
    _divided("m", m, g)
    return h * w * (2 * _divided("c", c, g) * m + 9 * m)


@_formula("L13", "h w (2 c m + 9 m^2 / g); ResNet: g = 1, ResNeXt: g > 1")
def bottleneck_macs(h: int, w: int, c: int, m: int, g: int = 1) -> int:
    """Products of the unit that it is compared with: 1x1 to m channels, 3x3 in g groups, 1x1 back to c channels."""
    return h * w * (2 * c * m + 9 * m * _divided("m", m, g))
