"""Metrics of the experts of mixtures: which of them a model can lose with their rows of the router."""

from __future__ import annotations

import torch

from billhook.core.errors import UsageError, option
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues
from billhook.methods.metrics import group_metric


def _weighted_norm(gates: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    weighted: torch.Tensor = gates * outputs.norm(dim=-1)
    return weighted


@group_metric(experts=True)
def reap(probe: Probe) -> GroupValues:
    """Size of what an expert adds to the residual stream of a token that its router sends it.

    All neurons of an expert have its score. An expert that no calibration token meets has 0.

    Formula: mean over the tokens routed to an expert of g · ‖f(x)‖, f its output, g what the model multiplies it with
    Cost: one forward pass, in which the experts of each token compute twice.

    Source: Lasby et al. 2025, REAP (arXiv 2510.13999).
    """
    scores = probe.groups_of_experts(_weighted_norm)
    if not scores:
        raise UsageError(
            f"reap scores the experts of mixtures, and {probe.teacher.name} has none. Take a metric of channel groups, "
            f"such as {option('metric', 'flap')}."
        )
    return scores
