"""A metric of channel groups from activations, their gradients, and outliers, per parameter."""

from __future__ import annotations

import torch

from billhook.core.errors import UsageError, option
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues
from billhook.engine.statistics.gradient_pass import InputSlopes
from billhook.methods.metrics import group_metric

HEADS_AT_A_TIME = 1024  # of a site, all their weights in float64


@group_metric
def apt(probe: Probe, *, outliers: float = 1.0) -> GroupValues:
    """Size of a group's activations times the size of their gradients, plus its outliers, per parameter.

    The density of APT: one order over heads and neurons of all sites. A group of several heads has their sum. Both
    terms are divided by their means over all groups of the model, so that neither depends on the scale of the loss or
    of the text. `outliers`: weight of the kurtosis term; 0 leaves it out.

    Formula: (S / mean S + outliers · K / mean K) / parameters of the group; S = Σ over channels c of
    (Σ over tokens |h_c|) (Σ over tokens |dL/dh_c|), K = Σ over heads of √max(kurtosis, 0), the excess kurtosis of
    mean(h_c) W_oc over the channels c of a head and the outputs o; h the input of the output projection W
    Cost: about three forward passes.

    Source: Zhao et al. 2024, APT (arXiv 2401.12200). Deviations: the paper adds S and K as they are, which have no
    scale in common; its code takes one kurtosis over all heads of a site together; it has no grouped heads; it averages
    S over training steps, where one pass has all tokens; tokens are those that predict one; hidden dimensions are not
    groups.
    """
    if not outliers >= 0:
        raise UsageError(f"apt takes outliers=0 or more, not {outliers:g}. Type {option('set', {'outliers': 1.0})}.")
    found = probe.groups_of_slopes({"salience": salience, "outliers": outlier_size})
    sizes = {size.site: size.group.parameters for size in probe.teacher.anatomy.sites if size.group is not None}
    scales = {name: _mean(values) for name, values in found.items()}
    return {
        site: (values / scales["salience"] + outliers * found["outliers"][site] / scales["outliers"]) / sizes[site]
        for site, values in found["salience"].items()
    }


def salience(x: InputSlopes, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Return the products of the two sums over tokens, summed over the channels of each group."""
    return (x.absolute * x.slopes)[channels].sum((1, 2))


def outlier_size(x: InputSlopes, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Return the roots of the kurtosis, where it is above 0, summed over the heads of each group."""
    written = (x.mean * weight).T  # [inputs, outputs]
    heads = channels.flatten(0, 1).split(HEADS_AT_A_TIME)
    roots = [kurtosis(written[each].flatten(1)).clamp(min=0).sqrt() for each in heads]
    return torch.cat(roots).view(channels.shape[:2]).sum(1)


def kurtosis(values: torch.Tensor) -> torch.Tensor:
    """Return the excess kurtosis of each row of [rows, values]; 0 where all values of a row are equal."""
    centred = values - values.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    ratio = centred.pow(4).mean(1) / variance.square() - 3
    return ratio.masked_fill(variance.square() == 0, 0.0)


def _mean(values: GroupValues) -> float:
    """Return the mean over all groups, 1 where it is 0."""
    pieces = list(values.values())
    return float(torch.cat(pieces).mean()) or 1.0 if pieces else 1.0
