"""How a command begins, shows its result and fails: a message and an exit code, never a traceback unless asked for."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from billhook.errors import BillhookError
from billhook.records import EventListener


class CommandSession:
    """What a command shows, and how it fails: a message and an exit code, never a traceback unless asked for."""

    def __init__(self, as_json: bool, quiet: bool, verbose: bool, resume: str = "") -> None:
        self.as_json, self.quiet, self.verbose, self.resume = as_json, quiet, verbose, resume
        self.watch: EventListener
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> CommandSession:
        from billhook import terminal

        signal.signal(signal.SIGTERM, _interrupt)
        tune_allocator()
        terminal.silence_libraries(self.verbose)
        self.watch, self._close = terminal.progress(quiet=self.quiet)
        return self

    def show(self, value: dict[str, Any], kind: str) -> None:
        from billhook import terminal

        self._close()
        if self.as_json:
            print(json.dumps(value, indent=2))
        else:
            terminal.print_result(value, kind)

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
            _leave(str(error), error.exit_code)
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # a GPU's, a CPU's
        if isinstance(error, MemoryError) or full:
            _leave(f"Out of memory: {error}. Use fewer --tokens, a shorter --length, or --dtype bfloat16.", 5)
        if isinstance(error, OSError) and error.errno == 28:
            _leave(f"The disk is full: {error}. Free some space and run it again.", 5)
        if not self.verbose:
            traceback.print_exception(error)
        _leave("This is a bug in Billhook. Please report it with the lines above.", 1)


def tune_allocator() -> None:
    """Keep glibc from giving large buffers back after every forward pass and faulting them in anew (LOG.md, 1)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
