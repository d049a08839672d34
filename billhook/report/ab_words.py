"""Two endpoints against each other in words: the rows of the table, and what a reader must know besides.

Nothing is measured here: every number comes from the result, a plain JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from billhook.report.numbers import format_accuracy, format_number, format_points, format_ratio, printable

Result = Mapping[str, Any]
Spell = Callable[[float], str]
MEASURES = {
    "Latency, s": "latency_s",
    "With retries, s": "total_s",
    "First token, s": "first_token_s",
    "Tokens/s": "tokens_per_s",
}
MOST = 120  # characters of what a server says


def ab_rows(result: Result) -> list[tuple[str, str, str, str]]:
    """The lines of the table: what, A, B, and B against A."""
    a, b, answered = result["a"], result["b"], result["answered"]
    p = f"p = {answered['p']:.2g}" if answered["only_a"] + answered["only_b"] else "–"
    told = [
        ("Answered", _cell(a["answered"], format_accuracy, _whole), _cell(b["answered"], format_accuracy, _whole), p)
    ]
    for label, name in MEASURES.items():
        if result["ratio"][name] and (name != "total_s" or a["retries"] or b["retries"]):
            spell = _seconds if name.endswith("_s") and name != "tokens_per_s" else format_number
            told.append(
                (label, _cell(a[name], spell), _cell(b[name], spell), _cell(result["ratio"][name], format_ratio))
            )
    if agreement := result["agreement"]:
        told.append(("Same text", "", "", _cell(agreement["same"], format_accuracy, _whole)))
        told.append(("Same words at first", "", "", _cell(agreement["prefix_words"])))
    for label, name in (("Accuracy", "acc"), ("Accuracy, by length", "acc_norm")):
        if score := (result["task"] or {}).get(name):
            first, second = (_cell(score[side], format_accuracy, _whole) for side in ("a", "b"))
            told.append((label, first, second, _cell(score["change"], format_points, _format_points, " to ")))
    return told


def _cell(values: Mapping[str, Any], spell: Spell = format_number, ends: Spell | None = None, to: str = "–") -> str:
    """`0.21 (0.20–0.22)`; of a single pair without the ends, which are not known."""
    if values["low"] is None:
        return spell(values["value"])
    low, high = ((ends or spell)(values[end]).removeprefix("×") for end in ("low", "high"))
    return f"{spell(values['value'])} ({low}{to}{high})"


def _seconds(x: float) -> str:
    """Milliseconds are seen."""
    return f"{x:.3f}" if x < 10 else format_number(x)


def _whole(x: float) -> str:
    return f"{100 * x:.0f}"


def _format_points(x: float) -> str:
    return f"{100 * x:+.0f}".replace("-", "−")


def ab_notes(result: Result) -> list[str]:
    """What a reader of the numbers must know."""
    answered, pairs = result["answered"], result["pairs"]
    total = len(result["outcomes"])
    told = [
        f"{total} prompts: {answered['both']} answered by both, {answered['only_a']} by A only, {answered['only_b']} "
        f"by B only, {answered['neither']} by neither. Times and texts: of those that both answered."
    ]
    for name in ("a", "b"):
        side = result[name]
        if side["errors"] or side["retries"]:
            counted = ", ".join(f"{count} {kind}" for kind, count in side["errors"].items()) or "no error"
            told.append(f"{name.upper()}: {counted}, {side['retries']} further attempts.")
        for kind, detail in side["first_errors"].items():
            told.append(f"  the first {kind}: {printable(detail)[:MOST]}")
    if pairs and result["tokens_counted_by"] == "pieces":
        told.append("Tokens are pieces of the stream, as not both servers count them: a piece may hold several.")
    for name, why in (result["task"] or {"not_offered": {}})["not_offered"].items():
        told.append(
            f"No task scores: {name.upper()} offers no log-probabilities of a prompt ({printable(why)[:MOST]})."
        )
    if (task := result["task"]) and not task["not_offered"]:
        lost = task["errors"]
        told.append(f"Scored by both: {task['items']} items; not by A {lost['a']}, not by B {lost['b']}.")
    if pairs < 30:
        told.append("The intervals rest on few prompts and are not reliable.")
    asking = result["asking"]
    told.append(
        f"{asking['kind']}, at most {asking['max_tokens']} tokens, temperature {asking['temperature']:g}, timeout "
        f"{asking['timeout']:g} s, {asking['retries']} retries, {asking['concurrency']} at a time, in pairs after a "
        "warm-up; in brackets: 95% intervals"
    )
    return told
