"""The shape of the house: imports run one way, importing does nothing, and a kernel has one name everywhere."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triton_conv as tc
from triton_conv.autotune.space import SPACES
from triton_conv.defaults import RULES
from triton_conv.kernels import KERNELS

ROOT = Path(tc.__file__).parent
# A module imports only what stands before it.
LAYERS = (
    "amounts",
    "errors",
    "settings",
    "writing",
    "target",
    "tensors",
    "geometry",
    "deform_geometry",
    "layout",
    "problem",
    "problem_deform",
    "problem_lectures",
    "kernels",
    "portfolio",
    "configs",
    "verdicts",
    "comparisons",
    "defaults",
    "dispatch",
    "reference",
    "eager",
    "first_use_lectures",
    "first_use",
    "ops",
    "ops_conv",
    "ops_deform",
    "ops_fused",
    "ops_local",
    "autograd",
    "autocast",
    "calls",
    "calls_deform",
    "autograd_lectures",
    "vmaps",
    "vmaps_lectures",
    "arguments",
    "symbolic",
    "functional",
    "lectures",
    "policy",
    "routing",
    "nn_lectures",
    "nn",
    "report",
    "trial",
    "conversion",
    "acceleration",
    "sharding",
    "distributed",
    "recording",
    "cost",
    "examples",
    "workloads",
    "loading",
    "aot",
    "inspection",
    "static_model",
    "autotune",
    "cli_lectures",
    "cli_model",
    "cli",
)
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules of the package that a file imports, anywhere in it, as dotted names below the package."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            if node.module:
                yield ".".join(base)
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name.removeprefix("triton_conv.") for name in names if name.startswith("triton_conv."))


def test_every_module_has_a_layer():
    assert {dotted(path).split(".")[0] for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_one_way(path):
    own = dotted(path).split(".")[0]
    allowed = set(LAYERS[: LAYERS.index(own)])
    if own in ("kernels", "defaults", "autotune", "cost", "examples", "static_model"):
        allowed.add(own)
    imported = {name.split(".")[0] for name in imports(path)} - {"__version__"}
    assert imported <= allowed


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("kernels.")], ids=dotted)
def test_kernels_know_neither_each_other_nor_the_planning(path):
    inside = {name for name in imports(path) if name.startswith("kernels")}
    shared = (
        "arguments", "banded_rows", "banded_sums", "boxed_sums", "boxes", "common", "kernel", "launching", "patches",
        "planes", "row_vectors", "row_windows", "sampling", "staging", "strips", "toeplitz_blocks", "turned_boxes",
        "windows",
    )  # fmt: skip
    assert inside <= {f"kernels.{name}" for name in shared}


def test_the_library_does_not_import_its_benchmarks_or_tests():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"perf_plots", "tests"}
            assert "autotune_configs" not in roots or dotted(path) == "configs"


def test_importing_does_nothing():
    script = """
import os, sys, torch
environment, precision = dict(os.environ), torch.backends.cudnn.conv.fp32_precision
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)
import triton_conv
from triton_conv import configs, dispatch, kernels, ops
assert not torch.cuda.is_initialized()
assert configs.files.cache_info().currsize == 0
assert dispatch.plan.cache_info().currsize == 0
assert not kernels.launches
assert not [name for name in opened if str(name).endswith(".json")], opened
assert "autotune_configs" not in sys.modules
assert "matplotlib" not in sys.modules
assert dict(os.environ) == environment
assert torch.backends.cudnn.conv.fp32_precision == precision
assert torch.get_default_dtype() is torch.float32
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def camel(name):
    return "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_one_name(name):
    kernel = KERNELS[name]
    assert kernel.name == name
    assert Path(inspect.getsourcefile(kernel.function.fn)) == ROOT / "kernels" / f"{name}.py"
    assert kernel.function.fn.__name__ == f"{name}_kernel"
    assert kernel.tile_type.__name__ == f"{camel(name)}Tile"
    assert isinstance(kernel.safe_tile, kernel.tile_type)
    assert name in RULES
    assert name in SPACES


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_parameters(name):
    kernel = KERNELS[name]
    parameters = inspect.signature(kernel.function.fn).parameters
    for parameter in parameters.values():
        assert parameter.name.isupper() == (parameter.annotation is not inspect.Parameter.empty), parameter.name
    names = list(parameters)
    assert tuple(names[: len(kernel.pointers)]) == kernel.pointers
    tile = [field for field in kernel.safe_tile.asdict() if field.isupper()]
    assert set(tile) <= set(names)

    def kind(name):
        if name.endswith("_ptr"):
            return 0
        return 3 if name.isupper() else 2 if name.startswith("stride_") else 1

    kinds = [kind(name) for name in names]
    assert kinds == sorted(kinds), "pointers, sizes, strides, constants"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_explains_itself(name):
    text = KERNELS[name].function.fn.__doc__
    assert "Grid:" in text
    assert "= " in text.splitlines()[0], "the formula"
    assert any(word in text for word in ("arXiv", "et al.")), "a reference"


def device_functions():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield pytest.param(node, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize("function", list(device_functions()))
def test_device_code(function):
    for argument in function.args.args:
        assert argument.arg.isupper() == (argument.annotation is not None), argument.arg
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.load":
            keywords = {keyword.arg for keyword in call.keywords}
            assert "mask" in keywords, "every load is masked"
            assert "other" in keywords, "and what is masked off is a number, since it may be multiplied"
    assert ast.get_docstring(function)


OF_TORCH = [name for name in tc.__all__ if name.startswith(("conv", "deform")) and name != "convert"]
FUNCTIONS = OF_TORCH + [name for name in tc.__all__ if name.startswith(("separable", "shuffle", "locally", "channel"))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_is_equivalent_to(name):
    text = " ".join(getattr(tc, name).__doc__.split())
    library = "torchvision.ops" if name.startswith("deform") else "torch.nn.functional"
    # torchvision has the one rank.
    torchs = "deform_conv2d" if name.startswith("deform") else name if name in OF_TORCH else ""
    assert f"Equivalent to `{library}.{torchs}" in text


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_public_function_has_torchs_signature(name):
    parameters = inspect.signature(getattr(tc, name)).parameters
    ours = {key: p.default for key, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    if name.startswith("deform"):
        names = ["input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask"]
    elif "transpose" in name:
        names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    else:
        names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert list(ours) == names
    assert ours["bias"] is None
    one, zero = ((1, 1), (0, 0)) if name == "deform_conv2d" else (1, 0)
    assert (ours["stride"], ours["padding"], ours["dilation"]) == (one, zero, one)
    extra = {key for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert extra <= {"padding_mode", "activation"}
