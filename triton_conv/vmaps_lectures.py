"""`torch.func.vmap` of shuffled, separable and locally connected convolution, by the same means as in `vmaps`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import autograd_lectures, vmaps
from .vmaps import Dims, Result, as_channels, as_images, first


def _shuffle_conv(
    info: Any, dims: Dims, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: int, activation: str,
) -> Result:  # fmt: skip
    size, (x, w, b, *_) = info.batch_size, dims
    window = stride, padding, dilation
    if w is None and b is None:
        output = autograd_lectures.shuffle_conv(as_images(input, x, size), weight, bias, *window, groups, activation)
        return output.unflatten(0, (size, -1)), 0
    tensors = as_channels(input, x, size), as_images(weight, w, size), as_images(bias, b, size)
    output = autograd_lectures.shuffle_conv(*tensors, *window, size * groups, activation)
    # Channel j of group s of call b is at (j * size + b) * groups + s.
    return output.unflatten(1, (-1, size, groups)).movedim(2, 0).flatten(2, 3), 0


def _separable_conv(
    info: Any, dims: Dims, input: Tensor, depthwise: Tensor, pointwise: Tensor, mid_bias: Tensor | None,
    bias: Tensor | None, *arguments: Any,
) -> Result:  # fmt: skip
    size, (x, d, p, m, b, *_) = info.batch_size, dims
    if all(dim is None for dim in (d, p, m, b)):
        images = as_images(input, x, size)
        output = autograd_lectures.separable_conv(images, depthwise, pointwise, mid_bias, bias, *arguments)
        return output.unflatten(0, (size, -1)), 0
    # Filters of its own for each call make groups of the 1x1, which the one kernel has not.
    channels = input.shape[1 if x is None or x > 1 else 2]
    halves = autograd_lectures.separable_halves(arguments, channels)
    mid, mid_dim = vmaps.conv_of_batch(info, (x, d, m), input, depthwise, mid_bias, *halves[0])
    return vmaps.conv_of_batch(info, (mid_dim, p, b), mid, pointwise, bias, *halves[1])


def _filters(weight: Tensor, dim: int | None, size: int, rank: int) -> Tensor:
    """`(*out_size, c_out, c_in/groups, *kernel)` in a batch, with its output channels those of all calls."""
    found = first(weight, dim, size)
    assert found is not None
    return found.movedim(0, rank).flatten(rank, rank + 1)


def _local_conv(
    info: Any, dims: Dims, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: int,
) -> Result:  # fmt: skip
    size, (x, w, b, *_) = info.batch_size, dims
    window = stride, padding, dilation
    if w is None and b is None:
        output = autograd_lectures.local_conv(as_images(input, x, size), weight, bias, *window, groups)
        return output.unflatten(0, (size, -1)), 0
    filters, biases = _filters(weight, w, size, len(stride)), as_images(bias, b, size)
    output = autograd_lectures.local_conv(as_channels(input, x, size), filters, biases, *window, size * groups)
    return output.unflatten(1, (size, -1)), 1


def _local_input_gradient(
    info: Any, dims: Dims, grad_output: Tensor, weight: Tensor, size_of_input: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, channels_last: bool,
) -> Result:  # fmt: skip
    size, (y, w, *_) = info.batch_size, dims
    window = size_of_input, stride, padding, dilation
    call = autograd_lectures.local_conv_input_gradient
    if w is None:
        return call(as_images(grad_output, y, size), weight, *window, groups, channels_last).unflatten(0, (size, -1)), 0
    filters = _filters(weight, w, size, len(stride))
    result = call(as_channels(grad_output, y, size), filters, *window, size * groups, channels_last)
    return result.unflatten(1, (size, -1)), 1


def _local_weight_gradient(
    info: Any, dims: Dims, input: Tensor, grad_output: Tensor, kernel_size: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, channels_last: bool,
) -> Result:  # fmt: skip
    size, (x, y, *_) = info.batch_size, dims
    tensors = as_channels(input, x, size), as_channels(grad_output, y, size)
    window = kernel_size, stride, padding, dilation
    result = autograd_lectures.local_conv_weight_gradient(*tensors, *window, size * groups, channels_last)
    return result.unflatten(len(stride), (size, -1)), len(stride)


vmaps.register(
    autograd_lectures,
    shuffle_conv=_shuffle_conv,
    separable_conv=_separable_conv,
    local_conv=_local_conv,
    local_conv_input_gradient=_local_input_gradient,
    local_conv_weight_gradient=_local_weight_gradient,
)
