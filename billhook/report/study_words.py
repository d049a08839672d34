"""Studies in words: short names, and the headline of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from billhook.core.plan import Part
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import (
    SizeName,
    StabilityResult,
    StabilitySize,
    SweepResult,
    TransferResult,
    TrialResult,
)
from billhook.report.numbers import (
    format_correlation,
    format_interval,
    format_perplexity_ratio,
    format_points,
    format_share,
    join_words,
    pluralize,
    visible_name,
)

Trials = SweepResult | TransferResult  # results whose trials were measured on the same sets
SIZE_LABELS: dict[SizeName, str] = {
    "parameters": "parameters",
    "kv_bytes_per_token": "KV cache",
    "ns_per_token": "time per token",
}


# -- numbers and words -------------------------------------------------------------------------------------------------


def short_names(sources: Iterable[str]) -> dict[str, str]:
    """Short names of texts and tasks: of a file its name, of a mixture those of its parts; in full where two agree."""
    given = list(dict.fromkeys(sources))
    brief = {source: "+".join(PurePath(part).name or part for part in source.split("+")) for source in given}
    seen = Counter(brief.values())
    return {source: visible_name(brief[source] if seen[brief[source]] == 1 else source) for source in given}


def texts_of(result: Trials) -> list[str]:
    """Evaluation sets that are text; the others are tasks."""
    return [name for name, outcome in result.teacher.items() if outcome.kind == "perplexity"]


def tasks_of(result: Trials) -> list[str]:
    """Evaluation sets that are tasks."""
    return [name for name, outcome in result.teacher.items() if outcome.kind != "perplexity"]


def fraction_kept(result: Trials, trial: TrialResult, size: SizeName = "parameters") -> float:
    """The share of the teacher's parameters, KV bytes or time that a student keeps."""
    return float(getattr(trial.sizes, size) / getattr(result.sizes, size))


def known_fraction(result: Trials, trial: TrialResult, size: SizeName) -> float | None:
    """`fraction_kept`, or None where it is not known: time is measured of whole sites, not of narrowed ones."""
    return None if size == "ns_per_token" and trial.plan.narrowed else fraction_kept(result, trial, size)


def removed_words(trial: TrialResult, part: Part) -> tuple[int, str]:
    """How many sites of a part a trial removes, and how many it narrows, in words."""
    narrowed = sum(each.site.part == part for each in trial.plan.narrowed)
    return trial.count(part), f"{narrowed} narrowed" if narrowed else ""


def rank_label(gap: Estimate) -> str:
    """What an interval above the best says: `best`, `not told apart` or nothing."""
    if gap.value == gap.low == gap.high == 0:
        return "best"
    return "not told apart" if gap.low <= 0 <= gap.high else ""


def reliability_notes(result: Trials) -> list[str]:
    """A note where intervals rest on few texts, and one where they rest on few items."""
    names, notes = short_names(result.teacher), []
    for what, sets in (("texts", texts_of(result)), ("items", tasks_of(result))):
        few = [names[on] for on in sets if any(not trial.results[on].change.reliable for trial in result.trials)]
        if few:
            notes.append(f"The intervals on {', '.join(few)} rest on few {what} and are not reliable.")
    return notes


def gap_to_best(trial: TrialResult, text: str) -> Estimate:
    """How far a trial of a sweep is above the best of its size and calibration text, on a text."""
    gap = trial.results[text].above_best
    assert gap is not None, "every trial of a sweep is compared with the best on every text"
    return gap


def gap_to_text(trial: TrialResult, task: str) -> Estimate:
    """How a trial of a transfer differs from the one that was pruned on text, on a task."""
    gap = trial.results[task].against_text
    assert gap is not None, "every trial of a transfer is compared with the one on text"
    return gap


def sorted_trials(result: SweepResult, text: str = "") -> list[TrialResult]:
    """The trials of a sweep by size, calibration text and loss on a text, by default the first."""
    texts = [text] if text else texts_of(result)
    removes, datas = (list(dict.fromkeys(getattr(t, key) for t in result.trials)) for key in ("remove", "data"))

    def place(trial: TrialResult) -> tuple[float, ...]:
        at = removes.index(trial.remove), datas.index(trial.data)
        return (*at, trial.results[texts[0]].nats or 0.0) if texts else at

    return sorted(result.trials, key=place)


def peers(result: SweepResult, trial: TrialResult) -> int:
    """How many trials have the size and the calibration text of this one, itself included."""
    return sum((each.remove, each.data) == (trial.remove, trial.data) for each in result.trials)


# -- a sweep in words --------------------------------------------------------------------------------------------------


def grouped_gaps(result: SweepResult) -> list[list[tuple[str, Estimate]]]:
    """For each size, calibration text and held-out text with two trials or more: recipes and gaps, best first."""
    found = []
    for text in texts_of(result):
        groups: dict[tuple[str, str], list[tuple[str, Estimate]]] = {}
        for trial in result.trials:
            entry = trial.recipe, gap_to_best(trial, text)
            groups.setdefault((trial.remove, trial.data), []).append(entry)
        found += [sorted(group, key=lambda e: (e[1].value, e[1].low)) for group in groups.values()]
    return [group for group in found if len(group) > 1]


def sweep_headline(result: SweepResult) -> str:
    """The sweep in one sentence of plain words."""
    groups = grouped_gaps(result)
    if not result.trials:
        return f"Nothing was compared: {pluralize(len(result.refused), 'combination')} of recipe and size refused."
    if not groups:
        return _largest_student(result)
    lowest = [[recipe for recipe, gap in group if gap.value == group[0][1].value] for group in groups]
    firsts = Counter(recipe for recipes in lowest for recipe in recipes)
    name, wins = firsts.most_common(1)[0]
    tied = [recipe for recipe, count in firsts.items() if count == wins]
    if len(tied) > 1:
        return _tie(tied, wins, len(groups))
    won = [group for group in groups if group[0][0] == name]
    clear = sum(all(not rank_label(gap) for _, gap in group[1:]) for group in won)
    if len(groups) == 1:
        near = [visible_name(recipe) for recipe, gap in groups[0][1:] if rank_label(gap)]
        rest = f"not told apart from {join_words(near)}" if near else "clear of all others"
        return f"Of {pluralize(len(groups[0]), 'recipe')}, {visible_name(name)} has the lowest perplexity, {rest}."
    close = sum(any(r == name and rank_label(g) for r, g in group) for group in groups if group[0][0] != name)
    more = f", and is not told apart from the lowest in {close} more" if close else ""
    return (
        f"{visible_name(name)} has the lowest perplexity in {wins} of {len(groups)} comparisons (a size, a calibration "
        f"text and a held-out text each), clear of all other recipes in {clear} of them{more}."
    )


def _tie(recipes: Sequence[str], wins: int, groups: int) -> str:
    """The headline where several recipes are lowest equally often."""
    names = join_words([visible_name(recipe) for recipe in recipes])
    if groups == 1:
        return f"{names} have the same perplexity, the lowest."
    return (
        f"{names} tie: each has the lowest perplexity in {wins} of {groups} comparisons (a size, a calibration text "
        "and a held-out text each)."
    )


def _largest_student(result: SweepResult) -> str:
    """The headline where no two trials can be compared by perplexity: the largest student that was measured."""
    trial = max(result.trials, key=lambda trial: fraction_kept(result, trial))
    names, facts = short_names(result.teacher), []
    for on, outcome in trial.results.items():
        change = outcome.change
        if outcome.kind == "perplexity":
            ends = format_interval(change, format_perplexity_ratio)
            facts.append(f"perplexity {format_perplexity_ratio(change.value)} on {names[on]} (95% interval {ends})")
        else:
            ends = format_interval(change, format_points)
            facts.append(f"{format_points(change.value)} points on {names[on]} (95% interval {ends})")
    kept = f"{fraction_kept(result, trial):.1%} of the parameters left"
    return f"{visible_name(trial.recipe)} at {visible_name(trial.remove)}, with {kept}: {', '.join(facts)}."


def sizes_of(result: Trials) -> dict[SizeName, str]:
    """The sizes that the teacher has, and their words; time only where it was measured."""
    return {size: words for size, words in SIZE_LABELS.items() if getattr(result.sizes, size)}


# -- a transfer and a study of stability in words ----------------------------------------------------------------------


def transfer_headline(result: TransferResult) -> str:
    """The transfer in one sentence of plain words."""
    own: list[Estimate] = []
    others: list[Estimate] = []
    for trial in result.trials[1:]:
        for task in trial.results:
            (own if task == trial.recipe else others).append(gap_to_text(trial, task))
    if not own:
        return "There is nothing to compare: no task was given."
    better, worse = sum(gap.low > 0 for gap in own), sum(gap.high < 0 for gap in others)
    gained = sum(gap.low > 0 for gap in others)
    rest = f"; on another task it is clearly worse in {worse} and clearly better in {gained} of {len(others)} pairs"
    return (
        f"Pruned for a task instead of on text, the model is clearly better on that task in {better} of "
        f"{pluralize(len(own), 'case')}{rest if others else ''}."
    )


def stability_headline(result: StabilityResult) -> str:
    """The study in one sentence of plain words."""
    sizes = sorted(result.sizes, key=lambda size: size.tokens)
    most, least = sizes[-1], sizes[0]
    ranks, overlap = most.rank_correlation, most.overlap
    words = (
        f"Two calibration sets of {most.tokens:,} tokens rank the sites with a correlation of "
        f"{format_correlation(ranks.mean)} ({format_interval(ranks, format_correlation)}), and their plans overlap by "
        f"{format_share(overlap.mean)} ({format_interval(overlap, format_share)})"
    )
    if least is most:
        return f"{words}."
    before = f"{format_correlation(least.rank_correlation.mean)} and {format_share(least.overlap.mean)}"
    return f"{words}; with {least.tokens:,} tokens it is {before}."


def removal_counts(size: StabilitySize) -> dict[str, int]:
    """In how many plans of a size each site is removed, in order of the model."""
    votes = Counter(site for plan in size.plans for site in plan.removed)
    return {str(site): votes[site] for site in sorted(votes)}
