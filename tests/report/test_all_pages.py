"""What all pages have in common: their commands are taken, and no part needs inline style or handlers."""

from __future__ import annotations

import html
import re
import shlex

import pytest
import typer
from browser import Elements
from made_comparisons import a_comparison, a_gate, a_speed, a_watch, an_ab_report
from made_studies import a_stability, a_sweep, a_threshold, a_transfer
from test_report import TARGETS, a_result

from billhook.cli.main import app
from billhook.core.plan import Plan
from billhook.core.results.exports import ExportReport
from billhook.core.results.json_form import Result
from billhook.report.pages import page_of

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
RESULTS: dict[str, Result] = {
    "run": a_result(1, targets=TARGETS),
    "run without recovery": a_result(2, steps=(), recoveries=(), targets=TARGETS),
    "run with an export": a_result(3, exports=(ExportReport("m", "gguf", "f", "out dir/gguf", ("a.gguf",), 1),)),
    "sweep": a_sweep(1),
    "transfer": a_transfer(1, ("arc", "piqa")),
    "stability": a_stability(1),
    "unstable": a_stability(1, (256,)),
    "threshold": a_threshold(),
    "nothing": a_threshold(plan=Plan(), step=0, share=0.0, confirmed=None, test=()),
    "compare": a_comparison(),
    "gate": a_gate(),
    "gate that passes": a_gate("PASS"),
    "gate that is undecided": a_gate("UNDECIDED"),
    "abtest": an_ab_report(),
    "few prompts": an_ab_report(4),
    "speed": a_speed(2),
    "speed of one": a_speed(1),
    "speed in a runtime": a_speed(2, runtime="llama.cpp 1.0"),
    "watch": a_watch(3),
    "watch of one round": a_watch(1),
}


def commands_of(page: str) -> list[list[str]]:
    blocks = map(html.unescape, re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL))
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("billhook ")]


@pytest.mark.parametrize("name", RESULTS)
def test_commands_of_a_page_are_taken(name: str) -> None:
    result = RESULTS[name]
    commands = commands_of(page_of(result.kind)(result))
    assert commands, "a page says what to do next"
    for _, command, *arguments in commands:
        COMMANDS[command].make_context(command, arguments)


@pytest.mark.parametrize("name", RESULTS)
def test_the_body_of_a_page_has_no_inline_style_and_no_handler(name: str) -> None:
    """So that its parts can be laid into a page under a strict Content-Security-Policy."""
    result = RESULTS[name]
    body = page_of(result.kind)(result).partition("<body>")[2].partition("<script>")[0]
    for tag, about in Elements(body).found:
        assert tag not in ("style", "script")
        assert not [key for key in about if key == "style" or key.startswith("on")], tag
