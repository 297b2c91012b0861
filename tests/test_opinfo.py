"""torch's own samples and error inputs for the six convolution functions, taken from its OpInfo database."""

import re

import pytest
import torch
from helpers import DEVICE, DTYPES, check, launches, name_of
from torch_samples import OPS

import triton_conv as tc

NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NAMES_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def samples(function, dtype):
    """The samples as dictionaries of named arguments."""
    names = NAMES_TRANSPOSED if "transpose" in function else NAMES
    for sample in OPS[function].sample_inputs(DEVICE, dtype):
        yield dict(zip(names, (sample.input, *sample.args), strict=False)) | sample.kwargs


def error_inputs(function):
    op = OPS[function]
    return list(op.error_inputs(DEVICE)) if op.error_inputs_func else []


def test_there_are_six_functions_with_92_samples_and_30_errors():
    assert sorted(OPS) == [f"conv{t}{rank}d" for t in ("", "_transpose") for rank in (1, 2, 3)]
    assert sum(1 for function in OPS for _ in samples(function, torch.float32)) == 92
    assert sum(len(error_inputs(function)) for function in OPS) == 30


def long(function, dtype):
    if "transpose" in function:
        return dtype != torch.float32 or function.endswith("3d")
    return dtype.itemsize == 2 and not function.endswith("1d")


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        # Transposed samples take the longest, and half precision of many taps; the curated cases have them too.
        pytest.param(function, dtype, marks=pytest.mark.slow if long(function, dtype) else ())
        for function in OPS
        for dtype in DTYPES
    ],
    ids=name_of,
)
def test_samples(function, dtype):
    for arguments in samples(function, dtype):
        check(function, arguments)


def test_batched_samples_of_the_longest():
    """Each of these is there unbatched too, which takes as long again."""
    found = [arguments for arguments in samples("conv_transpose3d", torch.float32) if arguments["input"].dim() == 5]
    assert len(found) == 5
    for arguments in found:
        check("conv_transpose3d", arguments)


@pytest.mark.parametrize("function", [name for name in OPS if error_inputs(name)])
def test_error_inputs(function):
    for error in error_inputs(function):
        sample = error.sample_input
        with pytest.raises(error.error_type) as raised:
            getattr(tc, function)(sample.input, *sample.args, **sample.kwargs)
        assert re.search(error.error_regex, str(raised.value))
        assert isinstance(raised.value, tc.errors.TritonConvError)
        assert not launches
