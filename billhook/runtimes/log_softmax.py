"""Log-probabilities of the logits of any runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Return the natural logarithms of the probabilities of logits [time, vocabulary].

    Computed in float64, a row at a time, so that no second table of that size is made.
    """
    found = np.empty(logits.shape, np.float32)
    for i, row in enumerate(logits):
        shifted = row.astype(np.float64) - row.max()
        found[i] = shifted - np.log(np.exp(shifted).sum())
    return found
