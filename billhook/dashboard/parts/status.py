"""Where a run is, in words and bars."""

from __future__ import annotations

import time

from billhook.core.plan import PARTS
from billhook.dashboard.progress import Progress, Round
from billhook.report.charts import Axis, Line, Point, figure, xy_chart
from billhook.report.frame import escaped
from billhook.report.numbers import format_duration, format_number, pluralize, visible_name

WORDS = {
    "load": "loading the model", "calibrate": "reading calibration text", "score": "scoring", "search": "searching",
    "finalists": "judging the best plans on unseen text",
    "influence": "asking unseen text about each choice",
    "spectra": "measuring outputs of linear maps", "factor": "fitting factors",
    "round": "searching", "recover": "recovering", "apply": "cutting", "evaluate": "evaluating",
    "answer": "answering prompts", "save": "saving", "speed": "timing", "report": "reporting", "export": "exporting",
}  # fmt: skip


def status_line(found: Progress) -> str:
    """The stage with its bar, rate and time left, and what the process uses, as HTML."""
    return f"{_bar(found)}<p>{' · '.join(map(escaped, (*_pace(found), *_use(found))))}</p>"


def age(since: float) -> str:
    """The time since a moment as HTML, which the page counts on."""
    return f'<span class="age" data-since="{since:.3f}">{format_duration(max(0.0, time.time() - since))}</span>'


def stage_words(stage: str) -> str:
    """What a stage does."""
    return WORDS.get(stage, visible_name(stage))


def _bar(found: Progress) -> str:
    now = found.now
    count = f"{now.done:,} of {now.total:,}" if now.total else f"{now.done:,}" if now.done else ""
    label = escaped(f"{stage_words(now.stage)} {count}".rstrip())
    bar = f'<progress max="{now.total}" value="{min(now.done, now.total)}"></progress>' if now.total else ""
    return f"<label>{label}{bar}</label>"


def _pace(found: Progress) -> list[str]:
    words = []
    if found.rate is not None:
        words.append(f"{format_number(found.rate)}/s")
    if found.left is not None:
        words.append(f"{format_duration(found.left)} left in this stage")
    if found.removed is not None:
        gone, target, unit = found.removed
        words.append(f"{_count(gone)} of {_count(target)} {unit} removed")
    return words


def _count(x: float) -> str:
    return format_number(int(x) if x == int(x) else x)


def _use(found: Progress) -> list[str]:
    used = found.now.resources
    words = [] if found.cpu is None else [f"CPU {found.cpu:.1f} cores"]
    for name, label in (("memory_bytes", "memory"), ("gpu_memory_bytes", "GPU memory")):
        if name in used:
            words.append(f"{label} {format_number(used[name], 'B')}")
    return [*words, f"disk {format_number(found.disk_free, 'B')} free"]


def gone_so_far(found: Progress) -> str:
    """What the best candidate of the last round removes, as HTML; nothing before the first round."""
    if not found.rounds:
        return ""
    last = found.rounds[-1]
    counts = [
        f"{pluralize(n, f'{part} site')}" for part in PARTS
        if (n := sum(site.startswith(part) for site in last.removed))
    ]  # fmt: skip
    if last.narrowed:
        counts.append(f"{pluralize(len(last.narrowed), 'site')} narrower")
    names = ", ".join([*last.removed, *(each.replace("=", " keeps ") for each in last.narrowed)]) or "nothing yet"
    return (
        f"<p>Gone so far: <strong>{escaped(' and '.join(counts) or 'nothing')}</strong>, loss {last.loss:.4g} on "
        "calibration tokens; no interval is stored for a round.</p>"
        f"<p><small>{escaped(visible_name(names))}</small></p>"
    )


def rounds_figure(found: Progress) -> str:
    """The loss of the best candidate round by round; nothing before the second round."""
    if len(found.rounds) < 2:
        return ""
    points = tuple(
        Point(number, each.loss, f"round {number}: {_round_words(each)}, loss {each.loss:.4g}")
        for number, each in enumerate(found.rounds, 1)
    )
    line = Line("Loss", points, "--orange", joined=True, size=9)
    option = xy_chart(
        [line], Axis("Round of the search", "integer"), Axis("Loss of its best candidate", "nats", zero=True)
    )
    words = f"The best candidate of each of {len(points)} rounds, on calibration tokens; a round has no interval."
    return figure(option, title="", label=words, caption=words, height=220)


def _round_words(each: Round) -> str:
    narrow = [f"{pluralize(len(each.narrowed), 'site')} narrower"] if each.narrowed else []
    return ", ".join([*(each.removed[-3:]), *narrow]) or "nothing removed"
