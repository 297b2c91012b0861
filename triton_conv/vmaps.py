"""`torch.func.vmap` of the ops: one call of the same op over all of a batch of calls.

Where the weight is common, the batch becomes more images. Where each call has a weight of its own (per-sample
gradients, ensembles) it becomes more groups, which do not mix either. An op with no rule here has none in torch's
sense, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import autograd, ops

Dims = tuple[Any, ...]
# A result and the dimension of the batch in it.
Result = tuple[Any, Any]


def first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with the batch as its first dimension, expanded if it has none."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def as_images(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """`(N, ...)` in a batch as `(size * N, ...)`."""
    found = first(tensor, dim, size)
    return None if found is None else found.flatten(0, 1)


def as_channels(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """`(N, C, ...)` in a batch as `(N, size * C, ...)`: the groups of one call after those of another."""
    found = first(tensor, dim, size)
    return None if found is None else found.movedim(0, 1).flatten(1, 2)


def conv_of_batch(
    info: Any, dims: Dims, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    groups: int, transposed: bool, *others: Any,
) -> Result:  # fmt: skip
    """The rule of the op `conv`: the result, and the dimension of the batch in it."""
    size, (x, w, b, *_) = info.batch_size, dims
    if w is None and b is None:
        images = as_images(input, x, size)
        output = autograd.conv(images, weight, bias, stride, padding, dilation, groups, transposed, *others)
        return output.unflatten(0, (size, -1)), 0
    # One input and many filters of one group are one convolution with as many more outputs.
    together = x is None and groups == 1 and not transposed
    output = autograd.conv(
        input if together else as_channels(input, x, size),
        as_images(weight, w, size),
        as_images(bias, b, size),
        stride,
        padding,
        dilation,
        1 if together else size * groups,
        transposed,
        *others,
    )
    return output.unflatten(1, (size, -1)), 1


def _conv_weight_gradient(
    info: Any, dims: Dims, input: Tensor, grad_output: Tensor, kernel_size: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, *others: Any,
) -> Result:  # fmt: skip
    size = info.batch_size
    tensors = as_channels(input, dims[0], size), as_channels(grad_output, dims[1], size)
    arguments = kernel_size, stride, padding, dilation, size * groups, *others
    return autograd.conv_weight_gradient(*tensors, *arguments).unflatten(0, (size, -1)), 0


def _deform_conv(
    info: Any, dims: Dims, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
    *others: Any,
) -> Result:  # fmt: skip
    size, sampled = info.batch_size, (input, offset, mask)
    common = dims[3] is None and dims[4] is None
    fold = as_images if common else as_channels
    operands = [fold(tensor, dim, size) for tensor, dim in zip(sampled, dims)]
    filters = (weight, bias) if common else (as_images(weight, dims[3], size), as_images(bias, dims[4], size))
    output = autograd.deform_conv(*operands, *filters, *others)
    return (output.unflatten(0, (size, -1)), 0) if common else (output.unflatten(1, (size, -1)), 1)


def _deform_input_gradient(
    info: Any, dims: Dims, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, grad_output: Tensor,
    *others: Any,
) -> Result:  # fmt: skip
    size, common = info.batch_size, dims[3] is None
    fold, dim = (as_images, 0) if common else (as_channels, 1)
    operands = [fold(tensor, at, size) for tensor, at in zip((input, offset, mask), dims)]
    filters = weight if common else as_images(weight, dims[3], size)
    results = autograd.deform_conv_input_gradient(*operands, filters, fold(grad_output, dims[4], size), *others)
    # What was not needed is an empty tensor in every call.
    needed = others[3]
    results = tuple(r.unflatten(dim, (size, -1)) if need else r for r, need in zip(results, needed))
    return results, tuple(dim if need else None for need in needed)


def _deform_weight_gradient(
    info: Any, dims: Dims, input: Tensor, offset: Tensor, mask: Tensor | None, grad_output: Tensor, *others: Any
) -> Result:
    size, (*geometry, groups) = info.batch_size, others
    operands = [as_channels(t, dim, size) for t, dim in zip((input, offset, mask, grad_output), dims)]
    result = autograd.deform_conv_weight_gradient(*operands, *geometry, size * groups)
    return result.unflatten(0, (size, -1)), 0


def register(differentiated: Any, **rules: Callable[..., Result]) -> None:
    """Gives their rules to the functions of these names in `differentiated`, and these to the ops: what a graph has
    under a transform of torch.func is the op, whose own gradient refuses `grad` and forgets the tangents of `jvp`.
    """
    for name, rule in rules.items():
        transformed = getattr(differentiated, name).transformed
        transformed.vmap = staticmethod(rule)
        ops.library.impl(name, transformed.apply, "FuncTorchDynamicLayerFrontMode")


register(
    autograd,
    conv=conv_of_batch,
    conv_weight_gradient=_conv_weight_gradient,
    deform_conv=_deform_conv,
    deform_conv_input_gradient=_deform_input_gradient,
    deform_conv_weight_gradient=_deform_weight_gradient,
)
