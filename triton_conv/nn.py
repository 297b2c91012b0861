"""Modules: torch's own convolution layers, whose calls may run on our kernels.

Each is a subclass of the layer of that name in `torch.nn`, with its constructor, its parameters and its state_dict, and
runs on whichever library `set_backend` and the stored measurements say (see `triton_conv.plan`). Besides, they take

* `activation`: None, "relu", "relu6", "gelu" or "silu", fused into our kernel. It may be set later, and must be where
  a batch norm is folded in: `layer = torch.nn.utils.fuse_conv_bn_eval(layer, norm)`, then `layer.activation = "relu"`.
  Of a layer that has one already, that function gives a wrong result without an error: it cannot see it;
* `padding` as one (before, after) pair a dimension: `Conv1d(8, 8, 4, padding=((3, 0),))` is causal;
* `backend`: "auto", "triton" or "torch" for this layer; None, the default, follows `set_backend`.

Padding modes other than zeros are folded into our kernels' loads: no padded copy is made.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import policy, routing, symbolic
from .arguments import (
    Size,
    activation_name,
    conv_arguments,
    conv_transpose_arguments,
    deform_arguments,
    flat_padding,
    group_count,
    per_dimension,
)
from .errors import ArgumentError, ArgumentTypeError, ArgumentValueError, TritonConvError
from .nn_lectures import (
    ChannelShuffle,
    LocallyConnected1d,
    LocallyConnected2d,
    LocallyConnected3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
    ShuffleConv2d,
)
from .ops import pairs

__all__ = [
    "ChannelShuffle",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeformConv2d",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "LocallyConnected3d",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "ShuffleConv2d",
]


class Routed(nn.Module):
    """What all layers here have besides torch's: an activation and a backend.

    Both have class defaults, so that a layer of torch's whose class becomes one of these is complete.
    """

    activation: str | None = None
    backend: str | None = None

    def _set_routed(self, activation: str | None, backend: str | None) -> None:
        activation_name(activation)
        self.activation = activation
        self.backend = None if backend is None else policy.check_backend(backend)

    def _where(self) -> str:
        return self.backend or policy.current_backend()

    def __prepare_scriptable__(self) -> NoReturn:
        raise ArgumentTypeError(
            f"obj: torch.jit.script cannot compile triton_conv's {type(self).__name__}; trace it, use torch.compile or "
            "torch.export, or revert(model) before"
        )

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f"activation={self.activation}, "
        return f"{super().extra_repr()}, {activation}backend={self._where()}".removeprefix(", ")

    def routed_arguments(self, *args: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
        """The kind of op that `forward` of these arguments calls, and the op's arguments."""
        raise NotImplementedError

    def choose(self, *args: Any, **kwargs: Any) -> policy.Choice:
        """Where `forward` of these arguments would run, and why."""
        try:
            kind, arguments = self.routed_arguments(*args, **kwargs)
        except TritonConvError as error:
            return policy.Choice(policy.TORCH, f"not ours: {error}")
        return routing.choose(kind, arguments, self._where())


class _Conv(Routed, nn.modules.conv._ConvNd):
    """What the forward convolutions share: everything."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        uneven = isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding)
        arguments: Any = (stride, 0 if uneven else padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *arguments)
        self._set_routed(activation, backend)
        if uneven:
            rank = len(self.kernel_size)
            flat = flat_padding(padding, rank, self.stride, self.weight, self.dilation)
            if min(flat) < 0:
                raise ArgumentError(f"padding: negative padding is not supported, got padding={padding}")
            self.padding: Any = tuple(pairs(flat))
            self._reversed_padding_repeated_twice = [p for pair in reversed(pairs(flat)) for p in pair]

    @property
    def _torchs(self) -> bool:
        """Whether torch's own layer takes these options."""
        return self.activation is None and (isinstance(self.padding, str) or isinstance(self.padding[0], int))

    def _arguments(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        return conv_arguments(
            len(self.kernel_size), input, weight, bias, self.stride, self.padding, self.dilation, self.groups,
            self.padding_mode, self.activation,
        )  # fmt: skip

    def routed_arguments(self, input: Tensor) -> tuple[str, tuple[Any, ...]]:
        return "conv", self._arguments(input, self.weight, self.bias)

    def routed_window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.padding_mode, self.activation

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input)) is not None:
            return node  # type: ignore[no-any-return]
        return self._conv_forward(input, self.weight, self.bias)

    # As torch's layers have it, for subclasses to call.
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        where = self._where()
        given = self, input, weight, bias
        known = routing.again(where, *given)
        if isinstance(known, Tensor):
            return known
        if (where == policy.TORCH or known is routing.TORCHS) and self._torchs:
            return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
        try:
            arguments = self._arguments(input, weight, bias)
        except TritonConvError:
            if not self._torchs:
                raise
            # torch takes it after all (a layout of its own), or says what is wrong in its own words.
            return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
        output = routing.conv(arguments, where, given)
        return output if input.dim() == output.dim() else output.squeeze(0)


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` that may run on our kernels; see `triton_conv.nn` and `triton_conv.conv1d`."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` that may run on our kernels; see `triton_conv.nn` and `triton_conv.conv2d`."""


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` that may run on our kernels; see `triton_conv.nn` and `triton_conv.conv3d`."""


class _ConvTranspose(Routed, nn.modules.conv._ConvTransposeNd):
    """What the transposed convolutions share: everything."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # type: ignore[call-arg,arg-type]  # fmt: skip
        self._set_routed(activation, backend)

    def _arguments(self, input: Tensor, output_size: list[int] | None = None) -> tuple[Any, ...]:
        rank = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        return conv_transpose_arguments(
            rank, input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups,
            self.dilation, self.activation,
        )  # fmt: skip

    def routed_arguments(self, input: Tensor, output_size: list[int] | None = None) -> tuple[str, tuple[Any, ...]]:
        return "conv", self._arguments(input, output_size)

    def routed_window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.output_padding, self.dilation, self.groups, self.activation

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if type(input) is not Tensor and (node := symbolic.leaf(self, input, output_size)) is not None:
            return node  # type: ignore[no-any-return]
        where = self._where()
        given = (self, input, self.weight, self.bias) if output_size is None else None
        known = given and routing.again(where, *given)
        if isinstance(known, Tensor):
            return known
        if (where == policy.TORCH or known is routing.TORCHS) and self.activation is None:
            return super().forward(input, output_size)  # type: ignore[no-any-return,misc]
        try:
            arguments = self._arguments(input, output_size)
        except TritonConvError:
            if self.activation is not None:
                raise
            return super().forward(input, output_size)  # type: ignore[no-any-return,misc]
        output = routing.conv(arguments, where, given)
        return output if input.dim() == output.dim() else output.squeeze(0)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that may run on our kernels; see `triton_conv.nn`."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that may run on our kernels; see `triton_conv.nn`."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that may run on our kernels; see `triton_conv.nn`."""


class DeformConv2d(Routed):
    """Deformable convolution: `torchvision.ops.DeformConv2d`, with its constructor, parameters and state_dict.

    `forward(input, offset, mask=None)` takes what `triton_conv.deform_conv2d` takes. With `predict=True` the layer
    takes the input alone: a convolution `conv_offset` of the same kernel, stride, padding and dilation predicts
    offsets and, through a sigmoid, the mask. It begins at zero, so that the layer begins as a plain convolution times
    one half (Zhu et al., arXiv:1811.11168, section 3.2), and has the names that other libraries give it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as torchvision's.
        predict: whether the layer predicts offsets and mask itself.
        offset_groups: with `predict`, into how many parts, with offsets of their own, the input channels fall.
        backend: as in `triton_conv.nn`. "auto" also takes our kernel where torchvision is not installed.

    Raises:
        ArgumentValueError (a ValueError): groups or offset_groups are not positive, or do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        predict: bool = False,
        offset_groups: int = 1,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, count in (("groups", groups), ("offset_groups", offset_groups)):
            if group_count(count, name) <= 0:
                raise ArgumentValueError(f"{name} must be a positive integer, got {count}")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ArgumentValueError(
                    f"{name} must be divisible by groups, got {name}={channels} and groups={groups}"
                )
        if in_channels % offset_groups:
            raise ArgumentValueError(
                f"in_channels must be divisible by offset_groups, got in_channels={in_channels} and "
                f"offset_groups={offset_groups}"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_dimension("kernel_size", kernel_size, 2)
        self.stride = per_dimension("stride", stride, 2)
        self.padding = per_dimension("padding", padding, 2)
        self.dilation = per_dimension("dilation", dilation, 2)
        self.offset_groups = offset_groups
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **made))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **made)) if bias else None)
        self.conv_offset: Conv2d | None = None
        if predict:
            geometry: Any = (self.kernel_size, self.stride, self.padding, self.dilation)
            outputs = 3 * offset_groups * math.prod(self.kernel_size)
            self.conv_offset = Conv2d(in_channels, outputs, *geometry, backend=backend, **made)
        self._set_routed(None, backend)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torchvision's initialisation; that of the predictor is zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None and (fan_in := math.prod(self.weight.shape[1:])):
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)
        if self.conv_offset is not None:
            for parameter in self.conv_offset.parameters():
                nn.init.zeros_(parameter)

    def _sampled(self, input: Tensor, offset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Offset and mask, given or predicted."""
        # A layer of torchvision's whose class became this one has no predictor.
        predictor = getattr(self, "conv_offset", None)
        if predictor is not None:
            if offset is not None or mask is not None:
                raise TypeError("DeformConv2d with predict=True takes the input alone: it makes offset and mask itself")
            predicted = predictor(input)
            offset, mask = predicted.split([2 * predicted.shape[1] // 3, predicted.shape[1] // 3], 1)
            return offset, mask.sigmoid()
        if offset is None:
            raise TypeError("DeformConv2d without predict=True takes an offset: forward(input, offset, mask=None)")
        return offset, mask

    def _arguments(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return deform_arguments(
            2, input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def routed_arguments(
        self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[str, tuple[Any, ...]]:
        return "deform_conv", self._arguments(input, *self._sampled(input, offset, mask))

    def routed_window(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`(N, in_channels, H, W)` -> `(N, out_channels, H_out, W_out)`; offset and mask as in `deform_conv2d`."""
        if type(input) is not Tensor and (node := symbolic.leaf(self, input, offset, mask)) is not None:
            return node  # type: ignore[no-any-return]
        offset, mask = self._sampled(input, offset, mask)
        where, given = self._where(), (self, input, offset, mask, self.weight, self.bias)
        known = routing.again(where, *given)
        if isinstance(known, Tensor):
            return known
        arguments = self._arguments(input, offset, mask)
        if known is routing.TORCHS:
            return routing.torch_deform_conv(*arguments)
        return routing.deform_conv(arguments, where, given)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        zeros = (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("offset_groups", 1))
        parts += [f"{name}={getattr(self, name)}" for name, usual in zeros if getattr(self, name, usual) != usual]
        if self.bias is None:
            parts.append("bias=False")
        if getattr(self, "conv_offset", None) is not None:
            parts.append("predict=True")
        return ", ".join((*parts, f"backend={self._where()}"))
