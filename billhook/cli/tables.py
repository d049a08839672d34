"""Tables of results in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from billhook.cli.session import empty_table, plain_table, prints
from billhook.core.anatomy import ModelSizes, SiteSize, Unassigned
from billhook.core.plan import Site
from billhook.core.registry import MethodInfo
from billhook.core.results.exports import ExportReport, PushReport, TargetTable
from billhook.core.results.json_form import Result, cell_text
from billhook.core.results.model import (
    BlockScore,
    Evaluation,
    GroupScores,
    Inspection,
    MetricScores,
    ScoreTable,
    SiteScore,
    SpanScore,
    SpeedReport,
    WorkEstimate,
)
from billhook.core.results.run import RunResult
from billhook.report.numbers import (
    format_duration,
    reliability_note,
    verification_sentence,
)
from billhook.report.timing import words


@prints(Result)
def rows_table(console: Console, result: Result) -> None:
    """Print the rows of a result that has no table of its own."""
    rows = result.rows()
    console.print(plain_table(tuple(rows[0] if rows else ()), [[cell_text(v) for v in row.values()] for row in rows]))


@prints(RunResult)
def result_table(console: Console, result: RunResult) -> None:
    """Print what a pruning removed and what that changed."""
    from billhook.report import run_words
    from billhook.report.run.narrowed import narrowed_sentence
    from billhook.report.run.search_words import search_in_words
    from billhook.report.run.skills import lost_skills
    from billhook.report.run.smaller_vocabulary import rows_in_words

    removed = result.plan.names()
    names = f": {', '.join(removed)}" if removed else ""
    if result.vocabulary is not None:
        console.print(rows_in_words(result.vocabulary))
    if result.plan or result.vocabulary is None:
        console.print(f"Removed {len(removed)} of {len(result.anatomy.sites)} sites{names}")
    if narrowed := narrowed_sentence(result):
        console.print(narrowed)
    table = empty_table("", "teacher", "student", "change")
    for row in run_words.summary_rows(result):
        table.add_row(row.label, row.teacher, row.student, row.change)
    console.print(table)
    if warning := lost_skills(result):
        console.print(warning, style="bold")
    for note in filter(None, (search_in_words(result.search), *run_words.run_notes(result))):
        console.print(note, style="dim")
    console.print(f"Checkpoint and report: {result.out} (open {result.out}/report.html)")


@prints(ExportReport)
def export_table(console: Console, report: ExportReport) -> None:
    """Print what an export wrote, and how its runtime differs from the checkpoint."""
    console.print(f"{report.out}: {report.form}, {report.bytes / 1e6:,.1f} MB in {len(report.files)} files")
    for sentence in (verification_sentence(report.verified), *report.notes):
        console.print(sentence, style="dim")


@prints(TargetTable)
def targets_table(console: Console, found: TargetTable) -> None:
    """Print what software that serves models can express of a model."""
    console.print(f"{found.model}: {found.type}")
    table = empty_table("target", "removes", "mlp widths", "attention widths", "repairs")
    for row in found.targets:
        if row.reason is not None:
            table.add_row(row.target, "", "", "", "")
            continue
        removes = {"removed": "sites", "zeros": "zeros", "none": "blocks"}[row.sites]
        step = f", in {row.mlp_step}s" if row.mlp_step > 1 and row.mlps == "any" else ""
        groups = f", {' '.join(map(str, row.kv_groups))}" if row.kv_groups else ""
        repairs = " + ".join(name for name, so in (("patches", row.patches), ("biases", row.biases)) if so)
        table.add_row(row.target, removes, row.mlps + step, row.attentions + groups, repairs or "weights")
    console.print(table)
    for row in found.targets:
        if row.reason is not None:
            console.print(f"{row.target}: no place for {row.reason}.", style="dim", highlight=False)
        elif row.first_attention:
            console.print(f"{row.target}: the first block keeps its attention.", style="dim", highlight=False)
    for name, targets in _by_export(found).items():
        console.print(f"{', '.join(targets)}: billhook export FOLDER --to {name}", style="dim", highlight=False)
    unverified = ", ".join(row.target for row in found.targets if not row.verified)
    console.print(f"Billhook runs exports in all of them but {unverified}.", style="dim", highlight=False)


def _by_export(found: TargetTable) -> dict[str, list[str]]:
    """Return by the most general export of each target the targets that it serves."""
    served: dict[str, list[str]] = {}
    for row in found.targets:
        if row.reason is None:
            served.setdefault(row.exports[-1], []).append(row.target)
    return served


@prints(PushReport)
def push_table(console: Console, report: PushReport) -> None:
    """Print the files of an upload with their sizes, and where they are."""
    rows = [[file.path, f"{file.bytes:,}"] for file in report.files]
    console.print(plain_table(("file", "bytes"), rows))
    size = f"{len(report.files)} files, {sum(file.bytes for file in report.files) / 1e6:,.1f} MB"
    if report.url:
        gone = f"; {len(report.replaced)} replaced, {len(report.deleted)} deleted" if report.replaced else ""
        console.print(f"{size} in {report.repo} on {report.revision}{gone}: {report.url}", soft_wrap=True)
    else:
        console.print(f"{size} for {report.repo} on {report.revision}. Nothing was uploaded.")


def push_question(report: PushReport) -> str:
    """Ask whether an upload may change a branch that holds files."""
    deleted = f" and delete {', '.join(report.deleted)}" if report.deleted else ""
    return (
        f"{report.repo} holds files on {report.revision}. Add {len(report.files) - len(report.replaced)}, replace "
        f"{len(report.replaced)}{deleted}?"
    )


@prints(Inspection)
def anatomy_table(console: Console, found: Inspection) -> None:
    """Print the sites of a model and their sizes."""
    anatomy = found.anatomy
    console.print(f"{found.model}: {found.type}, {anatomy.blocks} blocks, {found.dtype}")
    table = empty_table("site", "parameters", "bytes", "KV B/token", "FLOPs/token", "groups")
    rows: list[tuple[str, SiteSize | Unassigned | ModelSizes, int]] = [
        (str(size.site), size, len(size.groups)) for size in anatomy.sites
    ]
    for name, size, groups in [*rows, ("the rest", anatomy.rest, 0), ("total", found.total, 0)]:
        numbers = (size.parameters, size.bytes, size.kv_bytes_per_token, size.flops_per_token)
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{groups:,}" if groups else "")
    console.print(table)
    if found.already_removed:
        console.print(f"Removed before: {', '.join(found.already_removed.names())}")


@prints(WorkEstimate)
def plan_of_work_table(console: Console, work: WorkEstimate) -> None:
    """Print what a pruning would measure, and what it would take."""
    from billhook.report.run.search_words import work_in_words

    table = empty_table("", "")
    calibration, held_out, memory = work.data.calibration, work.data.evaluation, work.memory
    weights, kept, free = (size / 1e9 for size in (memory.weights, memory.kept_for_search, memory.free))
    about = work.seconds.search
    search = "unknown" if about is None else f"about {format_duration(about)}"
    for label, text in (
        ("remove", f"{work.remove} of {work.model}"),
        ("losses to measure", "unknown" if work.losses is None else f"{work.losses:,}"),
        ("calibration", f"{calibration.tokens:,} tokens of {calibration.source}"),
        ("held out", f"{held_out.tokens:,} tokens of {held_out.source}"),
        ("memory", f"{weights:.2f} GB weights, {kept:.2f} GB kept for the search, {free:.1f} GB free"),
        ("measured", work_in_words(work.work)),
        ("disk", f"at most {work.disk_bytes / 1e9:.2f} GB"),
        (
            "time",
            f"search {search}, recovery about {format_duration(work.seconds.recover)}, evaluation about "
            f"{format_duration(work.seconds.evaluate)}",
        ),
    ):
        table.add_row(label, text)
    console.print(table)


@prints(Evaluation)
def evaluation_table(console: Console, found: Evaluation) -> None:
    """Print a perplexity with its interval, or a line for every evaluation that was named."""
    if found.perplexity is None:
        return _evaluations_by_name(console, found)
    ppl, data = found.perplexity, found.data
    console.print(
        f"{found.model}: perplexity {ppl.value:.3f} (95% interval {ppl.low:.3f} to {ppl.high:.3f}; "
        f"{ppl.n} documents of {ppl.clusters} texts, {data.tokens:,} tokens of {data.source})"
    )
    if found.bits_per_byte is not None:
        console.print(f"{found.bits_per_byte:.4f} bits a byte, perplexity of a word {found.word_perplexity:,.2f}")
    if note := reliability_note(ppl):
        console.print(note, style="dim")


def _evaluations_by_name(console: Console, found: Evaluation) -> None:
    lines = [
        [name, f"{each.value:#.4g}", f"{each.low:#.4g} to {each.high:#.4g}", f"{each.n:,}", reliability_note(each)]
        for name, each in found.evaluations.items()
    ]
    console.print(f"{found.model}, {found.data.tokens:,} tokens of {found.data.source}")
    console.print(plain_table(("evaluation", "value", "95% interval", "items", ""), lines))


@prints(SpeedReport)
def speed_table(console: Console, found: SpeedReport) -> None:
    """Print tokens per second and peak memory, and how many times faster a second model is."""
    console.print(plain_table(words.speed_columns(found), words.speed_rows(found)))
    console.print(words.speed_headline(found), highlight=False)
    for note in words.speed_notes(found):
        console.print(note, style="dim", highlight=False)


@prints("methods")
def methods_table(console: Console, value: Mapping[str, Sequence[MethodInfo]]) -> None:
    """Print every registered method with its options and source."""
    for method in value["methods"]:
        console.print(f"{method.name} ({method.family}): {method.summary}", highlight=False, style="bold")
        options = ", ".join(f"{name}={default}" for name, default in method.options.items())
        for text in (method.cost and f"Cost: {method.cost}", options and f"Options: {options}", method.source):
            if text:
                console.print(f"    {text}", style="dim", highlight=False)


@prints("recipes")
def recipe_table(console: Console, value: dict[str, Any]) -> None:
    """Print every built-in recipe with what it makes, what it does and its paper."""
    for row in value["recipes"]:
        makes = "depth and width" if row["makes"] == "both" else row["makes"]
        trains = ", trains" if row["trains"] else ""
        head = f"{row['name']} ({makes}, {row['checkpoint']} type{trains}, {row['remove']}): {row['summary']}"
        console.print(head, highlight=False, style="bold")
        console.print(f"    {row['paper'] or 'ours'}", style="dim", highlight=False)
    console.print("Use one: billhook prune MODEL --recipe NAME [--remove SIZE]", style="dim", highlight=False)


@prints(ScoreTable)
def score_tables(console: Console, found: ScoreTable) -> None:
    """Of every metric a line a block, with its sites, and a line a length for spans of blocks."""
    for metric, scores in found.scores.items():
        scored: list[SiteScore | BlockScore | SpanScore] = [*scores.sites, *scores.blocks, *scores.spans]
        errors = any(each.se is not None for each in scored)
        note = " (± one standard error)" if errors else ""
        console.print(f"{metric} of {found.model}, higher = removal hurts more{note}")
        if scores.sites or scores.blocks:
            _by_block(console, scores)
        if scores.spans:
            _by_length(console, scores.spans)
        if scores.groups:
            _by_group(console, scores.groups)
    read = f", {found.bytes_read / 1e9:.2f} GB read from disk" if found.streamed else ""
    console.print(f"{found.data.tokens:,} tokens of {found.data.source}, {found.seconds:.1f} s{read}", style="dim")


def _by_block(console: Console, scores: MetricScores) -> None:
    sites = {each.site: each for each in scores.sites}
    blocks = {each.block: each for each in scores.blocks}
    lines = []
    for block in sorted({site.block for site in sites} | set(blocks)):
        cells = (blocks.get(block), sites.get(Site(block, "attention")), sites.get(Site(block, "mlp")))
        lines.append([str(block), *(_score(cell) for cell in cells)])
    console.print(plain_table(("block", "whole block", "attention", "mlp"), lines))
    if sites:
        least = sorted(scores.sites, key=lambda each: each.value)[:5]
        console.print(f"Least important sites: {', '.join(str(each.site) for each in least)}")


def _by_length(console: Console, spans: Sequence[SpanScore]) -> None:
    """The least important span of every length."""
    lines = []
    for length in sorted({span.length for span in spans}):
        least = min((span for span in spans if span.length == length), key=lambda span: span.value)
        lines.append([str(length), f"{least.first}-{least.last}", _score(least)])
    console.print(plain_table(("blocks in a span", "least important", "score"), lines))


def _by_group(console: Console, groups: Sequence[GroupScores]) -> None:
    """Of every site the lowest, middle and highest score of its channel groups, and which one matters least."""
    lines = []
    for each in groups:
        ranked = sorted(each.values)
        three = (ranked[0], ranked[len(ranked) // 2], ranked[-1])
        least = each.numbers[each.values.index(ranked[0])]
        lines.append([str(each.site), f"{len(ranked):,}", *(f"{value:#.4g}" for value in three), str(least)])
    console.print(plain_table(("site", "groups", "lowest", "middle", "highest", "lowest is"), lines))


def _score(each: SiteScore | BlockScore | SpanScore | None) -> str:
    if each is None:
        return "removed"
    return f"{each.value:#.4g}" + (f" ± {each.se:#.2g}" if each.se is not None else "")
