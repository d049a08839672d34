"""Recovery by linear regression into weights that are there already: free at inference, and the shapes stay."""

from __future__ import annotations

from billhook.data import TokenSet
from billhook.errors import UsageError
from billhook.probe.pair import Change, Stage, side_by_side
from billhook.records import Event
from billhook.recover import Subject, recovery
from billhook.regression import fitted
from billhook.repair import Repair

PARTS_OF = {"mlp": ("mlp",), "attention": ("attention",), "both": ("attention", "mlp")}


@recovery
def fold(subject: Subject, train: TokenSet, valid: TokenSet, *, parts: str = "both", reach: str = "all") -> Repair:
    """Refit output projections behind the removed sites, so that the residual stream is the teacher's again.

    From the front to the back, each on what the student before it makes of the text: ridge regression of what the
    stream still lacks on what the projection reads. The ridge of each is chosen on every eighth text, and one that
    does not help there is left alone. Tokens count by the inverse square of their stream's length, because the final
    norm divides by it. `parts`: mlp, attention or both; `reach`: all behind the first removed site, or the next one
    behind each removed site only.

    Formula: argmin over ΔW of Σ_t |h_t - s_t - ΔW x_t|² / |h_t|² + λ |ΔW|², h the teacher's stream, s the student's
    Cost: one forward pass of the teacher and one of the student, and a solve a projection; nothing at inference.
    Source: Park et al. 2025, SPRINT (arXiv 2506.03510), which refits the next MLP's down projection. Deviations: every
    later projection, ridge chosen on held-out text, tokens weighted.
    """
    if parts not in PARTS_OF or reach not in ("all", "next"):
        raise UsageError(f"fold takes parts mlp, attention or both, and reach all or next, not {parts!r}, {reach!r}.")
    bench = subject.bench(train)
    held = subject.held(bench, train)
    waiting = False
    done = 0

    def visit(stage: Stage) -> Change:
        nonlocal waiting, done
        done += 1
        subject.watch(Event("recover", done, len(subject.teacher.anatomy.sites), "fold"))
        if stage.removed:
            waiting = True
            return None
        if stage.weight is None or not waiting or stage.site.part not in PARTS_OF[parts]:
            return None
        waiting = reach == "all"
        lacking = stage.teacher_after - stage.after
        weight = 1 / stage.teacher_after.square().mean(-1).clamp(min=1e-12)
        fit = fitted(stage.inputs, lacking, weight / weight.mean(), held)
        return fit.matrix if fit.left < 1 else None

    return side_by_side(bench, subject.plan, subject.repair, visit)
