"""Recoveries that replace removed sublayers by a vector or a number."""

from __future__ import annotations

from dataclasses import replace

import torch

from billhook.core.errors import UsageError
from billhook.core.plan import Site
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, recovery
from billhook.methods.recover.side_by_side import (
    Change,
    SiteView,
    equivalent_places,
    execution_order,
    removed_runs,
    side_by_side,
)
from billhook.models.repair import Patch, Repair


@recovery(adds="constants")
def mean(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """Replace each removed sublayer by its mean output in the unpruned model, the emulated update.

    Vectors with no reader of the stream between them become one: in the bias of the output projection before them, if
    it has one, else at the place of one of the sublayers.

    Formula: b = mean over tokens of f(x), x and f as in the teacher; the stream becomes x + b
    Cost: one forward pass of the teacher and one of the student; at inference a vector per run of removed sublayers, or
    nothing.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its emulated update.
    Deviation: its code for this is not public; means are over the tokens of all texts alike.
    """
    teacher = task.teacher_streams(train)
    constants: dict[Site, torch.Tensor] = {}
    biases: dict[Site, tuple[str, torch.Tensor]] = {}  # names and values of kept output projections' biases

    def visit(view: SiteView) -> Change:
        if view.bias is not None and view.weight is not None:
            biases[view.site] = f"{view.weight.removesuffix('weight')}bias", view.bias
        if not view.removed or view.site in task.repair.patches:
            return None
        constants[view.site] = (view.teacher_after - view.teacher_before).mean(0)
        return Patch(bias=constants[view.site])

    repair = side_by_side(teacher, task.plan, task.repair, visit)
    patches, weights = dict(task.repair.patches), dict[str, torch.Tensor]()
    earlier = task.teacher.pruned.patches  # of an earlier pruning
    kept_blocks = {site.block for site in execution_order(teacher.bench) if site not in task.plan.removed}
    for place in equivalent_places(teacher.bench, task.plan):
        sites = [site for site in place if site in constants]
        if earlier or len(sites) < sum(site in repair.patches for site in place):  # an earlier patch reads the stream
            patches |= {site: repair.patches[site] for site in sites}
        elif sites:
            total = torch.stack([constants[site].to(constants[sites[0]].device) for site in sites]).sum(0)
            name, bias = next((biases[site] for site in place if site in biases), ("", total))
            if name:
                weights[name] = bias + total.to(bias.device)
            else:
                patches[min(sites, key=lambda site: (site.block not in kept_blocks, site))] = Patch(bias=total)
    return replace(repair, patches=dict(sorted(patches.items()))).with_weights(weights)


@recovery(adds="biases")
def compensate(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """Add a bias to each narrowed site's output projection: the mean contribution of its removed channel groups.

    Sites are compensated in order, each on the student's own activations.

    Formula: b += mean over tokens of (f(h) - g(x)), f(h) the site's output in the teacher, g(x) in the student
    Cost: one forward pass of the teacher and one of the student; at inference a vector per narrowed site, and nothing
    where the output projection has a bias already.
    Source: An et al. 2024, FLAP (arXiv 2312.11983), its baseline bias compensation. Deviations: the student's own
    stream is measured, so that changes of earlier sites are compensated too; the checkpoint's modelling file adds
    biases to a type without them.
    """
    teacher = task.teacher_streams(train)
    narrowed = {narrow.site for narrow in task.plan.narrowed}
    if not narrowed:
        raise UsageError("compensate needs narrowed sites, and the plan narrows none. Use mean, scale or fold.")

    def visit(view: SiteView) -> Change:
        if view.site not in narrowed or view.weight is None:
            return None
        return (view.teacher_after - view.teacher_before).mean(0) - (view.after - view.before).mean(0)

    return side_by_side(teacher, task.plan, task.repair, visit)


@recovery(adds="patches")
def scale(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """Scale the residual stream at the end of each run of removed sublayers to the teacher's length.

    Formula: x -> a x, a = mean over tokens of |h| / mean over tokens of |x|, h the teacher's stream at that place
    Cost: one forward pass of the teacher and one of the student; at inference a factor per run.
    Source: Prune&Comp (arXiv 2507.18212), its magnitude compensation. Deviations: the factor is applied at the cut and
    is not multiplied into all earlier weights; the student's own stream is measured; no search is repeated.
    """
    teacher = task.teacher_streams(train)
    ends = {run[-1] for run in removed_runs(execution_order(teacher.bench), task.plan)}

    def visit(view: SiteView) -> Change:
        if view.site not in ends or view.site in task.repair.patches:
            return None
        if not torch.equal(view.inputs, view.before):
            raise UsageError(f"scale cannot repair {view.site}: its norm is kept. Use mean, lowrank or fold.")
        factor = view.teacher_after.norm(dim=-1).mean() / view.after.norm(dim=-1).mean()
        return Patch(gain=(factor - 1)[None])

    return side_by_side(teacher, task.plan, task.repair, visit)
