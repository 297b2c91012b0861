"""Triton's interpreter in a third of its time, and strict: an integer that overflows fails the test, and so does a mask
of anything but truths, which Triton 3.9 refuses and earlier versions take.

Nothing that a kernel computes changes.
"""

import functools
import operator

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def quicken():
    """For the rest of the process. A version of Triton with other names inside just takes its time."""
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        TritonSemantic.binary_op_sanitize_overflow_impl = _no_overflow
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        if hasattr(interpreter.InterpreterBuilder, name):
            access = getattr(interpreter.InterpreterBuilder, name)
            setattr(interpreter.InterpreterBuilder, name, _of_truths(access, position))
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


def _of_truths(access, position):
    @functools.wraps(access)
    def strict(builder, *arguments, **options):
        # A box's mask is the array itself before Triton 3.9.
        dtype = np.asarray(arguments[position].data).dtype
        assert dtype.kind == "b", f"a mask of {dtype}"
        return access(builder, *arguments, **options)

    return strict


def _once(patch):
    """A kernel's call gives `tl` the interpreter's functions, until it returns; each call of a device function inside
    would look for them all again and find none: a third of the time. Triton's own device functions see `tl.core`.
    """

    @functools.wraps(patch)
    def patched(function):
        seen = [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]
        found = any(tl.core.is_builtin(module.load) for module in seen)
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
