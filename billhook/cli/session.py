"""How a command begins, shows its result and fails: a message and an exit code, never a traceback unless asked for."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from rich.console import Console

from billhook.cli.visible_console import VisibleConsole
from billhook.core.errors import BillhookError, on_command_line, visible
from billhook.core.events import EventListener
from billhook.core.results.json_form import Result


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

    def show(self, value: Any) -> None:
        """Print a result: its JSON under --json, else its tables."""
        from billhook.core.results.json_form import encode

        self._close()
        if self.as_json:
            print(json.dumps(value.to_json() if isinstance(value, Result) else encode(value), indent=2))
        else:
            print_result(value)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close()
        if error is None:
            return
        if self.verbose:
            _print_traceback(error)
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
            _print_traceback(error)
        _leave("This is a bug in Billhook. Please report it with the lines above.", 1)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> NoReturn:
    print(visible(message), file=sys.stderr)
    sys.exit(code)


def _print_traceback(error: BaseException) -> None:
    print(visible("".join(traceback.format_exception(error))), file=sys.stderr)


# -- results --------------------------------------------------------------------------------------------------------


class _Tables(VisibleConsole):
    """A console that leaves it to the command how a reader who has seen enough is answered; rich exits with 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling


Print = Callable[[Console, Any], None]

TABLES: dict[type | str, Print] = {}  # by the class of a result, or the one key of a plain object


def prints(result: type | str) -> Callable[[Print], Print]:
    """Register a function as what prints results of a class, or plain objects with one key."""

    def register(function: Print) -> Print:
        TABLES[result] = function
        return function

    return register


def print_result(value: Any) -> None:
    """Print a result of a command as tables."""
    for module in ("tables", "study_tables"):
        import_module(f"billhook.cli.{module}")
    kind = next(iter(value)) if isinstance(value, dict) else type(value)
    TABLES.get(kind, TABLES[Result])(_Tables(soft_wrap=False, markup=False), value)
