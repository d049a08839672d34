"""Weights of a dtype that is none of a model's are refused with their file and name, whole or streamed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from billhook.core.errors import ModelError
from billhook.models.load import load

DTYPES = {
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {
    "llama": "model.layers.2.mlp.up_proj.weight",
    "gpt2": "transformer.wpe.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "qwen2": "model.layers.0.self_attn.k_proj.bias",
}


def stored(folder: Path, variant: str, change: dict[str, torch.Tensor | torch.dtype]) -> Path:
    """A checkpoint of two shards, of which some tensors are others."""
    tiny.saved(folder, variant)
    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        tensors[name] = value if isinstance(value, torch.Tensor) else tensors[name].to(value)
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + turn % 2}-of-00002.safetensors" for turn, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        held = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", NAMES)
def test_one_weight_of_another_dtype_is_refused_by_name(
    variant: str, dtype: str, memory: int | None, tmp_path: Path
) -> None:
    folder = stored(tmp_path / "m", variant, {NAMES[variant]: DTYPES[dtype]})
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][NAMES[variant]]
    with pytest.raises(ModelError, match=rf"{re.escape(str(folder / where))} stores {NAMES[variant]} as {dtype}\."):
        load(folder, memory=memory)


def test_a_checkpoint_of_integers_alone_is_refused_by_name(tmp_path: Path) -> None:
    tensors = load_file(tiny.saved(tmp_path / "source", "llama") / "model.safetensors")
    folder = stored(tmp_path / "m", "llama", dict.fromkeys(tensors, torch.int8))
    with pytest.raises(ModelError, match=r"safetensors stores .* as I8\. Billhook prunes float32"):
        load(folder)


@pytest.mark.parametrize("memory", [None, 0])
def test_masks_that_no_model_takes_may_be_bools(memory: int | None, tmp_path: Path) -> None:
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 96, 96).tril().bool()}
    folder = stored(tmp_path / "m", "gpt2", mask)
    assert load(folder, memory=memory).anatomy.blocks == 4


@pytest.mark.parametrize("memory", [None, 0])
def test_the_three_floats_of_models_may_be_mixed(memory: int | None, tmp_path: Path) -> None:
    change = {"model.norm.weight": torch.bfloat16, NAMES["llama"]: torch.float16}
    assert load(stored(tmp_path / "m", "llama", change), memory=memory).dtype == torch.float32
