"""Recovery by linear regression into weights that are there already: free at inference, and the shapes stay."""

from __future__ import annotations

from billhook.core.errors import UsageError
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
from billhook.models.repair import Repair

FOLDED_PARTS = {"mlp": ("mlp",), "attention": ("attention",), "both": ("attention", "mlp")}


@recovery
def fold(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *, parts: str = "both", reach: str = "all", ahead: bool = True
) -> Repair:
    """Refit output projections around the removed sites, so that the residual stream is the teacher's again.

    From the front to the back, each on what the student before it makes of the text: ridge regression of what the
    stream still lacks on what the projection reads. What it should be is the teacher's stream before whatever the
    student computes next: right before a run of removed sites that is the stream behind the run. The ridge of each is
    chosen on every eighth text, and one that does not help there is left alone. Tokens count by the inverse square of
    their stream's length, because the final norm divides by it.

    Sites that became narrower are refitted too, on the channels that stayed. `parts`: mlp, attention or both; `reach`:
    all from the first removed or narrower site on, or those and the next one behind each removed site only;
    `ahead=False`: no look behind the runs.

    Formula: argmin over ΔW of Σ_t (|h_t - s_t - ΔW x_t|² + λ Σ_i |x_ti ΔW_i|²) / |h_t|², h the teacher's stream,
    s the student's, ΔW_i what channel i goes through
    Cost: a forward pass of the teacher (two, where its streams do not fit into memory) and one of the student, and a
    few solves a projection; nothing at inference.
    Source: Park et al. 2025, SPRINT (arXiv 2506.03510), which refits the next MLP's down projection. Deviations:
    attention as well, every later projection, those before a removed site with an eye on what comes behind it, ridge
    chosen on held-out text, tokens weighted.
    """
    if parts not in FOLDED_PARTS or reach not in ("all", "next"):
        raise UsageError(f"fold takes parts mlp, attention or both, and reach all or next, not {parts!r}, {reach!r}.")
    side = task.teacher_streams(train, again=ahead and bool(task.plan.removed))
    held, sites = task.validation_mask(side.bench, train), execution_order(side.bench)
    behind = lookahead_targets(sites, task.plan) if ahead else {}
    streams = streams_after(side, set(behind.values())) if behind else {}
    narrower = {narrow.site for narrow in task.plan.narrowed}
    waiting, done, can = False, 0, False

    def visit(stage: SiteView) -> Change:
        nonlocal waiting, done, can
        done += 1
        task.watch(Event("recover", done, len(sites), {"step": "fold"}))
        if stage.removed:
            waiting = True
            return None
        waiting |= stage.site in narrower
        can |= stage.weight is not None
        if stage.weight is None or stage.site.part not in FOLDED_PARTS[parts] or not (waiting or stage.site in behind):
            return None
        waiting = waiting and reach == "all"
        target = streams[behind[stage.site]] if stage.site in behind else stage.teacher_after
        weight = 1 / target.square().mean(-1).clamp(min=1e-12)
        fit = ridge_fit(stage.inputs, target - stage.after, weight / weight.mean(), held)
        return fit.matrix if fit.remaining_error < 1 else None

    repair = side_by_side(side, task.plan, task.repair, visit)
    if not can:
        raise UsageError(
            "fold finds no output projection in this model that adds to the residual stream as it is: a norm stands "
            "between, or experts. Recover by lowrank, linear or lora."
        )
    return repair
