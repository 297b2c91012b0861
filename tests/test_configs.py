"""Files of measured tiles: what is good is used, what is not is reported once, passed over, and left as it is."""

import ast
import importlib.util
import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import DEVICE, random

import triton_conv as tc
from triton_conv import configs, dispatch, ops
from triton_conv.configs import ConfigFile, Entry
from triton_conv.errors import ConfigError, ConfigWarning
from triton_conv.kernels import KERNELS
from triton_conv.kernels.implicit_gemm import ImplicitGemmTile
from triton_conv.target import INTERPRETER, KNOWN, of_device

KERNEL = "implicit_gemm"
TILE = ImplicitGemmTile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, num_warps=2)
ENTRY = Entry(TILE, 12.5, (12.0, 13.0), 20.0, 1e-4, 7)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A user's and a shipped folder of our own, and no plan remembered from before."""
    user, shipped = tmp_path / "home" / "autotune_configs", tmp_path / "shipped"
    monkeypatch.setenv("TRITON_CONV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(configs, "FOLDERS", (("user tuned", configs.user_folder), ("shipped exact", lambda: shipped)))
    ops.forget_plans()
    yield {"user tuned": user, "shipped exact": shipped}
    ops.forget_plans()


def made():
    """The plan of the call that the entries here are for."""
    return tc.plan(tc.conv2d, random((1, 20, 5, 5)), random((9, 20, 1, 1)))


@pytest.fixture
def target():
    return of_device(random((1,)).device)


def written(folder, target, entry=ENTRY, key=None):
    """A file with one entry, for the problem of `made` if no other is named."""
    key = key or made().problem.describe()
    ops.forget_plans()
    return ConfigFile(KERNEL, target, {"driver": "none"}, {key: entry}).write(folder)


def test_without_files_the_default_is_analytic():
    assert made().source == "analytic default"


@pytest.mark.parametrize("source", ["user tuned", "shipped exact"])
def test_an_entry_is_used(source, folders, target):
    written(folders[source], target)
    assert (made().source, made().tile) == (source, TILE)
    assert not any("passed over" in note for note in made().notes)


def test_only_for_its_own_problem(folders, target):
    written(folders["user tuned"], target, key="another problem")
    assert made().source == "analytic default"


def test_the_users_folder_comes_first(folders, target):
    written(folders["shipped exact"], target)
    written(folders["user tuned"], target, replace(ENTRY, tile=replace(TILE, BLOCK_K=16)))
    assert (made().source, made().tile.BLOCK_K) == ("user tuned", 16)


def depthwise_written(folder, target, times):
    """Files of depthwise kernels, an entry each for one and the same problem; and the plan that they lead to."""
    x, w = random((1, 4, 5, 8)), random((4, 1, 3, 3))
    key = tc.plan(tc.conv2d, x, w, groups=4).problem.describe()
    for kernel, time_us in times.items():
        entry = Entry(KERNELS[kernel].safe_tile, time_us, (time_us, time_us), 20.0, 1e-4, 7)
        ConfigFile(kernel, target, {}, {key: entry}).write(folder)
    ops.forget_plans()
    return tc.plan(tc.conv2d, x, w, groups=4)


@pytest.mark.parametrize("times", [(9.0, 12.5), (12.5, 9.0)], ids=["preferred-faster", "preferred-slower"])
def test_the_fastest_form_wins(times, folders, target):
    forms = dict(zip(("depthwise_banded", "depthwise"), times, strict=True))
    plan = depthwise_written(folders["user tuned"], target, forms)
    assert plan.kernel.name == min(forms, key=forms.get)
    assert (plan.source, plan.tile) == ("user tuned", plan.kernel.safe_tile)


def test_a_slower_form_of_the_user_comes_before_a_faster_one_shipped(folders, target):
    depthwise_written(folders["shipped exact"], target, {"depthwise_banded": 1.0})
    plan = depthwise_written(folders["user tuned"], target, {"depthwise": 50.0})
    assert (plan.kernel.name, plan.source) == ("depthwise", "user tuned")


def test_an_entry_of_a_form_that_is_unsuited_is_not_looked_at(folders, target):
    plan = depthwise_written(folders["user tuned"], target, {"depthwise": 9.0, "depthwise_patch": 1.0})
    assert plan.kernel.name == "depthwise"
    assert "not depthwise_patch: the channels of its input are not contiguous" in plan.notes


def test_the_entry_is_what_runs(folders, target):
    written(folders["user tuned"], target)
    x, w = random((1, 20, 5, 5)), random((9, 20, 1, 1))
    assert made().grid == 2
    assert tc.conv2d(x, w).isfinite().all()


def test_round_trip(tmp_path):
    file = ConfigFile(KERNEL, KNOWN["sm_90"], {"driver": "1"}, {"b": ENTRY, "a": replace(ENTRY, trials=1)})
    path = file.write(tmp_path)
    assert path == tmp_path / "nvidia-sm_90" / "h100-80gb-hbm3-132sm" / "implicit_gemm.json"
    assert configs.read(path, KERNELS[KERNEL], KNOWN["sm_90"]) == file
    before = path.read_bytes()
    file.write(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file was left behind"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = ConfigFile(KERNEL, INTERPRETER, {}, {"a": ENTRY})
    path = file.write(tmp_path)
    before = path.read_bytes()
    file.entries["b"] = replace(ENTRY, trials=object())
    with pytest.raises(TypeError):
        file.write(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def change(**changes):
    return lambda content: content | changes


def change_entry(**changes):
    def apply(content):
        return content | {"entries": {key: entry | changes for key, entry in content["entries"].items()}}

    return apply


def change_tile(**changes):
    return lambda content: change_entry(tile=next(iter(content["entries"].values()))["tile"] | changes)(content)


def without(name):
    return lambda content: {key: value for key, value in content.items() if key != name}


SPOILT = {
    "schema": (change(schema=99), "schema 99, expected 1"),
    "no-schema": (without("schema"), "malformed"),
    "kernel": (change(kernel="depthwise"), "of kernel 'depthwise'"),
    "device": (change(device={"name": "another"}), "measured on"),
    "device-shared-memory": (lambda c: c | {"device": c["device"] | {"shared_bytes": 1}}, "measured on"),
    "stale": (change(kernel_hash="0123456789abcdef"), "stale"),
    "no-entries": (without("entries"), "malformed"),
    "entries-list": (change(entries=[]), "malformed"),
    "no-environment": (without("environment"), "malformed"),
    "time-missing": (change_entry(time_us=None), "malformed"),
    "time-text": (change_entry(time_us="fast"), "malformed"),
    "interval-short": (change_entry(interval_us=[1.0]), "malformed"),
    "tile-power": (change_tile(BLOCK_M=48), "BLOCK_M: expected a power of two"),
    "tile-zero": (change_tile(BLOCK_N=0), "BLOCK_N: expected a positive integer"),
    "tile-text": (change_tile(BLOCK_K="64"), "BLOCK_K: expected a positive integer"),
    "tile-flag": (change_tile(FLAT_K=1), "FLAT_K: expected true or false"),
    "tile-warps": (change_tile(num_warps=64), "at most 16 warps"),
    "tile-field": (change_tile(BLOCK_Q=1), "malformed"),
    "not-an-object": (lambda content: [content], "malformed"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_file(name, folders, target):
    spoil, message = SPOILT[name]
    path = written(folders["user tuned"], target)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    skipped(path, message)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"not json"])
def test_no_json(content, folders, target):
    path = written(folders["user tuned"], target)
    path.write_bytes(content)
    skipped(path, "")


def skipped(path, message):
    """The file is reported once, by its path, and neither used nor changed."""
    before = path.read_bytes()
    with pytest.warns(ConfigWarning, match=message) as caught:
        assert made().source == "analytic default"
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tc.plan(tc.conv2d, random((1, 20, 4, 4)), random((9, 20, 1, 1)))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_spoilt_file_of_the_user_leaves_the_shipped_one(folders, target):
    written(folders["shipped exact"], target)
    written(folders["user tuned"], target).write_text("{")
    with pytest.warns(ConfigWarning):
        assert made().source == "shipped exact"


@pytest.mark.skipif(DEVICE == "cuda", reason="a tile too large for the interpreter is one for a GPU as well")
def test_an_entry_that_does_not_fit_is_passed_over(folders, target):
    large = replace(TILE, BLOCK_M=1024, BLOCK_N=1024, BLOCK_K=1024, num_stages=8)
    small = replace(target, shared_bytes=2**20)
    problem = made().problem
    ConfigFile(KERNEL, small, {}, {problem.describe(): replace(ENTRY, tile=large)}).write(folders["user tuned"])
    plan = dispatch.plan(problem, small)
    assert plan.source == "analytic default"
    (note,) = [note for note in plan.notes if "passed over" in note]
    assert "passed over user tuned" in note
    assert "shared memory" in note
    assert "shared memory" in str(plan)


def test_the_users_folder(monkeypatch, tmp_path):
    assert configs.user_folder() == tmp_path / "home" / "autotune_configs"
    monkeypatch.delenv("TRITON_CONV_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.user_folder() == tmp_path / ".triton_conv" / "autotune_configs"


def test_what_ships_is_readable():
    # Files of devices that we know; others could not be checked here.
    for target in KNOWN.values():
        for kernel in KERNELS:
            path = ConfigFile(kernel, target).path(configs.shipped_folder())
            if path.is_file():
                assert configs.read(path, KERNELS[kernel], target).entries


def test_the_target_folders_differ():
    assert len({target.config_folder for target in (*KNOWN.values(), INTERPRETER)}) == len(KNOWN) + 1


def test_read_refuses_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"not a readable JSON file"):
        configs.read(tmp_path / "none.json", KERNELS[KERNEL], INTERPRETER)


def test_hashes_differ_between_kernels_and_are_stable():
    hashes = {name: configs.kernel_hash(name) for name in KERNELS}
    assert len(set(hashes.values())) == len(KERNELS)
    configs.kernel_hash.cache_clear()
    assert {name: configs.kernel_hash(name) for name in KERNELS} == hashes


CODE = '''"""Docstring."""

import triton


@triton.jit
def helper(x):
    return x - 1


@triton.jit
def stranger(x):
    return x * 5


@triton.jit
def kernel(x):
    """What it does."""
    y = helper(x) + 1  # why
    return y


def host(x):
    return x
'''
SAME = {
    "comment": CODE.replace("# why", "# because"),
    "docstring": CODE.replace("What it does.", "Another description."),
    "module-docstring": CODE.replace("Docstring.", "Other words."),
    "lines": CODE.replace("@triton.jit", "\n\n# A comment.\n@triton.jit"),
    "host-code": CODE.replace("return x\n", "return 2 * x\n"),
    "code-it-does-not-reach": CODE.replace("x * 5", "x * 6"),
}
OTHER = {
    "operation": CODE.replace("+ 1", "+ 2"),
    "argument": CODE.replace("kernel(x)", "kernel(x, z)"),
    "code-it-reaches": CODE.replace("x - 1", "x - 2"),
}


@pytest.fixture
def hash_of(monkeypatch, tmp_path):
    def compute(code):
        # Of the package, by its name: the functions of others are left out.
        name = f"triton_conv.made_up_{abs(hash(code))}"
        file = tmp_path / f"{abs(hash(code))}.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return configs.code_hash(module.kernel)

    return compute


@pytest.mark.parametrize("name", SAME)
def test_the_hash_is_blind_to(name, hash_of):
    assert SAME[name] != CODE
    assert hash_of(SAME[name]) == hash_of(CODE)


@pytest.mark.parametrize("name", OTHER)
def test_the_hash_sees(name, hash_of):
    assert hash_of(OTHER[name]) != hash_of(CODE)


def test_threads_read_code_one_after_another(monkeypatch):
    """Python 3.11 may fail where two threads make syntax trees: "AST constructor recursion depth mismatch"."""
    inside, alone = threading.Semaphore(1), []

    def parse(source):
        alone.append(inside.acquire(blocking=False))
        time.sleep(0.001)
        tree = ast.parse(source)
        inside.release()
        return tree

    monkeypatch.setattr(configs, "ast", SimpleNamespace(**vars(ast) | {"parse": parse}))
    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(lambda _: configs.code_hash(KERNELS["depthwise"].function), range(4)))
    assert len(hashes) == 1
    assert len(alone) > 4
    assert all(alone)
