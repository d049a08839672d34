"""A student's config.json is its teacher's text plus what pruning changes, whichever transformers wrote that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook.core.plan import Plan
from billhook.methods.export.checkpoint import save
from billhook.models.load import load
from billhook.models.surgery import apply, masked

Folder = Callable[[str], Path]
BLOCK, SITE = "attention.1,mlp.1", "attention.2"
OURS = {"billhook", "per_layer_config", "auto_map", "model_type", "architectures"}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
OLD: dict[str, tuple[str, dict[str, Any], tuple[str, ...], set[str]]] = {
    # how a config of its time says it, what it does not say, and which keys the loss of block 1 changes or adds
    "llama 3": ("llama", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
                ("rope_parameters", "head_dim"), {"num_hidden_layers"}),
    "llama 1": ("llama", {"rope_theta": 10_000, "pad_token_id": -1, "max_sequence_length": 96},
                ("rope_parameters", "head_dim", "num_key_value_heads"), {"num_hidden_layers"}),
    "qwen 2": ("qwen2", {"rope_theta": 700.0}, ("rope_parameters", "layer_types"),
               {"num_hidden_layers", "max_window_layers"}),
    "gemma 3": ("gemma3_text", {"rope_theta": 700.0, "rope_local_base_freq": 90.0, "rope_scaling": None,
                                "sliding_window_pattern": 2},
                ("rope_parameters", "layer_types", "_sliding_window_pattern"),
                {"num_hidden_layers", "layer_types", "sliding_window_pattern"}),
    "gpt 2": ("gpt2", {"num_hidden_layers": 4, "n_ctx": 96, "task_specific_params": {"text-generation": {"top_k": 5}}},
              ("n_layer",), {"num_hidden_layers"}),
}  # fmt: skip


def old_checkpoint(folder: Path, case: str) -> Path:
    """A tiny checkpoint whose config.json is spelt as in the time of its model."""
    variant, fields, without, _ = OLD[case]
    kv = {"num_key_value_heads": 4} if "num_key_value_heads" in without else {}
    tiny.saved(folder, variant, **kv)
    raw = json.loads((folder / "config.json").read_text())
    raw = {name: value for name, value in raw.items() if name not in without and name != "dtype"}
    raw |= fields | {"torch_dtype": "float32", "transformers_version": "4.38.1", "eos_token_id": [2, 9], "note": "é"}
    (folder / "config.json").write_text(json.dumps(raw, indent=4, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", OLD)
@pytest.mark.parametrize("names", [BLOCK, SITE])
def test_a_student_has_its_teachers_config_text(case: str, names: str, tmp_path: Path) -> None:
    source = old_checkpoint(tmp_path / "teacher", case)
    teacher, plan = load(source), Plan.parse(names.split(","))
    save(apply(teacher, plan), None, plan, tmp_path / "student", teacher=teacher)
    before, after = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("teacher", "student"))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed - OURS == (OLD[case][3] if names == BLOCK else set())
    assert [name for name in after if name in before] == [name for name in before if name in after]
    again = load(tmp_path / "student")
    with torch.inference_mode(), masked(teacher, plan):
        rows = tiny.tokens(2, 40)
        assert torch.equal(again.model(rows).logits, teacher.model(rows, use_cache=False).logits)


@pytest.mark.parametrize("variant", ["llama", "mixtral", "qwen2", "phi3"])
def test_heads_that_are_fewer_everywhere_say_their_width(variant: str, tmp_path: Path) -> None:
    source = tiny.saved(tmp_path / "teacher", variant)
    raw = json.loads((source / "config.json").read_text())
    raw.pop("head_dim", None)
    (source / "config.json").write_text(json.dumps(raw))
    teacher, plan = load(source), Plan.parse([f"attention.{block}[1]" for block in range(4)])
    save(apply(teacher, plan), None, plan, tmp_path / "student", teacher=teacher)
    text = json.loads((tmp_path / "student" / "config.json").read_text())
    changed = {name for name in text if text[name] != raw.get(name)} - {"billhook"}
    assert changed == {"num_attention_heads", "num_key_value_heads", "head_dim"}
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]) == (2, 1, 8)


def test_a_config_is_its_own_again_after_a_second_pruning(checkpoint: Folder, tmp_path: Path) -> None:
    """What the first pruning added goes where the second makes it a stock checkpoint again."""
    teacher = load(checkpoint("llama"))
    for turn, names in enumerate(("attention.2", "mlp.2")):
        plan = Plan.parse([names])
        save(apply(teacher, plan), None, plan, tmp_path / str(turn), teacher=teacher)
        teacher = load(tmp_path / str(turn))
    before = json.loads((checkpoint("llama") / "config.json").read_text())
    after = json.loads((tmp_path / "1" / "config.json").read_text())
    assert after.pop("billhook")
    assert after == before | {"num_hidden_layers": 3}


def test_the_generation_config_is_the_teachers_file(checkpoint: Folder, tmp_path: Path) -> None:
    source = tiny.saved(tmp_path / "teacher", "llama")
    text = '{"eos_token_id":  [2, 9], "do_sample": true, "temperature": 0.6, "_from_model_config": false, "unknown": 1}'
    (source / "generation_config.json").write_text(text)
    teacher, plan = load(source), Plan.parse(["mlp.1"])
    save(apply(teacher, plan), None, plan, tmp_path / "student", teacher=teacher)
    assert (tmp_path / "student" / "generation_config.json").read_text() == text
    (source / "generation_config.json").unlink()
    save(apply(teacher, plan), None, plan, tmp_path / "without", teacher=teacher)
    assert not (tmp_path / "without" / "generation_config.json").exists()
    assert load(tmp_path / "without").model.generation_config.eos_token_id == 2
