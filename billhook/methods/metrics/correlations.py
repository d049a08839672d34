"""A metric of how far a matrix can do what a sublayer does: canonical correlations of its streams."""

from __future__ import annotations

import torch

from billhook.core.errors import UsageError, option
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.engine.statistics.activation_passes import Covariances
from billhook.methods.metrics import metric


@metric
def cca(probe: Probe, *, ridge: float = 0.01) -> dict[ScoredUnit, Score]:
    """Bound on the error of the best matrix in the place of a site: a sum over canonical correlations.

    The correlations are those of x and y, the residual stream before and after the site. A site that is linear in the
    stream has 0, however much it adds: rank with it where `linear` puts a matrix in its place. The sum bounds the
    squared error of the best matrix, as a share of the variance of y. `ridge`: noise that x and y have in common, as a
    share of the variance of each channel of x; 0 takes none, and needs more tokens than the stream has channels.

    Formula: Σ_i (1 - ρ_i²), ρ_i the singular values of C_yy^(-1/2) C_yx C_xx^(-1/2), each C with ridge · diag(C_xx)
    Cost: one forward pass; three products and two factors of matrices of width by width for each site and block.
    Source: Erdogan et al. 2025, NBL (arXiv 2505.21077); as in its code, x is the stream before the norm and y holds the
    residual connection. Deviations: MLPs and blocks as well; the ridge, which lets few tokens tell sites apart.
    """
    if not ridge >= 0:
        raise UsageError(f"cca takes a ridge of 0 or more, not {ridge:g}. Type {option('set', {'ridge': 0.01})}.")
    return probe.over_covariances(lambda c: linearisation_bound(c, ridge))


def linearisation_bound(c: Covariances, ridge: float) -> float:
    """Return Σ (1 - ρ²) of covariances with a share `ridge` of the diagonal of xx added to all three.

    Raises UsageError where a matrix is singular.
    """
    noise = torch.diag(ridge * c.xx.diagonal())
    least = 1e-12 * torch.diag(c.xx.diagonal().mean().expand(len(c.xx)))  # of channels that are always the same
    noise = noise.maximum(least) if ridge else noise
    factors = [torch.linalg.cholesky_ex(each + noise) for each in (c.xx, c.yy)]
    if any(int(failed) for _, failed in factors):
        raise UsageError(
            "cca finds streams of fewer directions than channels. Give more "
            f"{option('tokens')}, or {option('set', {'ridge': 0.01})}."
        )
    (x, _), (y, _) = factors
    half = torch.linalg.solve_triangular(x, c.xy + noise, upper=False)
    correlation = torch.linalg.solve_triangular(y, half.T, upper=False)
    return len(c.xx) - float(correlation.square().sum())
