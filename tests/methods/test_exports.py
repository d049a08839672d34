"""Exports: one contract over the registry; what a target cannot express is refused, and no folder is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook.core.errors import BillhookError, PlanError, UnknownName, UsageError
from billhook.core.plan import Plan
from billhook.methods.export import EXPORTS, Student, export_student, form_of
from billhook.methods.export.targets import Form
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Patch, Repair
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
ROWS = tiny.tokens(2, 12)
SITES, BLOCK, WIDTH = "mlp.1,attention.2", "attention.1,mlp.1", "mlp.2[0-30]"


def student(teacher: Teacher, names: str, repair: Repair = NO_REPAIR, **more: Any) -> Student:
    plan = Plan.parse(names.split(","))
    return Student(apply(teacher, plan, repair=repair), teacher, plan, ROWS, repair, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ROWS, use_cache=False).logits
    return found


@pytest.mark.parametrize("names", [SITES, BLOCK])
@pytest.mark.parametrize("name", ["transformers", "stock"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_what_an_export_writes_loads_back_equal(
    name: str, names: str, variant: str, checkpoint: Folder, tmp_path: Path
) -> None:
    teacher = load(checkpoint(variant))
    given = student(teacher, names)
    got = export_student(name, given, tmp_path / "out")
    assert got.folder == tmp_path / "out"
    assert set(got.files) == set(got.folder.iterdir())
    again = load(got.folder)
    assert again.model.config.model_type == got.form
    assert got.form.startswith("billhook-") == (name == "transformers" and names == SITES)
    torch.testing.assert_close(logits(again.model), logits(given.model), rtol=1e-4, atol=1e-5)


def test_what_a_target_can_express_is_data() -> None:
    assert EXPORTS.facts("transformers") == (Form(),)
    assert EXPORTS.facts("stock") == (Form("", "zeros", "alike", "alike", inserts=False, biases=False),)
    assert list(EXPORTS) == ["adapter", "deci", "gguf", "onnx", "openvino", "stock", "transformers"]


def test_what_cannot_be_expressed_is_refused_with_what_can(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("llama"))
    patched = Repair(patches={site: Patch(bias=torch.ones(32)) for site in Plan.parse(["mlp.1"]).sites()})
    with pytest.raises(PlanError, match="stock has no place for what a repair puts in the place of a site; recover by"):
        export_student("stock", student(teacher, "mlp.1", patched), tmp_path / "out")
    with pytest.raises(PlanError, match="stock has no place for mlps of different widths; narrow all"):
        export_student("stock", student(teacher, WIDTH), tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter beside it"):
        export_student("adapter", student(teacher, "mlp.1"), tmp_path / "out")
    with pytest.raises(UnknownName, match="stock"):
        form_of("stok", teacher, Plan())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_load_back_equal_is_not_there(checkpoint: Folder, tmp_path: Path) -> None:
    """A student that is not what its folder will hold: one of its modules adds something that is no parameter."""
    given = student(load(checkpoint("llama")), SITES)
    given.model.model.norm.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(BillhookError, match="does not load back equal"):
        export_student("transformers", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
