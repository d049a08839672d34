"""How a command begins, shows its result and fails: a message and an exit code, never a traceback unless asked for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from billhook.core.errors import BillhookError, on_command_line
from billhook.core.events import EventListener
from billhook.core.results.json_form import Result

if TYPE_CHECKING:  # numpy comes with it, which no help text waits for
    from billhook.core.results.stored import StoredRun


class CommandSession:
    """What a command shows, and how it fails: a message and an exit code, never a traceback unless asked for."""

    def __init__(self, as_json: bool, quiet: bool, verbose: bool, resume: str = "") -> None:
        self.as_json, self.quiet, self.verbose, self.resume = as_json, quiet, verbose, resume
        self.watch: EventListener
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> CommandSession:
        from billhook.cli import progress
        from billhook.models.device import keep_freed_memory

        signal.signal(signal.SIGTERM, _interrupt)
        keep_freed_memory()
        progress.silence_libraries(self.verbose)
        self.watch, self._close = progress.progress(quiet=self.quiet)
        return self

    def show(self, value: Any, kind: str) -> None:
        """Print a result: its JSON under --json, else its tables."""
        from billhook.cli import session
        from billhook.core.results.json_form import encode

        self._close()
        if self.as_json:
            print(json.dumps(value.to_json() if isinstance(value, Result) else encode(value), indent=2))
        else:
            session.print_result(value, kind)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close()
        if error is None:
            return
        if self.verbose:
            traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt):
            hint = f" Nothing measured is lost. Go on with: {self.resume}" if self.resume else ""
            _leave(f"Interrupted.{hint}", 130)
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if isinstance(error, BillhookError):
            _leave(on_command_line(error.message), error.exit_code)
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # a GPU's, a CPU's
        if isinstance(error, MemoryError) or full:
            _leave(f"Out of memory: {error}. Use fewer --tokens, a shorter --length, or --dtype bfloat16.", 5)
        if isinstance(error, OSError) and error.errno == 28:
            _leave(f"The disk is full: {error}. Free some space and run it again.", 5)
        if not self.verbose:
            traceback.print_exception(error)
        _leave("This is a bug in Billhook. Please report it with the lines above.", 1)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


# -- results --------------------------------------------------------------------------------------------------------


class _Tables(Console):
    """A console that leaves it to the command how a reader who has seen enough is answered; rich exits with 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling


def print_result(value: Any, kind: str) -> None:
    """Print a result of a command as tables."""
    _tables()[kind](_Tables(soft_wrap=False, markup=False), value)


def _tables() -> dict[str, Callable[[Console, Any], None]]:
    """How a result of every kind is printed."""
    from billhook.cli import study_tables, tables

    return {
        "result": tables.result_table, "anatomy": tables.anatomy_table, "plan_of_work": tables.plan_of_work_table,
        "evaluation": tables.evaluation_table, "speed": tables.speed_table, "scores": tables.score_tables,
        "runs": tables.runs_table, "run": run_table, "methods": tables.methods_table,
        "recipes": tables.recipe_table, "sweep": study_tables.sweep_table, "transfer": study_tables.transfer_table,
        "stability": study_tables.stability_table, "compare": study_tables.comparison_table,
        "gate": study_tables.gate_table, "baselines": study_tables.baseline_table, "tasks": study_tables.task_table,
        "threshold": study_tables.threshold_table, "abtest": study_tables.ab_table,
        "report": lambda console, value: study_tables.foot(console, value["page"], []),
    }  # fmt: skip


TABLES = {"prune": "result", "baseline": "baselines", "eval": "tasks"}  # of kinds of run, where called otherwise


def run_table(console: Console, run: StoredRun) -> None:
    """Print all that the store holds of one run."""
    from billhook.cli.progress import event_words
    from billhook.cli.study_tables import foot

    out = f", out: {run.out}" if run.out else ""
    console.print(f"{run.id}: {run.kind}, {run.state}, {run.losses:,} losses measured{out}")
    for event in run.events:
        at = time.strftime("%H:%M:%S", time.localtime(event.at))
        count = f" {event.done}/{event.total}" if event.total else ""
        words = event_words(event.stage, event.values)
        console.print(f"{at} {event.stage}{count} {words}".rstrip(), style="dim", highlight=False)
    if isinstance(run.result, Result):
        shown = {"baselines": [run.result]} if run.kind == "baseline" else run.result
        _tables()[TABLES.get(run.kind, run.kind)](console, shown)
    elif run.result is not None:
        if set(run.result) - {"laboratory", "page"}:
            console.print(
                "Billhook 0.1 stored the result. For its JSON add --json; for tables run the command again: what the "
                "store holds is not measured again."
            )
        foot(console, str(run.result.get("page", "")), [])
