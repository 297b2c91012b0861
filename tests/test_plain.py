"""The commands on a machine without rich, as a GPU machine with torch and triton alone is."""

import importlib.util
import sys

import pytest

from triton_conv.autotune import console, plain


@pytest.fixture
def without(monkeypatch):
    """The console as it is imported where there is no rich."""
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("triton_conv.autotune.console_without", console.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_go_where_they_go_with_rich(without, capsys):
    without.say("a [bold] line")
    without.ERR.print("a complaint", markup=False, highlight=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a [bold] line\n", "a complaint\n")


def test_a_table_has_its_columns(without, capsys):
    table = without.Table(box=None, header_style="bold")
    assert isinstance(table, plain.Table)
    table.add_column("kernel", no_wrap=True)
    table.add_column("spilled\nbytes", justify="right")
    table.add_row("depthwise", "8", style="red")
    table.add_row("x", "1234")
    without.OUT.print(table)
    assert capsys.readouterr().out == (
        "kernel     spilled bytes\n"
        "depthwise              8\n"
        "x                   1234\n"
    )  # fmt: skip


def test_progress_asks_for_lines(without):
    columns = (without.TextColumn("{task}"), without.BarColumn(), without.TimeRemainingColumn())
    with without.Progress(*columns, console=without.ERR, transient=True, disable=False) as bar:
        task = bar.add_task("setting up", total=1.0)
        bar.update(task, completed=0.5)
        bar.advance(task)
        assert bar.disable


def test_every_name_is_there_twice():
    assert {name for name in console.__all__ if not hasattr(plain, name)} == {
        "ERR", "OUT", "complain", "say", "write_json",
    }  # fmt: skip
