"""Studies in words: short names, and the headline of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from billhook.core.plan import Plan
from billhook.report.numbers import (
    format_correlation,
    format_interval,
    format_perplexity_ratio,
    format_points,
    format_share,
    join_words,
    pluralize,
    printable,
)

Result = Mapping[str, Any]
SIZE_LABELS = {"parameters": "parameters", "kv_bytes_per_token": "KV cache", "ns_per_token": "time per token"}


# -- numbers and words -------------------------------------------------------------------------------------------------


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """Short names of texts and tasks: of a file its name, of a mixture those of its parts; in full where two agree."""
    given = list(dict.fromkeys(sources))
    brief = {source: "+".join(PurePath(part).name or part for part in source.split("+")) for source in given}
    seen = Counter(brief.values())
    return {source: printable(brief[source] if seen[brief[source]] == 1 else source) for source in given}


def texts_of(result: Result) -> list[str]:
    """Evaluation sets that are text; the others are tasks."""
    return [name for name, told in result["teacher"].items() if told["kind"] == "perplexity"]


def tasks_of(result: Result) -> list[str]:
    """Evaluation sets that are tasks."""
    return [name for name, told in result["teacher"].items() if told["kind"] != "perplexity"]


def fraction_kept(result: Result, row: Result, size: str = "parameters") -> float:
    """The share of the teacher's parameters, KV bytes or time that a row keeps."""
    return float(row["sizes"][size] / result["sizes"][size])


def rank_label(gap: Mapping[str, float]) -> str:
    """What an interval above the best says: `best`, `not told apart` or nothing."""
    if gap["value"] == gap["low"] == gap["high"] == 0:
        return "best"
    return "not told apart" if gap["low"] <= 0 <= gap["high"] else ""


def reliability_notes(result: Result) -> list[str]:
    """A note where intervals rest on few texts, and one where they rest on few items."""
    names, told = short_names(result["teacher"]), []
    for what, sets in (("texts", texts_of(result)), ("items", tasks_of(result))):
        few = [names[on] for on in sets if any(not row["results"][on]["reliable"] for row in result["rows"])]
        if few:
            told.append(f"The intervals on {', '.join(few)} rest on few {what} and are not reliable.")
    return told


def sorted_rows(result: Result, text: str = "") -> list[Result]:
    """The rows of a sweep by size, calibration text and loss on a text, at first the first."""
    texts = [text] if text else texts_of(result)
    order = [list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("remove", "data")]

    def place(row: Result) -> tuple[float, ...]:
        at = order[0].index(row["remove"]), order[1].index(row["data"])
        return (*at, row["results"][texts[0]]["nats"]) if texts else at

    return sorted(result["rows"], key=place)


def peers(result: Result, row: Result) -> int:
    """How many rows have the size and the calibration text of this one, itself included."""
    return sum((each["remove"], each["data"]) == (row["remove"], row["data"]) for each in result["rows"])


# -- a sweep in words --------------------------------------------------------------------------------------------------


def grouped_gaps(result: Result) -> list[list[tuple[str, Mapping[str, float]]]]:
    """For each size, calibration text and held-out text with two rows or more: recipes and distances, best first."""
    told = []
    for text in texts_of(result):
        groups: dict[tuple[str, str], list[tuple[str, Mapping[str, float]]]] = {}
        for row in result["rows"]:
            entry = row["recipe"], row["results"][text]["above_best"]
            groups.setdefault((row["remove"], row["data"]), []).append(entry)
        told += [sorted(group, key=lambda e: (e[1]["value"], e[1]["low"])) for group in groups.values()]
    return [group for group in told if len(group) > 1]


def sweep_headline(result: Result) -> str:
    """The sweep in one sentence of plain words."""
    rows, groups = result["rows"], grouped_gaps(result)
    if not rows:
        return f"Nothing was compared: {pluralize(len(result['refused']), 'combination')} of recipe and size refused."
    if not groups:
        return _apart(result)
    firsts = Counter(group[0][0] for group in groups)
    name, wins = firsts.most_common(1)[0]
    won = [group for group in groups if group[0][0] == name]
    clear = sum(all(not rank_label(gap) for _, gap in group[1:]) for group in won)
    if len(groups) == 1:
        near = [printable(recipe) for recipe, gap in groups[0][1:] if rank_label(gap)]
        rest = f"not told apart from {join_words(near)}" if near else "clear of all others"
        return f"Of {pluralize(len(groups[0]), 'recipe')}, {printable(name)} has the lowest perplexity, {rest}."
    close = sum(any(r == name and rank_label(g) for r, g in group) for group in groups if group[0][0] != name)
    more = f", and is not told apart from the lowest in {close} more" if close else ""
    return (
        f"{printable(name)} has the lowest perplexity in {wins} of {len(groups)} comparisons (a size, a calibration "
        f"text and a held-out text each), clear of all other recipes in {clear} of them{more}."
    )


def _apart(result: Result) -> str:
    """The verdict where no two rows can be compared by perplexity: the largest student that was measured."""
    row = max(result["rows"], key=lambda row: fraction_kept(result, row))
    names, facts = short_names(result["teacher"]), []
    for on, told in row["results"].items():
        if result["teacher"][on]["kind"] == "perplexity":
            facts.append(
                f"perplexity {format_perplexity_ratio(told['change'])} on {names[on]} (95% interval "
                f"{format_interval(told, format_perplexity_ratio, 'change_low', 'change_high')})"
            )
        else:
            ends = format_interval(told, format_points, "change_low", "change_high")
            facts.append(f"{format_points(told['change'])} points on {names[on]} (95% interval {ends})")
    kept = f"{fraction_kept(result, row):.1%} of the parameters left"
    return f"{printable(row['recipe'])} at {printable(row['remove'])}, with {kept}: {', '.join(facts)}."


def sizes_of(result: Result) -> dict[str, str]:
    """The sizes that the teacher has, and their words; time only where it was measured."""
    return {size: words for size, words in SIZE_LABELS.items() if result["sizes"][size]}


# -- a trade and a study of stability in words -------------------------------------------------------------------------


def transfer_headline(result: Result) -> str:
    """The trade in one sentence of plain words."""
    own: list[Mapping[str, float]] = []
    other: list[Mapping[str, float]] = []
    for row in result["rows"][1:]:
        for task, told in row["results"].items():
            (own if task == row["pruned_for"] else other).append(told["against_text"])
    if not own:
        return "There is nothing to trade: no task was given."
    better, worse = sum(gap["low"] > 0 for gap in own), sum(gap["high"] < 0 for gap in other)
    gained = sum(gap["low"] > 0 for gap in other)
    rest = f"; on another task it is clearly worse in {worse} and clearly better in {gained} of {len(other)} pairs"
    return (
        f"Pruned for a task instead of on text, the model is clearly better on that task in {better} of "
        f"{pluralize(len(own), 'case')}{rest if other else ''}."
    )


def stability_headline(result: Result) -> str:
    """The study in one sentence of plain words."""
    sizes = sorted(result["sizes"], key=lambda told: told["tokens"])
    most, least = sizes[-1], sizes[0]
    ranks, overlap = most["rank_correlation"], most["overlap"]
    told = (
        f"Two calibration sets of {most['tokens']:,} tokens rank the sites with a correlation of {format_correlation(ranks['mean'])} "
        f"({format_interval(ranks, format_correlation)}), and their plans overlap by {format_share(overlap['mean'])} ({format_interval(overlap, format_share)})"
    )
    if least is most:
        return told + "."
    before = f"{format_correlation(least['rank_correlation']['mean'])} and {format_share(least['overlap']['mean'])}"
    return f"{told}; with {least['tokens']:,} tokens it is {before}."


def removal_counts(size_row: Mapping[str, Any]) -> dict[str, int]:
    """In how many plans of a size each site is removed, in order of the model."""
    votes = Counter(site for plan in size_row["plans"] for site in plan)
    return {str(site): votes[str(site)] for site in Plan.parse(votes).sites()}
