"""Fixed windows for the perplexity of papers, and perplexity per byte and word, which compares across tokenizers."""

from __future__ import annotations

import math
from typing import Any

from billhook.core.errors import DataError, UnknownName, UsageError, option
from billhook.core.statistics import exp_capped
from billhook.data.rows import WHOLE
from billhook.data.texts import read_source
from billhook.data.token_sets import TokenSet, token_set

# Tokens per window. gptq: Frantar et al. 2022 (arXiv 2210.17323), then SparseGPT, Wanda, SliceGPT and most others;
# shortened-llama: Kim et al. 2024 (arXiv 2402.02834).
PROTOCOLS = {"gptq": 2048, "shortened-llama": 128}


def fixed_windows(source: str, protocol: str, field: str, tokenizer: Any, config: Any) -> TokenSet:
    """Cut a whole text into windows: its texts joined by two line ends, tokenised at once, without a last partial one.

    Each window is a row; all belong to one text. Raises DataError for less than two windows and for a text that is too
    large to be read whole, UnknownName, and UsageError if the model has too few positions.
    """
    if protocol not in PROTOCOLS:
        raise UnknownName("protocol of perplexity", protocol, PROTOCOLS)
    length = PROTOCOLS[protocol]
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise UsageError(
            f"The protocol {protocol} needs {length:,} positions, and this model has {most:,}. Leave "
            f"{option('protocol')} out."
        )
    read = read_source(source, field, tokenizer)
    if not read.whole:
        raise DataError(
            f"The protocol {protocol} reads all of a text, and {source} holds more than {WHOLE >> 20} MB. Give a part "
            "of it: head -n 10000"
        )
    ids = tokenizer("\n\n".join(read.texts), verbose=False)["input_ids"]
    count = len(ids) // length
    if count < 2:
        raise DataError(f"{source} holds {len(ids):,} tokens, less than two windows of {length:,}. Give more text.")
    rows = [tuple(ids[i * length : (i + 1) * length]) for i in range(count)]
    return token_set(rows, range(count), [0] * count, [f"window {i}" for i in range(count)], source)


def per_byte_and_word(tokens: TokenSet, tokenizer: Any, nats: float) -> tuple[float, float]:
    """Return bits per byte and perplexity per word, from the `nats` of all tokens except the first of each row.

    They compare models of different tokenizers on the same text. Blanks separate words.
    """
    rows = [tokens.rows[r, 1:n].tolist() for r, n in enumerate(tokens.lengths)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    return nats / math.log(2) / max(1, size), exp_capped(nats / max(1, words))
