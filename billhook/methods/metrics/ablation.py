"""Metrics that remove one site or block at a time: a loss for each, by the measuring engine, kept like a search's."""

from __future__ import annotations

from billhook.core.plan import Plan
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Loss, Score, paired_gap
from billhook.core.statistics import exp_capped
from billhook.engine.probe import Probe
from billhook.methods.metrics import metric, require_task


def leave_one_out(probe: Probe) -> tuple[Loss, dict[ScoredUnit, Loss]]:
    """The loss of the dense model, and of the model without each site and each block."""
    anatomy = probe.teacher.anatomy
    alone: dict[ScoredUnit, Plan] = {site: Plan(frozenset([site])) for site in anatomy.sites_present()}
    for block in sorted({site.block for site in anatomy.sites_present()}):
        alone[block] = Plan(frozenset(site for site in anatomy.sites_present() if site.block == block))
    dense, *losses = probe.losses([Plan(), *alone.values()])
    return dense, dict(zip(alone, losses, strict=True))


def _rises(probe: Probe) -> dict[ScoredUnit, Score]:
    dense, without = leave_one_out(probe)
    return {unit: Score(*paired_gap(loss, dense)) for unit, loss in without.items()}


@metric
def loo_nll(probe: Probe) -> dict[ScoredUnit, Score]:
    """How much the negative log-likelihood rises without the site or block, in nats per token.

    Formula: NLL(without) - NLL(dense).
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), whose code
    calls it a Shapley value. Deviation: the rise over the dense model, with its standard error over documents.
    """
    return _rises(probe.with_objective("nll"))


@metric
def loo_ppl(probe: Probe) -> dict[ScoredUnit, Score]:
    """The perplexity without the site or block; not in nats: the lower, the less it matters.

    Formula: exp(NLL(without)); its standard error is that of the rise over the dense model, by the delta method.
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834).
    """
    dense, without = leave_one_out(probe.with_objective("nll"))
    scores: dict[ScoredUnit, Score] = {}
    for unit, loss in without.items():
        value, error = exp_capped(loss.mean), paired_gap(loss, dense)[1]
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
    """How much the loss of a multiple-choice task rises without the site or block; wants a loss task:FILE.

    With task:FILE in nats per item, with task_error:FILE in shares of the items.

    Formula: L(without) - L(dense).
    Cost: a loss for each site and block, about half a forward pass each.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), adaptive metrics.
    """
    return _rises(require_task(probe))
