"""Names of others are shown escaped on every stream, and in the file for continuous integration."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from io import StringIO

import pytest
from rich.table import Table

from billhook.cli import progress, session
from billhook.cli.visible_console import VisibleConsole
from billhook.core.errors import ModelError, either, on_command_line, visible
from billhook.core.events import Event
from billhook.core.margin import Margin
from billhook.core.results.comparisons import GateCheck, GateReport
from billhook.core.results.measured import Environment, Estimate
from billhook.report.compare_words import junit_xml

NAME = "a\x1b[31mred\x1b]0;title\x07\u202egnp\u2066\x9b1m\ud800"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\u202egnp\u2066\x9b1m\ud800"


def test_what_a_terminal_would_obey_is_escaped_and_words_stay() -> None:
    assert visible(NAME) == SHOWN
    words = "größer, \t日本語 ☃ 👩\u200d👩\nשלום"
    assert visible(words) == words


def test_messages_are_escaped_for_both_readers() -> None:
    error = ModelError(f"{NAME}: {either('python', 'shell')}")
    assert str(error) == f"{SHOWN}: python"
    assert on_command_line(error.message) == f"{SHOWN}: shell"


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_are_escaped_and_keep_their_own_colours(terminal: bool) -> None:
    out = StringIO()
    console = VisibleConsole(
        file=out, force_terminal=terminal, width=200, color_system="standard" if terminal else None
    )
    table = Table("name", "x")
    table.add_row(NAME, "1")
    console.print(table)
    console.print(NAME, style="bold", markup=False, highlight=False)
    assert out.getvalue().count(SHOWN) == 2
    assert not set(out.getvalue()) & set("\x07\u202e\u2066\x9b\ud800")
    assert ("\x1b[1m" in out.getvalue()) == terminal
    assert "\x1b[31m" not in out.getvalue()
    edges = [line.rindex("│") for line in out.getvalue().splitlines() if "│" in line]
    assert terminal or len(set(edges)) == 1


def test_progress_and_failures_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    watch, close = progress.progress(quiet=False)
    watch(Event("load", values={"model": NAME}))
    close()
    with pytest.raises(SystemExit), session.CommandSession(False, True, True):
        raise ValueError(NAME)
    told = capsys.readouterr().err
    assert told.count(SHOWN) >= 2
    assert not set(told) & set("\x1b\x07\u202e\x9b")


def test_the_file_for_continuous_integration_is_xml() -> None:
    lost = Estimate(1.0, 0.5, 1.5, 100, 100, True, "")
    here = Environment("0", "3", "2", "5", "cpu", "a machine", 1)
    check = GateCheck(NAME, "acc\x00", 9, "FAIL", 0.5, 0.4, lost, Margin.parse("1pp:a.jsonl"))
    xml = junit_xml(GateReport("FAIL", f"{NAME}\n", "base", (check,), (), here))
    case = ET.fromstring(xml).find("testcase")
    assert case is not None
    assert (case.get("name"), case.get("classname")) == (rf"{SHOWN} (acc\x00)", rf"{SHOWN}\n")
