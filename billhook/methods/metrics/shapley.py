"""Metrics that remove random sets of sites: what a site adds to coalitions of others."""

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
    """Shapley values of the negative log-likelihood, in nats per token; they sum to its rise if all sites are removed.

    Options and units are those of `shapley_kl`.

    Formula: mean over orders π of L(before s in π, and s) - L(before s in π), L of what is removed.
    Cost: 2 · pairs · n losses for n players, about half a forward pass each.
    Source: Shapley 1953; Mitchell et al. 2022 (arXiv 2104.12199), antithetic permutations. What
    Siddiqui et al. 2024 (arXiv 2407.16286) call so is `loo_nll` and `present_absent` here.
    """
    return _shapley(probe.with_objective("nll"), pairs, players, seed)


@metric
def shapley_kl(probe: Probe, *, pairs: int = 8, players: str = "sites", seed: int = 0) -> dict[ScoredUnit, Score]:
    """Shapley values of KL(teacher || student), in nats per token; they sum to the loss if all sites are removed.

    Monte Carlo over `pairs` of random orders of removal and their reverses (antithetic); the interval is over the
    pairs, not over documents. `players`: sites, or blocks. With sites, a block's value is the sum of its sites'.

    Formula: mean over orders π of L(before s in π, and s) - L(before s in π), L of what is removed.
    Cost: 2 · pairs · n losses for n players, about half a forward pass each.
    Source: Shapley 1953; Mitchell et al. 2022 (arXiv 2104.12199), antithetic permutations. The game is ours.
    """
    return _shapley(probe.with_objective("kl"), pairs, players, seed)


@metric
def shapley_task(probe: Probe, *, pairs: int = 8, players: str = "sites", seed: int = 0) -> dict[ScoredUnit, Score]:
    """Shapley values of the loss of a multiple-choice task; needs --loss task:FILE or task_error:FILE.

    Options and units are those of `shapley_kl`.

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

    `draws` sub-networks, each player kept with a probability of `keep`. Not a Shapley value: the coalitions have about
    one size, and each value has the noise of all other players.

    Formula: mean of L over the draws without s - mean of L over the draws with s.
    Cost: `draws` losses.
    Deviation: every sub-network sees all tokens.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its random sub-networks:
    half kept for losses, nine tenths for tasks.
    """
    if not 0 < keep < 1:
        raise UsageError(
            f"keep={keep} is not a share of the sites between 0 and 1. Type {option('set', {'keep': 0.5})}."
        )
    units, draw = _players(probe, players), random.Random(seed)
    absent = [[draw.random() >= keep for _ in units] for _ in range(draws)]
    plans = [_union([u for u, removed in zip(units, row, strict=True) if removed]) for row in absent]
    means = [loss.mean for loss in probe.losses(plans)]
    scores: dict[ScoredUnit, Score] = {}
    for i, unit in enumerate(units):
        without, kept = ([m for m, row in zip(means, absent, strict=True) if row[i] is out] for out in (True, False))
        if min(len(without), len(kept)) < 2:
            raise UsageError(
                f"{draws} draws leave too few with and without each player. Ask for more: "
                f"{option('set', {'draws': 64})}."
            )
        variance = statistics.variance(without) / len(without) + statistics.variance(kept) / len(kept)
        value = statistics.fmean(without) - statistics.fmean(kept)
        scores[_unit(unit, players)] = Score(value, math.sqrt(variance))
    return _with_blocks(scores)


def _shapley(probe: Probe, pairs: int, players: str, seed: int) -> dict[ScoredUnit, Score]:
    """Return the mean rise of the loss by each player over `pairs` of random orders and their reverses."""
    if pairs < 2:
        raise UsageError(
            f"pairs={pairs} gives no interval. Ask for at least 2 pairs of orders: {option('set', {'pairs': 8})}."
        )
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
        for player, before, after in zip(order, chain, chain[1:], strict=False):
            rises[player].append(means[after] - means[before])
    values: dict[ScoredUnit, list[float]] = {
        _unit(player, players): [statistics.fmean(pair) for pair in zip(rise[::2], rise[1::2], strict=True)]
        for player, rise in rises.items()
    }
    blocks: dict[int, list[list[float]]] = {}
    for unit, by_pair in values.items():
        if isinstance(unit, Site):
            blocks.setdefault(unit.block, []).append(by_pair)
    sums = {block: [math.fsum(pair) for pair in zip(*sites, strict=True)] for block, sites in blocks.items()}
    return {unit: _mean(by_pair) for unit, by_pair in (values | sums).items()}


def _mean(values: Sequence[float]) -> Score:
    return Score(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def _players(probe: Probe, kind: str) -> list[tuple[Site, ...]]:
    """Return the sites of each player."""
    present = probe.teacher.anatomy.sites_present()
    if kind == "sites":
        return [(site,) for site in present]
    if kind == "blocks":
        return [tuple(s for s in present if s.block == block) for block in sorted({s.block for s in present})]
    raise UsageError(f"players={kind!r} is neither sites nor blocks. Write one of them.")


def _unit(player: tuple[Site, ...], kind: str) -> Site | int:
    return player[0] if kind == "sites" else player[0].block


def _union(players: Sequence[tuple[Site, ...]]) -> Plan:
    return Plan(frozenset(site for player in players for site in player))


def _with_blocks(scores: dict[ScoredUnit, Score]) -> dict[ScoredUnit, Score]:
    """Return the scores with those of blocks, the sums over their sites, where sites were scored."""
    by_block: dict[int, list[Score]] = {}
    for unit, score in scores.items():
        if isinstance(unit, Site):
            by_block.setdefault(unit.block, []).append(score)
    blocks = {
        block: Score(math.fsum(s.value for s in sites), math.sqrt(math.fsum((s.se or 0.0) ** 2 for s in sites)))
        for block, sites in by_block.items()
    }
    return scores | blocks
