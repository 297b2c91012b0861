"""What forward and backward allocate beside what goes in and out: a tenth of what the weight gradient reads."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import DEVICE

import triton_conv as tc
from triton_conv import eager, ops, ops_conv, workloads
from triton_conv import problem as problems
from triton_conv.dispatch import forms, plan
from triton_conv.errors import PlanError
from triton_conv.kernels.sum_partials import sum_partials
from triton_conv.layout import dense_strides
from triton_conv.target import KNOWN


def dense(shape, channels_last, dtype, parts=None):
    strides = dense_strides(shape, channels_last)
    if parts is not None:
        shape, strides = (parts, *shape), (math.prod(shape), *strides)
    return torch.empty_strided(shape, strides, dtype=dtype, device=DEVICE).fill_(math.nan)


@pytest.mark.parametrize(
    "shape", [(5, 7, 3, 3), (4, 1, 5, 5), (6, 8, 1, 1), (3, 130, 2, 2), (2, 3, 70), (2, 3, 2, 2, 5)]
)
@pytest.mark.parametrize("parts", [1, 3, 70])
@pytest.mark.parametrize(
    ("dtype", "sums"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_partial_sums_are_added_up_and_rounded_once(shape, parts, dtype, sums):
    values = torch.randn(parts, *shape, dtype=torch.float64, device=DEVICE)
    expected = values.to(sums).double().sum(0)
    for order in ((False, False), (False, True), (True, False), (True, True)):
        partial, result = dense(shape, order[0], sums, parts), dense(shape, order[1], dtype)
        sum_partials(partial.copy_(values), result)
        # One rounding of the sum, and float32's own of adding up.
        bound = expected.abs() * torch.finfo(dtype).eps / 2 + parts * 8 * torch.finfo(sums).eps
        assert ((result.double() - expected).abs() <= bound).all(), order


class Meter:
    """Bytes of live results of the functions that everything comes from which the ops, plans and launches allocate."""

    def __init__(self, monkeypatch):
        self.live = self.peak = 0
        for owner, name in ((torch, "empty"), (torch, "empty_strided"), (eager, f"_empty_{DEVICE}")):
            monkeypatch.setattr(owner, name, self.metered(getattr(owner, name)))

    def metered(self, allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            size = tensor.untyped_storage().nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(tensor, self.freed, size)
            return tensor

        return call

    def freed(self, size):
        self.live -= size


LAYERS = {
    # Partial sums lie where the input's gradient will.
    "many-pixels-nhwc": (tc.conv2d, (1, 16, 30, 30), (16, 16, 3, 3), {"padding": 1}),
    # A weight of a little more than a tenth of what is read.
    "fewer-pixels-nhwc": (tc.conv2d, (1, 16, 26, 26), (16, 16, 3, 3), {"padding": 1}),
    "depthwise": (tc.conv2d, (2, 4, 16, 16), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    "depthwise-nhwc": (tc.conv2d, (1, 16, 12, 12), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
    "narrow-groups-nhwc": (tc.conv2d, (2, 16, 16, 16), (16, 4, 3, 3), {"padding": 1, "groups": 4}),
    "strided-1d": (tc.conv1d, (4, 16, 128), (32, 16, 4), {"padding": 1, "stride": 2}),
    "transposed-nhwc": (tc.conv_transpose2d, (1, 16, 28, 28), (16, 16, 4, 4), {"padding": 1, "stride": 2}),
    "transposed-few-pixels": (tc.conv_transpose2d, (1, 32, 4, 4), (32, 16, 4, 4), {"padding": 1, "stride": 2}),
}  # fmt: skip


def most_parts(problem, target):
    """The plan with as many partial sums as its tile may have, up to 64."""
    made = plan(problem, target)
    if not isinstance(problem, problems.WeightGradientProblem) or not hasattr(made.tile, "SPLITS"):
        return made
    parts = min(problem.most_partial_bytes // (problem.accumulator_bytes * math.prod(problem.result_shape)), 64)
    if "SPLITS" not in made.tile.whole:
        parts = 1 << max(parts.bit_length() - 1, 0)
    return plan(problem, target, made.kernel.name, replace(made.tile, SPLITS=max(parts, 1)))


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_take_a_tenth_of_what_is_read_beside_what_goes_in_and_out(name, monkeypatch):
    monkeypatch.setattr(problems, "_POOLED_BYTES", 0)
    monkeypatch.setattr(ops_conv, "plan", most_parts)
    ops.forget_plans()
    plan.cache_clear()
    function, x_shape, w_shape, options = LAYERS[name]
    memory_format = torch.channels_last if name.endswith("nhwc") else torch.contiguous_format
    x, w = (
        torch.randn(shape, dtype=torch.float16, device=DEVICE).to(memory_format=memory_format).requires_grad_()
        for shape in (x_shape, w_shape)
    )
    meter = Meter(monkeypatch)
    y = function(x, w, **options)
    grad = torch.ones_like(y)
    held = meter.live
    y.backward(grad)
    assert meter.peak > held, "nothing was metered"
    reads = x.nbytes + y.nbytes
    beside = meter.peak - (y.nbytes + x.nbytes + w.nbytes)
    assert beside <= reads / 10
    ops.forget_plans()


@pytest.mark.parametrize("workload", workloads.FLAGSHIPS, ids=lambda w: w.name)
def test_the_tiles_that_flagships_run_with_keep_to_the_memory_there_is(workload):
    problem = replace(workload, part="weight gradient").problem()
    target = KNOWN["sm_90"]
    made = plan(problem, target)
    if made.partial is None:
        return
    g, (shape, _) = problem.geometry, made.partial
    x, y = (problem.itemsize * n for n in (g.batch * g.c_in * g.in_pixels, g.M * g.c_out))
    w = problem.itemsize * math.prod(problem.result_shape)
    partial = problem.accumulator_bytes * math.prod(shape)
    # With a small weight the input's gradient comes after this one.
    unborn = (y if workload.layer.problem().geometry.transposed else x) if 10 * w <= x + y else 0
    assert partial - unborn <= (x + y) / 10


def test_more_partial_sums_than_there_is_memory_for_are_refused():
    workload = next(w for w in workloads.FLAGSHIPS if w.name == "dcgan_t2d")
    problem = replace(workload, part="weight gradient").problem()
    kernel = forms(problem, KNOWN["sm_90"])[0][-1]
    tile = replace(kernel.safe_tile, SPLITS=2)
    with pytest.raises(PlanError, match="2 partial sums take 16777216 bytes of at most 1048576"):
        plan(problem, KNOWN["sm_90"], kernel.name, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("workload", [w for w in workloads.FLAGSHIPS if not w.offset_groups], ids=lambda w: w.name)
def test_a_training_step_on_the_gpu_takes_a_tenth_of_what_is_read_beside_what_goes_in_and_out(workload):
    tensors = workload.tensors(torch.device("cuda"))
    x, w = (tensors[name].requires_grad_() for name in ("input", "weight"))

    def step():
        y = workload.call(tensors)
        grad = torch.ones_like(y)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(y, (x, w), grad)
        return y.nbytes, torch.cuda.max_memory_allocated() - before

    step()
    y_bytes, peak = step()
    assert peak - x.nbytes - w.nbytes <= (x.nbytes + y_bytes) / 10 + problems._POOLED_BYTES
