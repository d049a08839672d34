"""Metrics that remove many sites at once, at random: what a site adds to coalitions of others."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from billhook.core.errors import UsageError, option
from billhook.core.plan import Plan, Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.methods.metrics import metric, require_task


@metric
def shapley_nll(probe: Probe, *, pairs: int = 8, players: str = "sites", seed: int = 0) -> dict[ScoredUnit, Score]:
    """Shapley values of the negative log-likelihood, in nats per token: they sum to the rise when everything goes.

    Otherwise as `shapley_kl`.

    Formula: mean over orders π of L(before s in π, and s) - L(before s in π), L of what is removed.
    Cost: 2 · pairs · n losses for n players, about half a forward pass each.
    Source: Shapley 1953; Mitchell et al. 2022 (arXiv 2104.12199), antithetic permutations. What
    Siddiqui et al. 2024 (arXiv 2407.16286) call so is `loo_nll` and `present_absent` here.
    """
    return _shapley(probe.with_objective("nll"), pairs, players, seed)


@metric
def shapley_kl(probe: Probe, *, pairs: int = 8, players: str = "sites", seed: int = 0) -> dict[ScoredUnit, Score]:
    """Shapley values of KL(teacher || student), in nats per token: they sum to the loss when everything goes.

    Monte Carlo over `pairs` of random orders of removal and their reverses (antithetic); the interval is over the
    pairs, not over documents. `players`: sites, or blocks. A block's value is the sum of its sites' where sites play.

    Formula: mean over orders π of L(before s in π, and s) - L(before s in π), L of what is removed.
    Cost: 2 · pairs · n losses for n players, about half a forward pass each.
    Source: Shapley 1953; Mitchell et al. 2022 (arXiv 2104.12199), antithetic permutations. The game is ours.
    """
    return _shapley(probe.with_objective("kl"), pairs, players, seed)


@metric
def shapley_task(probe: Probe, *, pairs: int = 8, players: str = "sites", seed: int = 0) -> dict[ScoredUnit, Score]:
    """Shapley values of the loss of a multiple-choice task; wants a loss task:FILE or task_error:FILE.

    Otherwise as `shapley_kl`.

    Formula: mean over orders π of L(before s in π, and s) - L(before s in π), L of what is removed.
    Cost: 2 · pairs · n losses for n players, about half a forward pass each.
    Source: Shapley 1953; Mitchell et al. 2022 (arXiv 2104.12199); for tasks Siddiqui et al. 2024
    (arXiv 2407.16286), by another estimator: `present_absent`.
    """
    return _shapley(require_task(probe), pairs, players, seed)


@metric
def present_absent(
    probe: Probe, *, draws: int = 64, keep: float = 0.5, players: str = "sites", seed: int = 0
) -> dict[ScoredUnit, Score]:
    """Mean loss of random sub-networks without the site minus that of those with it, under the probe's loss.

    `draws` sub-networks, each player kept with a probability of `keep`. Not a Shapley value: coalitions of about one
    size, and the noise of all other players in every value.

    Formula: mean of L over the draws without s - mean of L over the draws with s.
    Cost: `draws` losses.
    Deviation: every sub-network sees all tokens.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its random sub-networks:
    half kept for losses, nine tenths for tasks.
    """
    if not 0 < keep < 1:
        raise UsageError(f"keep={keep} is a share of the sites between 0 and 1.")
    units, draw = _players(probe, players), random.Random(seed)
    absent = [[draw.random() >= keep for _ in units] for _ in range(draws)]
    plans = [_union([u for u, gone in zip(units, row, strict=True) if gone]) for row in absent]
    means = [loss.mean for loss in probe.losses(plans)]
    found: dict[ScoredUnit, Score] = {}
    for i, unit in enumerate(units):
        without, held = ([m for m, row in zip(means, absent, strict=True) if row[i] is gone] for gone in (True, False))
        if min(len(without), len(held)) < 2:
            raise UsageError(
                f"{draws} draws leave too few with and without each player. Ask for more: "
                f"{option('set', {'draws': 64})}."
            )
        spread = statistics.variance(without) / len(without) + statistics.variance(held) / len(held)
        value = statistics.fmean(without) - statistics.fmean(held)
        found[_unit(unit, players)] = Score(value, math.sqrt(spread))
    return _with_blocks(found)


def _shapley(probe: Probe, pairs: int, players: str, seed: int) -> dict[ScoredUnit, Score]:
    if pairs < 2:
        raise UsageError(f"pairs={pairs} gives no interval. Ask for at least 2 pairs of orders.")
    units, draw = _players(probe, players), random.Random(seed)
    orders: list[list[tuple[Site, ...]]] = []
    for _ in range(pairs):
        order = draw.sample(units, len(units))
        orders += [order, order[::-1]]
    chains = [[_union(order[:n]) for n in range(len(order) + 1)] for order in orders]
    plans = list(dict.fromkeys(plan for chain in chains for plan in chain))
    means = {plan: loss.mean for plan, loss in zip(plans, probe.losses(plans), strict=True)}
    rises: dict[tuple[Site, ...], list[float]] = {unit: [] for unit in units}
    for order, chain in zip(orders, chains, strict=True):
        for unit, before, after in zip(order, chain, chain[1:], strict=False):
            rises[unit].append(means[after] - means[before])
    values: dict[ScoredUnit, list[float]] = {
        _unit(player, players): [statistics.fmean(both) for both in zip(each[::2], each[1::2], strict=True)]
        for player, each in rises.items()
    }
    blocks: dict[int, list[list[float]]] = {}
    for one, each in values.items():
        if isinstance(one, Site):
            blocks.setdefault(one.block, []).append(each)
    together = {block: [math.fsum(pair) for pair in zip(*each, strict=True)] for block, each in blocks.items()}
    return {unit: _mean(each) for unit, each in (values | together).items()}


def _mean(values: Sequence[float]) -> Score:
    return Score(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def _players(probe: Probe, kind: str) -> list[tuple[Site, ...]]:
    alive = probe.teacher.anatomy.sites_present()
    if kind == "sites":
        return [(site,) for site in alive]
    if kind == "blocks":
        return [tuple(s for s in alive if s.block == block) for block in sorted({s.block for s in alive})]
    raise UsageError(f"players={kind!r} is neither sites nor blocks.")


def _unit(player: tuple[Site, ...], kind: str) -> Site | int:
    return player[0] if kind == "sites" else player[0].block


def _union(players: Sequence[tuple[Site, ...]]) -> Plan:
    return Plan(frozenset(site for player in players for site in player))


def _with_blocks(scores: dict[ScoredUnit, Score]) -> dict[ScoredUnit, Score]:
    """Blocks as the sums of their sites, where sites were scored."""
    sums: dict[int, list[Score]] = {}
    for unit, score in scores.items():
        if isinstance(unit, Site):
            sums.setdefault(unit.block, []).append(score)
    blocks = {
        block: Score(math.fsum(s.value for s in each), math.sqrt(math.fsum((s.se or 0.0) ** 2 for s in each)))
        for block, each in sums.items()
    }
    return scores | blocks
