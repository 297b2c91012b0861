"""Ours or torch's: by a measurement of this very layer or of one like it, in words, and never without one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, INTERPRETED, launches, random

import perf_plots.comparisons
import triton_conv as tc
from perf_plots.record import COMMITTED, OURS
from perf_plots.store import load
from triton_conv import comparisons, configs, ops, policy
from triton_conv.comparisons import PARTS, Comparison, Signature, Times, alike, judge
from triton_conv.errors import BackendWarning, CaptureError, ConfigError, ConfigWarning
from triton_conv.target import INTERPRETER, KNOWN
from triton_conv.workloads import FLAGSHIPS, KINDS, STEP, WEIGHT_GRADIENT

pytestmark = pytest.mark.usefixtures("exact_products")

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="writes measurements for the interpreter's device")


@pytest.fixture(autouse=True)
def home(nothing_measured):
    return nothing_measured


def times(kernel, ours, torchs):
    return Times(ours, torchs, kernel, configs.kernel_hash(kernel), 0)


def measured(problem, forward=(10.0, 20.0), gradients=(10.0, 20.0)):
    """A comparison of a problem with such times (ours, torch's), in microseconds."""
    parts = {part: times("implicit_gemm", *(forward if part == PARTS[0] else gradients)) for part in PARTS}
    return Comparison(Signature.of(problem), parts)


def store(folder, target, *found):
    """Writes comparisons where they are looked for."""
    path = comparisons.path(folder, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = comparisons.to_json(target, {c.signature: c for c in found}, [{"device": target.name}])
    path.write_text(json.dumps(content))
    ops.forget_plans()
    return path


def problem_of(name="convnext_dw7", **changes):
    workload = next(w for w in FLAGSHIPS if w.name == name)
    return replace(workload, **changes).problem()


H100 = KNOWN["sm_90"]


def test_no_measurement():
    assert judge(problem_of(), H100, False) == (False, "no measurement for this device (H100 80GB HBM3)", None)


def test_an_exact_measurement(home):
    store(home, H100, measured(problem_of(), (10.0, 15.0), (30.0, 20.0)))
    verdict = judge(problem_of(), H100, training=False)
    assert verdict == (True, "measured: forward pass 10 us against torch's 15 us", 1.5)
    # A training step counts its gradients too.
    verdict = judge(problem_of(), H100, training=True)
    assert (verdict.faster, verdict.reason) == (False, "measured: training step 70 us against torch's 55 us")
    assert verdict.gain == pytest.approx(55 / 70)


def test_bias_and_activation_make_no_difference(home):
    store(home, H100, measured(problem_of()))
    assert judge(replace(problem_of(), has_bias=True, activation="relu"), H100, True).faster


@pytest.mark.parametrize(
    ("changes", "like"),
    [
        (dict(input=(32, 192, 56, 56)), True),
        (dict(input=(64, 192, 32, 32)), True),
        (dict(input=(64, 96, 56, 56), weight=(96, 1, 7, 7), arguments={"padding": 3, "groups": 96}), True),
        (dict(input=(8, 192, 56, 56)), False),
        (dict(input=(64, 192, 14, 14)), False),
        (dict(input=(64, 64, 56, 56), weight=(64, 1, 7, 7), arguments={"padding": 3, "groups": 64}), False),
        (dict(weight=(192, 1, 5, 5), arguments={"padding": 2, "groups": 192}), False),
        (dict(arguments={"padding": 3, "groups": 192, "stride": 2}), False),
        (dict(arguments={"padding": 3, "groups": 192, "dilation": 2}), False),
        (dict(weight=(192, 2, 7, 7), arguments={"padding": 3, "groups": 96}), False),
        (dict(dtype="float16"), False),
        (dict(channels_last=False), False),
    ],
    ids=str,
)
def test_a_layer_like_a_measured_one(home, changes, like):
    known, other = problem_of(), problem_of(**changes)
    assert alike(Signature.of(other), Signature.of(known)) is like
    store(home, H100, measured(known))
    verdict = judge(other, H100, False)
    assert verdict.faster is like
    assert verdict.reason.startswith("like n64 c192-192 hw56x56 k7x7" if like else "no measurement of such a layer")


def test_only_a_clear_gain_speaks_for_another_layer(home):
    store(home, H100, measured(problem_of(), forward=(10.0, 10.9)))
    assert judge(problem_of(), H100, False).faster
    assert not judge(problem_of(input=(32, 192, 56, 56)), H100, False).faster
    # Of several measured layers like it, the worst speaks.
    near = measured(problem_of(input=(48, 192, 56, 56)), forward=(10.0, 30.0))
    store(home, H100, measured(problem_of(), forward=(10.0, 9.0)), near)
    assert judge(problem_of(input=(32, 192, 56, 56)), H100, False).gain == pytest.approx(0.9)


def test_where_torch_has_no_such_operation(home):
    problem = problem_of("dcnv2")
    store(home, H100, measured(problem, forward=(10.0, None)))
    assert judge(problem, H100, False) == (True, "measured: forward pass 10 us, torch has none", None)


def test_what_is_not_known_of_gradients_or_is_stale(home):
    forward = measured(problem_of())
    store(home, H100, replace(forward, parts={PARTS[0]: forward.parts[PARTS[0]]}))
    assert judge(problem_of(), H100, False).faster
    reason = "no measurement of its input gradient and weight gradient"
    assert judge(problem_of(), H100, True) == (False, reason, None)
    old = {PARTS[0]: replace(forward.parts[PARTS[0]], kernel_hash="0")}
    store(home, H100, replace(forward, parts=old))
    assert judge(problem_of(), H100, False) == (False, "measured with other kernel code; measure again", None)


def test_a_users_own_measurements_come_first(home, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(configs, "FOLDERS", (*configs.FOLDERS, ("shipped exact", lambda: shipped)))
    store(shipped, H100, measured(problem_of(), (10.0, 50.0)), measured(problem_of("dcgan_t2d"), (10.0, 50.0)))
    store(home, H100, measured(problem_of(), (10.0, 20.0)))
    assert judge(problem_of(), H100, False).gain == 2.0
    assert judge(problem_of("dcgan_t2d"), H100, False).gain == 5.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c | {"schema": 0}, "schema 0, expected 1"),
        (lambda c: c | {"device": {}}, "measured on {}, this is"),
        (lambda c: {k: v for k, v in c.items() if k != "layers"}, "malformed .KeyError"),
        (lambda c: c["layers"][0]["parts"]["forward"].update(ours_us=-1) or c, "a time is not positive"),
        (lambda c: c["layers"][0]["signature"]["geometry"].update(more=1) or c, "malformed .TypeError"),
        (lambda c: [], "malformed .TypeError"),
    ],
)
def test_a_file_that_does_not_hold_up_is_skipped_once(home, spoil, message):
    path = store(home, H100, measured(problem_of()))
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=message):
        comparisons.read(path, H100)
    with pytest.warns(ConfigWarning, match="skipping a file of comparisons"):
        assert not judge(problem_of(), H100, False).faster
    assert not judge(problem_of(), H100, True).faster


def test_the_committed_results_become_the_file_that_is_read(home, capsys):
    assert perf_plots.comparisons.main(["--store", str(home)]) == 0
    assert "layers, ours faster in the forward pass of" in capsys.readouterr().out
    devices, _ = load(COMMITTED)
    for results in devices:
        target = perf_plots.comparisons.target_of(results)
        assert comparisons.path(home, target).parent.name == results.name
        stored = comparisons.entries(target)
        plain = [record for record in results.records if record.workload.kind in KINDS]
        assert len(plain) < len(results.records), "a separable convolution must not speak for a depthwise one"
        assert set(stored) == {Signature.of(record.workload.layer.problem()) for record in plain}
        assert {part for found in stored.values() for part in found.parts} == set(PARTS), "a step is no part"
        for record in (record for record in plain if record.workload.part != STEP):
            found = stored.get(Signature.of(record.workload.layer.problem()))
            theirs = record.contestants.get("cudnn")
            if record.ours_us is None or theirs is None or not theirs.samples_us:
                continue
            part = found.parts[record.workload.part]
            assert part.ours_us == record.contestants[OURS].median_us
            assert part.torch_us == theirs.median_us
            assert part.kernel_hash == record.plan["kernel_hash"]
        assert any(WEIGHT_GRADIENT in found.parts for found in stored.values())


# ------------------------------------------------------------------------------------------ what the modules make of it


@needs_interpreter
@pytest.mark.parametrize(("gain", "ran"), [(2.0, 1), (0.5, 0)])
def test_a_module_goes_where_the_measurement_says(home, gain, ran):
    layer, x = tc.nn.Conv2d(3, 4, 3), random((2, 3, 5, 5))
    made = tc.plan(tc.conv2d, x, layer.weight, layer.bias)
    store(home, INTERPRETER, measured(made.problem, (10.0, 10.0 * gain), (10.0, 10.0)))
    with torch.no_grad():
        choice = layer.choose(x)
        result = layer(x)
    assert (choice.backend, choice.gain) == ("triton" if ran else "torch", gain)
    assert sum(launches.values()) == ran
    torch.testing.assert_close(result, F.conv2d(x, layer.weight, layer.bias))
    # Another size is not measured, and not like it either.
    launches.clear()
    layer(random((2, 3, 30, 30)))
    assert not launches


@needs_interpreter
def test_accelerate_goes_where_the_measurement_says(home):
    x, w, wide = random((2, 3, 5, 5)), random((4, 3, 3, 3)), random((4, 3, 5, 5))
    store(home, INTERPRETER, measured(tc.plan(tc.conv2d, x, w).problem))
    with tc.accelerate() as report:
        for weight in (w, wide, w):
            torch.testing.assert_close(F.conv2d(x, weight), torch.conv2d(x, weight))
    assert [row.choice.backend for row in report] == ["triton", "torch"]
    assert [row.gain for row in report] == ["2.00x", "unknown"]
    assert sum(launches.values()) == 4
    for words in ("2 convolutions, 1 on our kernels", "implicit_gemm", "measured: forward pass 10 us", "hw5x5 k3x3"):
        assert words in str(report)


FUNCTIONS = [name for name in dir(F) if name.startswith("conv") and name[-1] == "d"]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "unbatched"])
def test_accelerate_takes_every_function_by_force(name, batch):
    rank = int(name[-2])
    x, w = random((*batch, 4, *(5,) * rank)).requires_grad_(), random((4, 4, *(3,) * rank))
    function, extra = getattr(F, name), {"output_padding": 1} if "transpose" in name else {"dilation": 2}
    expected = function(x, w, None, 2, padding=1, **extra)

    @tc.accelerate(force=True)
    def accelerated():
        return function(input=x, weight=w, stride=2, padding=1, **extra)

    result = accelerated()
    assert sum(launches.values()) == 1
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
    # The gradient follows the forward pass, though the block is over.
    result.sum().backward()
    assert sum(launches.values()) == 2
    assert function(x, w, None, 2, padding=1, **extra).shape == expected.shape
    assert sum(launches.values()) == 2


def test_accelerate_without_its_parentheses_is_refused():
    with pytest.raises(TypeError, match=r"force: expected True or False, got <function.*@tc\.accelerate\(\)"):

        @tc.accelerate
        def accelerated():
            pass


def test_accelerate_leaves_alone_what_it_cannot_take():
    x, w = random((1, 3, 4, 4)), random((2, 3, 3, 3))
    with tc.accelerate(force=True) as report:
        with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
            F.conv2d(x[:, :2], w)
        with pytest.raises(TypeError):
            F.conv2d(x, "weight")
        with pytest.warns(BackendWarning, match="no kernel for torch.complex64"):
            assert F.conv2d(x.cfloat(), w.cfloat()).dtype == torch.complex64
        assert F.linear(x, w[0, 0, :, :1].expand(3, 4)).shape == (1, 3, 4, 3)
    assert not launches
    assert all(not row.choice.ours for row in report)


# ------------------------------------------------------------------------------------------------------------- capture


@pytest.fixture
def capturing(monkeypatch):
    """Makes torch say that a CUDA graph is being captured, from the moment it is called."""

    def begin(now=True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: now)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)

    return begin


def test_a_capture_needs_a_warm_function(capturing):
    x, w = random((1, 3, 5, 5)), random((2, 3, 3, 3))
    expected = tc.conv2d(x, w)
    capturing()
    assert torch.equal(tc.conv2d(x, w), expected)
    with pytest.raises(CaptureError, match=r"a CUDA graph is being captured, .*triton_conv.warmup\(model, example\)"):
        tc.conv2d(x, w, padding=1)
    assert launches["implicit_gemm"] == 2
    capturing(False)
    assert tc.conv2d(x, w, padding=1).shape == (1, 2, 5, 5)


def test_a_layer_in_a_capture(capturing, monkeypatch):
    x = random((1, 3, 5, 5))
    model = torch.nn.Sequential(tc.nn.Conv2d(3, 4, 3, backend="triton"), torch.nn.BatchNorm2d(4)).to(DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    capturing()
    with pytest.warns(BackendWarning, match="a CUDA graph is being captured"):
        cold = model[0](x)
    assert not launches
    capturing(False)
    tc.warmup(model, x)
    assert sum(launches.values()) == 2 * (1 if DEVICE == "cpu" else 3), "a stream of its own is run three times"
    # Nothing of the model is changed by it.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    capturing()
    launches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(comparisons, "entries", None)
        patch.setattr(configs, "files", None)
        y = model(x)
        torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))
    assert sum(launches.values()) == 2
    torch.testing.assert_close(model[0](x), cold)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_a_cuda_graph(training):
    model = torch.nn.Sequential(
        tc.nn.Conv2d(8, 8, 3, padding=1, groups=8, activation="silu", backend="triton"),
        tc.nn.ConvTranspose2d(8, 8, 2, stride=2, backend="triton"),
    ).cuda()
    x = random((2, 8, 9, 9))

    def step():
        y = model(x)
        return torch.autograd.grad(y.square().sum(), list(model.parameters())) if training else (y,)

    with torch.set_grad_enabled(training):
        tc.warmup(model, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(random((2, 8, 9, 9), seed="another"))
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_a_capture_without_warmup_is_refused():
    x, w = random((1, 4, 7, 7)), random((4, 4, 3, 3))
    with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tc.conv2d(x, w)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_that_of_the_tensors():
    x, w = random((1, 4, 7, 7)), random((4, 4, 3, 3))
    with torch.cuda.device(0):
        there = tc.conv2d(x.to("cuda:1"), w.to("cuda:1"))
    assert there.device.index == 1
    torch.testing.assert_close(there.to("cuda:0"), tc.conv2d(x.to("cuda:0"), w.to("cuda:0")))


def test_a_choice_is_remembered():
    layer, x = tc.nn.Conv2d(3, 4, 3, backend="triton").to(DEVICE), random((1, 3, 5, 5))
    first = layer.choose(x)
    assert layer.choose(x) is first
    assert layer.choose(x[:, :, :4]) is not first
    assert policy.current_backend() == "auto"
