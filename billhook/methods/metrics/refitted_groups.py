"""A metric of channel groups for prunings that are refitted: what the best refit of the others leaves."""

from __future__ import annotations

from functools import partial

import torch

from billhook.core.errors import UsageError, option
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues
from billhook.methods.metrics import group_metric

STEPS = 64  # in which all groups of a site go


@group_metric
def obs(probe: Probe, *, ridge: float = 0.01) -> GroupValues:
    """Error of a site's output after the other groups are refitted to it, group by group in the best order.

    The groups that can be replaced best by the others go first, in 64 steps; after each the output projection of
    what is left is the least-squares one. The score is the error that has come together when a group goes: it orders
    the groups of a site for a pruning that is followed by `fold`. `ridge`: a share of the diagonal of XᵀX.

    Formula: the sum, over the steps until the group goes, of tr(W_R ([H⁻¹]_RR)⁻¹ W_Rᵀ) per token; R the channels that
    go in a step, H = XᵀX + ridge · diag(XᵀX)
    Cost: one forward pass; for each site an inverse of a matrix as wide as its output projection, and as much again.

    Source: Kurtic et al. 2023, ZipLM (arXiv 2302.04089); Hassibi and Stork 1993, Optimal Brain Surgeon. Deviation: 64
    steps, of as many groups each, for one group a step.
    """
    if not ridge > 0:
        raise UsageError(f"obs takes a ridge above 0, not {ridge:g}. Type {option('set', {'ridge': 0.01})}.")

    return probe.groups_of_products(partial(removal_errors, ridge=ridge))


def removal_errors(gram: torch.Tensor, weight: torch.Tensor, channels: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return for each group the squared error of the output when it has gone, in the order in which groups go best.

    gram [inputs, inputs] of the inputs, weight [outputs, inputs], channels [groups, channels of each].
    """
    gram = gram.clone()
    least = 1e-12 * float(gram.diagonal().mean()) or 1.0  # of an input that is always zero
    gram.diagonal().mul_(1 + ridge).clamp_(min=least)
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(gram)), weight.clone()
    told = torch.zeros(len(channels), dtype=weight.dtype, device=weight.device)
    alive = torch.arange(len(channels), device=weight.device)
    size, total = -(-len(channels) // STEPS), 0.0
    while len(alive):
        blocks = inverse[channels[alive][:, :, None], channels[alive][:, None, :]]  # [alive, channels, channels]
        theirs = weight.T[channels[alive]]  # [alive, channels, outputs]
        alone = (theirs * torch.linalg.solve(blocks, theirs)).sum((1, 2))
        first = alone.argsort()[:size]
        gone = channels[alive[first]].flatten()
        sides = torch.cat((inverse[gone], weight[:, gone].T), 1)  # [gone, inputs + outputs]
        back, read = torch.linalg.solve(inverse[gone][:, gone], sides).split((len(inverse), len(weight)), 1)
        together = float((weight[:, gone].T * read).sum())
        shares = alone[first].cumsum(0) / alone[first].sum().clamp(min=1e-300)
        told[alive[first]] = total + together * shares
        total += together
        weight -= weight[:, gone] @ back
        inverse -= inverse[:, gone] @ back
        stays = torch.ones(len(alive), dtype=torch.bool, device=weight.device)
        stays[first] = False
        alive = alive[stays]
    return told
