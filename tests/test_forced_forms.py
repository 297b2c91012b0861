"""A form forced where it is not valid: an error that names the predicate that failed, for every form and direction."""

import functools

import pytest
import torch
from helpers import INTERPRETED

from triton_conv import dispatch, first_use
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.reference import tolerance
from triton_conv.target import INTERPRETER, KNOWN
from triton_conv.workloads import FORWARD, INPUT_GRADIENT, PARTS, WEIGHT_GRADIENT, find

_LAYERS = "narrow_groups_4,causal_dw1d,convnext_dw7,vocoder_t1d_s8,dcnv2,dilated_1d,separable_56,shuffle_g3,local2d"


@functools.cache
def problems(part):
    """Small layers of every kind, by title."""
    parts = [found for workload in find(_LAYERS) for found in workload.shrunk().parts() if found.part == part]
    return {found.title: found.problem() for found in parts}


def reason_of(name, problem):
    """The predicate that rules a form out, asked directly; None for a form that can run the problem."""
    apart, kernels = dispatch._APART.get(type(problem), ("", (name,)))
    return KERNELS[name].unsuited(problem) or (None if name in kernels else apart)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_forced_form_runs_or_names_the_predicate(name, part):
    refused = 0
    for title, problem in problems(part).items():
        reason = reason_of(name, problem)
        if reason is None:
            assert dispatch.plan(problem, INTERPRETER, name).kernel.name == name, title
            continue
        with pytest.raises(PlanError) as caught:
            dispatch.plan(problem, INTERPRETER, name)
        assert str(caught.value) == f"kernel: {name} cannot run {problem.describe()}: {reason}"
        refused += 1
    assert refused, "each form refuses some layer in each direction"


@pytest.mark.parametrize(
    ("name", "title", "part", "phrase"),
    [
        ("implicit_gemm", "vocoder_t1d_s8-bfloat16-nchw", FORWARD, "it is transposed"),
        ("implicit_gemm", "narrow_groups_4-bfloat16-nhwc-dw", WEIGHT_GRADIENT, "it is a weight gradient"),
        ("implicit_gemm_boxed", "vocoder_t1d_s8-bfloat16-nchw", FORWARD, "the stride is (1, 1, 8), not 1"),
        ("strided_boxed", "narrow_groups_4-bfloat16-nhwc", FORWARD, "its stride is 1"),
        ("grouped_packed", "dilated_1d-bfloat16-nchw", FORWARD, "there are no groups to pack"),
        ("transposed_phase", "causal_dw1d-bfloat16-nchw-dx", INPUT_GRADIENT, "it is not transposed"),
        ("depthwise_banded", "convnext_dw7-bfloat16-nhwc-dx", INPUT_GRADIENT, "neighbouring pixels are not contiguous"),
        ("depthwise_patch", "causal_dw1d-bfloat16-nchw", FORWARD, "the channels of its input are not contiguous"),
        ("weight_gradient_boxed", "narrow_groups_4-bfloat16-nhwc-dw", WEIGHT_GRADIENT, "groups of 4 channels do not"),
        ("depthwise_banded_weight_gradient", "narrow_groups_4-bfloat16-nhwc-dw", WEIGHT_GRADIENT, "not one each"),
        ("deformable", "narrow_groups_4-bfloat16-nhwc", FORWARD, "it has no offsets"),
    ],
)
def test_what_the_message_says(name, title, part, phrase):
    with pytest.raises(PlanError) as caught:
        dispatch.plan(problems(part)[title], INTERPRETER, name)
    assert f"kernel: {name} cannot run" in str(caught.value)
    assert phrase in str(caught.value)


def test_an_engine_that_a_target_lacks():
    problem = next(w for w in find("dilated_d4")).problem()
    with pytest.raises(PlanError, match=r"implicit_gemm_boxed cannot run .*: sm_80 has no engine for bulk copies"):
        dispatch.plan(problem, KNOWN["sm_80"], "implicit_gemm_boxed")


def test_a_name_that_no_form_has():
    with pytest.raises(PlanError, match=r"kernel: 'im2col' is not known; choose one of implicit_gemm, "):
        dispatch.plan(problems(FORWARD)["causal_dw1d-bfloat16-nchw"], INTERPRETER, "im2col")


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs every form")
@pytest.mark.parametrize("part", PARTS)
def test_a_form_that_may_be_forced_outside_its_kind_is_right(part):
    """A depthwise layer is grouped and dense too: forms that the kind would not be given compute it all the same."""
    problem = problems(part)[f"causal_dw1d-bfloat16-nchw{dict(zip(PARTS, ('', '-dx', '-dw'), strict=True))[part]}"]
    foreign = [n for n in KERNELS if n not in dispatch.family(problem)[0] and reason_of(n, problem) is None]
    assert len(foreign) == (5 if part == WEIGHT_GRADIENT else 2)
    for name in foreign:
        made = dispatch.plan(problem, INTERPRETER, name)
        assert first_use.difference(made, torch.device("cpu")) <= tolerance(problem.dtype, 8)
