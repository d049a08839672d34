"""Recovery by linear regression into existing weights: free at inference, with unchanged shapes."""

from __future__ import annotations

from billhook.core.errors import UsageError, option
from billhook.core.events import Event
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, recovery
from billhook.methods.recover.ridge import ridge_fit
from billhook.methods.recover.side_by_side import (
    Change,
    SiteView,
    execution_order,
    lookahead_targets,
    side_by_side,
    streams_after,
)
from billhook.models.architectures import Architecture
from billhook.models.repair import Repair

FOLDED_PARTS = {"mlp": ("mlp",), "attention": ("attention",), "both": ("attention", "mlp")}


def _no_direct_sum(row: Architecture) -> str | None:
    if not row.norm_before_sum:
        return None
    return (
        "fold finds no output projection that adds to the residual stream directly: this model has a norm between. Use "
        f"{option('recover')} lowrank, linear or lora."
    )


@recovery(refuse=_no_direct_sum)
def fold(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *, parts: str = "both", reach: str = "all", ahead: bool = True
) -> Repair:
    """Refit output projections around the removed sites, so that the residual stream is the teacher's again.

    Projections are refitted in order, each on the student's own activations, by ridge regression of the stream's error
    on the projection's input. The target is the teacher's stream before the student's next sublayer: before a run of
    removed sites, the stream after the run. Every eighth text chooses the ridge; a fit that does not help there is left
    out. A token's weight is the inverse square of its stream's length, because the final norm divides by it.

    Narrowed sites are refitted too, on their kept channels. `parts`: mlp, attention or both. `reach`: all projections
    from the first removed or narrowed site, or the next one after each. `ahead=False`: no look past the runs.

    Formula: argmin over ΔW of Σ_t (|h_t - s_t - ΔW x_t|² + λ Σ_i |x_ti ΔW_i|²) / |h_t|², h the teacher's stream,
    s the student's, ΔW_i the column of channel i
    Cost: a forward pass of the teacher (two, where its streams do not fit into memory) and one of the student, and a
    few solves per projection; nothing at inference.
    Source: Park et al. 2025, SPRINT (arXiv 2506.03510), which refits the next MLP's down projection. Deviations:
    attention as well, all later projections, those before a removed site with the stream after it as target, ridge
    chosen on held-out text, tokens weighted.
    """
    if parts not in FOLDED_PARTS or reach not in ("all", "next"):
        raise UsageError(f"fold takes parts mlp, attention or both, and reach all or next, not {parts!r}, {reach!r}.")
    teacher = task.teacher_streams(train, again=ahead and bool(task.plan.removed))
    validation, sites = task.validation_mask(teacher.bench, train), execution_order(teacher.bench)
    run_end = lookahead_targets(sites, task.plan) if ahead else {}
    streams = streams_after(teacher, set(run_end.values())) if run_end else {}
    narrowed = {narrow.site for narrow in task.plan.narrowed}
    refits, done, supported = False, 0, False

    def visit(view: SiteView) -> Change:
        nonlocal refits, done, supported
        done += 1
        task.watch(Event("recover", done, len(sites), {"step": "fold"}))
        if view.removed:
            refits = True
            return None
        refits |= view.site in narrowed
        supported |= view.weight is not None
        if view.weight is None or view.site.part not in FOLDED_PARTS[parts] or not (refits or view.site in run_end):
            return None
        refits = refits and reach == "all"
        target = streams[run_end[view.site]].to(view.after.device) if view.site in run_end else view.teacher_after
        weight = 1 / target.square().mean(-1).clamp(min=1e-12)
        fit = ridge_fit(view.inputs, target - view.after, weight / weight.mean(), validation)
        return fit.matrix if fit.remaining_error < 1 else None

    repair = side_by_side(teacher, task.plan, task.repair, visit)
    if not supported:
        raise UsageError(
            "fold finds no output projection that adds to the residual stream directly: this model has a norm between, "
            f"or experts. Use {option('recover')} lowrank, linear or lora."
        )
    return repair
