"""Folders of model type nemotron-nas: whatever a student is, MLX and transformers compute what it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open

from billhook.core.errors import PlanError
from billhook.core.plan import Plan, Site
from billhook.methods.export import Student, export_student, form_of, modeling_decilm
from billhook.methods.export.deci_blocks import kv_heads
from billhook.models.load import load
from billhook.models.repair import Patch, Repair
from billhook.models.surgery import apply
from billhook.runtimes import RUNTIMES

Folder = Callable[[str], Path]
ROWS = tiny.tokens(2, 12)
ROPE = {"rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


class Case(NamedTuple):
    """A model, what is removed of it, and the sites to which a recovery gave a bias."""

    plan: str = ""
    variant: str = "llama"
    fields: Mapping[str, Any] = MappingProxyType({})
    biases: str = ""


def sizes(heads: int, kv_heads: int, **more: int) -> dict[str, int]:
    """Fields of a config."""
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}


CASES = {
    "whole": Case(),
    "a block": Case("attention.1,mlp.1"),
    "the first block": Case("attention.0,mlp.0,attention.2"),
    "a middle attention": Case("attention.2"),
    "the last attention": Case("attention.3"),
    "the first attention": Case("attention.0"),
    "a middle mlp": Case("mlp.1"),
    "the last mlp": Case("mlp.3"),
    "both": Case("attention.1,mlp.2"),
    "all attentions but one": Case("attention.0,attention.1,attention.2"),
    "mixed": Case("attention.0,attention.2,mlp.2,mlp.3,mlp.0[0-20],attention.3[1]"),
    "neurons": Case("mlp.1[0-30],mlp.2[5-13]"),
    "more neurons than a multiple": Case("mlp.1[0-255],mlp.2[0-256]", fields={"intermediate_size": 300}),
    "heads": Case("attention.1[0],attention.3[1]"),
    "heads that do not divide": Case("attention.1[0-4],attention.2[1-4]", fields=sizes(12, 6, hidden_size=48)),
    "heads of one key": Case("attention.1[0-1],attention.2[3]", fields=sizes(4, 1)),
    "fewer heads than fit": Case("attention.1[0]", fields=sizes(2, 2, head_dim=8)),
    "all alike": Case(",".join(f"attention.{i}[1],mlp.{i}[3-30]" for i in range(4))),
    "biases of a recovery": Case("attention.1[0],mlp.2[0-30]", biases="attention.1,mlp.2"),
    "biases": Case("attention.0,mlp.2,mlp.1[0-30]", fields={"attention_bias": True, "mlp_bias": True}),
    "qwen2": Case("attention.0,attention.2[0],mlp.1", "qwen2", {"use_sliding_window": False}),
    "mistral": Case("attention.2,mlp.1", "mistral", {"sliding_window": None}),
    "tied": Case("attention.2,mlp.1", "llama_tied"),
    "theta": Case("attention.2", fields={"rope_parameters": {**ROPE, "rope_type": "default"}}),
    "linear positions": Case("attention.2", fields={"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama3 positions": Case("attention.2", fields={"rope_parameters": {**ROPE, **LLAMA3}}),
}  # fmt: skip
# Reads folders in MLX, in a process that imports it once; the worker that users start is in test_mlx.py.
IN_MLX = """
import sys, numpy
from billhook.runtimes.mlx import Model
for folder in sys.argv[2:]:
    numpy.save(folder + "/logprobs.npy", Model(folder, 12, 1).logprobs(list(map(int, sys.argv[1].split(",")))))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every case as a folder, with the logits of its student; MLX has read the folder where it is installed."""
    home, found = tmp_path_factory.mktemp("deci"), {}
    for number, (name, case) in enumerate(CASES.items()):
        teacher = load(tiny.saved(home / f"teacher{number}", case.variant, **case.fields))
        plan = Plan.parse(case.plan.split(",") if case.plan else [])
        biased = [Site.parse(site) for site in case.biases.split(",") if site]
        repair = Repair(biases={site: torch.linspace(-1, 1, 32) for site in biased})
        student = Student(apply(teacher, plan, repair=repair), teacher, plan, ROWS, repair, verify=False)
        got = export_student("deci", student, home / f"deci{number}")
        assert (got.form, got.verified) == ("nemotron-nas", None)
        with torch.inference_mode():
            found[name] = got.folder, student.model(ROWS, use_cache=False).logits
    if RUNTIMES["mlx"].installed:
        command = [
            sys.executable,
            "-c",
            IN_MLX,
            ",".join(map(str, ROWS[0].tolist())),
            *(str(f) for f, _ in found.values()),
        ]
        subprocess.run(command, check=True)
    return found


@pytest.mark.skipif(not RUNTIMES["mlx"].installed, reason="needs mlx-lm")
@pytest.mark.parametrize("name", CASES)
def test_mlx_computes_what_the_student_computes(name: str, exported: dict[str, tuple[Path, torch.Tensor]]) -> None:
    folder, logits = exported[name]
    mine, theirs = logits[0].log_softmax(-1), torch.from_numpy(np.load(folder / "logprobs.npy"))
    assert float((mine.exp() * (mine - theirs)).sum(-1).max()) < 1e-6
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_folder_with_its_own_code(
    name: str, exported: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    folder, logits = exported[name]
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers_modules")
    with torch.inference_mode():
        torch.testing.assert_close(model(ROWS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
        # with a KV cache, of rows of different lengths
        ids, mask = torch.cat([ROWS, ROWS]), torch.ones(4, 12, dtype=torch.long)
        mask[2:, :3] = 0
        cached, uncached = (
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
            for use in (True, False)
        )
    assert torch.equal(cached, uncached)


def test_what_is_missing_has_no_tensors_and_the_config_says_it(exported: dict[str, tuple[Path, torch.Tensor]]) -> None:
    """`mixed`: the first attention is needed, block 2 is removed whole, the last one lacks its MLP."""
    folder, _ = exported["mixed"]
    config = json.loads((folder / "config.json").read_text())
    blocks = config["block_configs"]
    assert [(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in blocks] == [(False, False)] * 2 + [(False, True)]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [4, 2, 4]
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not any(".2.mlp" in name or ".2.post_attention" in name for name in tensors)
    assert not tensors["model.layers.0.self_attn.o_proj.weight"].any()
    widths = [tensors[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(2)]
    assert widths == [256, 256] == [modeling_decilm.mlp_width(b["ffn"]["ffn_mult"], 32) for b in blocks[:2]]
    assert not tensors["model.layers.0.mlp.down_proj.weight"][:, 21:].any()  # of the 21 neurons that are kept
    folder, _ = exported["a middle attention"]
    assert json.loads((folder / "config.json").read_text())["block_configs"][2]["attention"]["no_op"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any(".2.self_attn" in name or ".2.input_layernorm" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("name", list(CASES))
def test_what_other_readers_are_told_is_what_the_tensors_are(
    name: str, exported: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    """Against the shapes on the disk. One width is all that ExecuTorch's file can say."""
    folder, _ = exported[name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    told = json.loads((folder / "config.anymodel.json").read_text())
    layers, dim = told["per_layer_config"], told["head_dim"]
    widths, kv = set(), set()
    for index, layer in enumerate(layers.values()):
        before = f"model.layers.{index}."
        attention, mlp = (shapes.get(before + rest) for rest in ("self_attn.k_proj.weight", "mlp.up_proj.weight"))
        assert layer["skip"] == [part for part, has in (("attention", attention), ("mlp", mlp)) if not has]
        assert layer.get("num_key_value_heads") == (attention[0] // dim if attention else None)
        assert layer.get("intermediate_size") == (mlp[0] if mlp else None)
        kv |= {attention[0] // dim} if attention else set()
        widths |= {mlp[0]} if mlp else set()
    told_it = (folder / "executorch.params.json").exists()
    biased = any(key.endswith(".bias") for key in shapes)
    assert told_it == (len(widths) < 2 and len(kv) == 1 and not biased and told["rope_scaling"] is None)
    if told_it:
        args = json.loads((folder / "executorch.params.json").read_text())
        skips = [layer["skip"] for layer in layers.values()]
        assert args["layer_types"] == ["skip_attention" if "attention" in skip else "attention" for skip in skips]
        assert args["mlp_type"] == ["skip" if "mlp" in skip else "default" for skip in skips]
        assert {args["hidden_dim"]} >= widths
        assert {args["n_kv_heads"]} == kv


def test_the_width_of_an_mlp_survives_every_reader() -> None:
    """mlx-lm rounds the factor to 6 decimals, and all of them cut to whole neurons before they round up."""
    for width in (32, 576, 960, 2048, 4096, 5120, 8192, 16384):
        for neurons in range(256, 40_000, 256):
            mult = 1.5 * neurons / width
            assert modeling_decilm.mlp_width(mult, width) == neurons == modeling_decilm.mlp_width(round(mult, 6), width)


def test_kv_heads_are_the_fewest_that_have_room() -> None:
    assert [kv_heads(32, groups, 4) for groups in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert [kv_heads(9, groups, 3) for groups in (1, 2, 3)] == [1, 3, 3]
    assert kv_heads(40, 8, 4) == 8
    assert kv_heads(9, 4, 2) is None


@pytest.mark.parametrize(
    ("variant", "fields", "reason"),
    [
        ("qwen3", {}, "models of type qwen3; it takes llama, mistral, qwen2"),
        ("mistral", {}, "a window of 6 tokens over texts of up to 96"),
        ("qwen2", {}, "a window of 6 tokens"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu; it takes silu"),
        ("llama", {"head_dim": 12}, "4 heads of 12 channels in a model of width 32"),
        ("llama", {"head_dim": 16}, "4 heads of 16 channels in a model of width 32"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE, "factor": 2.0}}, "positions of type dynamic"),
    ],
)
def test_a_model_without_a_place_is_refused(variant: str, fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "model", variant, **fields))
    with pytest.raises(PlanError, match=f"The export deci has no place for {reason}"):
        form_of("deci", teacher, Plan())


def test_what_a_repair_inserts_is_refused(checkpoint: Folder) -> None:
    repair = Repair(patches={Site(1, "mlp"): Patch(bias=torch.ones(32))})
    with pytest.raises(PlanError, match="deci has no place for what a repair puts in the place of a site; recover by"):
        form_of("deci", load(checkpoint("llama")), Plan.parse(["mlp.1"]), repair)


def test_an_earlier_pruning_is_exported_like_a_new_one(checkpoint: Folder, tmp_path: Path) -> None:
    """As `billhook export` does: the folder of a pruned checkpoint is the folder of its student."""
    teacher, plan = load(checkpoint("llama")), Plan.parse(["attention.0", "attention.2", "mlp.2", "mlp.1[0-30]"])
    student = Student(apply(teacher, plan), teacher, plan, ROWS, verify=False)
    export_student("transformers", student, tmp_path / "pruned")
    again = load(tmp_path / "pruned")
    export_student("deci", student, tmp_path / "one")
    export_student("deci", Student(again.model, again, Plan(), ROWS, verify=False), tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
