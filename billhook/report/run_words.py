"""One run in rows and sentences: what terminal, model card and page share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.core.margin import BOUND
from billhook.core.plan import Plan
from billhook.report.numbers import (
    format_duration,
    format_number,
    format_ratio,
    in_brackets,
    median_with_range,
    percentage_points,
    pluralize,
    stem,
)

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
        change = f"{format_ratio(quality['ratio'])} {in_brackets(quality['ci95'], format_ratio)}"
        told.append(
            SummaryRow(
                "Held-out perplexity", format_number(quality["teacher"]), format_number(quality["student"]), change
            )
        )
    for task in result.get("tasks", ()):
        teacher, student = (f"{100 * task[side]:.1f}%" for side in ("teacher", "student"))
        change = f"{percentage_points(task['change'])} {in_brackets(task['ci95'], percentage_points)}"
        told.append(SummaryRow(f"Accuracy, {stem(task['file'])}", teacher, student, change))
    for label, key, unit in (
        ("Parameters", "parameters", ""),
        ("On disk", "bytes", "B"),
        ("KV cache / token", "kv_bytes_per_token", "B"),
        ("FLOPs / token", "flops_per_token", ""),
    ):
        told.append(_sizes(label, result[key]["teacher"], result[key]["student"], unit))
    if speed := result["speed"]:
        for label, phase in (("Prefill tokens/s", "prefill"), ("Decode tokens/s", "decode")):
            sides = [median_with_range(speed[side][f"{phase}_tokens_per_s"]) for side in ("teacher", "student")]
            predicted = (speed.get("predicted") or {}).get(phase)
            change = median_with_range(speed["ratio"][phase], format_ratio) + (
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
            f"{format_ratio(on['ratio'])} {in_brackets(on['ci95'], format_ratio)}",
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


def _sizes(label: str, teacher: float | None, student: float | None, unit: str) -> SummaryRow:
    change = "–"
    if teacher and student is not None:
        change = "unchanged" if teacher == student else f"{student / teacher - 1:+.1%}".replace("-", "−")
    return SummaryRow(label, format_number(teacher, unit), format_number(student, unit), change)
