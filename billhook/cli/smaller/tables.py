"""Tables of the commands that write a smaller model without a search, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Console

from billhook.cli.session import plain_table, prints
from billhook.core.results.exports import FactorReport, SliceReport, VocabularyReport
from billhook.report.numbers import format_perplexity, format_ratio, reliability_note, with_interval


@prints(VocabularyReport)
def vocabulary_table(console: Console, report: VocabularyReport) -> None:
    """Print what is left of a vocabulary, and what held-out texts cost with it."""
    sizes = (
        ("tokens", report.rows_before, report.rows_after),
        ("parameters", report.parameters_before, report.parameters_after),
        ("bytes on disk", report.bytes_before, report.bytes_after),
    )
    _print_sizes(console, sizes)
    texts = [
        [
            each.source, with_interval(each.more, "{:+.1%}".format), f"{each.before.value:.3f}",
            f"{each.after.value:.3f}", with_interval(each.change, "{:+.3f}".format),
        ]
        for each in report.texts
    ]  # fmt: skip
    console.print(plain_table(("held-out text", "tokens", "bits a byte", "after", "change"), texts))
    console.print(
        f"Chosen by {report.counted:,} tokens of {report.data}, of which {report.used:,} are different. "
        f"{report.fixed:,} tokens stay whatever is removed. Intervals are 95%, over texts.",
        style="dim",
    )
    for each in report.texts:
        if note := reliability_note(each.change):
            console.print(f"{each.source}: {note}", style="dim")
    console.print(f"Checkpoint: {report.out}")


def _print_sizes(console: Console, sizes: Sequence[tuple[str, int, int]]) -> None:
    """Print what was there before, what is left, and its share."""
    lines = [[name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"] for name, before, after in sizes]
    console.print(plain_table(("", "before", "after", "left"), lines))


@prints(FactorReport)
def factor_table(console: Console, report: FactorReport) -> None:
    """Print what is left of a model, its ranks, and what held-out text costs with them."""
    before, after = report.parameters_before, report.parameters_after
    console.print(f"parameters: {before:,} before, {after:,} after ({after / before:.1%})")
    lines = []
    for name in dict.fromkeys(each.name for each in report.factors):
        mine = [each for each in report.factors if each.name == name]
        ranks = f"{min(each.rank for each in mine):,} to {max(each.rank for each in mine):,}"
        lost = sum(each.lost for each in mine) / len(mine)
        lines.append([name, f"{mine[0].outputs:,} x {mine[0].inputs:,}", f"{len(mine):,}", ranks, f"{lost:.1%}"])
    console.print(plain_table(("linear map", "size", "blocks", "ranks", "energy lost"), lines))
    console.print(
        f"Perplexity on {report.held_out}: {math.exp(report.before.value):,.2f} before, "
        f"{math.exp(report.after.value):,.2f} after, x{with_interval(report.change.mapped(math.exp), '{:.3f}'.format)}"
    )
    console.print(
        f"Fitted on {report.tokens:,} tokens of {report.data}, with ranks by {report.ranks}. {report.whole:,} linear "
        "maps stay whole. Energy lost is that of their outputs on this text, a mean without an interval. The interval "
        "is 95%, over texts.",
        style="dim",
    )
    if note := reliability_note(report.change):
        console.print(f"{report.held_out}: {note}", style="dim")
    console.print(f"Checkpoint: {report.out}")


@prints(SliceReport)
def slice_table(console: Console, report: SliceReport) -> None:
    """Print how narrow a residual stream is, and what held-out texts cost with it."""
    sizes = (
        ("residual width", report.width_before, report.width_after),
        ("parameters", report.parameters_before, report.parameters_after),
        ("bytes of weights", report.bytes_before, report.bytes_after),
    )
    _print_sizes(console, sizes)
    texts = [
        [
            each.source, f"{each.tokens:,}", format_perplexity(each.before.value), format_perplexity(each.after.value),
            with_interval(each.ratio, format_ratio),
        ]
        for each in report.texts
    ]  # fmt: skip
    console.print(plain_table(("held-out text", "tokens", "perplexity", "after", "ratio"), texts))
    for sentence in (*_slice_notes(report), *filter(None, (reliability_note(each.ratio) for each in report.texts))):
        console.print(sentence, style="dim")
    console.print(f"Checkpoint: {report.out}")


def _slice_notes(report: SliceReport) -> Iterator[str]:
    """Yield how a width was chosen, what the numbers mean, and what loses less."""
    if report.asked.strip() != str(report.width_after):
        yield f"Width {report.asked} became {report.width_after:,}: here widths are multiples of {report.step}."
    if report.bases == "boundary":
        yield (
            "Each boundary has a basis of its own, and a matrix stands in each shortcut, as in the paper. Load the "
            "checkpoint with trust_remote_code=True; nothing in it can be removed. One basis lost less at equal size "
            "where that was measured."
        )
    if report.untied:
        yield "Embedding and head were one matrix; they are two now."
    over = "tokens and boundaries" if report.bases == "one" else "boundaries"
    yield (
        f"The kept directions hold {report.energy:.1%} of the squared length of the residual stream, the mean over "
        f"{over}, of {report.calibrated:,} tokens of {report.data}. It has no interval. Other intervals are 95%, over "
        "texts."
    )
    share = 1 - report.parameters_after / report.parameters_before
    yield (
        "A search of depth, or of depth and width, loses less at equal size wherever that was measured. "
        f"Try: billhook prune {report.model} --remove {share:.1%}"
    )
