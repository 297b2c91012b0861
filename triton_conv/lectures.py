"""The public functions of separable, shuffled and locally connected convolution, run by our kernels and no other.

torch has none of them; each is equivalent to a few of its calls, which the docstring names. Tensors, dtypes, precision
and errors are as in `functional`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import autocast, autograd_lectures, functional, ops, ops_conv, ops_fused, ops_local, symbolic, vmaps_lectures  # noqa: F401
from .arguments import Padding, Size, activation_name, batched, flat_padding, group_count, per_dimension
from .dispatch import Plan
from .eager import plain, traced
from .errors import ArgumentError, ArgumentTypeError
from .ops_fused import Chain
from .tensors import TensorMeta, meta


def _window(
    rank: int, weight: Tensor, stride: Any, padding: Any, dilation: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Stride, flat padding and dilation of a call; `weight` has the shape of a convolution's."""
    stride = per_dimension("stride", stride, rank)
    dilation = per_dimension("dilation", dilation, rank)
    return stride, flat_padding(padding, rank, stride, weight, dilation), dilation


def _batched(output: Tensor, input: Tensor, rank: int) -> Tensor:
    return output if input.dim() == rank + 2 else output.squeeze(0)


# ---------------------------------------------------------------------------------------------------------- shuffled


def _shuffle_count(input: Any, groups: Any) -> int:
    count = group_count(groups)
    if not isinstance(input, Tensor):
        raise ArgumentTypeError(f"input: channel_shuffle() expects a Tensor, got {type(input).__name__}")
    if input.dim() < 3:
        raise ArgumentError(f"input: channel_shuffle needs (N, C, *size), got size {list(input.shape)}")
    if count < 1 or input.shape[1] % count:
        raise ArgumentError(f"groups: {groups} groups do not divide the channels of input {list(input.shape)}")
    return count


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """Channel j of group s goes to place j * groups + s: the shuffle between ShuffleNet's grouped convolutions.

    Equivalent to `torch.nn.functional.channel_shuffle(input, groups)`, for any rank and in the input's memory format.
    It multiplies nothing, and copies; `shuffle_conv2d` does the same without the copy.

    Args:
        input: `(N, C, *size)`.
        groups: divides C.

    Returns:
        A tensor of that shape; its element `[n, j * groups + s]` is the input's `[n, s * C / groups + j]`.

    Raises:
        ArgumentError: if groups does not divide the channels.
    """
    try:
        count = _shuffle_count(input, groups)
    except ArgumentTypeError:
        return symbolic.recorded(channel_shuffle, input, groups)  # type: ignore[no-any-return]
    return autograd_lectures.shuffle_channels(input, count)


def _shuffle_arguments(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, activation: str | None
) -> tuple[Any, ...]:
    input = batched("shuffle_conv2d", input, 2, weight=weight, bias=bias)
    window = _window(2, weight, stride, padding, dilation)
    input, weight, bias = autocast.operands(input, weight, bias)
    return input, weight, bias, *window, group_count(groups), activation_name(activation)


def _in_order(weight: Tensor, groups: int) -> bool:
    """Whether a shuffle would leave every channel where it is: one group, or groups of one channel."""
    return groups == 1 or weight.shape[0] == groups


def shuffle_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Grouped 2-D convolution whose output channels leave shuffled, in one kernel: ShuffleNet's 1x1 and its shuffle.

    Equivalent to `torch.nn.functional.channel_shuffle(conv2d(input, weight, bias, stride, padding, dilation, groups),
    groups)`, the activation of that name in between. Channel j of group s of the output is channel j * groups + s.

    Args, returns, raises:
        As `conv2d`; the bias is the convolution's, in the order of the weight.

    Zhang et al., "ShuffleNet", arXiv:1707.01083.
    """
    given = weight, bias, stride, padding, dilation, groups, activation
    try:
        arguments = _shuffle_arguments(input, *given)
    except ArgumentTypeError:
        return symbolic.recorded(shuffle_conv2d, input, *given)  # type: ignore[no-any-return]
    if _in_order(weight, arguments[6]):
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups, activation=activation)
    return _batched(autograd_lectures.shuffle_conv(*arguments), input, 2)


def _plan_shuffle(*given: Any) -> Plan:
    arguments = _shuffle_arguments(*given)
    if _in_order(arguments[1], arguments[6]):
        *rest, activation = given
        made: Plan = functional.plan(functional.conv2d, *rest, activation=activation)
        return made
    return ops_fused.plan_shuffle_conv(*arguments)


# --------------------------------------------------------------------------------------------------------- separable


def separable_arguments(
    rank: int, input: Any, depthwise_weight: Any, pointwise_weight: Any, bias: Any, stride: Any, padding: Any,
    dilation: Any, activation: str | None, mid_activation: str | None, mid_bias: Any,
) -> tuple[Any, ...]:  # fmt: skip
    function = f"separable_conv{rank}d"
    others = {"mid_bias": mid_bias} if mid_bias is not None else {}
    others |= {"depthwise_weight": depthwise_weight, "bias": bias}
    input = batched(function, input, rank, "depthwise_weight", **others)
    if not isinstance(pointwise_weight, Tensor):
        raise ArgumentTypeError(
            f"pointwise_weight: {function}() expects a Tensor, got {type(pointwise_weight).__name__}"
        )
    if pointwise_weight.dim() != rank + 2:
        raise ArgumentError(
            f"pointwise_weight: {function} takes a 1x1 weight of {rank + 2} dimensions, got pointwise_weight "
            f"{list(pointwise_weight.shape)} beside depthwise_weight {list(depthwise_weight.shape)}"
        )
    window = _window(rank, depthwise_weight, stride, padding, dilation)
    activations = activation_name(mid_activation, "mid_activation"), activation_name(activation)
    tensors = autocast.operands(input, depthwise_weight, pointwise_weight, mid_bias, bias)
    return *tensors, *window, *activations


def _separable_op(*arguments: Any) -> Tensor:
    """The one kernel or the two, whichever is faster, by the arguments of the op `separable_conv`."""
    if ops_fused.unfused(ops_fused.plan_separable_conv(*arguments)):
        return autograd_lectures.separable_pair(*arguments)
    return autograd_lectures.separable_conv(*arguments)  # type: ignore[no-any-return]


# Which of the two is decided inside an op that consists of what it calls, as in `routing`: torch.compile and
# torch.export need not follow how, and a graph decides once, by the sizes that it is traced with.
ops.library.define(
    "chosen_separable_conv(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? mid_bias, "
    "Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, str mid_activation, str activation) -> Tensor",
    tags=ops.TAGS,
)
ops.library.impl("chosen_separable_conv", _separable_op, "CompositeImplicitAutograd")
_traced_separable = torch.ops.triton_conv.chosen_separable_conv.default


def _separable(rank: int, *given: Any) -> Tensor:
    try:
        arguments = separable_arguments(rank, *given)
    except ArgumentTypeError:
        return symbolic.recorded(globals()[f"separable_conv{rank}d"], *given)  # type: ignore[no-any-return]
    return run_separable(rank, given[0], arguments)


def run_separable(rank: int, given: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """A separable convolution of what was given as the input, by the arguments of the op."""
    tensors, window = arguments[:5], arguments[5:]
    if traced():
        output = _traced_separable(*arguments)
    elif plain(*tensors):
        output = autograd_lectures.SeparableCall.like(tensors, window)(*tensors)
    else:
        output = _separable_op(*arguments)
    return _batched(output, given, rank)


def _plan_separable(rank: int, *given: Any) -> Plan | Chain:
    arguments = separable_arguments(rank, *given)
    made = ops_fused.plan_separable_conv(*arguments)
    reason = ops_fused.unfused(made)
    if reason is None:
        return made
    input, depthwise, pointwise, mid_bias, bias, *options = arguments
    first, second = autograd_lectures.separable_halves(tuple(options), input.shape[1])
    plan = ops_conv.plan_conv(input, depthwise, mid_bias, *first)
    between = TensorMeta(plan.out_shape, plan.out_strides, input.dtype, input.device)
    tensors = between, TensorMeta.of("pointwise_weight", pointwise), meta("bias", bias)
    return Chain((plan, ops_conv.plan_conv_of(*tensors, *second, ops.conv_precision(input.dtype))), reason, made)


def separable_conv1d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
    mid_activation: str | None = None,
    mid_bias: Tensor | None = None,
) -> Tensor:
    """1-D depthwise separable convolution: `(N, C, L)` -> `(N, c_out, L_out)`. See `separable_conv2d`.

    Equivalent to `torch.nn.functional.conv1d(conv1d(input, depthwise_weight, mid_bias, stride, padding, dilation,
    groups=C), pointwise_weight, bias)`.
    """
    return _separable(
        1, input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation, activation, mid_activation,
        mid_bias,
    )  # fmt: skip


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
    mid_activation: str | None = None,
    mid_bias: Tensor | None = None,
) -> Tensor:
    """2-D depthwise separable convolution, a depthwise one and a 1x1, in one kernel where that saves time.

    Equivalent to `torch.nn.functional.conv2d(conv2d(input, depthwise_weight, mid_bias, stride, padding, dilation,
    groups=C), pointwise_weight, bias)`, each followed by its activation. The intermediate is rounded to the dtype, as
    storing it would. Two kernels run where that is faster: `plan` says which, and why; `set_separable_fusion` forces
    it. Gradients of one kernel compute the intermediate anew; those of two keep it, as two layers do.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        depthwise_weight: `(C * multiplier, 1, KH, KW)`. A scale between the two, such as a batch norm's in inference,
            is folded into it beforehand; the shift is `mid_bias`.
        pointwise_weight: `(c_out, C * multiplier, 1, 1)`.
        bias: `(c_out,)` or None.
        stride, padding, dilation: the depthwise convolution's, as in `conv2d`.
        activation, mid_activation: of the result and of the intermediate; as in `conv2d`.
        mid_bias: `(C * multiplier,)` or None.

    Returns:
        `(N, c_out, H_out, W_out)`, channels_last if the input is.

    Raises:
        As `conv2d`.

    Chollet, arXiv:1610.02357; Howard et al., arXiv:1704.04861.
    """
    return _separable(
        2, input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation, activation, mid_activation,
        mid_bias,
    )  # fmt: skip


def separable_conv3d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
    mid_activation: str | None = None,
    mid_bias: Tensor | None = None,
) -> Tensor:
    """3-D depthwise separable convolution: `(N, C, D, H, W)` -> `(N, c_out, D_out, H_out, W_out)`.

    Equivalent to `torch.nn.functional.conv3d(conv3d(input, depthwise_weight, mid_bias, stride, padding, dilation,
    groups=C), pointwise_weight, bias)`. See `separable_conv2d`.
    """
    return _separable(
        3, input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation, activation, mid_activation,
        mid_bias,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- locally connected


def _local_arguments(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[Any, ...]:
    function = f"locally_connected{rank}d"
    if not isinstance(weight, Tensor):
        raise ArgumentTypeError(f"weight: {function}() expects a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2 * rank + 2 or 0 in weight.shape[:rank]:
        raise ArgumentError(
            f"weight: {function} takes a weight (*out_size, c_out, c_in/groups, *kernel) of {2 * rank + 2} dimensions, "
            f"none of its output sizes zero, got weight {list(weight.shape)}"
        )
    one = weight[(0,) * rank]
    input = batched(function, input, rank, weight=one, bias=bias)
    window = _window(rank, one, stride, padding, dilation)
    input, weight, bias = autocast.operands(input, weight, bias)
    return input, weight, bias, *window, group_count(groups)


def _local(rank: int, *given: Any) -> Tensor:
    try:
        arguments = _local_arguments(rank, *given)
    except ArgumentTypeError:
        return symbolic.recorded(globals()[f"locally_connected{rank}d"], *given)  # type: ignore[no-any-return]
    return _batched(autograd_lectures.local_conv(*arguments), given[0], rank)


def _plan_local(rank: int, *given: Any) -> Plan:
    return ops_local.plan_local_conv(*_local_arguments(rank, *given))


def locally_connected1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """1-D locally connected layer: `(N, c_in, L)` by `(L_out, c_out, c_in/groups, k)` -> `(N, c_out, L_out)`.

    Equivalent to `torch.nn.functional.unfold` and a product for each output. See `locally_connected2d`.
    """
    return _local(1, input, weight, bias, stride, padding, dilation, groups)


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """2-D locally connected layer: a convolution whose filter is another one at every output pixel.

    Equivalent to `torch.nn.functional.unfold(input, kernel)` and a product with its own weight for each output pixel.
    Nothing is unfolded: each weight is read from memory once, which is the time that it takes. From eight images on,
    the input is copied with its images innermost, unless channels lie innermost in it and in the weight.

    Args:
        input: `(N, c_in, H, W)` or `(c_in, H, W)`.
        weight: `(H_out, W_out, c_out, c_in/groups, KH, KW)`, in any strides; gradients are fastest where the input
            channels lie innermost, as `triton_conv.nn.LocallyConnected2d` has them.
        bias: `(c_out, H_out, W_out)` or None.
        stride, padding, dilation, groups: as in `conv2d`.

    Returns:
        `(N, c_out, H_out, W_out)`, channels_last if the input is.

    Raises:
        ArgumentError: if the weight has not one filter for each output; otherwise as `conv2d`.

    Gregor and LeCun, arXiv:1006.0448; Taigman et al., "DeepFace" (2014).
    """
    return _local(2, input, weight, bias, stride, padding, dilation, groups)


def locally_connected3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """3-D locally connected layer, weight `(D_out, H_out, W_out, c_out, c_in/groups, KD, KH, KW)`.

    Equivalent to `torch.nn.functional.unfold` in three dimensions and a product for each output. See
    `locally_connected2d`.
    """
    return _local(3, input, weight, bias, stride, padding, dilation, groups)


functional.planners[shuffle_conv2d] = _plan_shuffle
for _rank in (1, 2, 3):
    functional.planners[globals()[f"separable_conv{_rank}d"]] = functools.partial(_plan_separable, _rank)
    functional.planners[globals()[f"locally_connected{_rank}d"]] = functools.partial(_plan_local, _rank)
