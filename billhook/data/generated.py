"""Text that a model generates as its own calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from billhook.core.errors import DataError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.data.token_sets import special_prefix
from billhook.models.device import seeded

MOST_AT_A_TIME = 64  # texts


@torch.inference_mode()
def sample_texts(
    model: Any, tokenizer: Any, tokens: int, seed: int, *, length: int, watch: EventListener = ignore_events
) -> list[str]:
    """Sample texts of at most `length` tokens, at least `tokens` in all, after what precedes a text.

    Temperature 1, seeded, at most 64 texts at a time. Raises DataError if the tokenizer puts nothing before a
    text and has no BOS or EOS token, or if the model stops at once.

    Source: Williams et al. 2024, Self-calibration for language model quantization and pruning (arXiv 2410.17170).
    """
    own = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    first = special_prefix(tokenizer) or ([] if own is None else [own])
    if not first:
        raise DataError(
            f"The tokenizer has neither a BOS nor an EOS token to start from. Give {option('data')} a file instead."
        )
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    batch = min(-(-tokens // length), MOST_AT_A_TIME)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first[0]
    stop = None if model.generation_config is None else model.generation_config.eos_token_id
    plain = transformers.GenerationConfig(
        max_new_tokens=length - len(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, bos_token_id=own,
        eos_token_id=tokenizer.eos_token_id if stop is None else stop, pad_token_id=pad,
        remove_invalid_values=True,  # a model that overflows is refused where the block can be named
    )  # fmt: skip
    texts: list[str] = []
    written, rounds, most = 0, 0, 8 + 8 * tokens // (batch * length)
    with seeded(seed, model.device):
        while written < tokens:
            if rounds == most:
                raise DataError(
                    f"The model wrote only {written:,} tokens in {rounds} rounds of {batch} texts, and {tokens:,} are "
                    f"wanted: it stops at once. Give {option('data')} a file instead."
                )
            rounds += 1
            starts = torch.tensor([first] * batch, device=model.device)
            with _generating_by(model, plain):
                rows = model.generate(starts, attention_mask=torch.ones_like(starts))
            new = [text for text in tokenizer.batch_decode(rows, skip_special_tokens=True) if text.strip()]
            texts += new
            written += sum(map(len, tokenizer(new, add_special_tokens=False)["input_ids"])) if new else 0
            watch(Event("calibrate", min(written, tokens), tokens, {"step": "generate"}))
    return texts


@contextmanager
def _generating_by(model: Any, plain: transformers.GenerationConfig) -> Iterator[None]:
    """Inside, the model generates by `plain`: the checkpoint's penalties and cuts are meant for answers."""
    original, model.generation_config = model.generation_config, plain
    try:
        yield
    finally:
        model.generation_config = original
