"""Graphs: in ONNX Runtime and OpenVINO a student generates, with its KV cache, what it does in transformers."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch

from billhook.core.errors import BillhookError, MissingExtra, PlanError, UsageError
from billhook.core.plan import Plan, Site
from billhook.methods.export import EXPORTS, Student, export_student, form_of
from billhook.models.load import load
from billhook.models.repair import NO_REPAIR, Patch, Repair
from billhook.models.surgery import apply
from billhook.runtimes import RUNTIMES, Served

RUNTIME_OF = {"onnx": "onnxruntime", "openvino": "openvino"}
PATCH = Repair(patches={Site(1, "mlp"): Patch(bias=torch.linspace(-1, 1, 32), gain=torch.tensor([0.5]))})
PROMPT, COUNT = tiny.tokens(1, 9), 40

# A plan with all that may be uneven, one of a type with sliding windows, and one that leaves the stock type.
CASES = {
    "llama": ("attention.0,mlp.1,attention.2,mlp.2,attention.1[0],mlp.3[0-30]", PATCH, [1, 2]),
    "gemma2": ("mlp.0,attention.1,attention.2,mlp.2", NO_REPAIR, [2, 2]),
    "gpt2": ("attention.1,mlp.1,attention.3,mlp.3", NO_REPAIR, [4, 4]),
}


def student(folder: Path, names: str, repair: Repair = NO_REPAIR) -> Student:
    teacher, plan = load(folder), Plan.parse(names.split(","))
    return Student(apply(teacher, plan, repair=repair), teacher, plan, PROMPT, repair, verify=False)


@torch.inference_mode()
def alone(model: object, count: int) -> tuple[list[int], torch.Tensor]:
    """What a model appends without a KV cache, and its logarithms of probabilities over all of it: [time, words]."""
    made = PROMPT
    for _ in range(count):
        made = torch.cat([made, model(input_ids=made, use_cache=False).logits[:, -1:].argmax(-1)], 1)  # type: ignore[operator]
    return made[0].tolist(), model(input_ids=made, use_cache=False).logits[0].log_softmax(-1)  # type: ignore[operator]


@pytest.mark.parametrize("name", RUNTIME_OF)
@pytest.mark.parametrize("variant", CASES)
def test_a_runtime_generates_what_the_student_does(name: str, variant: str, tmp_path: Path) -> None:
    pytest.importorskip(RUNTIMES[RUNTIME_OF[name]].package)
    names, repair, kv_heads = CASES[variant]
    given = student(tiny.with_tokenizer(tmp_path / "model", variant), names, repair)
    got = export_student(name, given, tmp_path / "out")
    said = [sysconfig.get_path("purelib"), str(tmp_path), str(Path(__file__).parents[2])]
    for file in got.files:
        assert not any(folder.encode() in file.read_bytes() for folder in said), f"{file.name} names a folder"
    made, scores = alone(given.model, COUNT)
    with Served(RUNTIME_OF[name], got.folder, threads=1) as served:
        assert served.generate(made[: PROMPT.shape[1]], COUNT) == made[PROMPT.shape[1] :]
        cached = len(made) - 1  # the last token was never an input
        assert served.numbers().kv_bytes == sum(kv_heads) * 8 * 2 * 4 * cached
        np.testing.assert_allclose(served.logprobs(made), scores, atol=1e-4)
        assert served.tokenize("w3 w4 <s>") == given.teacher.tokenizer("w3 w4 <s>")["input_ids"]  # type: ignore[misc]


def test_what_does_not_agree_is_not_kept(tmp_path: Path) -> None:
    """A student that departs from its graph after it was traced: its runtime sees that."""
    pytest.importorskip("openvino")
    given = student(tiny.saved(tmp_path / "model", "llama", num_hidden_layers=2), "attention.0,mlp.0")
    given = Student(given.model, given.teacher, given.plan, PROMPT)
    given.model.model.norm.register_forward_hook(
        lambda module, args, output: output if torch.compiler.is_compiling() else output * 2
    )
    with pytest.raises(BillhookError, match="openvino does not compute what the student does"):
        export_student("openvino", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RUNTIME_OF)
def test_what_is_missing_is_told_with_what_to_type(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = student(tiny.saved(tmp_path / "model", "llama", num_hidden_layers=2), "mlp.0")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda *_: None)
        with pytest.raises(MissingExtra, match=rf"pip install 'billhook\[{name}\]'"):
            export_student(name, given, tmp_path / "out")
    pytest.importorskip(RUNTIMES[RUNTIME_OF[name]].package)
    monkeypatch.setitem(sys.modules, "transformers.exporters", ModuleType("transformers.exporters"))
    with pytest.raises(UsageError, match=r"pip install 'transformers>=5\.23'"):
        export_student(name, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_graph_was_not_seen_to_agree_is_refused(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "model", "falcon_alibi"))
    with pytest.raises(PlanError, match="onnx has no place for positions by ALiBi; take openvino"):
        form_of("onnx", teacher, Plan())
    assert form_of("openvino", teacher, Plan()).runtimes == ("openvino",)
    for name in RUNTIME_OF:
        assert str(EXPORTS.facts(name)[0].takes("mamba", None)).startswith("models of type mamba; it takes cohere,")
