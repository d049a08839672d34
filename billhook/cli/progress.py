"""Progress in the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from billhook.cli.visible_console import VisibleConsole
from billhook.core.errors import visible
from billhook.core.events import ALERT, OUTLOOK, Event, EventListener, EventValue, ignore_events

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

STEPS = {
    "side_by_side": "side by side", "decode": "time of a decoding step", "load_back": "loading it back",
    "equal": "loads back equal", "teacher_outputs": "the teacher's side", "fold": "fold",
    "copy_shards": "copying shards", "generate": "the model writes text", "measure_again": "every candidate again",
    "path": "along the path",
}  # fmt: skip

PHASES = {
    "exchanges": "now exchanging",
    "alone": "each part alone first",
    "pairs": "now two parts together",
    "changes": "now changing widths",
}

WORDS: dict[str, Callable[[Any], str]] = {  # of the values of an event, by name
    "note": str, "of": str, "set": str, "model": str, "metric": str, "recipe": str, "data": str, "remove": str,
    "phase": lambda phase: PHASES.get(phase, phase),
    "step": lambda step: STEPS.get(step, step),
    "converting": lambda name: f"converting {name} to safetensors, once",
    "pruned_for": lambda task: f"pruned for {task}",
    "tokens": lambda n: f"{n:,} tokens",
    "left_out": lambda n: f"{n:,} {'row' if n == 1 else 'rows'} left out",
    "tensors": lambda n: f"{n:,} tensors",
    "best": lambda loss: f"best on validation {loss:.4f}",
    "round": lambda number: f"round {number:,}", "host": str, "failed": str, "tracker": str,
    "seconds": lambda seconds: f"{seconds:.1f} s",
}  # fmt: skip

LASTING = (ALERT, "budget", "webhook", "track", "workers", "left_out")  # stages whose every event is a line of its own
PLAIN_SECONDS = 5.0  # without a terminal, at most one line in so many seconds
OUTLOOK_SECONDS = 60.0  # and at most one forecast


def silence_libraries(verbose: bool) -> None:
    """Keep transformers' own bars and warnings off the screen, unless asked for."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def event_words(stage: str, values: Mapping[str, EventValue]) -> str:
    """Return what the values of an event of a stage say, as one line without its counts."""
    if stage == ALERT:
        from billhook.core.monitoring.alerts import Alert
        from billhook.report.monitoring.alert_words import alert_sentence

        return alert_sentence(Alert.from_event(Event(stage, values=values)))
    if stage == "budget":
        asked, smaller = (f"{values[name]:.3g}%" for name in ("asked", "smaller"))
        share = f"{values.get('vocabulary', 0):.3g}%vocabulary"
        rows = f" Fewer tokens instead: --remove {share} --data FILE" if "vocabulary" in values else ""
        return (
            f"{asked} of all {values['unit']} is {values['of_sites']:.0f}% of what attentions and MLPs hold, since "
            f"{values['elsewhere']:.0f}% lies elsewhere, mostly in embeddings. {asked} of theirs: --remove {smaller}"
            f"{'' if values['unit'] == 'params' else values['unit']}{rows and '.'}{rows}"
        )
    if stage == "round":
        narrowed = [pair.partition("=") for pair in str(values["narrowed"]).split(",") if pair]
        sites = [site for site in str(values["removed"]).split(",") if site]
        sites += [f"{site} keeps {int(kept):,}" for site, _, kept in narrowed]
        return f"{', '.join(sites) or 'nothing'}: {values['loss']:.6f}"
    if stage == "workers":
        return _worker_words(values)
    if "because" in values:
        return f"on {values['alone_on']} alone: {values['because']}"
    units = [name.removeprefix("removed_") for name in values if name.startswith("removed_")]
    words = [f"{_amount(values[f'removed_{u}'])} of {_amount(values[f'target_{u}'])} {u} removed" for u in units]
    words += [WORDS[name](value) for name, value in values.items() if name in WORDS and name != "best"]
    if "steps_taken" in values:
        words.append(f"{values['steps_taken']} of {values['steps']} steps")
    for name, label in (("lowest", "lowest "), ("loss", "")):
        if name in values and "objective" in values:
            words.append(f"{label}{values['objective']} {values[name]:.4f}")
    return ", ".join([*words, *(WORDS["best"](values["best"]) for name in values if name == "best")])


def _worker_words(values: Mapping[str, EventValue]) -> str:
    """Return who came or was lost, who trains, or how busy each worker was; this process is worker 0."""
    if "place" in values:
        return f"{values['recovery']} trains in this process alone; workers of {values['place']} share searches only"
    if "training" in values:
        return (
            f"{values['training']} of {values['of']} for {values['recovery']}, which has {values['rows']} rows per "
            f"step; all with --recover-set {values['recovery']}.batch={values['of']}"
        )
    if "worker" not in values:
        busy = [f"{load:.0%}" for name, load in values.items() if name.startswith("load.")]
        return f"busy {', '.join(busy)} of the time"
    if "lost" in values:
        return f"{values['worker']} is lost ({values['lost']}); the others take its part"
    if "refused" in values:
        return f"{values['worker']} is refused: {values['refused']}"
    return f"{values['worker']} takes part"


def _amount(value: EventValue) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def progress(*, quiet: bool) -> tuple[EventListener, Callable[[], None]]:
    """A watcher that shows stages on stderr with rate and ETA, and how to close it.

    A stderr that is closed or full, or a terminal that is gone, ends the showing and nothing else.
    """
    if quiet:
        return ignore_events, lambda: None
    if sys.stderr is None:
        return ignore_events, lambda: None
    try:
        shown, close = _shown()
    except (OSError, ValueError):
        forget_stream(sys.stderr)
        return ignore_events, lambda: None

    def watch(event: Event) -> None:
        try:
            shown(event)
        except (OSError, ValueError):  # ValueError: of a stream that Python has closed
            forget_stream(sys.stderr)

    def end() -> None:
        try:
            close()
        except (OSError, ValueError):
            forget_stream(sys.stderr)

    return watch, end


def forget_stream(stream: Any) -> None:
    """Let what is written to a closed or full stream from now on go nowhere, libraries' words and a last flush too."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _shown() -> tuple[EventListener, Callable[[], None]]:
    """A watcher of lines, or of bars where stderr is a terminal, and how to close it."""
    console = VisibleConsole(stderr=True)
    return bars_on(console) if console.is_terminal else (_plain_progress(), lambda: None)


def bars_on(console: Console) -> tuple[EventListener, Callable[[], None]]:
    """A watcher that draws bars on a terminal, and how to close it."""
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class WithOutlook(Progress):
        """Bars, and below them the forecast of how the search will end."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if outlook.plain:
                yield outlook

    outlook = Text(style="dim")
    bars = WithOutlook(
        SpinnerColumn(),
        TextColumn("{task.fields[stage]:<9}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=False,
        expand=True,  # so that a long note is cut on few columns, and the counts are not
    )
    return _Bars(bars, outlook), bars.stop


class _Bars:
    """One bar a stage; a stage that starts over (a search round) starts its bar over. `outlook`: shown below them."""

    def __init__(self, bars: Progress, outlook: Text) -> None:
        self._bars, self._outlook, self._tasks = bars, outlook, {}  # type: ignore[var-annotated]
        self._since: dict[str, tuple[float, int]] = {}
        bars.start()

    def __call__(self, event: Event) -> None:
        if event.stage in LASTING:
            return self._bars.console.print(f"{event.stage}: {event_words(event.stage, event.values)}")
        if event.stage == OUTLOOK:
            self._outlook.plain = visible(str(event.values.get("words", "")))
            return None
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task("", stage=event.stage, rate="", note="", total=event.total)
        task = self._tasks[event.stage]
        shown = self._bars.tasks[self._bars.task_ids.index(task)]
        if event.done < shown.completed:
            self._bars.reset(task)
            self._since.pop(event.stage, None)
        start, first = self._since.setdefault(event.stage, (time.monotonic(), event.done))
        self._bars.update(
            task,
            completed=event.done,
            total=event.total,
            note=event_words(event.stage, event.values)[:60],
            rate=_rate(event, start, first),
        )


def _rate(event: Event, start: float, first: int) -> str:
    passed = time.monotonic() - start
    return f"{(event.done - first) / passed:.1f}/s" if passed > 1 and event.done > first else ""


def _plain_progress() -> EventListener:
    """Lines on stderr: a new stage at once, the same stage every few seconds and when it is complete."""
    last: dict[str, Any] = {"stage": "", "at": 0.0, "start": 0.0, "first": 0, "done": 0, OUTLOOK: -OUTLOOK_SECONDS}

    def watch(event: Event) -> None:
        now = time.monotonic()
        if event.stage == OUTLOOK:
            if event.values and now - last[OUTLOOK] >= OUTLOOK_SECONDS:
                last[OUTLOOK] = now
                print(visible(f"{OUTLOOK} {event.values['words']}"), file=sys.stderr, flush=True)
            return
        fresh = event.stage != last["stage"]
        if fresh or event.done < last["done"]:
            last.update(stage=event.stage, start=now, first=event.done)
        last["done"] = event.done
        complete = event.total is not None and event.done == event.total
        fresh = fresh or event.stage in LASTING
        if not fresh and not complete and now - last["at"] < PLAIN_SECONDS:
            return
        last["at"] = now
        count = f" {event.done}/{event.total}" if event.total else ""
        rate, left = _rate(event, last["start"], last["first"]), ""
        if rate and event.total:
            left = f", {(event.total - event.done) * (now - last['start']) / (event.done - last['first']):.0f} s left"
        words = event_words(event.stage, event.values)
        print(visible(f"{event.stage}{count} {words} {rate}{left}".rstrip()), file=sys.stderr, flush=True)

    return watch
