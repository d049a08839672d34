"""One run in rows and sentences, and numbers as people read them: what terminal, model card and pages share.

Nothing is measured here: every number comes from the run's result, a plain JSON object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.margin import BOUND
from billhook.plan import Plan

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One line of the run's table, as short strings."""

    label: str
    teacher: str
    student: str
    change: str


def summary_rows(result: Result) -> list[SummaryRow]:
    """The table of the run. What was not measured has no row; `run_notes` says so."""
    told: list[SummaryRow] = []
    if quality := result["perplexity"]:
        change = f"{format_ratio(quality['ratio'])} {_span(quality['ci95'], format_ratio)}"
        told.append(
            SummaryRow(
                "Held-out perplexity", format_number(quality["teacher"]), format_number(quality["student"]), change
            )
        )
    for task in result.get("tasks", ()):
        teacher, student = (f"{100 * task[side]:.1f}%" for side in ("teacher", "student"))
        change = f"{_points(task['change'])} {_span(task['ci95'], _points)}"
        told.append(SummaryRow(f"Accuracy, {_stem(task['file'])}", teacher, student, change))
    for label, key, unit in (
        ("Parameters", "parameters", ""),
        ("On disk", "bytes", "B"),
        ("KV cache / token", "kv_bytes_per_token", "B"),
        ("FLOPs / token", "flops_per_token", ""),
    ):
        told.append(_sizes(label, result[key]["teacher"], result[key]["student"], unit))
    if speed := result["speed"]:
        for label, phase in (("Prefill tokens/s", "prefill"), ("Decode tokens/s", "decode")):
            sides = [_median(speed[side][f"{phase}_tokens_per_s"]) for side in ("teacher", "student")]
            predicted = (speed.get("predicted") or {}).get(phase)
            change = _median(speed["ratio"][phase], format_ratio) + (
                f", predicted {format_ratio(predicted)}" if predicted else ""
            )
            told.append(SummaryRow(label, sides[0], sides[1], change))
        peaks = speed["teacher"]["peak_bytes"], speed["student"]["peak_bytes"]
        if any(peaks):
            told.append(_sizes("Peak memory", *peaks, "B"))
    return told


def run_notes(result: Result) -> list[str]:
    """What a reader of the numbers must know: the result's own notes, and what was not measured."""
    told = [str(result["note"])] if result.get("note") else []
    for key in ("perplexity", "speed"):
        if not result[key]:
            told.append(f"{key.capitalize()} was not measured.")
        elif result[key]["note"]:
            told.append(f"{key.capitalize()}: {result[key]['note']}")
    quality = result["perplexity"]
    if quality and not quality["reliable"] and not quality["note"]:
        told.append(f"Perplexity: the interval rests on {quality['clusters']} texts only and is not reliable.")
    if within := result.get("within"):
        told.append(_within_in_words(within))
    recoveries, before = [], 0
    for each in result.get("recoveries", ()):
        recoveries.append(_recovery_in_words(each, each["parameters"] - before))
        before = each["parameters"]
    return recoveries + told


RECOVERY_COLUMNS = ("Recovery", "Text", "Perplexity", "Change", "Of the gap")


def recovery_rows(result: Result) -> list[tuple[str, ...]]:
    """What every recovery did on every text, as short strings under `RECOVERY_COLUMNS`; the gap is that to the teacher."""
    return [
        (
            each["recovery"],
            text,
            f"{format_number(on['before'])} → {format_number(on['after'])}",
            f"{format_ratio(on['ratio'])} {_span(on['ci95'], format_ratio)}",
            "–" if on["closed"] is None else f"{on['closed']:.0%} closed" if on["closed"] >= 0 else "wider",
        )
        for each in result.get("recoveries", ())
        for text, on in each["on"].items()
    ]


def _recovery_in_words(report: Mapping[str, Any], added: int) -> str:
    """What one recovery did to the perplexity on held-out text, loudly where that is nothing; `added` parameters."""
    held = report["on"]["held-out"]
    low, high = (format_ratio(x) for x in held["ci95"])
    closed = f", {held['closed']:.0%} of the gap" if held["closed"] is not None else ""
    figures = f"{format_number(held['before'])} to {format_number(held['after'])} ({format_ratio(held['ratio'])}, {low}–{high}{closed})"
    cost = f"{added:,} parameters more" if added else "nothing"
    learnt = f"learnt from {report['tokens']:,} tokens in {format_duration(report['seconds'])}, at inference {cost}"
    if held["ci95"][1] >= 1:
        return f"{report['recovery']} DID NOT HELP on held-out text: perplexity {figures}; {learnt}. Leave it out."
    return f"{report['recovery']}: held-out perplexity {figures}; {learnt}."


def _within_in_words(within: Mapping[str, Any]) -> str:
    """Which sizes a margin was asked about, and what it said of the one that was taken."""
    taken = max((t for t in within["trials"] if t["within"]), key=lambda t: float(t["percent"]))
    refused = [f"{t['percent']:.1f}%" for t in within["trials"] if not t["within"]]
    more = f" {', '.join(refused)} would lose more." if refused else ""
    return (
        f"Within {within['margin']}, judged on {within['data']['tokens']:,} tokens that the proof does not use: "
        f"{taken['percent']:.1f}% of the parameters can go, for {taken['lost']:.2f} {within['unit']}, at most "
        f"{taken['high']:.2f} ({BOUND}).{more} {within.get('note') or ''}".rstrip()
    )


def headline(result: Result) -> str:
    """The run in one sentence of plain words."""
    told, alive = result["plan"], len(result["anatomy"]["sites"])
    plan = Plan.parse([*told["removed"], *told.get("narrowed", ())])
    whole = f" ({pluralize(len(plan.blocks()), 'whole block')})" if plan.blocks() else ""
    was, now = result["parameters"]["teacher"], result["parameters"]["student"]
    facts = [f"{1 - now / was:.1%} fewer parameters" if now < was else "as many parameters as before"]
    if quality := result["perplexity"]:
        low, high = (format_ratio(end)[1:] for end in quality["ci95"])
        values = f"{format_number(quality['teacher'])} → {format_number(quality['student'])}"
        facts.append(f"perplexity {values} ({format_ratio(quality['ratio'])}, 95% interval {low} to {high})")
    if result["speed"]:
        middle, low, high = (format_ratio(result["speed"]["ratio"]["decode"][key]) for key in ("median", "low", "high"))
        facts.append(f"decoding speed {middle} ({low[1:]} to {high[1:]})")
    narrower = f", {len(plan.narrowed)} narrower" if plan.narrowed else ""
    return f"{len(plan.removed)} of {pluralize(alive, 'site')} removed{whole}{narrower}: {', '.join(facts)}."


def kept_group_counts(result: Result) -> dict[str, tuple[int, int]]:
    """Of every site that became narrower, how many of its channel groups stayed, and how many it had."""
    had = {size["site"]: size.get("groups", 0) for size in result["anatomy"]["sites"]}
    left = sorted(Plan.parse(result["plan"].get("narrowed", ())).narrowed)
    return {str(each.site): (len(each.groups), had[str(each.site)]) for each in left}


def kept_group_texts(result: Result) -> dict[str, str]:
    """The same in words: `{"mlp.2": "22 of 48"}`."""
    return {site: f"{left:,} of {had:,}" for site, (left, had) in kept_group_counts(result).items()}


def kept_groups_sentence(left: Mapping[str, str], most: int = 6) -> str:
    """A sentence of what `kept_group_texts` says, of the first sites."""
    some = ", ".join(f"{site} {words}" for site, words in list(left.items())[:most])
    return f"Narrower, channel groups left: {some}" + (f" and {len(left) - most} more" if len(left) > most else "")


# -- numbers and words -------------------------------------------------------------------------------------------------


def format_number(x: float | None, unit: str = "") -> str:
    """Three significant digits, four from 1,000 to 9,999, then k, M, G, T, then powers; `–` for what is not known."""
    if x is None:
        return "–"
    gap = " " if unit else ""
    if not math.isfinite(x) or x == 0 or (isinstance(x, int) and abs(x) < 1000):
        return f"{x:g}{gap}{unit}".replace("inf", "∞")
    size = abs(float(f"{x:.3g}"))
    if size >= 1e15 or size < 1e-6:
        return f"{x:.2e}"
    if 1000 <= size < 10_000 and not unit:
        return f"{x:,.0f}"
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= s), (1.0, ""))
    digits = max(0, 2 - math.floor(math.log10(size / scale)))
    return f"{x / scale:.{digits}f}{gap}{prefix}{unit}".replace("-", "−")


def format_ratio(x: float) -> str:
    """A ratio, two decimals."""
    return f"×{x:.2f}" if abs(x) < 100 else f"×{format_number(x)}"


def _points(x: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * x:+.1f}pp".replace("-", "−")


def _stem(path: str) -> str:
    """The name of a file without folder and endings."""
    return path.rsplit("/", 1)[-1].partition(".")[0]


def _span(ends: Sequence[float], spell: Callable[[float], str] = format_number) -> str:
    return f"({spell(ends[0])}–{spell(ends[1])})".replace("×", "")


def _median(value: Mapping[str, float], spell: Callable[[float], str] = format_number) -> str:
    low, middle, high = (float(value[key]) for key in ("low", "median", "high"))
    return f"{spell(middle)} {_span((low, high), spell)}"


def _sizes(label: str, teacher: float | None, student: float | None, unit: str) -> SummaryRow:
    change = "–"
    if teacher and student is not None:
        change = "unchanged" if teacher == student else f"{student / teacher - 1:+.1%}".replace("-", "−")
    return SummaryRow(label, format_number(teacher, unit), format_number(student, unit), change)


def pluralize(n: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def about_tokens(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a token set says of itself, for readers: a task has items, text has documents and texts."""
    of_text = ("documents", "texts") if about.get("items") is not None else ()
    return {key: value for key, value in about.items() if key not in of_text}


def how_many(about: Mapping[str, Any]) -> str:
    """`40 items` of a task, `38 documents` of text."""
    items = about.get("items")
    return pluralize(about["documents"], "document") if items is None else pluralize(items, "item")


def format_duration(seconds: float) -> str:
    """`59.9 s`, `6 min 40 s`, `23 h 59 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
