"""How a command begins, shows its result and fails: a message and an exit code, never a traceback unless asked for."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table

from billhook.cli.visible_console import VisibleConsole
from billhook.core.errors import BillhookError, GateFailed, cannot_write, on_command_line, visible
from billhook.core.events import ALERT, Event, EventListener, fan_out
from billhook.core.results.json_form import Result

if TYPE_CHECKING:
    from billhook.core.monitoring.alerts import Alert
    from billhook.runs.trackers import Tracking


class CommandSession:
    """What a command shows, and how it fails: a message and an exit code, never a traceback unless asked for."""

    def __init__(self, as_json: bool, quiet: bool, verbose: bool, resume: str = "") -> None:
        self.as_json, self.quiet, self.verbose, self.resume = as_json, quiet, verbose, resume
        self.watch: EventListener
        self._close: Callable[[], None] = lambda: None
        self._alerts: list[Alert] = []
        self._following: list[Tracking] = []

    def __enter__(self) -> CommandSession:
        from billhook.cli import progress

        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that is closed ends no run
        progress.silence_libraries(self.verbose)
        watch, self._close = progress.progress(quiet=self.quiet)
        self.watch = fan_out(_with_kept_memory(watch), self._note)
        if not self.quiet:
            from billhook.cli.search_outlook import SearchOutlook

            self.watch = fan_out(self.watch, SearchOutlook(watch))
        return self

    def _note(self, event: Event) -> None:
        """Keep alerts for the exit code, and tell of failed trackers and webhooks where no progress is shown."""
        if event.stage == ALERT:
            from billhook.core.monitoring.alerts import Alert

            self._alerts.append(Alert.from_event(event))
        elif self.quiet and event.stage in ("track", "webhook"):
            _tell(f"{event.stage}: {', '.join(map(str, event.values.values()))}")

    def alert(self, alerts: Sequence[Alert]) -> None:
        """Let alerts decide the exit code: one that is critical is a failed gate."""
        self._alerts += alerts

    def track(self, names: str, kind: str, params: Mapping[str, Any]) -> None:
        """Let trackers follow the run, by their names with commas. Raises UnknownName, MissingExtra."""
        if names:
            from billhook.runs.trackers import Tracking

            tracking = Tracking.start(names, kind, params, self.watch)
            self._following.append(tracking)
            self.watch = fan_out(self.watch, tracking)

    def show(self, value: Any) -> None:
        """Print a result: its JSON under --json, else its tables."""
        from billhook.core.results.json_form import encode

        for tracking in self._following:
            tracking.finish(value)
        self._close()
        if self.as_json:
            print(json.dumps(value.to_json() if isinstance(value, Result) else encode(value), indent=2), flush=True)
        else:
            print_result(value)

    def asking(self, question: Callable[[Any], str]) -> Callable[[Any], bool] | None:
        """Return what asks yes or no in the terminal, with no as the default; None where nobody is there to answer."""
        if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
            return None

        def ask(value: Any) -> bool:
            self._close()
            print(visible(f"{question(value)} [y/N] "), end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip().lower() in ("y", "yes")

        return ask

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for tracking in self._following:
            tracking.close(failed=error is not None)
        self._close()
        if error is None or isinstance(error, KeyboardInterrupt):
            self._end_alerts(interrupted=error is not None)
        if error is None:
            return
        if self.verbose:
            _tell("".join(traceback.format_exception(error)).rstrip())
        if isinstance(error, KeyboardInterrupt):
            hint = f" Nothing measured is lost. Go on with: {self.resume}" if self.resume else ""
            _leave(f"Interrupted.{hint}", 130)
        if isinstance(error, OSError):  # what stdout still holds would fail again, and change the exit code
            _forget_unread(sys.stdout)
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            sys.exit(0)
        if isinstance(error, BillhookError):
            _leave(on_command_line(error.message), error.exit_code)
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # a GPU's, a CPU's
        if isinstance(error, MemoryError) or full:
            _leave(f"Out of memory: {error}. Use fewer --tokens, a shorter --length, or --dtype bfloat16.", 5)
        if cannot_write(error):
            again = self.resume or "run it again"
            _leave(f"The disk cannot be written: {error}. Free some space, or mend the disk, then: {again}", 5)
        if not self.verbose:
            _tell("".join(traceback.format_exception(error)).rstrip())
        _leave("This is a bug in Billhook. Please report it with the lines above.", 1)

    def _end_alerts(self, *, interrupted: bool) -> None:
        """Tell of alerts that a quiet command did not show, and leave with 4 where one is critical."""
        for alert in self._alerts if self.quiet else ():
            from billhook.report.monitoring.alert_words import alert_sentence

            _tell(f"{ALERT}: {alert_sentence(alert)}")
        critical = dict.fromkeys(alert.rule for alert in self._alerts if alert.severity == "critical")
        if critical and not interrupted:
            _leave(f"Rules are broken: {', '.join(critical)}.", GateFailed.exit_code)


def _with_kept_memory(watch: EventListener) -> EventListener:
    """A listener that sets the allocator at the first event: a model is loaded then, and torch is there."""

    waiting = [True]

    def on_event(event: Event) -> None:
        if waiting:
            from billhook.models.device import keep_freed_memory

            keep_freed_memory()
            waiting.clear()
        watch(event)

    return on_event


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> NoReturn:
    _tell(message)
    sys.exit(code)


def _forget_unread(stream: Any) -> None:
    from billhook.cli.progress import forget_stream

    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        forget_stream(stream)


def _tell(message: str) -> None:
    """Print on stderr, if somebody reads it."""
    from billhook.cli.progress import forget_stream

    if sys.stderr is not None:
        try:
            print(visible(message), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            forget_stream(sys.stderr)


# -- results --------------------------------------------------------------------------------------------------------


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
    table_of(next(iter(value)) if isinstance(value, dict) else type(value))(
        VisibleConsole(soft_wrap=False, markup=False), value
    )


def table_of(kind: type | str) -> Print:
    """What prints a result of a kind: its table, or its rows."""
    # by the time that they take to import
    for module in ("run_tables", "tables", "smaller.tables", "study_tables", "outlook_tables"):
        if kind not in TABLES:
            import_module(f"billhook.cli.{module}")
    return TABLES[kind if kind in TABLES else Result]


def empty_table(*columns: str) -> Table:
    """A table with columns and no rows yet."""
    return plain_table(columns, ())


def foot(console: Console, page: str, notes: Sequence[str]) -> None:
    """Print notes and where the page is."""
    from billhook.report.numbers import printable

    for note in notes:
        console.print(note, style="dim", highlight=False)
    if page:
        console.print(f"Page: {printable(page)}", highlight=False, soft_wrap=True)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under columns, the first on the left."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn
