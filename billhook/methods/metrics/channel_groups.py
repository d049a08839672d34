"""Metrics of channel groups: which key-value groups and neurons a model can lose."""

from __future__ import annotations

import torch

from billhook.core.errors import UnknownName, UsageError, option
from billhook.data.splits import select_documents
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues, Inputs, standardised
from billhook.methods.metrics import group_metric

BATCHES = 8  # parts of the calibration text, between which importance varies


@group_metric
def group_magnitude(probe: Probe, *, p: int = 2) -> GroupValues:
    """Size of the weights of a group.

    Formula: (Σ |w|^p)^(1/p) over all weights of the group, in every matrix that has some
    Cost: none but reading the weights.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), its magnitude baseline, `p` 1 or 2.
    """
    if p < 1:
        raise UsageError(f"group_magnitude takes p=1, p=2 or more, not {p}. Type {option('set', {'p': 2})}.")
    return {site: values ** (1 / p) for site, values in probe.groups_of_weights(lambda w: w.abs() ** p).items()}


def _first(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    return g * w


def _element1(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    return (g * w).abs()


def _element2(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    assert f is not None
    return (f * w * w / 2).abs()


def _mix(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    assert f is not None
    return (g * w - f * w * w / 2).abs()


@group_metric
def taylor_vector(probe: Probe) -> GroupValues:
    """Change of the loss, to first order, if each row or column of a group were zero.

    Formula: Σ over the rows (of inputs) and columns (of outputs) of the group of |Σ over their weights of g w|
    Cost: about three forward passes.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), `vectorize`.
    """
    return probe.groups_of_gradients({"vector": (_first, True)})["vector"]


@group_metric
def taylor_element1(probe: Probe) -> GroupValues:
    """Change of the loss, to first order, weight by weight.

    Formula: Σ over the weights of the group of |g w|
    Cost: about three forward passes.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), `param_first`.
    """
    return probe.groups_of_gradients({"element": (_element1, False)})["element"]


@group_metric
def taylor_element2(probe: Probe) -> GroupValues:
    """The second-order term alone, weight by weight, with the Fisher diagonal for the Hessian's.

    Formula: Σ over the weights of the group of f w² / 2, f = mean over rows of (gradient of the row's own mean loss)²
    Cost: about three forward passes, row by row.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), `param_second`.
    """
    return probe.groups_of_gradients({"element": (_element2, False)}, fisher=True)["element"]


@group_metric
def taylor_mix(probe: Probe) -> GroupValues:
    """Both terms of the series, weight by weight.

    Formula: Σ over the weights of the group of |g w - f w² / 2|
    Cost: about three forward passes, row by row.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), `param_mix`; f is a mean where its paper has a sum.
    """
    return probe.groups_of_gradients({"element": (_mix, False)}, fisher=True)["element"]


@group_metric
def wanda_sp(probe: Probe) -> GroupValues:
    """Size of the output projection's weights times the size of its inputs, channel by channel.

    Formula: mean over a group's channels c of (mean over outputs of |W_oc|) · ‖x_c‖, ‖x_c‖² = Σ over tokens of x_c²
    Cost: one forward pass.

    Source: An et al. 2024, FLAP (arXiv 2312.11983), its structured form of Sun et al. 2023, Wanda (arXiv 2306.11695).
    """
    return probe.groups_of_inputs(_wifn)


def _wifv(x: Inputs, w: torch.Tensor) -> torch.Tensor:
    return x.variance * w.square().sum(0)


def _ifv(x: Inputs, w: torch.Tensor) -> torch.Tensor:
    return x.variance


def _wifn(x: Inputs, w: torch.Tensor) -> torch.Tensor:
    return w.abs().mean(0) * (x.square * x.tokens).sqrt()


FLAP = {"wifv": _wifv, "ifv": _ifv, "wifn": _wifn}


@group_metric
def flap(probe: Probe, *, kind: str = "wifv", standardise: bool = True) -> GroupValues:
    """Variance of a channel's activation across tokens, weighted by its output weights.

    A channel that hardly varies can be replaced by a bias. `kind`: wifv, ifv (variance alone) or wifn (magnitudes);
    `standardise=False`: the plain scores.

    Formula: mean over a group's channels c of Var(x_c) ‖W_:c‖², then less the mean and divided by the deviation of the
    site's groups
    Cost: one forward pass.

    Source: An et al. 2024, FLAP (arXiv 2312.11983). Deviation: the variance over all tokens at once, not a running one.
    """
    if kind not in FLAP:
        raise UnknownName("kind of flap", kind, FLAP)
    scores = probe.groups_of_inputs(FLAP[kind])
    return standardised(scores) if standardise else scores


@group_metric
def activation(probe: Probe, *, p: int = 1) -> GroupValues:
    """Size of a group's activations, which the output projection reads.

    `p`: 1 or 2, the norm over tokens.

    Formula: mean over a group's channels of (mean over tokens of |x_c|^p)^(1/p)
    Cost: one forward pass.

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679), neurons and heads; Sandri et al. 2025, 2SSP (arXiv
    2501.17771), neurons, with p=2. Deviations: a head counts by the mean over its channels, not by its norm per token;
    the norm is over all tokens, where 2SSP has the mean of its samples' norms.
    """
    if p not in (1, 2):
        raise UsageError(f"activation takes p=1 or p=2, not {p}. Type {option('set', {'p': 2})}.")
    return probe.groups_of_inputs(lambda x, w: x.absolute if p == 1 else x.square.sqrt())


@group_metric
def saap(
    probe: Probe, *, stability: float = 0.5, batches: int = BATCHES, fusion: str = "kendall", within: bool = True
) -> GroupValues:
    """SAAP: coarse and fine importance fused under homoscedastic uncertainty; unstable groups are removed first.

    A reconstruction: the paper has no public code. Its text says that vector-wise and element-wise Taylor scores are
    fused by the multi-task construction of Kendall et al. 2018, and that unstable structures are pruned; it does not
    say how stability is measured. Here, σ² of each branch is its mean score. This minimises Σ I/(2σ²) + G log σ, so
    that the fused score does not depend on the scale of either branch. Fluctuation is the coefficient of variation of
    a group's fused score over `batches` parts of the text; a group with no importance gets the largest of its site.
    Both are standardised within each site (`within=False`: over all sites of a kind). `stability=0` is plain fusion.
    `fusion`: kendall, vector or element.

    Formula: z(I_v/(2σ_v²) + I_e/(2σ_e²)) - stability · z(sd_b(I_b) / mean_b(I_b)), I_v of `taylor_vector`, I_e of
    `taylor_mix`
    Cost: about three forward passes over the text, and three more in parts.

    Source: Zheng et al. 2024, SAAP (arXiv 2412.15127); Kendall, Gal and Cipolla 2018 (arXiv 1705.07115).
    """
    if fusion not in ("kendall", "vector", "element"):
        raise UnknownName("fusion of saap", fusion, ("kendall", "vector", "element"))
    documents = len(probe.tokens.clusters)
    if batches < 2 or documents < batches:
        raise UsageError(
            f"saap compares {batches} mini-batches, and there are {documents} documents. Give more {option('tokens')}."
        )
    fused = fuse(_taylor(probe), fusion)
    scores = standardised(fused, within=within)
    if not stability:
        return scores
    parts = [select_documents(probe.tokens, range(part, documents, batches)) for part in range(batches)]
    by_part = [fuse(_taylor(probe.with_objective(probe.loss, part)), fusion) for part in parts]
    fluctuation: GroupValues = {}
    for site in fused:
        values = torch.stack([part[site] for part in by_part])
        variation = values.std(0) / values.mean(0)
        dead = variation.isnan()  # no importance in any part
        fluctuation[site] = variation.masked_fill(dead, float(variation[~dead].max()) if (~dead).any() else 0.0)
    instability = standardised(fluctuation, within=within)
    return {site: scores[site] - stability * instability[site] for site in scores}


def _taylor(probe: Probe) -> dict[str, GroupValues]:
    return probe.groups_of_gradients({"vector": (_first, True), "element": (_mix, False)}, fisher=True)


def fuse(branches: dict[str, GroupValues], fusion: str) -> GroupValues:
    """Return the sum of the branches, each divided by twice its mean over all groups; or one of them."""
    fused: GroupValues = {}
    for values in (values for name, values in branches.items() if fusion in ("kendall", name)):
        mean = torch.cat(list(values.values())).mean().clamp(min=1e-300)
        for site, scores in values.items():
            fused[site] = fused.get(site, torch.zeros_like(scores)) + scores / (2 * mean)
    return fused
