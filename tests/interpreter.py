"""Triton's interpreter in a third of its time, and strict: an integer that overflows fails the test, and so does a mask
of anything but truths, which Triton 3.9 refuses and earlier versions take; an address outside the memory of the tensor
that its pointer came from; and an element that two programs store, whose order a GPU does not know.

Nothing that a kernel computes changes.
"""

import copy
import functools
import operator

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# Tests of what 32 bits do not count have tensors of gigabytes.
_MOST_REMEMBERED = 1 << 20
_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def quicken():
    """For the rest of the process. A version of Triton with other names inside just takes its time."""
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow
    builder = interpreter.InterpreterBuilder
    for name, pointers, mask in _ACCESSES:
        if hasattr(builder, name):
            setattr(builder, name, _strict(getattr(builder, name), pointers, mask, "store" in name))
    if hasattr(interpreter, "_implicit_cvt") and hasattr(builder, "create_bitcast"):
        interpreter._implicit_cvt = _with_memory(interpreter._implicit_cvt)
        builder.create_bitcast = _of_the_same_memory(builder.create_bitcast)
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _no_overflow(semantic, lhs, rhs, operation):
    """Triton's own check is a dozen of the interpreter's operations, half of all the time, and the assertion at its end
    is left out without `debug`, which is never set. A GPU wraps around and says nothing.
    """
    of = lhs.type.scalar
    if of.int_bitwidth < 64:
        result = _OPERATORS[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        fits = of.get_int_min_value() <= result.min() and result.max() <= of.get_int_max_value()
        assert fits, f"{of} overflows in {operation.__name__}: {result.min()} to {result.max()}"


class _Memory:
    """What a pointer may reach, all of one tensor's storage; and which program stored which of its elements."""

    def __init__(self, storage):
        self.first, self.bytes, self.writers = storage.data_ptr(), storage.nbytes(), None

    def check(self, addresses, size, mask):
        """Fails where one of the addresses that the mask lets through is outside."""
        if addresses.min() < self.first or addresses.max() + size > self.first + self.bytes:
            places = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64) - self.first
            if places.size:
                first, end = places.min(), places.max() + size
                assert first >= 0 and end <= self.bytes, f"bytes {first} to {end} of a tensor of {self.bytes}"

    def store(self, addresses, size, mask, program):
        """Fails where another program stored."""
        if self.bytes > _MOST_REMEMBERED:
            return
        if self.writers is None:
            self.writers = np.full(self.bytes // size, -1, np.int32)
        places = (addresses[np.broadcast_to(mask, addresses.shape)] - np.uint64(self.first)) // np.uint64(size)
        before = self.writers[places]
        assert ((before == program) | (before < 0)).all(), f"program {program} stores what another did"
        self.writers[places] = program


def _with_memory(convert):
    """The type of a pointer tells what it may reach: whatever is computed from the pointer keeps its type."""

    @functools.wraps(convert)
    def converted(argument):
        value = convert(argument)
        if not isinstance(argument, torch.Tensor):
            return value
        kind = copy.copy(value.type)
        kind.memory = _Memory(argument.untyped_storage())
        return tl.tensor(interpreter.TensorHandle(value.handle.data, kind), kind)

    return converted


def _of_the_same_memory(bitcast):
    @functools.wraps(bitcast)
    def cast(builder, source, kind):
        if isinstance(kind, tl.pointer_type):
            kind = copy.copy(kind)
            kind.memory = source.dtype.memory
        return bitcast(builder, source, kind)

    return cast


# With the places of pointers and mask among their arguments.
_ACCESSES = (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3))


def _strict(access, pointers, mask, stores):
    @functools.wraps(access)
    def strict(builder, *arguments, **options):
        # A box's mask is the array itself before Triton 3.9.
        truths = np.asarray(arguments[mask].data)
        assert truths.dtype.kind == "b", f"a mask of {truths.dtype}"
        at = arguments[pointers]
        size = at.get_element_ty().primitive_bitwidth // 8
        at.dtype.memory.check(at.data, size, truths)
        if stores:
            at.dtype.memory.store(at.data, size, truths, builder.grid_idx[0])
        return access(builder, *arguments, **options)

    return strict


def _once(patch):
    """A kernel's call gives `tl` the interpreter's functions, until it returns; each call of a device function inside
    would look for them all again and find none: a third of the time. Triton's own device functions see `tl.core`.
    """

    @functools.cache
    def seen_by(function):
        return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]

    @functools.wraps(patch)
    def patched(function):
        found = any(tl.core.is_builtin(module.load) for module in seen_by(function))
        return patch(function) if found else interpreter._LangPatchScope()

    return patched


def _remembered(of):
    """A table of all types is built anew for each question: a twentieth of the time."""
    known = functools.cache(of)

    @functools.wraps(of)
    def dtype_of(type):
        element = type.element_ty if isinstance(type, tl.block_type) else type
        # Types of pointers are equal, but have no hash.
        return of(element) if isinstance(element, tl.pointer_type) else known(element)

    return dtype_of
