"""One run in rows and sentences: what terminal, model card and page share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from billhook.core.margin import BOUND, WithinReport
from billhook.core.results.exports import FaultReason, TargetFit
from billhook.core.results.run import (
    Rates,
    RecoveryReport,
    RunReason,
    RunResult,
    SpeedChange,
    SpeedGap,
)
from billhook.report.numbers import (
    format_accuracy,
    format_duration,
    format_number,
    format_ratio,
    join_words,
    percentage_points,
    pluralize,
    reliability_note,
    speed_change,
    stem,
    verification_sentence,
    with_interval,
)
from billhook.report.run.narrowed import narrowed_sites
from billhook.report.run.smaller_vocabulary import (
    bits_in_words,
    rows_in_words,
    vocabulary_notes,
    vocabulary_rows,
    vocabulary_verdict,
)

SIZES = (("Parameters", "parameters", ""), ("On disk", "bytes", "B"), ("KV cache / token", "kv_bytes_per_token", "B"),
         ("FLOPs / token", "flops_per_token", ""))  # fmt: skip

REASONS: dict[RunReason, str] = {
    "zeroed": "The removed sites hold zeros: equal outputs everywhere, no speed-up.",
    "streamed": "The model was larger than the memory that it might use, and was read block by block: speed, sample "
    "answers and skills were not measured.",
    "adapter_beside": "The weights are those without the adapter, which is in the folder adapter beside them; all "
    "measurements are of both together, merged.",
    "no_answers": "The models could not answer the sample prompts; the events of the run say why.",
    "no_speed": "Speed could not be measured; the events of the run say why.",
    "no_skills": "Not every skill was tested: the tokenizer writes choices of its questions alike, or they are longer "
    "than the model reads, or the events of the run say what failed.",
    "loss_alone": "Perplexity alone was measured: no skills, answers and speed (proof: loss).",
    "recovery_left_out": "A recovery of the recipe was left out: it can do nothing here, or memory ran out.",
    "calibrated_on_text_alone": "Calibrated on the given text alone: this model cannot write its share of it here.",
}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One line of the run's table, as short strings."""

    label: str
    teacher: str
    student: str
    change: str


def summary_rows(result: RunResult) -> list[SummaryRow]:
    """The table of the run. What was not measured has no row; `run_notes` says so."""
    rows = [SummaryRow(*row) for row in vocabulary_rows(result.vocabulary)] if result.vocabulary else []
    if quality := result.perplexity:
        sides = format_number(quality.teacher), format_number(quality.student)
        rows.append(SummaryRow("Held-out perplexity", *sides, with_interval(quality.ratio, format_ratio)))
    for task in result.tasks:
        sides = f"{100 * task.teacher:.1f}%", f"{100 * task.student:.1f}%"
        rows.append(SummaryRow(f"Accuracy, {stem(task.file)}", *sides, with_interval(task.change, percentage_points)))
    for each in result.skills:
        sides = format_accuracy(each.teacher), format_accuracy(each.student)
        change = with_interval(each.change, percentage_points)
        rows.append(SummaryRow(f"{each.skill.capitalize()}, of {each.change.n}", *sides, change))
    for label, name, unit in SIZES:
        rows.append(_sizes(label, getattr(result.sizes.teacher, name), getattr(result.sizes.student, name), unit))
    return rows + (_speed_rows(result.speed) if result.speed else [])


def _speed_rows(speed: SpeedChange) -> list[SummaryRow]:
    before, after, ratio, promised = speed.teacher, speed.student, speed.ratio, speed.predicted
    rows = [
        SummaryRow(label, with_interval(a), with_interval(b),
                   f"{speed_change(a, b, times)}, predicted {format_ratio(predicted)}")
        for label, a, b, times, predicted in (
            ("Prefill tokens/s", before.prefill_tokens_per_s, after.prefill_tokens_per_s, ratio.prefill,
             promised.prefill),
            ("Decode tokens/s", before.decode_tokens_per_s, after.decode_tokens_per_s, ratio.decode, promised.decode),
        )
    ]  # fmt: skip
    peaks = before.peak_bytes, after.peak_bytes
    return rows + ([_sizes("Peak memory", *peaks, "B")] if any(peaks) else [])


def run_notes(result: RunResult, *, served: bool = True) -> list[str]:
    """What a reader of the numbers must know: recoveries, reasons, and what was not measured.

    `served`: with what runs the student, which a page says elsewhere.
    """
    notes = [_recovery_in_words(report, added) for report, added in _added_parameters(result)]
    if result.reasons:
        notes.append(" ".join(REASONS[reason] for reason in result.reasons))
    if result.vocabulary is not None:
        notes += vocabulary_notes(result.vocabulary)
    elif result.perplexity is None:
        notes.append("Perplexity was not measured.")
    elif not result.perplexity.ratio.reliable:
        notes.append(f"Perplexity: {reliability_note(result.perplexity.ratio)}")
    if result.speed is None:
        notes += [] if "loss_alone" in result.reasons else ["Speed was not measured."]
    else:
        notes += _eager_in_words(result.speed.teacher, result.speed.student)
        if result.speed.gap is not None:
            notes.append(f"Speed: {_gap_in_words(result.speed, result.speed.gap)}")
    for each in result.exports if served else ():
        notes.append(f"{each.out}: {each.form}. {' '.join((verification_sentence(each.verified), *each.notes))}")
    if result.targets and served:
        notes.append(targets_in_words(result.targets, result.out))
    return notes + ([_within_in_words(result.within)] if result.within else [])


def _eager_in_words(before: Rates, after: Rates) -> list[str]:
    """Return what decoding is kernel by kernel, where it was timed as one graph."""
    one, other = before.eager_decode_tokens_per_s, after.eager_decode_tokens_per_s
    if one is None or other is None:
        return []
    return [
        "Decoding was timed as a serving engine runs it: all kernels of a step are one graph. Kernel by kernel the "
        f"teacher decodes {with_interval(one)} and the student {with_interval(other)} tokens/s."
    ]


FAULTS: dict[FaultReason, str] = {
    "model": "this kind of model",
    "sites": "blocks of which one site is missing: remove whole blocks",
    "widths": "different widths: narrow all blocks alike, as the recipe billhook-width does",
    "kv_groups": "this number of KV groups",
    "patches": "the patches of a recovery: recover by fold",
    "biases": "the biases of a recovery: recover by fold",
    "factors": "low-rank factors of weights",
}


def targets_in_words(targets: Sequence[TargetFit], out: str) -> str:
    """Return which software loads a student, through which export, and what keeps the rest from it."""
    taken: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for each in targets:
        kind, key = (taken, each.export) if each.fault is None else (refused, FAULTS[each.fault])
        kind.setdefault(key, []).append(each.target)
    here = ", ".join(taken.pop("transformers", []))
    sentences = [f"{here} load it as it is."] if here else []
    sentences += [f"{', '.join(names)}: billhook export {out} --to {name}." for name, names in sorted(taken.items())]
    sentences += [f"{', '.join(names)}: no place for {fault}." for fault, names in refused.items()]
    return "What serves it: " + " ".join(sentences)


def _added_parameters(result: RunResult) -> list[tuple[RecoveryReport, int]]:
    """Every recovery with the parameters that it added."""
    totals = [0, *(report.parameters for report in result.recoveries)]
    return [(report, report.parameters - before) for report, before in zip(result.recoveries, totals, strict=False)]


def _gap_in_words(speed: SpeedChange, gap: SpeedGap) -> str:
    kinds = " and ".join(
        f"{phase} ({format_ratio(getattr(speed.ratio, phase).value)}, predicted "
        f"{format_ratio(getattr(speed.predicted, phase))})"
        for phase in gap.phases
    )
    return (
        f"Measured and predicted differ by more than 15% in {kinds}. The prediction counts weights only. At batch "
        f"{gap.batch} a decoding step of the teacher takes {1000 * gap.step_seconds:.1f} ms, of which reading the "
        f"weights accounts for about {1000 * gap.read_seconds:.1f} ms at this machine's measured memory bandwidth; the "
        "rest is the fixed cost of calling each site, attention over the context and the machine's noise, so speed "
        "follows the number and kind of the removed sites rather than their weights."
    )


RECOVERY_COLUMNS = ("Recovery", "Text", "Perplexity", "Change", "Of the gap")


def recovery_rows(result: RunResult) -> list[tuple[str, ...]]:
    """What every recovery did on every text, under `RECOVERY_COLUMNS`; the gap is that to the teacher."""
    return [
        (
            report.recovery,
            text,
            f"{format_number(gain.before)} → {format_number(gain.after)}",
            with_interval(gain.ratio, format_ratio),
            "–" if gain.closed is None else f"{gain.closed:.0%} closed" if gain.closed >= 0 else "wider",
        )
        for report in result.recoveries
        for text, gain in report.on.items()
    ]  # fmt: skip


def _recovery_in_words(report: RecoveryReport, added: int) -> str:
    """What one recovery did to the perplexity on held-out text, loudly where that is nothing; `added` parameters."""
    gain = report.on["held-out"]
    ratio = gain.ratio
    times, low, high = (format_ratio(x) for x in (ratio.value, ratio.low, ratio.high))
    closed = f", {gain.closed:.0%} of the gap" if gain.closed is not None else ""
    figures = f"{format_number(gain.before)} to {format_number(gain.after)} ({times}, {low}–{high}{closed})"
    cost = f"{added:,} parameters more" if added else "nothing"
    learnt = f"learnt from {report.tokens:,} tokens in {format_duration(report.seconds)}, at inference {cost}"
    if ratio.high >= 1:
        return f"{report.recovery} DID NOT HELP on held-out text: perplexity {figures}; {learnt}. Leave it out."
    return f"{report.recovery}: held-out perplexity {figures}; {learnt}."


def _within_in_words(within: WithinReport) -> str:
    """Which sizes a margin was asked about, and what it said of the one that was taken."""
    taken = within.taken
    refused = [f"{trial.percent:.1f}%" for trial in within.trials if not trial.within]
    more = f" {', '.join(refused)} would lose more." if refused else ""
    unit = "percent of the perplexity" if within.margin.kind == "ppl" else "percentage points of accuracy"
    return (
        f"Within {within.margin}, judged on {within.data.tokens:,} tokens that the proof does not use: "
        f"{taken.percent:.1f}% of the parameters can be removed, for {taken.lost.value:.2f} {unit}, at most "
        f"{taken.lost.high:.2f} ({BOUND}).{more} {reliability_note(taken.lost)}".rstrip()
    )


# -- the plan ----------------------------------------------------------------------------------------------------------


def checkpoint_type(result: RunResult) -> str:
    """The student's `model_type`, and that it holds zeros where it does."""
    return result.checkpoint + (", zeroed: no speed-up" if "zeroed" in result.reasons else "")


def headline(result: RunResult) -> str:
    """The run in one sentence of plain words."""
    was, now = result.sizes.teacher.parameters, result.sizes.student.parameters
    facts = [f"{1 - now / was:.1%} fewer parameters" if now < was else "as many parameters as before"]
    if quality := result.perplexity:
        low, high = (format_ratio(end)[1:] for end in (quality.ratio.low, quality.ratio.high))
        values = f"{format_number(quality.teacher)} → {format_number(quality.student)}"
        times = format_ratio(quality.ratio.value)
        facts.append(f"perplexity {values} ({times}, 95% interval {low} to {high})")
    if result.vocabulary is not None:
        facts.append(bits_in_words(result.vocabulary))
    if result.speed:
        before, after = (side.decode_tokens_per_s for side in (result.speed.teacher, result.speed.student))
        facts.append(f"decoding speed {speed_change(before, after, result.speed.ratio.decode)}")
    rows = f"{rows_in_words(result.vocabulary)}; " if result.vocabulary is not None and result.plan else ""
    return f"{rows}{_changed_in_words(result)}: {', '.join(facts)}."


def _changed_in_words(result: RunResult) -> str:
    """`3 of 60 sites removed (1 whole block), 2 narrowed`; `all 30 MLPs narrowed to 1,229 of 1,536 neurons`."""
    plan, present = result.plan, len(result.anatomy.sites)
    if result.vocabulary is not None and not plan:
        return rows_in_words(result.vocabulary)
    whole = f" ({pluralize(len(plan.blocks()), 'whole block')})" if plan.blocks() else ""
    if not plan.narrowed or plan.removed:
        narrowed = f", {len(plan.narrowed)} narrowed" if plan.narrowed else ""
        return f"{len(plan.removed)} of {pluralize(present, 'site')} removed{whole}{narrowed}"
    kinds = narrowed_sites(result)
    if all(kind.all_of_part for kind in kinds):
        words = join_words([f"all {kind.name} narrowed to {kind.kept_words}" for kind in kinds])
        return words[0].upper() + words[1:]
    return f"{len(plan.narrowed)} of {pluralize(present, 'site')} narrowed, none removed"


def quality_verdict(result: RunResult) -> str:
    """Whether the student is good, in a sentence: by its interval of perplexity, and by the margin if one was given."""
    if result.vocabulary is not None:
        return vocabulary_verdict(result.vocabulary)
    if result.perplexity is None:
        return "Its quality was not measured."
    ratio = result.perplexity.ratio
    ends = f"{_percent_more(ratio.low)} to {_percent_more(ratio.high)}"
    on = f"held-out text (95% interval over {pluralize(ratio.clusters, 'text')})"
    if not math.isfinite(ratio.low) or not math.isfinite(ratio.high):
        words = "How much worse it is on held-out text is not known: one text has no interval"
    elif ratio.high < 1:
        words = f"It is better than the teacher: perplexity changes by {ends} on {on}"
    elif ratio.low <= 1:
        words = f"No loss is seen: perplexity changes by {ends} on {on}"
    else:
        words = f"It is worse than the teacher: perplexity rises by {ends} on {on}"
    within = f", within the margin of {result.within.margin} on other text" if result.within else ""
    return f"{words}{within}."


def _percent_more(ratio: float) -> str:
    return f"{100 * (ratio - 1):.3g}%".replace("-", "−")


def _sizes(label: str, teacher: float | None, student: float | None, unit: str) -> SummaryRow:
    change = "–"
    if teacher and student is not None:
        change = "unchanged" if teacher == student else f"{student / teacher - 1:+.1%}".replace("-", "−")
    return SummaryRow(label, format_number(teacher, unit), format_number(student, unit), change)
