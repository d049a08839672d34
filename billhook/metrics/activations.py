"""Metrics that see the residual stream before and after: one pass over the model, whatever its size."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - its usual name

from billhook.metrics import metric
from billhook.plan import Site
from billhook.probe import Probe
from billhook.records import Score


@metric
def cosine(probe: Probe) -> dict[Site | int, Score]:
    """Block influence: the mean over tokens of 1 - cos(x, y), x and y the residual stream before and after.

    Of every site and, by position, of every block. Range [0, 2]; 0: nothing is turned.

    Source: Men et al. 2024, ShortGPT (arXiv 2403.03853), for blocks; Siddiqui et al. 2024, A deeper look at depth
    pruning of LLMs (arXiv 2407.16286), for attention and MLP as well. Deviation: in parallel blocks each site is
    judged by what it alone adds to the block's input.
    """
    return probe.mean_over_tokens(lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1))
