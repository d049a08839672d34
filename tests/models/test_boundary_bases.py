"""A residual stream with a basis for each boundary: equal to projections there, in a checkpoint of its own type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

from billhook.core.errors import BudgetError, ModelError, PlanError
from billhook.core.options import BasisRule
from billhook.core.plan import Plan, Site
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import logits as measured_logits
from billhook.methods.export import EXPORTS, form_of
from billhook.methods.export.checkpoint import save
from billhook.methods.export.serving import table
from billhook.models.load import Teacher, load, student_as_teacher
from billhook.models.modeling_billhook import PREFIX
from billhook.models.residual.student import require_equal, sliced, sliced_by_boundary, widths_of
from billhook.models.surgery import apply
from billhook.models.vocabulary.student import cut_model
from billhook.studies.slicing.basis import boundary_bases

WIDTH, BOUNDARIES = 32, 9
SLICED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed", "gemma", "phi3", "mixtral")},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama_tied": {},
    "gpt_oss": {},
}
ODD: dict[str, Any] = {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}  # and a width of 40


def teacher_of(folder: Path, variant: str = "llama", **more: Any) -> Teacher:
    """A tiny model whose epsilon matters: a student that forgets to scale it differs."""
    return load(tiny.saved(folder / variant, variant, **({"rms_norm_eps": 0.05} | more)))


def bases(columns: int, width: int = WIDTH, seed: int = 0) -> list[torch.Tensor]:
    """Some columns of a random orthogonal matrix for each boundary, all different."""
    draw = torch.Generator().manual_seed(seed)
    squares = [torch.randn(width, width, dtype=torch.float64, generator=draw) for _ in range(BOUNDARIES)]
    return [torch.linalg.qr(square)[0][:, :columns] for square in squares]


def text(rows: int = 24, length: int = 20) -> TokenSet:
    ids = tiny.tokens(rows, length).tolist()
    return token_set([tuple(row) for row in ids], range(rows), range(rows), [""] * rows, "random")


@torch.no_grad()
def logits(model: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
    told: torch.Tensor = model(input_ids=tiny.tokens(2, 17) if rows is None else rows).logits
    return told


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-4


def projected(
    teacher: Teacher, kept: Sequence[torch.Tensor], rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The teacher's logits with its stream projected at each boundary, and the streams before they were projected.

    By hooks on the embedding, around every attention, and on the output of every block.
    """
    model, streams = teacher.model, list[torch.Tensor]()

    def cut(number: int, stream: torch.Tensor) -> torch.Tensor:
        assert len(streams) == number
        streams.append(stream)
        return stream @ (kept[number] @ kept[number].T).float()

    with ExitStack() as hooks:

        def hook(handle: Any) -> None:
            hooks.callback(handle.remove)

        hook(model.get_input_embeddings().register_forward_hook(lambda m, args, out: cut(0, out)))
        for index, block in enumerate(model.model.layers):
            here: dict[str, torch.Tensor] = {}

            def enter(module: nn.Module, args: Any, here: dict[str, torch.Tensor] = here) -> None:
                here["stream"] = args[0]

            def attend(
                module: nn.Module, args: Any, out: Any, number: int = 2 * index + 1, h: dict[str, torch.Tensor] = here
            ) -> Any:
                return (cut(number, h["stream"] + out[0]) - h["stream"], *out[1:])

            hook(block.register_forward_pre_hook(enter))
            hook(block.self_attn.register_forward_hook(attend))
            hook(block.register_forward_hook(lambda m, args, out, number=2 * index + 2: cut(number, out)))
        told = logits(model, rows)
    return told, streams


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SLICED)
def test_any_bases_leave_the_logits_and_deletion_equals_projection(variant: str, tmp_path: Path) -> None:
    """And the checkpoint is what was compared: loaded from its folder, with and without the KV cache."""
    teacher = teacher_of(tmp_path, variant, **SLICED[variant])
    whole = logits(teacher.model)
    assert close(logits(sliced_by_boundary(teacher, bases(WIDTH))), whole)
    kept = bases(24, seed=2)  # with which no expert is chosen by rounding
    student = sliced_by_boundary(teacher, kept)
    assert close(logits(student), projected(teacher, kept)[0])
    assert not close(logits(student), whole), "else the projections do nothing, and the comparison says nothing"
    require_equal(teacher, kept, student, tiny.tokens(1, 12))
    assert torch.equal(logits(teacher.model), whole), "the teacher is as it was"
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(again).__name__ == PREFIX + type(teacher.model).__name__
    torch.testing.assert_close(logits(again), logits(student))
    mask = torch.ones(2, 6, dtype=torch.int64)
    texts = [
        again.generate(tiny.tokens(2, 6), attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    widths = widths_of(teacher, "boundary")
    assert widths.parameters_at(24) == sum(p.numel() for p in again.parameters())
    told = load(tmp_path / "out")
    assert told.pruned.shortcuts
    assert told.anatomy.total("parameters") == widths.parameters_at(24)


def test_equal_bases_are_one_basis_and_a_rotation_inside_of_one_changes_nothing(tmp_path: Path) -> None:
    teacher, kept = teacher_of(tmp_path), bases(16)
    student = sliced_by_boundary(teacher, [kept[0]] * BOUNDARIES)
    assert close(logits(student), logits(sliced(teacher, kept[0])))
    for block in student.model.layers:
        for shortcut in block.shortcuts:
            torch.testing.assert_close(shortcut.weight, torch.eye(16))
    turned = list(kept)
    turned[3] = kept[3] @ bases(16, 16, seed=5)[0]
    assert close(logits(sliced_by_boundary(teacher, turned)), logits(sliced_by_boundary(teacher, kept)))
    turned[3] = bases(16, seed=6)[3]
    assert not close(logits(sliced_by_boundary(teacher, turned)), logits(sliced_by_boundary(teacher, kept)))


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe_mixed"])
def test_each_basis_is_the_best_for_the_streams_of_the_sliced_model(variant: str, tmp_path: Path) -> None:
    """By the singular vectors of the streams that reach each boundary once those before it are projected."""
    teacher, tokens = teacher_of(tmp_path, variant), text()
    found = boundary_bases(teacher, tokens, 16)
    streams = projected(teacher, [each.vectors for each in found], tokens.rows)[1]
    assert len(found) == len(streams) == BOUNDARIES
    for each, stream in zip(found, streams, strict=True):
        rows = stream.flatten(0, 1).double().numpy()
        values, right = np.linalg.svd(rows, full_matrices=False)[1:]
        assert each.energies.tolist() == pytest.approx((values**2 / (values**2).sum()).tolist(), abs=1e-5)
        for best in (each.vectors.numpy(), right[:16].T):
            lost = ((rows - rows @ best @ best.T) ** 2).sum() / (rows**2).sum()
            assert 1 - each.kept(16) == pytest.approx(lost, abs=1e-5)
    before = logits(teacher.model, tokens.rows)
    assert not close(projected(teacher, [each.vectors for each in found], tokens.rows)[0], before)


def test_streams_inside_a_subspace_lose_nothing(tmp_path: Path) -> None:
    model, kept = tiny.build("llama"), bases(16)[0].float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ kept @ kept.T)
        for block in model.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.copy_(kept @ kept.T @ module.weight)
    model.save_pretrained(tmp_path / "planted")
    teacher = load(tmp_path / "planted")
    found = boundary_bases(teacher, text(), 16)
    assert min(each.kept(16) for each in found) == pytest.approx(1, abs=1e-9)
    assert close(logits(sliced_by_boundary(teacher, [each.vectors for each in found])), logits(teacher.model))
    fewer = [each.vectors for each in boundary_bases(teacher, text(), 8)]
    assert not close(logits(sliced_by_boundary(teacher, fewer)), logits(teacher.model))


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "more"), [("llama_tied", {"vocab_size": 400}), ("llama", {}), ("mixtral", {})])
def test_a_width_is_refused_exactly_where_it_saves_nothing(variant: str, more: dict[str, int], tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, variant, **more)
    widths, there = widths_of(teacher, "boundary"), sum(p.numel() for p in teacher.model.parameters())
    assert (widths.step, widths.parameters, widths.shortcuts) == (8, there, BOUNDARIES - 1)
    saving = []
    for width in range(8, WIDTH + 1, 8):
        student = sliced_by_boundary(teacher, bases(width))
        assert widths.parameters_at(width) == sum(p.numel() for p in student.parameters())
        one = sum(p.numel() for p in sliced(teacher, bases(width)[0]).parameters())
        assert widths.parameters_at(width) == one + (BOUNDARIES - 1) * width**2
        flops = [student_as_teacher(teacher, each).anatomy.total("flops_per_token") for each in (
            student, sliced(teacher, bases(width)[0])
        )]  # fmt: skip
        assert flops[0] - flops[1] == 2 * (BOUNDARIES - 1) * width**2
        if widths.parameters_at(width) < there:
            saving.append(width)
            assert widths.nearest(width) == width
        else:
            with pytest.raises(BudgetError, match=f"with matrices in its shortcuts.* at most width={widths.most}"):
                widths.nearest(width)
    assert widths.most == max(saving) == (16 if widths.tied else 24)


def test_no_type_asks_for_a_multiple_of_its_heads(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, "llama", **ODD)
    assert (widths_of(teacher).step, widths_of(teacher, "boundary").step) == (24, 8)
    assert (widths_of(teacher).nearest(47), widths_of(teacher, "boundary").nearest(47)) == (24, 40)


# -- elsewhere --------------------------------------------------------------------------------------------------------

FOREIGN = """
import sys, torch, transformers
rows = torch.tensor({rows})
for folder in sys.argv[2:]:
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    model.save_pretrained(folder + "-again")
    again = auto.from_pretrained(folder + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(rows).logits, model(rows).logits)
        torch.save(model(rows).logits, folder + ".logits")
    cached, whole = (
        model.generate(rows[:1], max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)
    static = model.generate(
        rows[:1], max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0, disable_compile=True
    )
    assert torch.equal(static, whole)
assert "billhook" not in sys.modules
"""


def test_without_billhook_its_own_file_gives_it(tmp_path: Path) -> None:
    rows, students = tiny.tokens(2, 12), {}
    for variant, more in (("llama", ODD), ("gpt_oss", {})):
        teacher = teacher_of(tmp_path, variant, **more)
        students[variant] = sliced_by_boundary(teacher, bases(40 if more else 16, 72 if more else WIDTH))
        save(students[variant], None, Plan(), tmp_path / "out" / variant, teacher=teacher)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", FOREIGN.format(rows=rows.tolist()), "-", *(f"out/{name}" for name in students)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for variant, student in students.items():
        torch.testing.assert_close(torch.load(tmp_path / "out" / f"{variant}.logits"), logits(student, rows))


def test_it_is_final_and_says_so(tmp_path: Path) -> None:
    """Whatever removes or rewrites is refused by name; a copy and a smaller vocabulary are not."""
    teacher = teacher_of(tmp_path)
    save(sliced_by_boundary(teacher, bases(16)), None, Plan(), tmp_path / "out", teacher=teacher)
    final = load(tmp_path / "out")
    for plan in (Plan(frozenset({Site(1, "mlp")})), final.anatomy.parse(["mlp.1[0-7]"])):
        with pytest.raises(ModelError, match=r"out has a basis for each boundary .* by whole blocks, and slice"):
            apply(final, plan)
    rules: tuple[BasisRule, ...] = ("one", "boundary")
    for rule in rules:
        with pytest.raises(ModelError, match="nothing in it can be removed, narrowed or factored"):
            widths_of(final, rule)
    with pytest.raises(PlanError, match="no place for matrices in the shortcuts"):
        apply(final, Plan(), stock=True)
    taken = {"transformers", "adapter", "onnx", "openvino"}
    for name in EXPORTS:
        if name in taken:
            form_of(name, final, Plan())
            continue
        with pytest.raises(
            PlanError, match=rf"export {name} has no place for the matrices in the shortcuts of a model"
        ):
            form_of(name, final, Plan())
    assert {row.target for row in table(final.model.config) if row.reason is None} == {
        "transformers",
        "onnx",
        "openvino",
    }
    assert all("slice with one basis" in row.reason for row in table(final.model.config) if row.reason is not None)
    rows = tiny.tokens(1, 12) % 40
    torch.testing.assert_close(measured_logits(final, Plan(), rows), logits(apply(final, Plan()), rows))
    fewer = cut_model(final, {index: index for index in range(40)})
    save(fewer, None, Plan(), tmp_path / "fewer", teacher=final)
    torch.testing.assert_close(logits(load(tmp_path / "fewer").model, rows), logits(final.model, rows)[..., :40])


def test_a_config_that_says_it_otherwise_is_refused(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path)
    save(sliced_by_boundary(teacher, bases(16)), None, Plan(), tmp_path / "out", teacher=teacher)
    file = tmp_path / "out" / "config.json"
    told = json.loads(file.read_text())["billhook"]
    assert told["shortcuts"] is True
    for wrong, said in (("yes", r"billhook.*shortcuts"), (False, "unexpected keys")):
        tiny.change_json(file, billhook=told | {"shortcuts": wrong})
        with pytest.raises(ModelError, match=said):
            load(tmp_path / "out")


def test_blocks_without_a_boundary_between_their_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(tmp_path)
    row = replace(teacher.architecture, parallel=lambda config: True)
    monkeypatch.setattr(Teacher, "architecture", row)
    assert widths_of(teacher).most == 24
    with pytest.raises(ModelError, match=r"an attention and then an MLP.* Leave bases= out for one basis"):
        widths_of(teacher, "boundary")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_half_precision_stays_within_its_rounding(compute: str, tmp_path: Path) -> None:
    """What is measured in memory is what a bfloat16 checkpoint holds, in whichever dtype it is computed."""
    teacher, kept = load(tiny.saved(tmp_path / "half", "qwen3", torch.bfloat16), dtype=compute), bases(16)
    student = sliced_by_boundary(teacher, kept)
    require_equal(teacher, kept, student, tiny.tokens(1, 12))
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    again = load(tmp_path / "out", dtype=compute)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again.model), logits(student))
