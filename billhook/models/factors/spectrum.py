"""The best factors of a weight for what a text gives it, by the covariance of its outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

RIDGE = 1e-6  # of the mean square of an input: what the text does not say is ordered by the weight


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of the outputs y = W x of a linear map, without its bias, over a text.

    `energies` [directions]: the sum of squares of y along each, descending, in float64; `directions` [outputs,
    directions], orthonormal.
    """

    energies: torch.Tensor
    directions: torch.Tensor

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (up [outputs, rank], down [rank, inputs]); up · down is the best matrix of that rank on the text."""
        up = self.directions[:, :rank]
        return up, up.T @ weight

    def loss_changes(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return by how much the loss changes in first order without each direction, with its sign: [directions].

        weight, gradient of the loss by it: [outputs, inputs], float64. Without the direction u the weight lacks u uᵀ W,
        so that the loss changes by -⟨G, u uᵀ W⟩. In whitened coordinates W L = Σ σ u vᵀ that is -σ uᵀ (G L⁻ᵀ) v.
        """
        return -((self.directions.T @ gradient) * (self.directions.T @ weight)).sum(dim=1)


def spectrum(weight: torch.Tensor, gram: torch.Tensor) -> Spectrum:
    """Return the spectrum of the outputs of `weight` [outputs, inputs]; gram [inputs, inputs] = Σ x xᵀ; float64.

    The directions are eigenvectors of W G Wᵀ, which are the left singular vectors of W G^½: no matrix of rank r is
    nearer to W on the text than its projection on the first r (Eckart and Young 1936).
    """
    whitened = _whitened(weight, gram)
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    else:
        values, right = torch.linalg.eigh(whitened.T @ whitened)
        vectors = whitened @ right / values.clamp(min=1e-300).sqrt()
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1))


def output_energies(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the energies of `spectrum` alone, in a quarter of its time."""
    whitened = _whitened(weight, gram)
    smaller = whitened @ whitened.T if weight.shape[0] <= weight.shape[1] else whitened.T @ whitened
    values: torch.Tensor = torch.linalg.eigvalsh(smaller)
    return values.flip(0).clamp(min=0)


def _whitened(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return W L, L Lᵀ = gram with its ridge: [outputs, inputs]."""
    gram = gram.clone()
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    root: torch.Tensor = torch.linalg.cholesky(gram)
    return weight @ root


def lost_share(energies: torch.Tensor, rank: int) -> float:
    """Return the share of the energies beyond the first `rank`; 0 of an output that is always zero."""
    total = float(energies.sum())
    share = float(energies[rank:].sum()) / total if total else 0.0
    return share if math.isfinite(share) else 0.0
