"""Metrics of the weights alone, independent of the text."""

from __future__ import annotations

from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.methods.metrics import metric


@metric
def magnitude(probe: Probe) -> dict[ScoredUnit, Score]:
    """Sum of |w| over the weights of each site and block, norms and biases included.

    A norm that both sites of a block share counts for the block alone. Large sites score high because of their size.

    Formula: sum over weights of |w|
    Cost: none; the weights are read once.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), for blocks. Deviation: of sites as well.
    """
    return probe.sum_over_weights(lambda w: w.abs().sum())
