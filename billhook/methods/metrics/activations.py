"""Metrics of the residual stream before and after each unit: one pass over the model, whatever its size."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from billhook.core.errors import UnknownName
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.engine.statistics.activation_passes import Statistic, require_finite_scores
from billhook.methods.metrics import metric


def _turn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(x, y, dim=-1)


def _change(x: torch.Tensor, y: torch.Tensor, p: int) -> torch.Tensor:
    change: torch.Tensor = (y - x).norm(p, dim=-1)
    return change


def _relative(x: torch.Tensor, y: torch.Tensor, p: int) -> torch.Tensor:
    change: torch.Tensor = (y - x).norm(p, dim=-1) / x.norm(p, dim=-1)
    return change


STATISTICS: dict[str, Statistic] = {  # of x and y [tokens, width], before and after; one pass computes all of them
    "cosine": _turn,
    "l1": partial(_change, p=1),
    "l2": partial(_change, p=2),
    "relative_l1": partial(_relative, p=1),
    "relative_l2": partial(_relative, p=2),
}


@metric
def cosine(probe: Probe) -> dict[ScoredUnit, Score]:
    """Block influence: the mean over tokens of 1 - cos(x, y), x and y the residual stream before and after.

    For each site and block. Range [0, 2]; 0: the direction does not change.

    Formula: mean over tokens of 1 - x·y / (||x||₂ ||y||₂)
    Cost: one forward pass, shared by cosine, l1, l2, relative_l1 and relative_l2.
    Source: Men et al. 2024, ShortGPT (arXiv 2403.03853), for blocks; Siddiqui et al. 2024, A deeper look at depth
    pruning of LLMs (arXiv 2407.16286), for attention and MLP as well. Deviation: in parallel blocks each site is
    scored by what it alone adds to the block's input.
    """
    return require_finite_scores(probe.mean_over_tokens(STATISTICS)["cosine"])


@metric
def l1(probe: Probe) -> dict[ScoredUnit, Score]:
    """Size of the update: the mean over tokens of ||y - x||₁, x and y the residual stream before and after.

    For each site and block. Streams grow with depth, so that late blocks rank high.

    Formula: mean over tokens of ||y - x||₁
    Cost: one forward pass, shared by cosine, l1, l2, relative_l1 and relative_l2.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286). Deviation: its code names
    this metric and does not compute it; the formula is inferred.
    """
    return require_finite_scores(probe.mean_over_tokens(STATISTICS)["l1"])


@metric
def l2(probe: Probe) -> dict[ScoredUnit, Score]:
    """Size of the update: the mean over tokens of ||y - x||₂, x and y the residual stream before and after.

    For each site and block. Streams grow with depth, so that late blocks rank high.

    Formula: mean over tokens of ||y - x||₂
    Cost: one forward pass, shared by cosine, l1, l2, relative_l1 and relative_l2.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286). Deviation: its code names
    this metric and does not compute it; the formula is inferred.
    """
    return require_finite_scores(probe.mean_over_tokens(STATISTICS)["l2"])


@metric
def relative_l1(probe: Probe) -> dict[ScoredUnit, Score]:
    """Relative size of the update: the mean over tokens of ||y - x||₁ / ||x||₁.

    x and y are the residual stream before and after every site and block.

    Formula: mean over tokens of ||y - x||₁ / ||x||₁
    Cost: one forward pass, shared by cosine, l1, l2, relative_l1 and relative_l2.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286). Deviation: its code names
    this metric and does not compute it; the formula, with x and not y below, is inferred.
    """
    return require_finite_scores(probe.mean_over_tokens(STATISTICS)["relative_l1"])


@metric
def relative_l2(probe: Probe) -> dict[ScoredUnit, Score]:
    """Relative size of the update: the mean over tokens of ||y - x||₂ / ||x||₂.

    x and y are the residual stream before and after every site and block.

    Formula: mean over tokens of ||y - x||₂ / ||x||₂
    Cost: one forward pass, shared by cosine, l1, l2, relative_l1 and relative_l2.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286). Deviation: its code names
    this metric and does not compute it; the formula, with x and not y below, is inferred.
    """
    return require_finite_scores(probe.mean_over_tokens(STATISTICS)["relative_l2"])


@metric
def sprint_local(probe: Probe) -> dict[ScoredUnit, Score]:
    """Relative error at the next MLP: the mean over tokens of ||g - f||₂ / ||f||₂ without the site, f with it.

    f is what the next MLP adds to the residual stream: that of the same block for an attention, a later one for an
    MLP, for a block, and for an attention whose MLP runs in parallel. After the last MLP, f is the residual stream
    after the last block. Nothing but the site or block itself is removed.

    Formula: mean over tokens of ||g - f||₂ / ||f||₂
    Cost: about three forward passes: every block on several streams, its weights touched once.
    Source: Park et al. 2025, SPRINT (arXiv 2506.03510). Deviations: not divided by the latency of the site, and no MLP
    is fitted anew before scoring; Euclidean norms of tokens, where its code has L1 norms of sentences; blocks as well;
    an MLP that adds nothing to any token is skipped.
    """
    return probe.mean_at_next_mlp(partial(_relative, p=2))


TOKENS = ("last", "all")


@metric
def angular_span(probe: Probe, *, tokens: str = "last") -> dict[ScoredUnit, Score]:
    """Angular distance, arccos(cos(x, y)) / π, between the residual stream before and after each span of blocks.

    Keys are (first, last) positions, for all lengths except that of the whole model. `tokens="last"`: the mean over
    the last token of each row; `all`: over all tokens, for which the streams between all blocks must fit into memory.

    Formula: mean over tokens of arccos(x·y / (||x||₂ ||y||₂)) / π
    Cost: one forward pass.
    Source: Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers (arXiv 2403.17887). Deviation: the
    angle is computed as 2 atan2(||u - v||, ||u + v||) of unit vectors, which is exact for small ones too.
    """
    if tokens not in TOKENS:
        raise UnknownName("choice of tokens", tokens, TOKENS)
    return probe.mean_over_spans(angular_distance, last=tokens == "last")


def angular_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return arccos(cos(x, y)) / π for each token: [tokens, width] twice -> [tokens]."""
    u, v = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return 2 / math.pi * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
