"""Tables of studies in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from billhook.cli.session import empty_table, foot, plain_table, prints
from billhook.core.results.ab_report import AbReport
from billhook.core.results.comparisons import Baseline, Comparison, GateReport, SeenSets, TaskScores
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import StabilityResult, SweepResult, ThresholdResult, TransferResult, TrialResult
from billhook.report import ab_words, compare_words, numbers, study_words
from billhook.report.numbers import format_accuracy, format_perplexity, printable
from billhook.report.study_words import short_names
from billhook.report.trials import threshold_page

# -- trials, and agreement of calibration sets ------------------------------------------------------------------------


@prints(SweepResult)
def sweep_table(console: Console, result: SweepResult) -> None:
    """A table a text, the best of each size first; then the tasks, three to a table."""
    names, trials = short_names(result.teacher), study_words.sorted_trials(result)
    console.print(f"{printable(result.model)}: {study_words.sweep_headline(result)}", highlight=False)
    for text in study_words.texts_of(result) if trials else ():
        table = empty_table("recipe", "left", "perplexity", "above best", "search")
        for place, peers in _places(result, study_words.sorted_trials(result, text)):
            table.add_row(place, style="bold")
            for trial in peers:
                left, measured = study_words.fraction_kept(result, trial), _perplexity(trial.results[text].estimate)
                gap = "–" if len(peers) == 1 else _above(study_words.gap_to_best(trial, text))
                cells = f"{left:.1%}", measured.replace(" ()", ""), gap, numbers.format_duration(trial.search_seconds)
                table.add_row(f" {printable(trial.recipe)}", *cells)
        whole = _perplexity(result.teacher[text].estimate)
        console.print(f"\nPerplexity on {names[text]}; the teacher's: {whole}", highlight=False)
        console.print(table)
    for three in _threes(study_words.tasks_of(result) if trials else []):
        table = empty_table("recipe", *(f"{names[task]}, %" for task in three))
        for place, peers in _places(result, trials):
            table.add_row(place, style="bold")
            for trial in peers:
                shares = (_share(trial.results[task].estimate) for task in three)
                table.add_row(f" {printable(trial.recipe)}", *shares)
        table.add_row("the teacher", *(_share(result.teacher[task].estimate) for task in three))
        console.print("\nAccuracy on tasks")
        console.print(table)
    for each in result.refused:
        console.print(f"Refused: {printable(f'{each.recipe} {each.remove} {each.data} {each.reason}')}")
    legend = "left: parameters; above best: nats, ≈ where not told apart; in brackets: 95% intervals"
    foot(console, result.page, [legend, *study_words.reliability_notes(result)])


def _perplexity(estimate: Estimate) -> str:
    ends = numbers.format_interval_short(estimate, format_perplexity)
    return f"{format_perplexity(estimate.value)} ({ends})"


def _above(gap: Estimate) -> str:
    """How far a trial is above the best of its peers, in nats."""
    state = study_words.rank_label(gap)
    return "best" if state == "best" else numbers.format_nats(gap.value) + (" ≈" if state else "  ")


def _places(result: SweepResult, trials: Sequence[TrialResult]) -> list[tuple[str, list[TrialResult]]]:
    """Trials by size and calibration text, which is named where there are several."""
    datas = short_names(trial.data for trial in result.trials)
    places: dict[str, list[TrialResult]] = {}
    for trial in trials:
        place = printable(trial.remove) + (f", by {datas[trial.data]}" if len(datas) > 1 else "")
        places.setdefault(place, []).append(trial)
    return list(places.items())


def _threes(names: list[str]) -> list[list[str]]:
    return [names[start : start + 3] for start in range(0, len(names), 3)]


def _share(estimate: Estimate) -> str:
    ends = numbers.format_interval_short(estimate, format_accuracy)
    return f"{format_accuracy(estimate.value)} ({ends})".replace("%", "")


@prints(TransferResult)
def transfer_table(console: Console, result: TransferResult) -> None:
    """Changes against the teacher and against text, in points, three tasks to a table."""

    def cell(gap: Estimate) -> str:
        ends = numbers.format_interval(gap, lambda x: f"{100 * x:+.0f}".replace("-", "−"))
        return f"{numbers.format_points(gap.value)} ({ends})"

    console.print(f"{printable(result.model)}: {study_words.transfer_headline(result)}", highlight=False)
    for three in _threes(list(result.teacher)):
        table = empty_table("pruned for", *map(printable, three))
        table.add_row("the teacher, %", *(_share(result.teacher[task].estimate) for task in three))
        table.add_row("against the teacher", style="bold")
        for trial in result.trials:
            table.add_row(f" {printable(trial.recipe)}", *(cell(trial.results[task].change) for task in three))
        table.add_row("against text", style="bold")
        for trial in result.trials[1:]:
            table.add_row(f" {printable(trial.recipe)}", *(cell(study_words.gap_to_text(trial, t)) for t in three))
        console.print(table)
    legend = "in points of accuracy; in brackets: 95% intervals"
    foot(console, result.page, [legend, *study_words.reliability_notes(result)])


@prints(StabilityResult)
def stability_table(console: Console, result: StabilityResult) -> None:
    """Print how far scores and plans agree between calibration sets."""
    headline = study_words.stability_headline(result)
    console.print(f"{printable(result.model)}, {printable(result.metric)}: {headline}", highlight=False)
    table = empty_table("tokens", "sets", "rank correlation", "overlap of plans", "in all", "in some")
    for size in result.sizes:
        votes = study_words.removal_counts(size)
        always = sum(n == size.sets for n in votes.values())
        cells = [
            f"{spell(spread.mean)} ({numbers.format_interval(spread, spell)})"
            for spread, spell in (
                (size.rank_correlation, numbers.format_correlation),
                (size.overlap, numbers.format_share),
            )
        ]
        table.add_row(f"{size.tokens:,}", str(size.sets), *cells, str(always), str(len(votes) - always))
    console.print(table)
    foot(console, result.page, ["in brackets: lowest and highest pair of sets; in all, in some: sites by plans"])


@prints(Comparison)
def comparison_table(console: Console, value: Comparison) -> None:
    """A comparison: for every model but the first its verdicts, sizes and what is behind them."""
    _warn(console, value.seen)
    names = compare_words.model_names(value)
    for other in range(1, len(names)):
        console.print(f"A: {names[0]}\nB: {names[other]}\n")
        console.print(plain_table(compare_words.VERDICT_COLUMNS, compare_words.verdict_rows(value, other)))
        console.print()
        for words in [*compare_words.flip_words(value, other), compare_words.agreement_words(value, other)]:
            if words:
                console.print(words)
        console.print()
        console.print(plain_table(("", "A", "B", "change"), compare_words.size_rows(value, other)))
        console.print(f"\n{compare_words.comparison_headline(value, other)}")
    if value.page:
        console.print(f"Page: {value.page}", soft_wrap=True)


def _warn(console: Console, seen: Sequence[SeenSets]) -> None:
    for warning in compare_words.seen_warnings(seen):
        console.print(warning)


@prints(TaskScores)
def task_table(console: Console, value: TaskScores) -> None:
    """One model on tasks: one row for each score."""
    _warn(console, value.seen)
    console.print(plain_table(compare_words.SCORE_COLUMNS, compare_words.score_rows(value)))
    for note in compare_words.score_notes(value):
        console.print(note)


@prints(GateReport)
def gate_table(console: Console, value: GateReport) -> None:
    """A gate: one row for each check, then the verdict."""
    _warn(console, value.seen)
    console.print(plain_table(compare_words.GATE_COLUMNS, compare_words.gate_rows(value)))
    for note in compare_words.gate_notes(value):
        console.print(note)
    console.print(f"\n{compare_words.gate_sentence(value)}")


@prints(Baseline)
def baseline_table(console: Console, value: Baseline) -> None:
    """One stored baseline."""
    baselines_table(console, {"baselines": [value]})


@prints("baselines")
def baselines_table(console: Console, value: dict[str, Sequence[Baseline]]) -> None:
    """Stored baselines, under `baselines`."""
    rows = [
        (printable(each.name), printable(each.model), each.fingerprint,
         ", ".join(short_names(kept.source for kept in each.sets).values()))
        for each in value["baselines"]
    ]  # fmt: skip
    console.print(plain_table(("Name", "Model", "Fingerprint", "Sets"), rows) if rows else "No baseline is stored.")


@prints(ThresholdResult)
def threshold_table(console: Console, result: ThresholdResult) -> None:
    """The trials of a threshold, what was chosen, and whether it was confirmed."""
    console.print(plain_table(threshold_page.TRIAL_COLUMNS, threshold_page.trial_rows(result)))
    console.print(f"\n{threshold_page.threshold_headline(result)}")
    console.print(threshold_page.knee_words(result))
    for note in threshold_page.threshold_notes(result):
        console.print(note)
    if command := threshold_page.command(result):
        console.print(f"Prune so: {command}", highlight=False, soft_wrap=True)
    foot(console, result.page, [])


@prints("page")
def page_line(console: Console, value: dict[str, str]) -> None:
    """Where a page is."""
    foot(console, value["page"], [])


@prints(AbReport)
def ab_table(console: Console, value: AbReport) -> None:
    """Two servers on the same prompts."""
    for name, side in (("A", value.a), ("B", value.b)):
        model, url = (printable(text)[: ab_words.MOST] for text in (side.model, side.url))
        console.print(f"{name}: {model} at {url}", highlight=False)
    console.print(plain_table(("", "A", "B", "B / A"), ab_words.ab_rows(value)))
    console.print(ab_words.ab_headline(value), highlight=False)
    for note in ab_words.ab_notes(value):
        console.print(note, style="dim", highlight=False)
    if value.run:
        run = printable(value.run)
        console.print(f"Page: billhook report {run}. All answers: billhook show {run} --json", highlight=False)
