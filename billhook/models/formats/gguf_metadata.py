"""The keys of a GGUF file that say what the model is: sizes, norms, rope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from billhook.models.architectures import head_dim
from billhook.models.formats.gguf_rows import GgufRow, Key, rope_kinds, window_of
from billhook.models.formats.gguf_tensors import EMBEDDING, Contents

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def model_keys(config: Any, row: GgufRow, held: Contents) -> dict[str, Key]:
    """Return the keys of a model by their names after `ARCHITECTURE.`; a list has a number for every block."""
    size, ropes = head_dim(config), rope_kinds(config)
    epsilon = float(next(value for name in EPSILONS if (value := getattr(config, name, None)) is not None))
    keys: dict[str, Key] = {
        "block_count": len(held.heads),
        "context_length": context_length(config, row),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _one_or_list(held.widths),
        "attention.head_count": _one_or_list(held.heads),
        "attention.head_count_kv": _one_or_list(held.kv),
        "attention.key_length": size,
        "attention.value_length": size,
        f"attention.layer_norm_{'' if row.layer_norm else 'rms_'}epsilon": epsilon,
        "vocab_size": held.pieces[EMBEDDING].shape[0],
    }
    if ropes:
        keys["rope.dimension_count"] = int(size * ropes[0].get("partial_rotary_factor", 1.0))
        keys["rope.freq_base"] = float(ropes[0]["rope_theta"])
        keys |= _scaling_keys(ropes[0], config)
    return keys | row.keys(config)


def context_length(config: Any, row: GgufRow) -> int:
    """Return for how many tokens the file computes what the model does: within its window, where the type has none."""
    window = None if row.windows else window_of(config)
    return window or int(config.max_position_embeddings)


def _one_or_list(numbers: Sequence[int]) -> Key:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _scaling_keys(rope: dict[str, Any], config: Any) -> dict[str, Key]:
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    keys: dict[str, Key] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = original
        if rope.get("attention_factor") is not None:
            usual = 1 + 0.1 * math.log(rope["factor"])  # by which llama.cpp multiplies without being told
            keys["rope.scaling.attn_factor"] = float(rope["attention_factor"]) / usual
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(ours) is not None:
                keys[f"rope.scaling.{theirs}"] = float(rope[ours])
    return keys
