"""Recoveries that put a vector or a number in the place of removed sublayers."""

from __future__ import annotations

import torch

from billhook.data import TokenSet
from billhook.errors import UsageError
from billhook.probe.pair import Change, Stage, order, runs, side_by_side
from billhook.recover import Subject, recovery
from billhook.repair import Patch, Repair


@recovery
def mean(subject: Subject, train: TokenSet, valid: TokenSet) -> Repair:
    """The emulated update: the mean of what a removed sublayer adds in the unpruned model, in its place.

    Formula: b = mean over tokens of f(x), x and f as in the teacher; the stream goes on as x + b
    Cost: one forward pass of the teacher and one of the student; at inference a vector a removed sublayer.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its emulated update.
    Deviation: its code for this is not public; means are over the tokens of all texts alike.
    """

    def visit(stage: Stage) -> Change:
        if not stage.removed or stage.site in subject.repair.patches:
            return None
        return Patch(bias=(stage.teacher_after - stage.teacher_before).mean(0))

    return side_by_side(subject.bench(train), subject.plan, subject.repair, visit)


@recovery
def scale(subject: Subject, train: TokenSet, valid: TokenSet) -> Repair:
    """One factor at the end of every run of removed sublayers, which gives the stream back its length.

    Formula: x -> a x, a = mean over tokens of |h| / mean over tokens of |x|, h the teacher's stream at that place
    Cost: one forward pass of the teacher and one of the student; at inference a factor a run.
    Source: Prune&Comp (arXiv 2507.18212), its magnitude compensation. Deviations: the factor stands at the cut and is
    not multiplied into all earlier weights; the student's own stream is measured; no search is repeated.
    """
    bench = subject.bench(train)
    ends = {run[-1] for run in runs(order(bench), subject.plan)}

    def visit(stage: Stage) -> Change:
        if stage.site not in ends or stage.site in subject.repair.patches:
            return None
        if not torch.equal(stage.inputs, stage.before):
            raise UsageError(f"scale cannot stand at {stage.site}: a norm stays there. Use mean, lowrank or fold.")
        factor = stage.teacher_after.norm(dim=-1).mean() / stage.after.norm(dim=-1).mean()
        return Patch(gain=(factor - 1)[None])

    return side_by_side(bench, subject.plan, subject.repair, visit)
