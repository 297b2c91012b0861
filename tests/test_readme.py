"""README's tables: every row of the lectures is there, what it calls exists, and so does every test that it names."""

import ast
import re
from functools import reduce
from pathlib import Path

import pytest

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.kernels import KERNELS

ROOT = Path(tc.__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside an installed package")


def rows():
    """(number, system, calls, tests) of the lectures' table."""
    text = README.read_text() if README.exists() else ""
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]
    return [row for row in cells if re.fullmatch(r"L\d+", row[0])]


ROWS = rows()


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_every_row_of_the_lectures_is_there():
    assert [row[0] for row in ROWS] == [f"L{i}" for i in range(1, 14)]
    assert all(len(row) == 4 and quoted(row[2]) and quoted(row[3]) for row in ROWS)


def names_of(call):
    """`tc.conv1d/2d/3d(groups=g)` as conv1d, conv2d, conv3d."""
    path = call.partition("(")[0].removeprefix("tc.")
    first, *ranks = path.split("/")
    return [first, *(first[:-2] + rank for rank in ranks)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_calls_of_a_row_exist(row):
    for call in quoted(row[2]):
        if call.startswith("tc."):
            for name in names_of(call):
                assert callable(reduce(getattr, name.split("."), tc)), name
        elif call.startswith("triton-conv "):
            source = (ROOT / "triton_conv" / "cli_lectures.py").read_text() + (ROOT / "triton_conv/cli.py").read_text()
            assert f'"{call.split()[1]}"' in source, call
        else:
            assert call == "triton_conv.examples"


def functions(module):
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_of_a_row_exist(row):
    for named in quoted(row[3]):
        module, _, function = named.partition("::")
        found = {name for name in functions(module) if name.startswith("test_")}
        assert found, module
        assert not function or function in found, named


def test_the_first_lines_are_the_public_surface():
    """Every `tc.` name anywhere in the README exists."""
    for name in set(re.findall(r"\btc\.([a-z_A-Z0-9.]+)", README.read_text())):
        assert reduce(lambda found, part: getattr(found, part, None), name.strip(".").split("."), tc), name


def test_the_kernels_page_names_every_kernel():
    text = (README.parent / "triton_conv" / "kernels" / "README.md").read_text()
    serving, waiting = text.split("## What serves where it was measured")
    # Weight gradients share the end of their names.
    written = {name for part in quoted(text) for name in (part, f"{part}weight_gradient")}
    written |= {f"locally_connected_input_gradient{part}" for part in quoted(serving)}
    missing = set(KERNELS) - written
    assert not missing
    assert set(dispatch.WAITING) <= set(quoted(waiting))
