"""What planning reads of tensors, and the checks of those that go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .errors import ArgumentError, DeviceError, DtypeError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TensorMeta(NamedTuple):
    """What planning reads of a tensor; hashable, so that it can be part of a cache's key."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool = True
    """Whether it begins at a multiple of 16 bytes."""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorMeta:
        """Reads a tensor; `name` is the argument it was passed as, for the errors."""
        if tensor.layout is not torch.strided:
            raise ArgumentError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
        # A named tuple's own constructor takes half as long again as the rest of this.
        known = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, _aligned(tensor)
        return tuple.__new__(cls, known)


def _aligned(tensor: torch.Tensor) -> bool:
    """By its address: torch aligns memory to more, but may have been lent some, as through DLPack. By its place in the
    storage, where there is no memory: in graphs and under transforms.
    """
    try:
        address = tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None
    except RuntimeError:
        address = None
    if address is not None:
        return address % 16 == 0
    place: Any = tensor.storage_offset()
    if isinstance(place, torch.SymInt):
        # That which the graph is traced with, if any: asking for it sets no guard on the graph.
        place = place.node.hint
    return place is not None and place * tensor.dtype.itemsize % 16 == 0


def meta(name: str, tensor: torch.Tensor | None) -> TensorMeta | None:
    """What planning sees of a tensor that may be absent."""
    return None if tensor is None else TensorMeta.of(name, tensor)


def check_tensors(
    input: TensorMeta, others: Mapping[str, TensorMeta | None], coordinates: Mapping[str, TensorMeta | None] = {}
) -> None:
    """One device and one dtype that we have kernels for, else a typed error naming the argument.

    `coordinates` may be float32 beside half-precision data: they are worth more digits.
    """
    for name, other in (*others.items(), *coordinates.items()):
        if other is None:
            continue
        wider = name in coordinates and other.dtype == torch.float32 and input.dtype.itemsize == 2
        if other.dtype != input.dtype and not wider:
            raise DtypeError(
                f"{name}: Input type ({input.dtype}) and {name} type ({other.dtype}) should be the same; cast one of "
                "them, or call under torch.autocast"
            )
        if other.device != input.device:
            raise DeviceError(
                f"{name}: expected all tensors on one device, but input is on {input.device} and {name} on "
                f"{other.device}"
            )
    if input.dtype not in DTYPES:
        raise DtypeError(f"input: no kernel for {input.dtype}; convert to one of {', '.join(str(d) for d in DTYPES)}")


def check_bias(bias: TensorMeta | None, weight_shape: Sequence[int], c_out: int) -> None:
    """A bias is one-dimensional with one element an output channel."""
    if bias is not None and tuple(bias.shape) != (c_out,):
        raise ArgumentError(
            f"bias: Given weight of size {list(weight_shape)}, expected bias to be 1-dimensional with {c_out} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )


def check_grad_output(grad_output: TensorMeta, out_shape: tuple[int, ...], input_shape: Sequence[int]) -> None:
    """An output's gradient has the output's shape."""
    if tuple(grad_output.shape) != out_shape:
        raise ArgumentError(
            f"grad_output: expected shape {list(out_shape)} for input {list(input_shape)}, got grad_output "
            f"{list(grad_output.shape)}"
        )
