"""What the tests share: the comparison with torch, tensors in odd memory layouts, and one case of a group."""

import os
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

import triton_conv as tc
from triton_conv import configs, dispatch
from triton_conv.defaults import default_tile
from triton_conv.kernels import KERNELS, launches
from triton_conv.reference import reference, relative_error, tolerance
from triton_conv.target import KNOWN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The forms of one kernel: which of them runs depends on memory formats, borders and measurements.
DEPTHWISE_FORMS = ("depthwise_banded", "depthwise_patch", "depthwise")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def name_of(value):
    """A test id for dtypes and cases; None lets pytest choose."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "id", None)


def limit(made, result):
    """The bound of `relative_error` that a correct kernel keeps for this plan."""
    # The interpreter multiplies float32 exactly, whatever the plan says of tf32.
    precision = "ieee" if INTERPRETED else made.problem.precision
    return tolerance(result.dtype, made.problem.geometry.K, precision, made.kernel.name == "deformable")


def compare(result, expected, bound):
    """Same shape, and no element further off than the bound."""
    assert result.shape == expected.shape
    error = relative_error(result, expected)
    assert error <= bound, f"relative error {error:.3g}, bound {bound:.3g}"


def compare_activated(result, expected, before, bound):
    """The same, relative to the numbers `before` the activation.

    It may flatten all of them to nearly nothing; their rounding errors it leaves, times its slope of at most 1.13.
    """
    assert result.shape == expected.shape == before.shape
    assert result.isfinite().all()
    offset = (result.double() - expected).abs()
    error = relative_error(before + offset, before)
    assert error <= 1.13 * bound, f"relative error {error:.3g}, bound {1.13 * bound:.3g}"


def torch_has(function, arguments):
    """Whether torch's own function takes these arguments."""
    padding = arguments.get("padding", 0)
    pairs = not isinstance(padding, (int, str)) and any(not isinstance(p, int) for p in padding)
    return hasattr(F, function) and not pairs and arguments.get("padding_mode", "zeros") == "zeros"


def strides_of_format(shape, *operands):
    """Strides of a dense tensor in channels_last if torch finds that any operand suggests it."""
    last = any(suggest_memory_format(tensor) != torch.contiguous_format for tensor in operands)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    chosen = formats.get(len(shape), torch.contiguous_format) if last else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=chosen).stride()


def check(function, arguments, *kernels, beside_torch=True):
    """Runs `triton_conv.<function>(**arguments)` and compares it with torch.

    Values with the float64 reference; shape and strides with torch's own result; and the launch counter proves that our
    kernel, one of `kernels` if given, computed it. Not `beside_torch`, torch's own call is not made: on CPUs it dies of
    some geometries (torch 2.13: channels_last bfloat16 of width 1, stride 2, padding 1).
    """
    ours = getattr(tc, function)
    made = tc.plan(ours, **arguments)
    assert not kernels or made.kernel.name in kernels
    launches.clear()
    result = ours(**arguments)
    assert dict(launches) == ({made.kernel.name: 1} if made.grid else {})
    assert result.dtype == arguments["input"].dtype
    expected, bound = reference(function, arguments), limit(made, result)
    if arguments.get("activation"):
        compare_activated(result, expected, reference(function, arguments | {"activation": None}), bound)
    else:
        compare(result, expected, bound)
    rank = int(function[-2])
    if rank > 1 and result.dim() == rank + 2:
        assert result.stride() == strides_of_format(result.shape, arguments["input"], arguments["weight"])
    # On a CPU ranks 1 and 2 follow that rule; rank 3, and cuDNN, have backends that do not.
    if beside_torch and torch_has(function, arguments) and rank < 3 and DEVICE == "cpu":
        plain = {name: value for name, value in arguments.items() if name not in ("activation", "padding_mode")}
        own = getattr(F, function)(**plain)
        assert (result.shape, result.stride()) == (own.shape, own.stride())
    return result


def chosen_tiles(quick):
    """A kernel's safe tile and the default one for sm_90, in every dtype; but for the `quick` pairs it is slow."""
    pairs = [(tile, dtype) for tile in ("safe", "sm_90") for dtype in DTYPES]
    marked = [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("tile", "dtype"), marked, ids=str)


def chosen_tile(name, problem, tile):
    """A kernel's "safe" tile, or the default one for the architecture that is named."""
    return KERNELS[name].safe_tile if tile == "safe" else default_tile(name, problem, KNOWN[tile])


def timed(monkeypatch, name, problem, target):
    """As if a device had timed one kernel's default tile on a problem, and nothing else."""
    entry = configs.Entry(default_tile(name, problem, target), 10.0, (9.0, 11.0), 20.0, 0.0, 8)
    stored = SimpleNamespace(entries={problem.describe(): entry}, portfolio=None, environment={}, target=target)
    monkeypatch.setattr(configs, "files", lambda kernel, _: [("user tuned", stored)] if kernel == name else [])


def serves_where_timed(monkeypatch, name, problem, target):
    """A kernel that only a measurement prefers is planned where there is one."""
    timed(monkeypatch, name, problem, target)
    dispatch.plan.cache_clear()
    chosen = dispatch.plan(problem, target)
    dispatch.plan.cache_clear()
    assert (chosen.kernel.name, chosen.source) == (name, "user tuned")


def random(shape, dtype=torch.float32, seed="", scale=1.0):
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}{tuple(shape)}".encode()))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def channels_last(tensor):
    """In torch's channels_last or channels_last_3d; 1-D tensors, for which torch has none, likewise by strides."""
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def dense(tensor):
    return tensor.contiguous()


def amid_nan(tensor, before, after):
    """Inside a larger tensor of NaN, so many elements in from either end of every dimension."""
    whole = torch.full([before + size + after for size in tensor.shape], float("nan")).to(tensor)
    return whole[tuple(slice(before, before + size) for size in tensor.shape)].copy_(tensor)


def apart(tensor):
    """Images inside longer ones, channels inside more: aligned vectors, but no image follows another."""
    n, c, *size = tensor.shape
    whole = torch.full((n, c + 1, size[0] + 8, *size[1:]), float("nan")).to(tensor)
    return whole[:, :c, : size[0]].copy_(tensor)


def sliced(tensor):
    """Every second element of every dimension of a tensor twice as large, whose other elements are NaN."""
    whole = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = whole[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def permuted(tensor):
    """The dimensions in reverse order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def expanded(tensor):
    """The first element of the first dimension for all of it, by a stride of zero."""
    return tensor[:1].expand(tensor.shape)


def shifted(tensor):
    """One element into its storage: not aligned to 16 bytes."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Case:
    """One call of a public function, by shapes; `x` and `w` are functions that lay out input and weight in memory.

    `kernel` is what runs it; "depthwise" stands for whichever of its forms the memory format lets run.
    """

    id: str
    kernel: str
    function: str
    input: tuple
    weight: tuple
    arguments: dict = field(default_factory=dict)
    bias: bool = True
    x: object = None
    w: object = None

    @property
    def kernels(self):
        """The kernels that may run it."""
        return DEPTHWISE_FORMS if self.kernel == "depthwise" else (self.kernel,)

    def tensors(self, dtype):
        """All arguments of the call; weights are scaled so that results are of the order of one."""
        rank = int(self.function[-2])
        fan_in = max(torch.Size(self.weight[1:]).numel(), 1)
        x = random(self.input, dtype, self.id)
        w = random(self.weight, dtype, "w" + self.id, fan_in**-0.5)
        c_out = self.weight[0]
        if "transpose" in self.function:
            c_out = self.weight[1] * self.arguments.get("groups", 1)
        result = {"input": self.x(x) if self.x else x, "weight": self.w(w) if self.w else w, **self.arguments}
        if self.bias:
            result["bias"] = random((c_out,), dtype, "b" + self.id)
        assert len(self.weight) == rank + 2
        return result
