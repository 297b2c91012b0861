"""Whatever is wrong with a call is said before anything runs: a typed error that names the argument and the shapes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, launches

import triton_conv as tc
from triton_conv import errors

X, W, B = (2, 6, 7, 7), (4, 6, 3, 3), (4,)


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **{"device": DEVICE} | kwargs)


def conv(**changes):
    """Arguments of a valid conv2d, with changes."""
    return "conv2d", {"input": zeros(*X), "weight": zeros(*W), "bias": zeros(*B)} | changes


def transposed(**changes):
    """Arguments of a valid conv_transpose2d, with changes."""
    return "conv_transpose2d", {"input": zeros(*X), "weight": zeros(6, 4, 3, 3), "bias": zeros(*B)} | changes


def plain(function, *shapes, **changes):
    return function, dict(zip(("input", "weight", "bias"), (zeros(*s) for s in shapes), strict=False)) | changes


# name: (call, class torch raises, what the message says). "(?s)" lets a dot match anything.
TORCH_REFUSES = {
    "channels": (conv(input=zeros(2, 5, 7, 7)), RuntimeError, r"^input: .*\[4, 6, 3, 3\].*\[2, 5, 7, 7\].*6 channels"),
    "channels-transposed": (
        transposed(input=zeros(2, 5, 7, 7)), RuntimeError,
        r"^input: .*\[6, 4, 3, 3\].*\[2, 5, 7, 7\].*6 channels.*weight is \(c_in, ",
    ),
    "channels-of-groups": (conv(groups=2), RuntimeError, r"^input: Given groups=2, .*12 channels, but got 6"),
    "groups-do-not-divide": (
        conv(input=zeros(2, 18, 7, 7), groups=3), RuntimeError, r"^weight: .*divisible by 3.*\[4, 6, 3, 3\]",
    ),
    "groups-over-weight": (conv(groups=5), RuntimeError, r"^weight: .*at least 5 at dimension 0.*\[4, 6, 3, 3\]"),
    "groups-zero": (conv(groups=0), RuntimeError, r"^groups: non-positive groups.*groups=0"),
    "groups-negative": (conv(groups=-1), RuntimeError, r"^groups: non-positive groups"),
    "input-rank-low": (conv(input=zeros(7, 7)), RuntimeError, r"^input: Expected 3D .*4D .*\[7, 7\].*\[4, 6, 3, 3\]"),
    "input-rank-high": (conv(input=zeros(1, *X)), RuntimeError, r"^input: Expected 3D .* or 4D .*\[1, 2, 6, 7, 7\]"),
    "weight-rank-low": (conv(weight=zeros(4, 6, 3)), RuntimeError, r"^weight: .*\[4, 6, 3\].*\[2, 6, 7, 7\]"),
    "weight-rank-high": (conv(weight=zeros(4, 6, 3, 3, 3)), RuntimeError, r"^weight: .*\[4, 6, 3, 3, 3\].*\[2, 6, 7,"),
    "weight-flat": (conv(weight=zeros(4, 6)), RuntimeError, r"^weight: .*at least three dimensions"),
    "bias-size": (conv(bias=zeros(3)), RuntimeError, r"^bias: .*\[4, 6, 3, 3\].*with 4 elements.*\[3\]"),
    "bias-rank": (conv(bias=zeros(4, 1)), RuntimeError, r"^bias: .*1-dimensional.*\[4, 1\]"),
    "bias-transposed": (transposed(bias=zeros(6)), RuntimeError, r"^bias: .*with 4 elements.*\[6\]"),
    "stride-zero": (conv(stride=0), RuntimeError, r"^stride: non-positive stride.*\[0, 0\]"),
    "stride-negative": (conv(stride=(1, -1)), RuntimeError, r"^stride: non-positive stride.*\[1, -1\]"),
    "stride-length": (conv(stride=(1, 1, 1)), RuntimeError, r"^stride: .*list of 2 values.*\[1, 1, 1\]"),
    "dilation-zero": (conv(dilation=0), RuntimeError, r"^dilation: .*greater than zero.*\[0, 0\]"),
    "dilation-length": (conv(dilation=(1, 1, 1)), RuntimeError, r"^dilation: .*list of 2 values.*\[1, 1, 1\]"),
    "padding-negative": (conv(padding=-1), RuntimeError, r"^padding: negative padding is not supported"),
    "padding-length": (conv(padding=(1, 1, 1)), RuntimeError, r"^padding: .*list of 2 values.*\[1, 1, 1\]"),
    "padding-name": (conv(padding="full"), RuntimeError, r"^padding: Invalid padding string: 'full'"),
    "padding-same-strided": (conv(padding="same", stride=2), RuntimeError, r"^padding: padding='same'.*strided"),
    "output-too-small": (conv(input=zeros(2, 6, 2, 7)), RuntimeError, r"^weight: .*\(2 x 7\).*\(3 x 3\).*greater than"),
    "dilated-kernel-too-large": (conv(dilation=4), RuntimeError, r"^weight: .*\(7 x 7\).*\(9 x 9\).*greater than"),
    "transposed-output-negative": (
        transposed(input=zeros(2, 6, 1, 1), padding=3), RuntimeError, r"^input: .*\(1 x 1\).*\(-3 x -3\).*too small",
    ),
    "output-padding-large": (
        transposed(output_padding=2, stride=2),
        RuntimeError,
        r"^output_padding: .*smaller than either stride or .*got output_padding=\[2, 2\], stride=\[2, 2\]",
    ),
    "output-padding-negative": (transposed(output_padding=-1), RuntimeError, r"^output_padding: negative"),
    "no-pixels": (conv(input=zeros(2, 6, 0, 7), padding=3), RuntimeError, r"^input: .*zero batch.*\[2, 6, 0, 7\]"),
    "dtype-weight": (conv(weight=zeros(*W).double()), RuntimeError, r"^weight: .*float32.*float64.*the same; cast"),
    "dtype-bias": (conv(bias=zeros(*B).half()), RuntimeError, r"^bias: .*float32.*float16.*should be the same"),
    "stride-float": (conv(stride=1.5), TypeError, r"^stride: expected an int or a sequence of 2 ints, got 1.5"),
    "stride-floats": (conv(stride=(1.0, 1.0)), TypeError, r"^stride: expected an int or a sequence"),
    "dilation-string": (conv(dilation="2"), TypeError, r"^dilation: expected an int or a sequence"),
    "padding-none": (conv(padding=None), TypeError, r"^padding: expected an int or a sequence"),
    "groups-float": (conv(groups=2.0), TypeError, r"^groups: expected an int, got 2.0"),
    "groups-none": (conv(groups=None), TypeError, r"^groups: expected an int, got None"),
    "input-list": (conv(input=[[0.0]]), TypeError, r"^input: conv2d\(\) expects a Tensor, got list"),
    "weight-none": (conv(weight=None), TypeError, r"^weight: conv2d\(\) expects a Tensor, got NoneType"),
    "bias-number": (conv(bias=1.0), TypeError, r"^bias: conv2d\(\) expects a Tensor, got float"),
    "conv1d-of-image": (plain("conv1d", X, (4, 6, 3)), RuntimeError, r"^input: Expected 2D .* or 3D .*\[2, 6, 7, 7\]"),
    "conv3d-of-line": (plain("conv3d", (2, 6, 7), (4, 6, 3, 3, 3)), RuntimeError, r"^input: Expected 4D .* or 5D"),
}  # fmt: skip

WE_REFUSE = {
    "pairs-number": (conv(padding=((1, 0),)), errors.ArgumentError, r"^padding: expected 2 pairs of \(before, after\)"),
    "pairs-length": (conv(padding=((1, 0, 0), (1, 1))), errors.ArgumentError, r"^padding: expected 2 pairs"),
    "pairs-flat": (conv(padding=(1, 0, 1, 0)), errors.ArgumentError, r"^padding: .*2 pairs of \(before.*got \(1, 0"),
    "pairs-negative": (conv(padding=((1, -1), (0, 0))), errors.ArgumentError, r"^padding: negative padding"),
    "pairs-and-number": (conv(padding=(1, (1, 0))), errors.ArgumentError, r"^padding: expected 2 pairs.*\(1, \(1, 0"),
    "pairs-float": (conv(padding=((1, 0.5), (0, 0))), errors.ArgumentError, r"^padding: expected 2 pairs"),
    "mode": (conv(padding_mode="constant"), errors.ArgumentValueError, r"^padding_mode: 'constant'.*zeros, reflect"),
    "mode-none": (conv(padding_mode=None), errors.ArgumentTypeError, r"^padding_mode: expected a str.*got None"),
    "activation": (conv(activation="tanh"), errors.ArgumentValueError, r"^activation: 'tanh'.*relu"),
    "reflect-large": (
        conv(padding=7, padding_mode="reflect"),
        errors.ArgumentError,
        r"^padding: .*'reflect'.*less one, got padding=\[\(7, 7\), \(7, 7\)\] for input size \(7 x 7\)",
    ),
    "circular-large": (conv(padding=8, padding_mode="circular"), errors.ArgumentError, r"^padding: .*circular.*\(7 x"),
    "complex": (
        conv(input=zeros(*X).cfloat(), weight=zeros(*W).cfloat(), bias=None),
        errors.DtypeError,
        r"^input: no kernel for torch.complex64; convert to one of torch.float16",
    ),
    "integers": (
        conv(input=zeros(*X).int(), weight=zeros(*W).int(), bias=None),
        errors.DtypeError,
        r"^input: no kernel for torch.int32",
    ),
    "bool": (
        conv(input=zeros(*X).bool(), weight=zeros(*W).bool(), bias=None),
        errors.DtypeError,
        r"^input: no kernel for torch.bool",
    ),
    "weight-on-meta": (conv(weight=zeros(*W, device="meta")), errors.DeviceError, r"^weight: .*one device.*meta"),
    "bias-on-meta": (conv(bias=zeros(*B, device="meta")), errors.DeviceError, r"^bias: .*one device.*meta"),
    "sparse": (conv(input=zeros(*X).to_sparse()), errors.ArgumentError, r"^input: expected a strided tensor.*sparse"),
    "empty-kernel": (conv(weight=zeros(4, 6, 0, 3)), errors.ArgumentError, r"^weight: .*positive.*\[4, 6, 0, 3\]"),
}  # fmt: skip


FAR = 2**40
# Kernels count in 32 bits. torch takes the first two; of others it says "Overflow when unpacking long long".
WE_REFUSE |= {
    "stride-far": (conv(stride=FAR), errors.ArgumentError, r"^stride: more than 2147483647 is not supported, got "),
    "dilation-far": (
        conv(weight=zeros(4, 6, 1, 1), dilation=FAR), errors.ArgumentError, r"^dilation: more than 2147483647 is not",
    ),
    "padding-far": (conv(padding=(0, 2**80)), errors.ArgumentError, r"^padding: more than 2147483647 .*\(0, 0\), \(12"),
    "pairs-far": (conv(padding=((0, 0), (FAR, 0))), errors.ArgumentError, r"^padding: more than 2147483647 is not"),
    "stride-far-transposed": (transposed(stride=FAR), errors.ArgumentError, r"^stride: more than 2147483647 is not"),
    "output-far": (
        conv(padding=2**31 - 1), errors.ArgumentError, r"^input: .*\[2, 4, 4294967299, 4294967299\] has more elements",
    ),
    "output-far-transposed": (
        transposed(stride=2**31 - 1), errors.ArgumentError, r"^input: .*128.*\] has more elements than can be counted",
    ),
}  # fmt: skip


def refused(call, error, message):
    function, arguments = call
    with pytest.raises(error, match=message) as raised:
        getattr(tc, function)(**arguments)
    assert isinstance(raised.value, errors.TritonConvError)
    assert not launches


@pytest.mark.parametrize("name", TORCH_REFUSES)
def test_what_torch_refuses(name):
    call, error, message = TORCH_REFUSES[name]
    with pytest.raises(error):
        getattr(F, call[0])(**call[1])
    refused(call, error, message)


@pytest.mark.parametrize("name", WE_REFUSE)
def test_what_only_we_refuse(name):
    refused(*WE_REFUSE[name])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
def test_tensors_that_only_look_strided():
    nested = torch.nested.nested_tensor([zeros(*X[1:])])
    quantized = torch.quantize_per_tensor(zeros(*W), 0.1, 0, torch.qint8)
    refused(conv(input=nested), errors.ArgumentError, r"^input: expected a strided tensor.* nested")
    refused(conv(weight=quantized), errors.ArgumentError, r"^weight: expected a strided tensor.* quantized")


def test_the_calls_are_valid_without_the_changes():
    for function, arguments in (conv(), transposed()):
        getattr(tc, function)(**arguments)
    assert launches.total() == 2


@pytest.mark.parametrize("whole", [2, np.int64(2), [np.int32(2)], torch.tensor(2), torch.Size([2, 2])], ids=repr)
def test_whole_numbers_of_other_types_are_taken(whole):
    # As torch does.
    function, arguments = conv()
    assert getattr(tc, function)(**arguments, stride=whole).shape == F.conv2d(**arguments, stride=whole).shape


@pytest.mark.parametrize("argument", ["stride", "padding", "dilation", "groups"])
def test_booleans_are_not_numbers(argument):
    call = conv(**{argument: True})
    with pytest.raises(TypeError):
        F.conv2d(**call[1])
    refused(call, errors.ArgumentTypeError, f"^{argument}: expected an int.*got True")


def test_the_largest_numbers_that_are_taken():
    most = 2**31 - 1
    for changes in (dict(stride=most), dict(weight=zeros(4, 6, 1, 1), dilation=most), dict(stride=2**30, padding=2)):
        function, arguments = conv(**changes)
        assert getattr(tc, function)(**arguments).shape == F.conv2d(**arguments).shape


def test_an_error_is_raised_again():
    # Plans are cached; refusals are not plans.
    for _ in range(2):
        refused(*TORCH_REFUSES["channels"])


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (errors.ArgumentError, RuntimeError),
        (errors.ArgumentTypeError, TypeError),
        (errors.ArgumentValueError, ValueError),
        (errors.DeviceError, RuntimeError),
        (errors.DtypeError, RuntimeError),
        (errors.PlanError, RuntimeError),
        (errors.ConfigError, ValueError),
        (errors.WorkloadError, ValueError),
    ],
)
def test_classes(ours, builtin):
    assert issubclass(ours, builtin)
    assert issubclass(ours, errors.TritonConvError)


def test_a_cpu_tensor_without_the_interpreter():
    script = (
        "import torch, triton_conv as tc\n"
        "try: tc.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))\n"
        "except tc.errors.DeviceError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(tc.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "'cpu'" in done.stdout
    assert ".cuda()" in done.stdout


def test_plan_wants_a_function_of_ours():
    for function in (F.conv2d, "conv2d", tc.plan, None):
        with pytest.raises(errors.ArgumentTypeError, match=r"^function: expected a convolution of triton_conv"):
            tc.plan(function, zeros(*X), zeros(*W))
    with pytest.raises(errors.ArgumentTypeError, match=r"such as conv2d, got Tensor$"):
        tc.plan(zeros(*X))


@pytest.mark.parametrize("function", [tc.convert, tc.revert, tc.warmup])
def test_what_is_no_model(function):
    for model, given in ((zeros(1), "Tensor"), (torch.nn.Conv2d, "<class 'torch.nn.*")):
        with pytest.raises(errors.ArgumentTypeError, match=f"^model: expected an nn.Module, got {given}"):
            function(model)


def test_a_switch_is_on_or_off():
    with pytest.raises(errors.ArgumentValueError, match=r"^enabled: expected True or False, got 'no'"):
        tc.set_first_use_check("no")
