"""The config of a GGUF file, with what transformers does not read from it: head widths, windows, caps, scaled rope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from billhook.core.errors import ModelError
from billhook.core.results.json_form import JsonObject

# Keys of a GGUF file behind the name of the architecture, and what configs call them.
FIELDS = {
    "context_length": "max_position_embeddings",
    "feed_forward_length": "n_inner",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SAME = 1e-3  # of a factor: files hold them in float32, made from a frequency in float32


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """How Llama 3 slows frequencies down, in the words of its configs. `positions`: of the model before that."""

    factor: float
    low: float = 1.0
    high: float = 4.0
    positions: float = 8192.0

    def to_json(self) -> JsonObject:
        return {
            "rope_type": "llama3", "factor": self.factor, "low_freq_factor": self.low, "high_freq_factor": self.high,
            "original_max_position_embeddings": round(self.positions),
        }  # fmt: skip


def read_gguf_config(path: Path) -> Any:
    """Return the transformers config of a GGUF file. Raises ModelError for a rope that is scaled in an unknown way."""
    import gguf

    config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    told = {key.removeprefix(f"{architecture}."): field for key, field in reader.fields.items()}
    for key, name in FIELDS.items():
        if key in told and hasattr(config, name) and isinstance(value := told[key].contents(), int | float):
            setattr(config, name, value)
    scaling = {key.removeprefix("rope.scaling."): f.contents() for key, f in told.items() if key.startswith("rope.sc")}
    factors = {t.name: t.data.tolist() for t in reader.tensors if t.name.startswith("rope_f")}
    rope: JsonObject = getattr(config, "rope_parameters", None) or {}
    every: JsonObject = rope.get("full_attention", rope)
    if every.get("rope_type", "default") == "default":
        every |= _rope(path, scaling, factors, every.get("rope_theta"), getattr(config, "head_dim", None))
        config.rope_parameters = {**rope, "full_attention": every} if "full_attention" in rope else every
    return config


def _rope(
    path: Path, scaling: JsonObject, factors: dict[str, list[float]], theta: float | None, width: int | None
) -> JsonObject:
    """Return what scales the rope of a file, as configs of transformers have it; nothing where it is not scaled."""
    kind = scaling.get("type", "none")
    if kind in ("linear", "yarn"):
        found: JsonObject = {"rope_type": kind, "factor": float(scaling["factor"])}
        if kind == "yarn" and "original_context_length" in scaling:
            found["original_max_position_embeddings"] = int(scaling["original_context_length"])
        return found
    values = factors.pop("rope_freqs.weight", None)
    if kind != "none" or factors or (values is not None and (theta is None or width is None)):
        how = ", ".join((str(kind), *factors))
        raise ModelError(
            f"{path} scales its rope in a way that Billhook does not read ({how}). Give the safetensors folder of this "
            "model instead."
        )
    if values is None or max(values) == min(values) == 1.0:
        return {}
    assert theta is not None
    assert width is not None
    for rope in _llama3_candidates(values, theta, width):
        expected = llama3_factors(theta, width, rope)
        if all(abs(a - b) <= SAME * b for a, b in zip(values, expected, strict=True)):
            return rope.to_json()
    raise ModelError(
        f"The factors of {path}, rope_freqs.weight, follow no rule that Billhook knows. Give the safetensors folder of "
        "this model instead."
    )


def llama3_factors(theta: float, width: int, rope: Llama3Rope) -> list[float]:
    """Return by how much Llama 3 slows each frequency of heads of `width` down: from 1, the fast ones, to its factor.

    In between 1 / factor is a straight line over the number of turns within its positions.
    """
    found = []
    for turns in _turns(theta, width):
        share = min(1.0, max(0.0, (rope.positions * turns - rope.low) / (rope.high - rope.low)))
        found.append(1 / ((1 - share) / rope.factor + share))
    return found


def _turns(theta: float, width: int) -> list[float]:
    """Return the turns of each frequency per position."""
    return [theta ** (-2 * i / width) / 6.283185307179586 for i in range(width // 2)]


def _llama3_candidates(values: Sequence[float], theta: float, width: int) -> list[Llama3Rope]:
    """Return settings that may have made some factors: Llama 3's own, and the line through two factors in between."""
    most, found = max(values), [Llama3Rope(max(values))]
    inner = [
        ((1 / value - 1 / most) / (1 - 1 / most), turns)
        for value, turns in zip(values, _turns(theta, width), strict=True)
        if 1 + SAME < value < most * (1 - SAME)
    ]
    if len(inner) > 1:
        (first, a), (last, b) = inner[0], inner[-1]
        slope = (first - last) / (a - b)
        rise = slope * b - last  # low / (high - low)
        if slope > 0 and rise > 0:
            found.append(Llama3Rope(most, 1.0, 1.0 + 1.0 / rise, round(slope / rise)))  # only ratios matter
    return found
