"""Folders of model type nemotron-nas: whatever a student is, MLX and transformers compute what it computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open

from billhook.core.errors import PlanError
from billhook.core.plan import Plan, Site
from billhook.methods.export import Student, export_student, form_of
from billhook.methods.export.deci_folder import kv_heads
from billhook.models import modeling_decilm
from billhook.models.load import load
from billhook.models.repair import NO_REPAIR, Patch, Repair
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
    fields: dict[str, Any] = {}
    biases: str = ""


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
    "heads that do not divide": Case(
        "attention.1[0-4],attention.2[1-4]", fields={"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6}
    ),
    "heads of one key": Case("attention.1[0-1],attention.2[3]", fields={"num_key_value_heads": 1}),
    "fewer heads than fit": Case("attention.1[0]", fields={"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
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
        command = [sys.executable, "-c", IN_MLX, ",".join(map(str, ROWS[0].tolist())), *(str(f) for f, _ in found.values())]
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
    folder, _ = exported["mixed"]
    config = json.loads((folder / "config.json").read_text())
    told = [(b["attention"]["n_heads_in_group"], b["ffn"]["ffn_mult"]) for b in config["block_configs"]]
    assert told == [(4, 12.0), (2, 12.0), (None, None), (4, None)][: len(told)]  # block 2 lost both
    told = [(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in config["block_configs"]]
