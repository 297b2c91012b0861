"""Every curated case against torch: as declared in float32, in channels_last with half precision, and unbatched."""

import dataclasses

import pytest
import torch
from cases import CASES
from helpers import DTYPES, channels_last, check, expanded, launches, name_of, random, sliced

import triton_conv as tc


def parameters(groups):
    """The cases of these groups, as parameters with readable ids; the smoke cases carry that mark."""
    return [
        pytest.param(case, id=f"{group}-{case.id}", marks=pytest.mark.smoke if group == "smoke" else ())
        for group in groups
        for case in CASES[group]
    ]


def check_case(case, dtype):
    check(case.function, case.tensors(dtype), *case.kernels)


@pytest.mark.parametrize("case", parameters(CASES))
def test_float32(case):
    check_case(case, torch.float32)


# Strided views are about formats of their own.
@pytest.mark.parametrize("case", parameters([group for group in CASES if group != "strided-views"]))
def test_bfloat16_channels_last(case):
    check_case(dataclasses.replace(case, x=channels_last), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES["smoke"] + CASES["networks"], ids=name_of)
def test_dtypes(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize("case", CASES["smoke"], ids=name_of)
def test_unbatched(case):
    arguments = case.tensors(torch.float32)
    arguments["input"] = arguments["input"][0]
    assert check(case.function, arguments, *case.kernels).dim() == len(case.input) - 1


@pytest.mark.parametrize("layout", [sliced, expanded, lambda b: b.flip(0)], ids=["sliced", "expanded", "copied"])
@pytest.mark.parametrize("case", CASES["smoke"], ids=name_of)
def test_bias_layouts(case, layout):
    if case.bias:
        arguments = case.tensors(torch.float32)
        check(case.function, arguments | {"bias": layout(arguments["bias"])}, *case.kernels)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("size", "kernel", "groups"),
    [((5,), (3,), 1), ((5, 4), (3, 3), 2), ((3, 3), (1, 1), 1), ((3, 4, 3), (2, 2, 2), 1)],
)
def test_no_input_channel_leaves_the_bias(size, kernel, groups, bias):
    # A sum of nothing is zero. (torch's own answer has no channel at all, whatever the weight says.)
    x, w = random((2, 0, *size)), random((4, 0, *kernel))
    b = random((4,)) if bias else None
    y = getattr(tc, f"conv{len(size)}d")(x, w, b, groups=groups)
    assert y.shape == (2, 4, *(s - k + 1 for s, k in zip(size, kernel, strict=True)))
    expected = b if bias else torch.zeros(4, device=x.device)
    assert torch.equal(y, expected.view(1, 4, *(1,) * len(size)).expand(y.shape))
    assert launches["implicit_gemm"] == 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_output_of_no_size(rank):
    # torch returns an empty tensor or an error, depending on the backend; nothing is to be computed either way.
    y = getattr(tc, f"conv_transpose{rank}d")(random((2, 3) + (1,) * rank), random((3, 4) + (2,) * rank), padding=1)
    assert y.shape == (2, 4) + (0,) * rank
    assert not launches
