"""What surgery puts into a module survives what people do next with the student, in memory and from its file."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from billhook.core.plan import Plan, Site
from billhook.methods.export.checkpoint import save
from billhook.models.load import Teacher, load
from billhook.models.modeling_billhook import LayerConfig
from billhook.models.repair import NO_REPAIR, Patch, Repair
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
ROWS = tiny.tokens(2, 12)
CONSTANT = Repair(patches={Site(2, "mlp"): Patch(bias=torch.ones(32) / 8, gain=torch.ones(1) / 8)})


def narrow_plan(teacher: Teacher) -> Plan:
    """Two sites removed, one attention and one MLP narrowed wherever the architecture has channel groups."""
    names = ["attention.0", "mlp.2"]
    for size in teacher.anatomy.sites:
        if str(size.site) in ("attention.1", "mlp.3") and size.group is not None:
            each = len(size.groups) // size.experts
            kept = max(1, min(each // 2, 8))
            ranges = [f"{e * each}-{e * each + kept - 1}" for e in range(size.experts)]
            names.append(f"{size.site}[{' '.join(ranges)}]")
    return Plan.parse(names)


def made(folder: Path, home: Path, kind: str) -> tuple[Any, Any]:
    """A student in memory, and the one from its file."""
    teacher = load(folder)
    plan = narrow_plan(teacher) if kind == "narrow" else Plan.parse(["attention.0", "mlp.2"])
    student = apply(teacher, plan, repair=CONSTANT if kind == "patched" else NO_REPAIR)
    save(student, None, plan, home / "out", teacher=teacher)
    return student, transformers.AutoModelForCausalLM.from_pretrained(home / "out").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ROWS, use_cache=False).logits
    return found


def configs(model: Any) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def same(model: Any, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(logits(model), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["narrow", "patched"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_student_is_a_model_like_any_other(variant: str, kind: str, checkpoint: Folder, tmp_path: Path) -> None:
    for model in made(checkpoint(variant), tmp_path, kind):
        wanted = logits(model)
        twin = copy.deepcopy(model)
        same(twin, wanted)
        assert all(getattr(each, "shared", each) is twin.config for each in configs(twin))
        twin.set_attn_implementation("eager")
        assert {each._attn_implementation for each in configs(twin)} == {"eager"}
        if variant != "falcon_alibi":  # whose two attentions differ in transformers itself
            same(twin, wanted, 1e-4)
        if model._supports_sdpa:
            twin.set_attn_implementation("sdpa")
            assert {each._attn_implementation for each in configs(twin)} == {"sdpa"}
            same(twin, wanted, 1e-4)
        same(pickle.loads(pickle.dumps(model)), wanted)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        same(torch.load(stream, weights_only=False), wanted)
        assert {p.dtype for p in twin.half().parameters()} == {torch.float16}
        assert logits(twin).isfinite().all()


@pytest.mark.parametrize("kind", ["narrow", "patched"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_student_is_saved_by_transformers_with_its_code(
    variant: str, kind: str, checkpoint: Folder, tmp_path: Path
) -> None:
    for turn, model in enumerate(made(checkpoint(variant), tmp_path, kind)):
        model.save_pretrained(tmp_path / str(turn))
        text = json.loads((tmp_path / str(turn) / "config.json").read_text())
        assert text["auto_map"] == json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
        code = (tmp_path / str(turn) / "modeling_billhook.py").read_bytes()
        assert code == (tmp_path / "out" / "modeling_billhook.py").read_bytes()
        again = load(tmp_path / str(turn))
        same(again.model, logits(model))


@pytest.mark.parametrize("kind", ["narrow", "patched"])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_all_of_a_student_learns_with_and_without_checkpointing(
    variant: str, kind: str, checkpoint: Folder, tmp_path: Path
) -> None:
    model = made(checkpoint(variant), tmp_path, kind)[1].train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    recompute = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its older name
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        model(ROWS, labels=ROWS, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        getattr(model, f"{recompute}_checkpointing_enable")()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["narrow", "patched"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "phi3", "gpt2", "opt", "falcon", "mixtral"])
def test_a_student_is_exported(variant: str, kind: str, checkpoint: Folder, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made(checkpoint(variant), tmp_path, kind)[0]
        program = torch.export.export(model, (ROWS,), {"use_cache": False}, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(ROWS, use_cache=False).logits, logits(model))


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2"])
def test_a_student_is_compiled(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    """phi3 asks its config for its heads, gpt2 has maps of its own."""
    model = made(checkpoint(variant), tmp_path, "narrow")[0]
    wanted = logits(model)
    same(torch.compile(model, backend="eager"), wanted)


def test_a_layers_config_is_a_view(checkpoint: Folder, tmp_path: Path) -> None:
    model = made(checkpoint("phi3"), tmp_path, "narrow")[1]
    own = next(each for each in configs(model) if isinstance(each, LayerConfig))
    assert own.num_attention_heads < model.config.num_attention_heads == own.shared.num_attention_heads
    model.config.later = 3
    assert own.later == 3
    own.later = 4
    assert model.config.later == 4
    with pytest.raises(AttributeError, match="never"):
        _ = own.never


UNPICKLE = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
assert type(model).__name__ == "BillhookLlamaForCausalLM" and type(model.config).__name__ == "BillhookLlamaConfig"
with torch.no_grad():
    torch.save(model(torch.tensor({rows}), use_cache=False).logits, sys.argv[2])
"""


def test_another_process_reads_a_pickled_student(checkpoint: Folder, tmp_path: Path) -> None:
    """It has registered nothing: the class is found by its name."""
    model = made(checkpoint("llama"), tmp_path, "narrow")[0]
    torch.save(model, tmp_path / "model.pt")
    code = UNPICKLE.format(rows=ROWS.tolist())
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")]
    told = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(os.environ))
    assert told.returncode == 0, told.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))
