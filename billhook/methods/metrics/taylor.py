"""Metrics of gradients: one forward and one backward pass, with the gradients of one block in memory."""

from __future__ import annotations

import torch

from billhook.core.errors import UnknownName
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.methods.metrics import metric


def _element(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    return (g * w).abs().sum()


def _vector(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    return (g * w).sum(-1).abs().sum()


def _second(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
    assert f is not None
    return (g * w - f * w * w / 2).abs().sum()


KINDS = {"element": _element, "vector": _vector, "second": _second}


@metric
def taylor(probe: Probe, *, kind: str = "element") -> dict[ScoredUnit, Score]:
    """Change of the loss, by its Taylor series, if the weights of a site or block were zero.

    The loss is the mean negative log-likelihood of a predicted token, w a weight and g its gradient. Rows count by
    their predicted tokens in f (the diagonal of the Fisher matrix, for that of the Hessian). Biases and norms count as
    weights, one per output. On Llama-2-7B it ranks the first block lowest, which must not be removed: protect it.

    Formula: `element`: sum over weights of |g w|; `vector`: sum over the outputs of every matrix of |sum over its
    inputs of g w|; `second`: sum over weights of |g w - f w² / 2|, f = mean over rows of (gradient of the row's own
    mean loss)²
    Cost: about three forward passes: one forward, then block by block forward and backward.

    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), `element`, for blocks; Ma et al. 2023, LLM-Pruner
    (arXiv 2305.11627), `vector` and `second`. Deviations: of sites as well; LLM-Pruner scores heads and channels, takes
    the inputs of some matrices for the rows of `vector`, and its paper has a sum for the mean of its code in f.
    """
    if kind not in KINDS:
        raise UnknownName("kind of taylor", kind, KINDS)
    return probe.sum_over_gradients(KINDS[kind], fisher=kind == "second")
