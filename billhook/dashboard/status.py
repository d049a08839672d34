"""Where a run is, in words and bars."""

from __future__ import annotations

from billhook.core.plan import PARTS
from billhook.dashboard.progress import Progress
from billhook.report.frame import escaped
from billhook.report.numbers import format_duration, format_number, pluralize, visible_name

WORDS = {
    "load": "loading the model", "calibrate": "reading calibration text", "score": "scoring", "search": "searching",
    "round": "searching", "recover": "recovering", "apply": "cutting", "evaluate": "evaluating",
    "answer": "answering prompts", "save": "saving", "speed": "timing", "report": "reporting", "export": "exporting",
}  # fmt: skip


def status_line(found: Progress) -> str:
    """The stage with its bar, rate and time left, and what the process uses, as HTML."""
    return f"{_bar(found)}<p>{' · '.join(map(escaped, (*_pace(found), *_use(found))))}</p>"


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
        words.append(f"{format_number(gone)} of {format_number(target)} {unit} removed")
    return words


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
        f"calibration tokens; no interval is stored for a round.</p><p><small>{escaped(visible_name(names))}</small></p>"
    )
