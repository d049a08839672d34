"""Checkpoints as they lie on disks and on the Hub: other names, other files beside them, old buffers, own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import billhook
from billhook.core.errors import BillhookError, ModelError, PlanError
from billhook.core.plan import Plan
from billhook.data.token_sets import Document, pack_rows
from billhook.models import checks
from billhook.models.load import load

PLAN = Plan.parse(["attention.0", "mlp.2"])
ROWS = tiny.tokens(2, 12)


def rewrite(folder: Path, change: object) -> dict[str, torch.Tensor]:
    """Replace the tensors of a checkpoint by what `change` makes of them."""
    tensors = change(load_file(folder / "model.safetensors"))  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_a_fingerprint_sees_every_weight(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512)
    before = checks.fingerprint(folder)
    name = "model.layers.3.post_attention_layernorm.weight"

    def nudge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][-1] += 1e-6
        return tensors

    rewrite(folder, nudge)
    assert checks.fingerprint(folder) != before
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "notes.safetensors").write_bytes(b"something else that lies here")
    assert checks.fingerprint(copy) == checks.fingerprint(folder)


def test_hub_names_without_the_prefix_are_copied_bit_for_bit(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "gpt2", "gpt2")
    old = rewrite(folder, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    assert "h.0.attn.c_attn.weight" in old
    teacher = load(folder, dtype="bfloat16")
    billhook.save(billhook.apply(teacher, PLAN), None, PLAN, tmp_path / "out", teacher=teacher)
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.removeprefix("transformer.")]), name


def test_a_name_that_cannot_be_found_is_refused_where_rounding_would_show(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "m", "llama"), dtype="bfloat16")
    student = billhook.apply(teacher, PLAN)
    student.model.register_buffer("extra", torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"model\.extra is not among the source's tensors.*dtype='float32'"):
        billhook.save(student, None, PLAN, tmp_path / "out", teacher=teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_weights_in_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", "llama")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, folder / "model_fp16.safetensors")
    (folder / "zzz.safetensors").write_bytes(b"damaged")
    teacher = load(folder)
    billhook.save(billhook.apply(teacher, PLAN), None, PLAN, tmp_path / "out", teacher=teacher)
    assert load(tmp_path / "out").removed_earlier == PLAN


def test_masks_of_old_checkpoints_do_not_decide_the_dtype(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", "gpt_neox", torch.bfloat16)
    masks = {f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 300, 300, dtype=torch.bool) for i in range(4)}
    rewrite(folder, lambda tensors: tensors | masks)
    assert load(folder).dtype == torch.bfloat16


def test_code_that_makes_another_class_is_refused_even_when_trusted(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", "llama")
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n", encoding="utf-8"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"auto_map in config\.json"):
        load(folder)
    with pytest.raises(ModelError, match=r"own code makes it a Own.*delete auto_map"):
        load(folder, trust_remote_code=True)


def test_stock_is_refused_where_weights_are_gone(tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    billhook.save(billhook.apply(teacher, PLAN), teacher.tokenizer, PLAN, tmp_path / "once", teacher=teacher)
    text = tiny.write_texts(tmp_path / "t.jsonl", 40)
    with pytest.raises(PlanError, match=r"attention\.0, mlp\.2 went in an earlier pruning.*Leave stock= out"):
        billhook.prune(
            tmp_path / "once", plan="mlp.1", stock=True, data=str(text), out=tmp_path / "o", store=tmp_path / "s.db",
            tokens=64, length=16,
        )  # fmt: skip


def test_a_plan_file_of_a_second_pruning_fits_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    from billhook.core.plan_files import read_plan

    teacher = load(tiny.saved(tmp_path / "m", "llama"))
    billhook.save(billhook.apply(teacher, PLAN), None, PLAN, tmp_path / "once", teacher=teacher)
    middle, more = load(tmp_path / "once"), Plan.parse(["mlp.3"])
    billhook.save(billhook.apply(middle, more), None, more, tmp_path / "twice", teacher=middle)
    file = str(tmp_path / "twice" / "billhook.json")
    assert read_plan(file, middle.anatomy, middle.fingerprint) == more
    assert json.loads(Path(file).read_text())["already_removed"] == PLAN.names()
    with pytest.raises(BillhookError, match="made for another model"):
        read_plan(file, teacher.anatomy, teacher.fingerprint)


def test_a_document_that_begins_with_bos_gets_no_second_one() -> None:
    found = [Document(0, (1, *range(3, 23))), Document(1, tuple(range(3, 23)))]
    tokens = pack_rows(found, 64, 12, [1], "made up")
    assert [row[:2].tolist() for row in tokens.rows[:, :2]][:1] == [[1, 3]]
    assert all(row[0] == 1 and row[1] != 1 for row in tokens.rows)


def test_surplus_special_tokens_are_allowed_and_others_are_not(tmp_path: Path) -> None:
    folder = tiny.with_tokenizer(tmp_path / "m")
    teacher = load(folder)
    teacher.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    teacher.tokenizer.save_pretrained(folder)
    assert len(load(folder).tokenizer) == 65
    teacher.tokenizer.add_tokens(["word"])
    teacher.tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="66 entries, the embedding only 64 rows"):
        load(folder)
