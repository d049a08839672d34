"""Recoveries that put a vector or a number in the place of removed sublayers."""

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


@recovery
def mean(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """The emulated update: the mean of what a removed sublayer adds in the unpruned model, in its place.

    Vectors between which nothing reads the stream are one: in the bias of the output projection before them, where it
    has one, or else where one of the sublayers was.

    Formula: b = mean over tokens of f(x), x and f as in the teacher; the stream goes on as x + b
    Cost: one forward pass of the teacher and one of the student; at inference a vector a run of removed sublayers, or
    nothing.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its emulated update.
    Deviation: its code for this is not public; means are over the tokens of all texts alike.
    """
    side = task.teacher_streams(train)
    constants: dict[Site, torch.Tensor] = {}
    biases: dict[Site, tuple[str, torch.Tensor]] = {}  # of output projections that stay, with their names

    def visit(stage: SiteView) -> Change:
        if stage.bias is not None and stage.weight is not None:
            biases[stage.site] = f"{stage.weight.removesuffix('weight')}bias", stage.bias
        if not stage.removed or stage.site in task.repair.patches:
            return None
        constants[stage.site] = (stage.teacher_after - stage.teacher_before).mean(0)
        return Patch(bias=constants[stage.site])

    repair = side_by_side(side, task.plan, task.repair, visit)
    patches, weights = dict(task.repair.patches), dict[str, torch.Tensor]()
    lasting = (getattr(task.teacher.model.config, "billhook", None) or {}).get("patches")  # of an earlier pruning
    stay = {site.block for site in execution_order(side.bench) if site not in task.plan.removed}
    for place in equivalent_places(side.bench, task.plan):
        mine = [site for site in place if site in constants]
        if lasting or len(mine) < sum(site in repair.patches for site in place):  # an earlier patch reads the stream
            patches |= {site: repair.patches[site] for site in mine}
            continue
        if not mine:
            continue
        total = torch.stack([constants[site] for site in mine]).sum(0)
        holder = next((biases[site] for site in place if site in biases), None)
        if holder is None:
            patches[min(mine, key=lambda site: (site.block not in stay, site))] = Patch(bias=total)
        else:
            weights[holder[0]] = holder[1] + total
    return replace(repair, patches=dict(sorted(patches.items()))).with_weights(weights)


@recovery
def compensate(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """A bias in every output projection of a narrower site, which gives back the mean of what its groups carried.

    From the front to the back, each on what the student before it makes of the text.

    Formula: b += mean over tokens of (f(h) - g(x)), f(h) what the site adds in the teacher, g(x) in the student
    Cost: one forward pass of the teacher and one of the student; at inference a vector a narrower site, and nothing
    where the output projection has a bias already.
    Source: An et al. 2024, FLAP (arXiv 2312.11983), its baseline bias compensation. Deviations: the student's own
    stream is measured, so that what earlier sites have changed is made up for too; a type without biases is carried
    by the checkpoint's modelling file.
    """
    side = task.teacher_streams(train)
    narrower = {narrow.site for narrow in task.plan.narrowed}
    if not narrower:
        raise UsageError("compensate gives narrower sites a bias, and the plan narrows none. Use mean, scale or fold.")

    def visit(stage: SiteView) -> Change:
        if stage.site not in narrower or stage.weight is None:
            return None
        return (stage.teacher_after - stage.teacher_before).mean(0) - (stage.after - stage.before).mean(0)

    return side_by_side(side, task.plan, task.repair, visit)


@recovery
def scale(task: RecoveryTask, train: TokenSet, valid: TokenSet) -> Repair:
    """One factor at the end of every run of removed sublayers, which gives the stream back its length.

    Formula: x -> a x, a = mean over tokens of |h| / mean over tokens of |x|, h the teacher's stream at that place
    Cost: one forward pass of the teacher and one of the student; at inference a factor a run.
    Source: Prune&Comp (arXiv 2507.18212), its magnitude compensation. Deviations: the factor stands at the cut and is
    not multiplied into all earlier weights; the student's own stream is measured; no search is repeated.
    """
    side = task.teacher_streams(train)
    ends = {run[-1] for run in removed_runs(execution_order(side.bench), task.plan)}

    def visit(stage: SiteView) -> Change:
        if stage.site not in ends or stage.site in task.repair.patches:
            return None
        if not torch.equal(stage.inputs, stage.before):
            raise UsageError(f"scale cannot stand at {stage.site}: a norm stays there. Use mean, lowrank or fold.")
        factor = stage.teacher_after.norm(dim=-1).mean() / stage.after.norm(dim=-1).mean()
        return Patch(gain=(factor - 1)[None])

    return side_by_side(side, task.plan, task.repair, visit)
