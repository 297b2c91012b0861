"""Modules of the layers that torch has none of: separable, shuffled and locally connected convolution.

Each one always runs our kernels. Parameters are drawn as torch's convolutions draw theirs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import lectures, policy, routing, symbolic
from .arguments import activation_name, flat_padding, group_count, per_dimension
from .autograd_lectures import SeparableCall
from .eager import traced
from .errors import ArgumentError
from .geometry import ConvGeometry
from .ops import pairs
from .problem_lectures import local_weight_strides

__all__ = [
    "ChannelShuffle",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "LocallyConnected3d",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "ShuffleConv2d",
]


def _draw(parameter: Tensor | None, fan_in: int) -> None:
    """Uniform within 1 / sqrt(fan_in), as `torch.nn.Conv2d` draws weights and biases."""
    if parameter is not None and fan_in:
        nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


# ---------------------------------------------------------------------------------------------------------- shuffled


class ChannelShuffle(nn.Module):
    """`triton_conv.channel_shuffle` as a layer; `torch.nn.ChannelShuffle` for any rank and memory format."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = group_count(groups)
        if self.groups < 1:
            raise ArgumentError(f"groups: expected a positive int, got {groups}")

    def extra_repr(self) -> str:
        return f"groups={self.groups}"

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input)) is not None:
            return node  # type: ignore[no-any-return]
        return lectures.channel_shuffle(input, self.groups)


class ShuffleConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by `torch.nn.ChannelShuffle(groups)`, in one kernel; see `shuffle_conv2d`.

    Parameters and state_dict are the convolution's. A batch norm behind it sees shuffled channels: do not fold it into
    this layer by `torch.nn.utils.fuse_conv_bn_eval`, which takes them for the convolution's and raises nothing.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ArgumentError(f"padding_mode: ShuffleConv2d has a border of zeros alone, got {self.padding_mode!r}")
        activation_name(activation)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input)) is not None:
            return node  # type: ignore[no-any-return]
        padding: Any = self.padding
        return lectures.shuffle_conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, activation=self.activation
        )


# --------------------------------------------------------------------------------------------------------- separable


class _Separable(nn.Module):
    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        mid_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        mid_activation: str | None = None,
    ) -> None:
        super().__init__()
        kernel = per_dimension("kernel_size", kernel_size, self.rank)
        if group_count(depth_multiplier, "depth_multiplier") < 1:
            raise ArgumentError(f"depth_multiplier: expected a positive int, got {depth_multiplier}")
        middle = in_channels * depth_multiplier
        activation_name(activation)
        activation_name(mid_activation, "mid_activation")
        # What is remembered of calls is compared with these: they are not to change by parts.
        self.stride, self.padding, self.dilation = (
            tuple(given) if isinstance(given, list) else given for given in (stride, padding, dilation)
        )
        self.activation, self.mid_activation = activation, mid_activation

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.depthwise_weight = parameter(True, middle, 1, *kernel)
        self.pointwise_weight = parameter(True, out_channels, middle, *(1,) * self.rank)
        self.register_parameter("mid_bias", parameter(mid_bias, middle))
        self.register_parameter("bias", parameter(bias, out_channels))
        steps = per_dimension("stride", self.stride, self.rank)
        spread = per_dimension("dilation", self.dilation, self.rank)
        assert self.depthwise_weight is not None
        flat_padding(self.padding, self.rank, steps, self.depthwise_weight, spread)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, each pair as a convolution of its own would."""
        assert self.depthwise_weight is not None and self.pointwise_weight is not None
        taps = math.prod(self.depthwise_weight.shape[2:])
        for name, fan_in in (("depthwise_weight", taps), ("mid_bias", taps)):
            _draw(getattr(self, name), fan_in)
        for name in ("pointwise_weight", "bias"):
            _draw(getattr(self, name), self.depthwise_weight.shape[0])

    @classmethod
    def of(
        cls, depthwise: Any, pointwise: Any, mid_norm: Any = None, norm: Any = None, *,
        activation: str | None = None, mid_activation: str | None = None,
    ) -> Any:  # fmt: skip
        """The same as two convolutions of `torch.nn`, with the batch norm behind each folded in: for inference.

        Raises `ArgumentError` if the layers are not a depthwise convolution and a 1x1 that follows it, or do more.
        """
        for name, layer in (("depthwise", depthwise), ("pointwise", pointwise)):
            if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or isinstance(layer, ShuffleConv2d):
                raise ArgumentError(f"{name}: expected a convolution such as torch.nn.Conv{cls.rank}d, got {layer}")
            if getattr(layer, "activation", None) is not None:
                raise ArgumentError(
                    f"{name}: expected a layer without an activation, which belongs behind its norm: give it as "
                    f"activation= or mid_activation=; got {layer}"
                )
        if depthwise.groups != depthwise.in_channels or depthwise.padding_mode != "zeros":
            raise ArgumentError(f"depthwise: expected one channel a group and a border of zeros, got {depthwise}")
        if (
            math.prod((*pointwise.kernel_size, *pointwise.stride)) != 1
            or not (isinstance(pointwise.padding, str) or set(pointwise.padding) <= {0, (0, 0)})
            or pointwise.groups != 1
            or pointwise.in_channels != depthwise.out_channels
        ):
            raise ArgumentError(
                f"pointwise: expected a 1x1 from {depthwise.out_channels} channels, of stride 1 and without padding, "
                f"got {pointwise}"
            )
        first, mid_bias = _folded(depthwise, mid_norm)
        second, bias = _folded(pointwise, norm)
        made = cls(
            depthwise.in_channels, pointwise.out_channels, depthwise.kernel_size, depthwise.stride, depthwise.padding,
            depthwise.dilation, depthwise.out_channels // depthwise.in_channels, bias is not None,
            mid_bias is not None, first.device, first.dtype, activation=activation, mid_activation=mid_activation,
        )  # fmt: skip
        with torch.no_grad():
            for name, value in (
                ("depthwise_weight", first), ("pointwise_weight", second), ("mid_bias", mid_bias), ("bias", bias),
            ):  # fmt: skip
                if value is not None:
                    getattr(made, name).copy_(value)
        return made.train(depthwise.training)

    def extra_repr(self) -> str:
        assert self.depthwise_weight is not None and self.pointwise_weight is not None
        kernel = tuple(self.depthwise_weight.shape[2:])
        return (
            f"{self.depthwise_weight.shape[0]}, {self.pointwise_weight.shape[0]}, kernel_size={kernel}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}"
        )

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input)) is not None:
            return node  # type: ignore[no-any-return]
        depthwise, pointwise, mid_bias, bias = self.depthwise_weight, self.pointwise_weight, self.mid_bias, self.bias
        given = self, input, depthwise, pointwise, mid_bias, bias
        known = routing.again(policy.OURS, *given)
        if isinstance(known, Tensor):
            return known
        all_of_it: tuple[Any, ...] = (input, depthwise, pointwise, bias, *self.routed_window(), mid_bias)
        if not isinstance(input, Tensor):
            return lectures._separable(self.rank, *all_of_it)
        arguments = lectures.separable_arguments(self.rank, *all_of_it)
        if not traced():
            routing.remember_ours(SeparableCall, arguments[:5], arguments[5:], policy.OURS, given)
        return lectures.run_separable(self.rank, input, arguments)

    def routed_window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.activation, self.mid_activation


def _folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with the batch norm behind it folded in."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if norm is None:
        return weight, bias
    if norm.running_var is None:
        raise ArgumentError(f"norm: expected one with running statistics, got {norm}")
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
    shift = (0 if bias is None else bias) - norm.running_mean
    shift = shift * scale + (0 if norm.bias is None else norm.bias.detach())
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


class SeparableConv1d(_Separable):
    """Depthwise separable convolution of `(N, C, L)`; see `SeparableConv2d`."""

    rank = 1


class SeparableConv2d(_Separable):
    """A depthwise convolution and a 1x1 in one layer, one kernel where that saves time; see `separable_conv2d`.

    Equivalent to `Sequential(Conv2d(C, C * depth_multiplier, kernel_size, stride, padding, dilation, groups=C), Conv2d(
    C * depth_multiplier, out_channels, 1))`, the activations behind each. `of` makes one of two such layers.

    Args:
        in_channels, out_channels, kernel_size: as `torch.nn.Conv2d`'s; the kernel is the depthwise convolution's.
        stride, padding, dilation: the depthwise convolution's, as in `separable_conv2d`.
        depth_multiplier: outputs of the depthwise convolution for each input channel.
        bias, mid_bias: whether the 1x1, and the depthwise convolution, have one.
        activation, mid_activation: None, "relu", "relu6", "gelu" or "silu", of the result and of what lies between.

    Shapes: `(N, in_channels, H, W)` -> `(N, out_channels, H_out, W_out)`, or both without N.
    """

    rank = 2


class SeparableConv3d(_Separable):
    """Depthwise separable convolution of `(N, C, D, H, W)`; see `SeparableConv2d`."""

    rank = 3


# -------------------------------------------------------------------------------------------------- locally connected


class _Local(nn.Module):
    rank: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Any,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        rank = self.rank
        size = per_dimension("input_size", input_size, rank)
        kernel = per_dimension("kernel_size", kernel_size, rank)
        if group_count(groups) < 1 or in_channels % groups:
            raise ArgumentError(f"groups: {groups} groups do not divide in_channels={in_channels}")
        filters = (out_channels, in_channels // groups, *kernel)
        one = torch.empty(filters, device="meta")
        stride = per_dimension("stride", stride, rank)
        dilation = per_dimension("dilation", dilation, rank)
        flat = flat_padding(padding, rank, stride, one, dilation)
        geometry = ConvGeometry.of((1, in_channels, *size), filters, stride, pairs(flat), dilation, groups)
        out = geometry.spatial(geometry.out_size)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (*out, *filters)
        # Input channels innermost, as forward and gradients read them in whole lines.
        strides = local_weight_strides(shape, channels_last=True)
        self.weight = nn.Parameter(torch.empty_strided(shape, strides, device=device, dtype=dtype))
        made = nn.Parameter(torch.empty(out_channels, *out, device=device, dtype=dtype)) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew; each filter reads as much as a convolution's."""
        fan_in = math.prod(self.weight.shape[self.rank + 1 :])
        _draw(self.weight, fan_in)
        _draw(self.bias, fan_in)

    def extra_repr(self) -> str:
        rank = self.rank
        c_out, c_group, *kernel = self.weight.shape[rank:]
        return (
            f"{c_group * self.groups}, {c_out}, out_size={tuple(self.weight.shape[:rank])}, "
            f"kernel_size={tuple(kernel)}, stride={self.stride}, padding={self.padding}"
        )

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input)) is not None:
            return node  # type: ignore[no-any-return]
        return lectures._local(
            self.rank, input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class LocallyConnected1d(_Local):
    """A filter of its own for every output of `(N, C, L)`; see `LocallyConnected2d`."""

    rank = 1


class LocallyConnected2d(_Local):
    """A convolution whose filters are not shared between pixels; see `locally_connected2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as `torch.nn.Conv2d`'s.
        input_size: height and width of what it will be given, an int if they are equal: there is a filter for each
            output.

    Raises:
        ArgumentError (a RuntimeError): groups do not divide in_channels, or the kernel does not fit in the input.

    Shapes: `(N, in_channels, H, W)` -> `(N, out_channels, H_out, W_out)`, or both without N. `weight` is
    `(H_out, W_out, out_channels, in_channels/groups, KH, KW)`, `bias` `(out_channels, H_out, W_out)`.
    """

    rank = 2


class LocallyConnected3d(_Local):
    """A filter of its own for every output of `(N, C, D, H, W)`; see `LocallyConnected2d`."""

    rank = 3
