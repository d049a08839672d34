"""A metric of channel groups from two grains: which neurons of a block, and how many of each block."""

from __future__ import annotations

import math
from collections.abc import Mapping

from billhook.core.errors import UsageError, option
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues
from billhook.methods.metrics import group_metric
from billhook.methods.metrics.activations import angular_distance


@group_metric
def cfsp(probe: Probe, *, coarse: float = 0.0) -> GroupValues:
    """Range of a group's weights in every matrix times the size of its activations.

    `coarse`: above 0, the score orders groups of different blocks by the share of its groups that each block keeps, in
    proportion to a sigmoid of its angular distance; within a site the order is that of the plain score. The paper's
    code has 13.1 here: 131,072 tokens, divided by 10,000.

    Formula: (Σ over matrices m of r_m / the largest r_m of the site) · ‖x_c‖, each a mean over the group's channels;
    r = max(w, 0) - min(w, 0) over the weights of a channel, ‖x_c‖² = Σ over tokens of x_c². With `coarse` a: minus
    the share of the site's groups above it, divided by k_b = σ(a (θ_b - mean θ)) / its mean over blocks, θ_b =
    arccos(cos(x, y)) / π of the streams x before and y after block b, a mean over tokens
    Cost: one forward pass; with `coarse` two.

    Source: Wang et al. 2024, CFSP (arXiv 2409.13199). Deviations: attention groups too; a block whose share would be
    more than the whole keeps all, and the others lose what it would, where its code draws all shares together.
    """
    if not coarse >= 0:
        raise UsageError(f"cfsp takes coarse=0 or more, not {coarse:g}. Type {option('set', {'coarse': 13.1})}.")
    sizes = probe.groups_of_inputs(lambda x, w: (x.square * x.tokens).sqrt())
    fine = {site: ranges * sizes[site] for site, ranges in probe.groups_of_ranges().items()}
    if not coarse:
        return fine
    distances = probe.mean_over_tokens({"angular_distance": angular_distance})["angular_distance"]
    blocks = {unit: score.value for unit, score in distances.items() if isinstance(unit, int)}
    return shared_out(fine, block_shares(blocks, coarse))


def block_shares(distances: Mapping[int, float], sharpness: float) -> dict[int, float]:
    """Return what each block keeps in proportion to the mean block: a sigmoid of its distance to the mean distance."""
    mean = math.fsum(distances.values()) / len(distances)
    kept = {block: 1 / (1 + math.exp(-sharpness * (distance - mean))) for block, distance in distances.items()}
    average = math.fsum(kept.values()) / len(kept)
    return {block: share / average for block, share in kept.items()}


def shared_out(fine: GroupValues, shares: Mapping[int, float]) -> GroupValues:
    """Return scores whose one order over all sites keeps groups of each block in proportion to `shares`."""
    coarse: GroupValues = {}
    for site, values in fine.items():
        rank = values.argsort(stable=True).argsort().double()
        coarse[site] = (rank + 0.5 - len(values)) / (len(values) * shares[site.block])
    return coarse
