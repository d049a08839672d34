"""A comparison in words: rows of short strings and sentences that terminal and page share.

Every number comes from the result, a plain JSON object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from billhook.core.statistics import exp_capped
from billhook.report.numbers import (
    format_accuracy,
    format_interval,
    format_number,
    format_perplexity,
    format_points,
    format_ratio,
    pluralize,
    printable,
)
from billhook.report.study_words import short_names

Result = Mapping[str, Any]
VERDICT_COLUMNS = ("Set", "Verdict", "A", "B", "B against A (95%)", "p")
MOST_ITEMS = 10**7  # beyond, no number of items is worth naming


def names_of(result: Result) -> list[str]:
    """The models, A first, as they were named."""
    return [printable(each["model"]) for each in result["models"]]


def verdict_rows(result: Result, other: int = 1) -> list[tuple[str, ...]]:
    """Under `VERDICT_COLUMNS`: one row a set, of A and the model number `other`."""
    brief = short_names(row["set"] for row in result["rows"])
    told: list[tuple[str, ...]] = []
    for row in result["rows"]:
        text = row["kind"] == "perplexity"
        spell = format_perplexity if text else format_accuracy
        a, b = row["values"][0], row["values"][other]
        pair = row["pairs"][other - 1]
        name = f"{brief[row['set']]}, {'ppl' if text else row['kind']}"
        change, p, word = "other tokens", "–", "not comparable"
        if pair is not None:
            change, p, word = _change(pair, text), p_value(pair["p_holm"]), pair["verdict"]
        told.append((name, word, spell(a["value"]), spell(b["value"]), change, p))
    return told


def _change(pair: Mapping[str, Any], text: bool) -> str:
    """`×1.62 (1.55 to 1.70)`, or `−6.2 pp (−8.1 to −4.3)`."""
    if text:
        return f"{format_ratio(exp_capped(pair['change']))} ({format_interval(pair, lambda x: format_ratio(exp_capped(x)))})"
    return f"{format_points(pair['change'])} pp ({format_interval(pair, format_points)})"


def p_value(p: float) -> str:
    """Three decimals; what is less is said to be."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def flip_words(result: Result, other: int = 1) -> list[str]:
    """How many items only A has right, and only B, task by task; and how many more an open question would take."""
    brief, told = short_names(row["set"] for row in result["rows"]), []
    for row in result["rows"]:
        pair = row["pairs"][other - 1]
        if pair is None:
            told.append(
                f"{brief[row['set']]}: the two models have other tokens, and texts of other tokens do not pair."
            )
            continue
        if pair["gained"] is not None:
            told.append(
                f"{brief[row['set']]}: of {row['n']:,} items {pair['lost']} only A has right, {pair['gained']} only B."
            )
        if pair["verdict"] == "undecided":
            more = pair["more"]
            kind = "texts" if row["kind"] == "perplexity" else "items"
            open_ = f"about {more:,} more {kind} would decide it" if more is not None and more < MOST_ITEMS else None
            told.append(
                f"{brief[row['set']]}: undecided; {open_ or f'no number of {kind} that there is would decide it'}."
            )
        if pair["note"]:
            told.append(f"{brief[row['set']]}: {pair['note']}")
    return told


def size_rows(result: Result, other: int = 1) -> list[tuple[str, str, str, str]]:
    """(measure, A, B, change) of sizes, speed and memory, and how alike both are."""
    a, b = result["models"][0], result["models"][other]
    told = [
        (label, format_number(a[key], unit), format_number(b[key], unit), _percent(b[key] / a[key]))
        for label, key, unit in (
            ("Parameters", "parameters", ""), ("On disk", "bytes", "B"),
            ("KV cache / token", "kv_bytes_per_token", "B"), ("FLOPs / token", "flops_per_token", ""),
        )
        if a[key]
    ]  # fmt: skip
    speed = result["speed"][other - 1]
    if speed:
        for phase in ("prefill", "decode"):
            rates = [each[f"{phase}_tokens_per_s"]["median"] for each in speed["models"]]
            ratio = speed["ratio"][phase]
            change = (
                f"{format_ratio(ratio['median'])} ({format_ratio(ratio['low'])}–{format_ratio(ratio['high'])})".replace(
                    "×", "×", 1
                )
            )
            told.append((f"{phase.capitalize()} tokens/s", format_number(rates[0]), format_number(rates[1]), change))
        peaks = [each["peak_bytes"] for each in speed["models"]]
        if all(peaks):
            told.append(
                (
                    "Peak memory",
                    format_number(peaks[0], "B"),
                    format_number(peaks[1], "B"),
                    _percent(peaks[1] / peaks[0]),
                )
            )
    return told


def close_words(result: Result, other: int = 1) -> str:
    """How alike both are word by word, as a sentence; nothing where that was not measured."""
    close = result["close"][other - 1]
    if close is None:
        return ""
    kl, agree = close["kl"], close["agreement"]
    return (
        f"On {close['tokens']:,} tokens of text B would say the same next token as A in {agree['value']:.1%} of the "
        f"places ({agree['low']:.1%} to {agree['high']:.1%}); KL of B to A {kl['value']:.3f} nats a token "
        f"({kl['low']:.3f} to {kl['high']:.3f})."
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%".replace("-", "−")


def comparison_headline(result: Result, other: int = 1) -> str:
    """The verdict of the whole in one sentence."""
    words = Counter(row["pairs"][other - 1]["verdict"] for row in result["rows"] if row["pairs"][other - 1])
    order = ("worse", "undecided", "equivalent", "better")
    told = [f"{word} on {words[word]}" for word in order if words[word]]
    a, b = names_of(result)[0], names_of(result)[other]
    margins = (
        f"margins: {result['margins']['points']:g} pp of accuracy, {result['margins']['percent']:g}% of perplexity"
    )
    if not told:
        return f"{b} and {a} share no set on which they can be compared."
    sets = pluralize(sum(words.values()), "set")
    return f"{b} against {a}, {sets}: {', '.join(told)} ({margins})."


def comparison_warnings(result: Result) -> list[str]:
    """What every output must say first."""
    return [
        f"NOT A PROOF: {printable(model)} was made by a search that has seen some of {' and '.join(map(printable, sets))}."
        for model, sets in result["seen"].items()
    ]
