"""Recoveries that replace removed sublayers by a matrix, in closed form."""

from __future__ import annotations

import torch

from billhook.core.errors import UsageError, option
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, recovery
from billhook.methods.recover.ridge import Moments, ridge_fit
from billhook.methods.recover.side_by_side import (
    Change,
    SiteView,
    execution_order,
    lookahead_targets,
    removed_runs,
    side_by_side,
    streams_after,
)
from billhook.models.repair import Patch, Repair


@recovery(adds="patches")
def lowrank(task: RecoveryTask, train: TokenSet, valid: TokenSet, *, rank: int = 32, bias: bool = True) -> Repair:
    """Replace each removed sublayer by x -> x + U V x + b, the best matrices of `rank` in closed form.

    The fit's target is the whole error of the student's stream at that place. A fit that does not help on held-out
    texts is left out. `bias`: with the constant b.

    Formula: the rank-r minimum of Σ_t |h_t - x_t - U V x_t - b|²: ridge regression, then the r principal directions of
    its fitted values
    Cost: one forward pass of the teacher and one of the student, a solve per removed sublayer; at inference two
    products of `rank` by width.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its low-rank adapters;
    reduced-rank regression, Izenman 1975. Deviations: not trained; fitted to the student's stream, not to the removed
    sublayer's output.
    """
    if rank < 1:
        raise UsageError(f"lowrank takes a rank of at least 1, not {rank}.")
    teacher = task.teacher_streams(train)
    validation = task.validation_mask(teacher.bench, train)

    def visit(view: SiteView) -> Change:
        if not view.removed or view.site in task.repair.patches:
            return None
        return _low_rank(view, validation, rank, bias)

    return side_by_side(teacher, task.plan, task.repair, visit)


def _low_rank(view: SiteView, validation: torch.Tensor, rank: int, bias: bool) -> Patch | None:
    x, y = view.inputs, view.teacher_after - view.after
    centre, middle = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    even = torch.ones(len(x), device=x.device)
    fit = ridge_fit(x - centre, y - middle, even, validation)
    if fit.remaining_error >= 1:
        return Patch(bias=middle) if bias else None
    moments = Moments(x - centre, y - middle, even)
    b = fit.matrix.T.to(moments.xx)  # [inputs, outputs]
    carried = torch.linalg.eigh(b.T @ moments.xx @ b)[1][:, -min(rank, len(y[0])) :]
    up, down = carried, carried.T @ b.T
    constant = middle.to(b) - up @ (down @ centre.to(b)) if bias else None
    parts = (constant, None, down, up)
    return Patch(*(None if part is None else part.to(x.device, torch.float32).contiguous() for part in parts))


@recovery(adds="patches", option=("where", "inserted"))
def linear(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *, where: str = "inserted", bias: bool = False
) -> Repair:
    """Replace each run of removed sublayers by one matrix, inserted or fused into the projection before the run.

    `where`: inserted, x -> x + W x at the end of the run; or fused into the output projection of the last sublayer kept
    before the run, with unchanged shapes. A matrix that does not help on held-out texts is left out, and so is a fused
    one with no sublayer before it. `bias`: with a constant, x -> x + W x + b, only where inserted; a matrix that does
    not help leaves the constant.

    Formula: inserted: min over W (and b) of Σ_t |h_t - x_t - W x_t - b|²; fused: the same with m_t, the output of the
    sublayer before the run, instead of W's x_t, and W W_out added to its output projection W_out
    Cost: one forward pass of the teacher and one of the student (fused: two, where its streams do not fit into memory),
    a solve per run; at inference a product of width by width per run, or nothing.
    Source: Ghosted Layers (arXiv 2605.15491), inserted; Erdogan et al. 2025, NBL (arXiv 2505.21077), with `bias`;
    ReplaceMe (NeurIPS 2025), fused, its least squares. Deviations: any runs of single sublayers, ridge chosen on
    held-out texts; the target is the teacher's stream, where NBL has what the sublayer adds in the teacher.
    """
    if where not in ("inserted", "fused"):
        raise UsageError(f"linear is inserted or fused, not {where!r}.")
    if bias and where == "fused":
        raise UsageError(f"A fused matrix has no constant. Leave {option('recover_set', {'bias': True})} out.")
    teacher = task.teacher_streams(train, again=where == "fused")
    validation, sites = task.validation_mask(teacher.bench, train), execution_order(teacher.bench)
    even = torch.ones(len(validation), device=validation.device)
    if where == "inserted":
        ends = {run[-1] for run in removed_runs(sites, task.plan)}

        def insert(view: SiteView) -> Change:
            if view.site not in ends or view.site in task.repair.patches:
                return None
            x, y = view.inputs, view.teacher_after - view.after
            centre, middle = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
            fit = ridge_fit(x - centre, y - middle, even, validation)
            if fit.remaining_error >= 1:
                return Patch(bias=middle) if bias else None
            constant = middle - fit.matrix @ centre if bias else None
            return Patch(bias=constant, down=fit.matrix, up=torch.eye(len(fit.matrix), device=x.device))

        return side_by_side(teacher, task.plan, task.repair, insert)
    run_end = lookahead_targets(sites, task.plan)
    streams = streams_after(teacher, set(run_end.values()))

    def fuse(view: SiteView) -> Change:
        if view.site not in run_end or view.value is None:
            return None
        target = streams[run_end[view.site]].to(view.after.device) - view.after
        fit = ridge_fit(view.after - view.before, target, even, validation)
        return fit.matrix @ view.value if fit.remaining_error < 1 else None

    return side_by_side(teacher, task.plan, task.repair, fuse)
