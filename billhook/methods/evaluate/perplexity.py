"""Perplexity on held-out text, document by document."""

from __future__ import annotations

from typing import Any

import torch

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import nll
from billhook.methods.evaluate import batches, evaluation
from billhook.models.device import to_float64


@evaluation
@torch.inference_mode()
def perplexity(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Return the negative log-likelihood of each document in nats; exp of the mean per token is the perplexity.

    Each row of `tokens` is read on its own from its first token, without a sliding window. Values depend on the row
    length: compare only those of the same token set.

    Source: Jelinek et al. 1977; the window rule is ours.
    """
    per_row = [0.0] * len(tokens.lengths)
    done = 0
    for batch in batches(tokens, model):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            per_row[row] = float(to_float64(nll(logits[i, :n], logits[i, :n], batch.targets[i, :n])).sum())
        done += sum(batch.lengths)
        watch(Event("evaluate", done, tokens.tokens, {"of": who}))
    return EvalResult("perplexity", tokens.hash, *_by_document(tokens, per_row), tokens.clusters)


def _by_document(tokens: TokenSet, per_row: list[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the sums and counts of predicted tokens per document, from the sums per row."""
    sums, counts = [0.0] * len(tokens.clusters), [0] * len(tokens.clusters)
    for document, value, length in zip(tokens.documents, per_row, tokens.lengths, strict=True):
        sums[document] += value
        counts[document] += length - 1
    return tuple(sums), tuple(counts)
