"""`python -m perf_plots.model_bench`: published models from end to end, plain and converted, in a process of its own.

Each unit is one model in one memory format, eager or compiled, its forward pass or a training step (forward, loss,
backward, and a step of SGD whose rate is zero). Timed by the host's clock from the call to its end, launches and all,
in turn. What a model computes is compared with the plain one in higher precision before its time counts.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import triton_conv as tc
from triton_conv.autotune.measure import Call, RehearsalTimer, Timer, Timing, usable
from triton_conv.errors import BackendWarning
from triton_conv.problem import Problem
from triton_conv.recording import record as recorded
from triton_conv.target import of_device

from . import children, model_record
from .baselines import fastest_algorithms, reason
from .clocks import sample
from .model_record import COMPILED, CONVERTED, FORCED, GRAPH, PLAIN, WRONG, ModelRecord, Unit
from .models import MODELS, SMALL, Model, Scale
from .provenance import provenance, source_hash
from .record import Contestant, ResultError
from .store import device_folder

# Inputs at a time: what fills an H100 without filling its memory. Most layers that we have kernels for come first.
_BATCHES = {
    "convnext_tiny": 32, "x3d": 8, "mobilenet_v2": 64, "hifi_gan": 16, "resnext50": 32, "shufflenet_v2": 64,
    "deeplab_v3": 8, "dcgan": 64,
}  # fmt: skip
_TINY = "rehearsal"
_ROUNDS, _LEAST_ROUNDS, _WARMUP, _SECONDS, _CHECKED = 20, 6, 3, 4.0, 2
# A converted model may be so many times as far from the reference as the plain one, and this much anyway.
_TIMES_AS_FAR, _ANYWAY = 2.0, 0.01


class WallTimer:
    """The host's clock from a call to the end of its work, one call after the other in turn."""

    measured = True

    def rounds(self, calls: Mapping[str, Call], count: int, warmup: int = _WARMUP) -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        stop = time.perf_counter() + _SECONDS
        for turn in range(warmup + count):
            if turn >= warmup + _LEAST_ROUNDS and time.perf_counter() > stop:
                break
            for name, call in calls.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                if turn >= warmup:
                    samples[name].append(1e6 * (time.perf_counter() - start))
        return {name: Timing(tuple(each)) for name, each in samples.items()}


def units(rehearse: bool = False) -> list[Unit]:
    """All of them, what says most first: every model in its usual format eagerly, then compiled, then in the other."""
    if rehearse:
        return [Unit(_TINY, True, False, False), Unit(_TINY, False, False, True), Unit(_TINY, False, True, False)]
    found = []
    for usual in (True, False):
        for compiled in (False, True):
            for name in _BATCHES:
                flat = len(MODELS[name].input) == 2
                # A one-dimensional model has one format.
                if not (flat and not usual):
                    found += [Unit(name, usual and not flat, compiled, training) for training in (False, True)]
    return found


def unit(title: str) -> Unit:
    """The unit of a title."""
    name, layout, mode, what = title.split("-")
    return Unit(name, layout == "nhwc", mode == "compiled", what == "training")


def finished(folder: Path, unit: Unit) -> bool:
    """Whether this code has a result of the unit in a device's folder, if only a failure."""
    try:
        found = model_record.read(model_record.path(folder, unit))
    except ResultError:
        return False
    return bool(found.provenance.get("source") == source_hash("triton_conv"))


def spent(folder: Path, units: Iterable[Unit]) -> str:
    """What the time of units went to, the most first."""
    total: Counter[str] = Counter()
    for each in units:
        total.update(model_record.read(model_record.path(folder, each)).seconds)
    return ", ".join(f"{seconds:.0f} s {what}" for what, seconds in total.most_common())


def fail(folder: Path, unit: Unit, device: torch.device, why: str) -> None:
    """Writes down why a unit has no times."""
    model_record.write(ModelRecord(unit, device.type == "cuda", provenance(device), error=why), folder)


def _tiny(scale: Scale) -> nn.Module:
    """One for the interpreter."""
    layers = [nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2)]
    return nn.Sequential(*layers)


_MODELS = MODELS | {_TINY: Model(_tiny, (4, 6, 6), (4, 6, 6))}


def problems(unit: Unit) -> Iterator[Problem]:
    """The convolutions that a unit's model runs on our kernels, found on meta tensors, where nothing is computed."""
    if unit.compiled:
        return
    bench = Bench(unit, torch.device("meta"), False)
    net = tc.convert(bench.net, force=True)
    yield from recorded(_Step(net, bench.input) if unit.training else _Forward(net, bench.input))


class _Forward:
    """The forward pass; what is checked are the outputs of the first inputs, which do not depend on the others."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self._net, self._x = net, x

    def __call__(self) -> Tensor:
        with torch.no_grad():
            output: Tensor = self._net(self._x)
        return output

    def result(self) -> Tensor:
        return self()[:_CHECKED].double()


class _Replay(_Forward):
    """The same, captured in a CUDA graph."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            tc.warmup(net, x)
            with torch.cuda.graph(self._graph):
                self._output: Tensor = net(x)

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._output


class _Step:
    """A training step; what is checked are all gradients, one after the other."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        self._net, self._x, self._optimizer = net, x, torch.optim.SGD(net.parameters(), lr=0.0)

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._net(self._x).float().square().mean()
            loss.backward()
        self._optimizer.step()

    def result(self) -> Tensor:
        self()
        return torch.cat([p.grad.flatten().double() for p in self._net.parameters() if p.grad is not None])


class Bench:
    """A unit, set up on a device: the plain model, and an input."""

    def __init__(self, unit: Unit, device: torch.device, rehearse: bool) -> None:
        self.unit, self._device, self._rehearse = unit, device, rehearse
        model = _MODELS[unit.model]
        # Small models are for the interpreter, where only float32 is exact enough.
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.shape = (2, *model.small) if rehearse else (_BATCHES[unit.model], *model.input)
        torch.manual_seed(0)
        with device:
            net = model.build(SMALL if rehearse else Scale()).to(self.dtype)
            x = torch.randn(self.shape, dtype=self.dtype)
        self.net: nn.Module = _in_format(net.train(unit.training), unit.channels_last)
        self.input: Tensor = _in_format(x, unit.channels_last)
        self.layers: dict[str, int] = {}
        self.absent: dict[str, str] = {}

    @property
    def timer(self) -> Timer:
        return RehearsalTimer() if self._rehearse else WallTimer()

    def entrants(self) -> dict[str, _Forward | _Step]:
        """Who is timed; `absent` says who cannot be, and why."""
        make: Any = _Step if self.unit.training else _Forward
        nets = self._nets()
        if not self.unit.compiled:
            found = {name: make(net, self.input) for name, net in nets.items()}
            if not self.unit.training:
                found |= self._graphs(nets)
            return found
        found = {PLAIN: make(nets[PLAIN], self.input)}
        # The models share the code of their layers, of which only so many shapes are compiled before torch gives up.
        torch.compiler.reset()
        if CONVERTED in nets and not self.layers["ours"]:
            del nets[CONVERTED]
            self.absent[CONVERTED + COMPILED] = "the same as PyTorch's: no layer of ours is measured faster"
        for name, net in nets.items():
            # Of a rehearsal the interpreter's kernels, which Inductor cannot compile.
            backend = "eager" if self._rehearse else "inductor"
            found[name + COMPILED] = make(
                torch.compile(copy.deepcopy(net), backend=backend, fullgraph=True), self.input
            )
        return found

    def _nets(self) -> dict[str, nn.Module]:
        nets = {PLAIN: self.net, FORCED: tc.convert(copy.deepcopy(self.net), force=True)}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            converted = tc.convert(copy.deepcopy(self.net))
        unmeasured = [str(each.message) for each in said if issubclass(each.category, BackendWarning)]
        if unmeasured:
            name = CONVERTED + (COMPILED if self.unit.compiled else "")
            self.absent[name] = unmeasured[0].partition(":")[0]
        else:
            nets[CONVERTED] = converted
        with torch.set_grad_enabled(self.unit.training):
            rows = list(tc.plan(converted, self.input))
        ours = sum(row.choice.ours for row in rows) if not unmeasured else 0
        self.layers = {"convolutions": len(rows), "ours": ours}
        return nets

    def _graphs(self, nets: Mapping[str, nn.Module]) -> dict[str, _Replay]:
        found = {}
        for name in (PLAIN, FORCED):
            try:
                if self._device.type != "cuda":
                    raise RuntimeError("CUDA graphs are of a GPU alone")
                found[name + GRAPH] = _Replay(nets[name], self.input)
            except Exception as error:  # whatever a capture raises is the reason why there is none
                self.absent[name + GRAPH] = reason(error)
        return found

    def reference(self) -> tuple[str, Tensor]:
        """What the plain model computes in higher precision, and in which."""
        if not self.unit.training:
            net, few = copy.deepcopy(self.net).double(), self.input[:_CHECKED].double()
            return "the first outputs of the plain model in float64", _Forward(net, few).result()
        setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before, setting.fp32_precision = setting.fp32_precision, "ieee"
        try:
            found = _Step(copy.deepcopy(self.net).float(), self.input.float()).result()
        finally:
            setting.fp32_precision = before
        return "all gradients of the plain model in float32", found


def _in_format(what: Any, channels_last: bool) -> Any:
    """A model or a tensor in its memory format: of its tensors those that are images or volumes."""
    if not channels_last:
        return what
    tensors = [what] if isinstance(what, Tensor) else list(what.parameters())
    volumes = any(tensor.dim() == 5 for tensor in tensors)
    return what.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)


def run_unit(unit: Unit, folder: Path, device: torch.device, rehearse: bool = False) -> ModelRecord:
    """Checks and times a unit, and writes its record, whatever happens in it."""
    record = ModelRecord(unit, not rehearse, provenance(device))
    spent = _Spent()
    try:
        bench = Bench(unit, device, rehearse)
        dtype = str(bench.dtype).removeprefix("torch.")
        record = replace(record, batch=bench.shape[0], input=bench.shape[1:], dtype=dtype, seconds=spent.seconds)
        spent.on("building")
        # What comes out is compared with a reference: no kernel need be checked at its first use besides.
        with tc.set_first_use_check(False):
            record = _timed(record, bench, device, spent)
    except Exception as error:  # the next unit must run: what went wrong is this one's result
        record = replace(record, error=reason(error))
    model_record.write(record, folder)
    return record


class _Spent:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def on(self, what: str) -> None:
        """Everything since the last call."""
        now = time.perf_counter()
        self.seconds[what] = round(self.seconds.get(what, 0.0) + now - self._last, 2)
        self._last = now


def _timed(record: ModelRecord, bench: Bench, device: torch.device, spent: _Spent) -> ModelRecord:
    # Without a search: cuDNN's is for what runs often, and in float64 it takes longest.
    what, reference = bench.reference()
    spent.on("reference")
    with fastest_algorithms():
        return _against(reference, replace(record, reference=what), bench, device, spent)


def _against(
    reference: Tensor, record: ModelRecord, bench: Bench, device: torch.device, spent: _Spent
) -> ModelRecord:  # fmt: skip
    errors, contestants = {}, {}
    entrants = bench.entrants()
    spent.on("converting, capturing")
    for name, entrant in list(entrants.items()):
        try:
            errors[name] = _error(entrant.result(), reference)
        except Exception as error:  # one that cannot run is absent, and the others are timed
            if name == PLAIN:
                raise
            bench.absent[name] = reason(error)
            del entrants[name]
            continue
        bound = _TIMES_AS_FAR * errors[PLAIN] + _ANYWAY
        if not errors[name] <= bound:
            bench.absent[name] = f"{WRONG}: relative error {errors[name]:.2g}, the plain model's is {errors[PLAIN]:.2g}"
            del entrants[name]
        spent.on(f"first run of {name}")
    before = sample(device)
    timings = bench.timer.rounds(entrants, _ROUNDS)
    spent.on("timing")
    clocks = {"before": before, "after": sample(device)}
    contestants = {name: Contestant.of(timings[name], errors[name], "") for name in entrants}
    contestants |= {name: Contestant(absent=why) for name, why in bench.absent.items()}
    return replace(record, contestants=contestants, layers=bench.layers, clocks=clocks)


def _error(result: Tensor, reference: Tensor) -> float:
    return float((result - reference).norm() / reference.norm())


def main(arguments: list[str] | None = None) -> int:
    """Runs the units of these titles; exit status 1 if the device does not answer any more."""
    options = children.options("model_bench", __doc__, "models' units", arguments)
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    folder = options.work / "results" / device_folder(of_device(device))
    for title in options.units.split(","):
        record = run_unit(unit(title), folder, device, options.rehearse)
        times = ", ".join(f"{name} {each.median_us:.0f} us" for name, each in record.contestants.items()
                          if each.samples_us)  # fmt: skip
        print(f"{title}: {record.error or times} ({sum(record.seconds.values()):.0f} s)", flush=True)
        if record.error and not usable(device):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
