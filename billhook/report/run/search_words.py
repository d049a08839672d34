"""How a search went, in sentences."""

from __future__ import annotations

from billhook.core.results.measured import Z_95, WorkPlan
from billhook.core.results.run import FinalChoice, Influence, SearchSummary
from billhook.report.numbers import pluralize


def search_in_words(search: SearchSummary) -> str:
    """How a search went, in a sentence; empty where it had nothing to decide."""
    decided = search.decided
    if not decided.total:
        return ""
    counts = (
        (decided.full, "measured in full"),
        (decided.bound, "dropped as soon as they were certain to lose"),
        (decided.raced, "dropped as significantly worse"),
        (decided.skipped, "not measured, by the ranking of the rounds before"),
    )
    parts = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    sentence = f"{search.mode.capitalize()} search, {decided.total:,} candidates: {parts}. "
    sentence += f"Measured {work_in_words(search.work)}."
    if search.audit is not None:
        missed = [round_ for round_ in search.audit if round_.regret > 0]
        worst = max((round_.regret for round_ in search.audit), default=0.0)
        sentence += f" Audit: {len(missed)} of {len(search.audit)} rounds missed the best candidate"
        sentence += f", by at most {worst:.3g} per token." if missed else "."
    sentence += _final_choice_in_words(search.final) if search.final is not None else ""
    return sentence + (_influence_in_words(search.influence) if search.influence is not None else "")


def _final_choice_in_words(final: FinalChoice) -> str:
    """Which of the best plans was taken, and how much the calibration text flatters it."""
    taken = (
        f" The best {final.plans} plans were judged on {final.data.tokens:,} tokens that the search had not seen. "
        f"The lowest was taken: {final.unseen:.4g} per token there, {final.calibration:.4g} on the calibration text."
    )
    if not final.gap:
        return taken
    error = "" if final.gap_se is None else f" ± {Z_95 * final.gap_se:.2g}"
    where = ", found for another size," if final.elsewhere else ""
    return taken + f" It{where} is lower by {final.gap:.2g}{error} than the one that the calibration text chooses."


def _influence_in_words(influence: Influence) -> str:
    """How many choices another text would have made otherwise."""
    otherwise = [each for each in influence.exchanges if each.gap < 0]
    clear = sum(each.is_clear for each in otherwise)
    surely = f", {clear:,} of them beyond noise" if clear else ", none of them beyond noise" if otherwise else ""
    return (
        f" Each of {pluralize(len(influence.exchanges), 'choice')} was held against the best other one on "
        f"{influence.data.tokens:,} tokens that the search had not seen: {len(otherwise) or 'none'} would be made "
        f"otherwise there{surely}."
    )


def work_in_words(work: WorkPlan) -> str:
    """`layer by layer, 4 document groups, streams kept after every block, at most 1.0 GB`."""
    weights = "blocks from disk, " if work.streamed else ""
    often = "every block" if work.checkpoint_every == 1 else f"every {work.checkpoint_every} blocks"
    kept = f"streams kept after {often}, at most {work.limit / 1e9:.1f} GB" if work.checkpoint_every else ""
    order = "layer by layer" if work.walk == "layers" else "depth-first"
    return f"{weights}{order}, {pluralize(work.groups, 'document group')}, {kept or 'no streams kept'}"
