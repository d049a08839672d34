"""A student of a type of its own under every auto class, by register() and by its own file; and under peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from billhook.core.plan import Plan
from billhook.methods.export.checkpoint import save
from billhook.models.load import load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
ROWS = tiny.tokens(2, 12)
NO_CLASSIFIER = {"cohere"}  # in transformers itself


def student(folder: Path, target: Path) -> Any:
    """A student without two sites, one MLP of which is narrower where that can be; saved to `target` too."""
    teacher = load(folder)
    size = next(size for size in teacher.anatomy.sites if str(size.site) == "mlp.3")
    narrow = ["mlp.3[0-7]"] if size.experts == 1 else []
    plan = Plan.parse(["attention.0", "mlp.2", *narrow])
    model = apply(teacher, plan)
    save(model, None, plan, target, teacher=teacher)
    return model


@torch.no_grad()
def hidden(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.base_model(ROWS, use_cache=False).last_hidden_state
    return found


@pytest.mark.parametrize("variant", tiny.TYPES)
def test_every_auto_class_of_a_type_reads_its_students(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    wanted = hidden(student(checkpoint(variant), tmp_path / "out"))
    base, told = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(base).__name__.startswith("Billhook")
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    torch.testing.assert_close(hidden(base.eval()), wanted)
    names = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert ("AutoModelForSequenceClassification" in names) == (variant not in NO_CLASSIFIER)
    if variant not in NO_CLASSIFIER:
        auto = transformers.AutoModelForSequenceClassification
        model, told = auto.from_pretrained(tmp_path / "out", num_labels=3, output_loading_info=True)
        assert {name.rpartition(".")[0] for name in told["missing_keys"]} <= {"score", "classification_head"}
        assert not told["mismatched_keys"]
        torch.testing.assert_close(hidden(model.eval()), wanted)
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(hidden(auto.from_pretrained(tmp_path / "again").eval()), wanted)


FOREIGN = """
import sys, torch, transformers
from peft import LoraConfig, get_peft_model
rows = torch.tensor({rows})
for auto in ("AutoModelForSequenceClassification", "AutoModel", "AutoModelForCausalLM"):
    model = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model.base_model(rows, use_cache=False).last_hidden_state, sys.argv[2] + auto)
    print(sorted(get_peft_model(model, LoraConfig()).peft_config["default"].target_modules))
assert "billhook" not in sys.modules
"""


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen2"])
def test_without_billhook_its_own_file_gives_them(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    import peft

    wanted = hidden(student(checkpoint(variant), tmp_path / "out"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FOREIGN.format(rows=ROWS.tolist()), str(tmp_path / "out"), str(tmp_path / "x")]
    told = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    for file in tmp_path.glob("xAuto*"):
        torch.testing.assert_close(torch.load(file), wanted, rtol=1e-4, atol=1e-5)
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[variant]
    assert told.stdout.splitlines() == [str(sorted(known))] * 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("variant", ["llama", "falcon", "gemma3_text", "opt"])
def test_peft_takes_the_modules_of_the_stock_type(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    import peft

    wanted = peft.get_peft_model(load(checkpoint(variant)).model, peft.LoraConfig()).peft_config["default"]
    for model in (student(checkpoint(variant), tmp_path / "out"), load(tmp_path / "out").model):
        for kind in (peft.LoraConfig, peft.IA3Config):
            adapted = peft.get_peft_model(model, kind())
            assert kind is not peft.LoraConfig or adapted.peft_config["default"].target_modules == wanted.target_modules
            model = adapted.unload()
