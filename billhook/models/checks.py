"""What is refused before a checkpoint is loaded: damaged, foreign, quantised, unknown or dangerous ones."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from billhook.core.errors import ModelError, option
from billhook.core.results.json_form import JsonObject
from billhook.models import architectures
from billhook.models.device import SAFETENSORS_DTYPES

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def inspect_checkpoint(folder: Path, trust_remote_code: bool = False) -> tuple[JsonObject, dict[str, tuple[str, int]]]:
    """Check a model folder without loading it: its raw config, and {tensor: (dtype, elements)}.

    Raises ModelError for everything that must not be loaded.
    """
    raw = _read_json(folder, "config.json")
    _check_config(raw, trust_remote_code)
    tensors = _tensors(folder)
    _check_depth(raw, tensors)
    return raw, tensors


def _read_json(folder: Path, name: str) -> JsonObject:
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{folder} has no {name}, so it is no Hugging Face checkpoint. Give the folder that holds it.")
    _inside(folder, path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Download the file again.")
    return value


def _check_config(raw: JsonObject, trust_remote_code: bool) -> None:
    model_type = str(raw.get("model_type", ""))
    ours = model_type.startswith("billhook-")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"The checkpoint is quantised ({method}). Prune the unquantised one, and quantise the result afterwards."
        )
    foreign = [k for k in ("block_configs", "per_layer_config") if raw.get(k)]
    if foreign and not ours:
        raise ModelError(
            f"Another tool pruned this model (config.json has {foreign[0]}), in a form that transformers does not load "
            "faithfully. Start from the model that it was made of."
        )
    if raw.get("auto_map") and not ours and not trust_remote_code:
        raise ModelError(
            "The checkpoint brings its own Python code (auto_map in config.json), which is not run unasked. If you "
            f"trust it, add {option('trust_remote_code', True)}; if transformers' own class of the type computes the "
            "same, delete "
            "auto_map from config.json instead."
        )
    if not model_type:
        raise ModelError("config.json names no model_type, so its architecture is unknown. Download the file again.")
    blocks, kinds = raw.get("num_hidden_layers"), raw.get(architectures.BLOCK_KINDS)
    if isinstance(kinds, list) and isinstance(blocks, int) and len(kinds) != blocks:
        raise ModelError(
            f"config.json says num_hidden_layers={blocks} but lists {len(kinds)} {architectures.BLOCK_KINDS}. "
            "One of them is wrong; download config.json again."
        )
    try:
        config = transformers.AutoConfig.for_model(architectures.base_type(model_type), **_stock_fields(raw))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, StrictDataclassError) as error:
        if architectures.base_type(model_type) in transformers.CONFIG_MAPPING:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"transformers does not accept this config.json: {reason} Download the file again."
            ) from error
        raise ModelError(
            f"There is no row for the architecture {model_type!r}, and transformers {transformers.__version__} does "
            f"not know it. Known here: {', '.join(sorted(architectures.ARCHITECTURES))}."
        ) from error
    try:
        architectures.architecture_of(config)
    except ModelError as error:
        if (
            architectures.base_type(model_type) in architectures.ARCHITECTURES
            or architectures.unsupported_reason(config)
            or "num_hidden_layers" not in raw
        ):
            raise
        raise ModelError(f"{error} The row that is probably missing: {_suggestion(config)}") from error


def _stock_fields(raw: JsonObject) -> JsonObject:
    return {k: v for k, v in raw.items() if k not in ("model_type", "per_layer_config", "auto_map", "billhook")}


def _suggestion(config: Any) -> str:
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return architectures.suggest_architecture(model, config)
    except Exception as error:  # a foreign architecture may fail in any way; the suggestion is a courtesy
        return f"none suggests itself ({type(error).__name__})"


def _inside(folder: Path, path: Path) -> None:
    """Raises ModelError if `path` leads out of the model's folder (the Hub's own cache, which is links, is allowed)."""
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not path.resolve().is_relative_to(home):
        raise ModelError(f"{path} is a link out of the model's folder, to {path.resolve()}. Copy the file itself.")


def shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up a checkpoint, and no others that lie beside them.

    Raises ModelError if one is missing or lies elsewhere, or if there are only pickles.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(folder, index.name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map. Download the file again.")
        names = sorted({str(name) for name in weight_map.values()})
        for shard in names:
            if Path(shard).name != shard:
                raise ModelError(f"{index} names {shard!r}, a path. Shards must lie beside the index.")
            if not (folder / shard).is_file():
                raise ModelError(f"{index} names {shard}, which is missing. Download it again.")
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds pickle weights ({pickles[0]}), which can run code when read. Only safetensors and "
                "GGUF are read. Convert it with transformers: save_pretrained writes safetensors."
            )
        raise ModelError(f"{folder} holds no model.safetensors. Only safetensors and GGUF are read.")
    for name in names:
        _inside(folder, folder / name)
    return tuple(folder / name for name in names)


def _tensors(folder: Path) -> dict[str, tuple[str, int]]:
    """{name: (dtype, elements)} of the floating-point tensors; masks and counters of old checkpoints do not count."""
    tensors: dict[str, tuple[str, int]] = {}
    for shard in shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    piece = file.get_slice(name)
                    elements = 1
                    for size in piece.get_shape():
                        elements *= size
                    if piece.get_dtype()[0] in "FB" and piece.get_dtype() != "BOOL":
                        tensors[name] = (piece.get_dtype(), elements)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard} is damaged ({error}). Download it again.") from error
    return tensors


def _check_depth(raw: JsonObject, tensors: dict[str, tuple[str, int]]) -> None:
    model_type = str(raw["model_type"])
    row = architectures.ARCHITECTURES[architectures.base_type(model_type)]
    tail = row.blocks.rsplit(".", 1)[-1]
    found = {int(m[1]) for name in tensors if (m := re.search(rf"(?:^|\.){tail}\.(\d+)\.", name))}
    config = transformers.AutoConfig.for_model(architectures.base_type(model_type), **_stock_fields(raw))
    if (found and max(found) + 1 != config.num_hidden_layers) or len(found) != max(found, default=-1) + 1:
        raise ModelError(
            f"config.json says num_hidden_layers={config.num_hidden_layers}, but the weights hold {len(found)} blocks. "
            "One of them is wrong; download the checkpoint again."
        )


def stored_dtype(raw: JsonObject, tensors: dict[str, tuple[str, int]]) -> torch.dtype:
    """The dtype that holds most of the checkpoint's elements."""
    elements: dict[str, int] = {}
    for dtype, count in tensors.values():
        elements[dtype] = elements.get(dtype, 0) + count
    most = max(elements, key=lambda d: elements[d], default="nothing")
    if most not in SAFETENSORS_DTYPES:
        raise ModelError(f"The weights are stored as {most}. Billhook prunes float32, bfloat16 and float16 weights.")
    return SAFETENSORS_DTYPES[most]


def fingerprint(folder: Path) -> str:
    """16 hex digits of a checkpoint: of its config and of every byte of its shards."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in shards(folder):
        with shard.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
