"""Metrics that remove one site or block at a time and measure a loss for each, cached like those of a search."""

from __future__ import annotations

from billhook.core.plan import Plan
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Loss, Score, paired_gap
from billhook.core.statistics import exp_capped
from billhook.engine.probe import Probe
from billhook.methods.metrics import metric, require_task


def leave_one_out(probe: Probe) -> tuple[Loss, dict[ScoredUnit, Loss]]:
    """Return the teacher's loss, and the loss without each site and each block."""
    present = probe.teacher.anatomy.sites_present()
    alone: dict[ScoredUnit, Plan] = {site: Plan(frozenset([site])) for site in present}
    for block in sorted({site.block for site in present}):
        alone[block] = Plan(frozenset(site for site in present if site.block == block))
    teacher, *losses = probe.losses([Plan(), *alone.values()])
    return teacher, dict(zip(alone, losses, strict=True))


def _rises(probe: Probe) -> dict[ScoredUnit, Score]:
    """Return the rise of the loss without each unit, with its standard error over documents."""
    teacher, without = leave_one_out(probe)
    return {unit: Score(*paired_gap(loss, teacher)) for unit, loss in without.items()}


@metric
def loo_nll(probe: Probe) -> dict[ScoredUnit, Score]:
    """Rise of the negative log-likelihood without the site or block, in nats per token.

    Formula: NLL(without) - NLL(teacher).
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), whose code
    calls it a Shapley value. Deviation: the rise over the teacher's loss, with its standard error over documents.
    """
    return _rises(probe.with_objective("nll"))


@metric
def loo_ppl(probe: Probe) -> dict[ScoredUnit, Score]:
    """Perplexity without the site or block; not in nats.

    Formula: exp(NLL(without)); its standard error is that of the rise over the teacher's, by the delta method.
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834).
    """
    teacher, without = leave_one_out(probe.with_objective("nll"))
    scores: dict[ScoredUnit, Score] = {}
    for unit, loss in without.items():
        value, error = exp_capped(loss.mean), paired_gap(loss, teacher)[1]
        scores[unit] = Score(value, None if error is None else value * error)
    return scores


@metric
def loo_kl(probe: Probe) -> dict[ScoredUnit, Score]:
    """KL(teacher || student) without the site or block, in nats per token.

    Formula: mean over tokens of KL(p || q), p the teacher, q the student.
    Cost: a loss for each site and block, about half a forward pass each.
    Source: the objective of Sieberling et al. 2024, EvoPress (arXiv 2410.14649), for single removals.
    """
    return _rises(probe.with_objective("kl"))


@metric
def loo_js(probe: Probe) -> dict[ScoredUnit, Score]:
    """Jensen-Shannon divergence from the teacher without the site or block, in nats per token.

    Formula: mean over tokens of (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2.
    Cost: a loss for each site and block, about half a forward pass each.
    Source: the objective of Zhang et al. 2024, FinerCut (arXiv 2405.18218), in its one-shot ablation.
    """
    return _rises(probe.with_objective("js"))


@metric
def loo_logits(probe: Probe) -> dict[ScoredUnit, Score]:
    """Mean over tokens of the L2 distance of the logits without the site or block from the teacher's.

    Formula: mean over tokens of ||z_p - z_q||_2.
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), the logit
    influence that its code computes by leaving one out.
    """
    return _rises(probe.with_objective("norm"))


@metric
def loo_task(probe: Probe) -> dict[ScoredUnit, Score]:
    """Rise of the loss of a multiple-choice task without the site or block; needs --loss task:FILE.

    In nats per item with task:FILE, in shares of the items with task_error:FILE.

    Formula: L(without) - L(teacher).
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), adaptive metrics.
    """
    return _rises(require_task(probe))
