"""A narrower residual stream: equal to projections at every boundary, in a checkpoint of the stock type."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn

from billhook.core.errors import BudgetError, ModelError
from billhook.core.plan import Plan
from billhook.data.token_sets import TokenSet, token_set
from billhook.methods.export.checkpoint import save
from billhook.models.load import Teacher, load
from billhook.models.residual.student import require_equal, sliced, widths_of
from billhook.models.surgery import apply
from billhook.studies.slicing.basis import basis_of

WIDTH = 32
SLICED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed", "gemma", "phi3", "mixtral")},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama_tied": {},
    "gpt_oss": {},
}
REFUSED = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), "its norms stand behind attention and MLP"),
    **dict.fromkeys(("phi", "stablelm", "cohere", "nemotron", "gpt2", "opt", "falcon", "gpt_neox"), "no RMS norms"),
}


def teacher_of(folder: Path, variant: str = "llama", **more: Any) -> Teacher:
    """A tiny model whose epsilon matters: a student that forgets to scale it differs."""
    return load(tiny.saved(folder / variant, variant, **({"rms_norm_eps": 0.05} | more)))


def basis(columns: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix, or some of its columns."""
    square = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square)[0][:, :columns]


def text(rows: int = 24, length: int = 20) -> TokenSet:
    ids = tiny.tokens(rows, length).tolist()
    return token_set([tuple(row) for row in ids], range(rows), range(rows), [""] * rows, "random")


def logits(model: Any, rows: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        told: torch.Tensor = model(input_ids=tiny.tokens(2, 17) if rows is None else rows).logits
    return told


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-4


def projected(teacher: Teacher, kept: torch.Tensor) -> torch.Tensor:
    """The teacher's logits with h ← QQᵀh put in by hooks: behind the embedding, and on what every site adds."""
    model = teacher.model
    projection = (kept @ kept.T).float()
    modules: list[nn.Module] = [model.get_input_embeddings()]
    for block in model.model.layers:
        modules += [block.self_attn, block.mlp]

    def project(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] @ projection, *output[1:]) if isinstance(output, tuple) else output @ projection

    hooks = [module.register_forward_hook(project) for module in modules]
    try:
        return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SLICED)
def test_any_rotation_leaves_the_logits_and_deletion_equals_projection(variant: str, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, variant, **SLICED[variant])
    whole = logits(teacher.model)
    assert close(logits(sliced(teacher, basis(WIDTH))), whole)
    for kept in (basis(24, seed=1), basis(8, seed=2)):
        student = sliced(teacher, kept)
        assert student.config.hidden_size == kept.shape[1]
        assert close(logits(student), projected(teacher, kept))
        assert not close(logits(student), whole), "else the projections do nothing, and the comparison says nothing"
        assert type(student) is type(teacher.model)
    assert torch.equal(logits(teacher.model), whole), "the teacher is as it was"


def test_a_rotation_inside_of_the_kept_subspace_changes_nothing(tmp_path: Path) -> None:
    teacher, kept = teacher_of(tmp_path), basis(16)
    assert close(logits(sliced(teacher, kept @ basis(16, 16, seed=3))), logits(sliced(teacher, kept)))
    assert not close(logits(sliced(teacher, basis(16, seed=4))), logits(sliced(teacher, kept)))


def test_streams_inside_a_subspace_lose_nothing(tmp_path: Path) -> None:
    model, kept = tiny.build("llama", attention_bias=True), basis(16).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ kept @ kept.T)
        for block in model.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.copy_(kept @ kept.T @ module.weight)
            block.self_attn.o_proj.bias.copy_(kept @ kept.T @ block.self_attn.o_proj.bias)
    model.save_pretrained(tmp_path / "planted")
    teacher = load(tmp_path / "planted")
    found = basis_of(teacher, text())
    assert found.kept(16) == pytest.approx(1, abs=1e-9)
    assert found.kept(8) < 0.99
    assert close(logits(sliced(teacher, found.vectors[:, :16])), logits(teacher.model))
    assert not close(logits(sliced(teacher, found.vectors[:, :8])), logits(teacher.model))


def test_the_tail_of_the_eigenvalues_is_the_energy_lost(tmp_path: Path) -> None:
    teacher, tokens = teacher_of(tmp_path), text()
    found = basis_of(teacher, tokens)
    assert float(found.energies.sum()) == pytest.approx(1)
    assert bool((found.energies[:-1] >= found.energies[1:]).all())
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(WIDTH, dtype=torch.float64))
    streams: list[torch.Tensor] = []
    norms = [teacher.model.model.norm]  # each of them reads the stream at one boundary
    for block in teacher.model.model.layers:
        norms += [block.input_layernorm, block.post_attention_layernorm]
    hooks = [norm.register_forward_pre_hook(lambda norm, args: streams.append(args[0].double())) for norm in norms]
    logits(teacher.model, tokens.rows)
    for hook in hooks:
        hook.remove()
    unit = torch.cat([stream.flatten(0, 1) for stream in streams])
    unit = unit / unit.norm(dim=-1, keepdim=True)
    assert len(unit) == tokens.tokens * (2 * len(teacher.model.model.layers) + 1)
    for width in (8, 16, 24):
        kept = found.vectors[:, :width]
        lost = (unit - unit @ kept @ kept.T).square().sum(-1).mean()
        assert float(lost) == pytest.approx(float(found.energies[width:].sum()), abs=1e-6)
        other = basis(width, seed=width)
        assert float((unit @ other).square().sum(-1).mean()) < found.kept(width), "no other basis keeps more"


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "more"), [("llama_tied", {"vocab_size": 800}), ("llama", {}), ("mixtral", {})])
def test_a_width_is_refused_exactly_where_it_saves_nothing(variant: str, more: dict[str, int], tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path, variant, **more)
    widths, there = widths_of(teacher), sum(p.numel() for p in teacher.model.parameters())
    assert (widths.whole, widths.step, widths.parameters) == (WIDTH, 8, there)
    assert widths.tied == (variant == "llama_tied")
    saving = []
    for width in range(8, WIDTH + 1, 8):
        student = sliced(teacher, basis(width))
        assert widths.parameters_at(width) == sum(p.numel() for p in student.parameters())
        assert student.get_input_embeddings().weight is not student.get_output_embeddings().weight
        if widths.parameters_at(width) < there:
            saving.append(width)
            assert widths.nearest(width) == widths.nearest(width + 7 if width < widths.most else width) == width
        else:
            with pytest.raises(BudgetError, match=f"at most width={widths.most}"):
                widths.nearest(width)
    assert widths.most == max(saving) == (16 if widths.tied else 24)


def test_a_tied_head_that_is_most_of_the_model_leaves_no_width(tmp_path: Path) -> None:
    widths = widths_of(teacher_of(tmp_path, "llama_tied", vocab_size=64 * WIDTH, intermediate_size=8))
    assert widths.parameters_at(WIDTH) - widths.parameters == 64 * WIDTH * WIDTH, "what untying adds"
    with pytest.raises(BudgetError, match="the head is tied"):
        widths.nearest(24)


def test_widths_are_rounded_to_what_the_type_allows(tmp_path: Path) -> None:
    three = {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}
    llama, qwen = (widths_of(teacher_of(tmp_path, name, **three)) for name in ("llama", "qwen3"))
    assert (llama.step, llama.most) == (24, 48), "transformers wants a multiple of the heads there"
    assert (qwen.step, qwen.most) == (8, 64)
    assert (llama.nearest(50), qwen.nearest(50)) == (48, 48)
    assert (llama.nearest(Fraction(1, 2)), qwen.nearest(Fraction(9, 10))) == (24, 64)
    for asked in (23, 72, 73):
        with pytest.raises(BudgetError, match=r"residual width 72 .* multiple of 24, at most width=48"):
            llama.nearest(asked)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", REFUSED)
def test_other_norms_are_refused_by_name(variant: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"this {variant} cannot be cut: .*{REFUSED[variant]}.*billhook prune"):
        widths_of(load(tiny.saved(tmp_path / variant, variant)))


def test_every_architecture_is_either_cut_or_refused() -> None:
    assert set(tiny.TYPES) <= {*SLICED, *REFUSED}


def test_models_with_shapes_of_their_own_are_refused(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path)
    sites = [site for site in teacher.anatomy.sites_present() if site.block == 1]
    whole = load_student(teacher, Plan(frozenset(sites)), tmp_path / "blocks")
    assert close(logits(sliced(whole, basis(WIDTH))), logits(whole.model)), "fewer blocks are a stock model"
    assert sliced(whole, basis(16)).config.billhook["kept_blocks"] == [0, 2, 3]
    with pytest.raises(ModelError, match="Slice the unpruned model, then prune it"):
        widths_of(load_student(teacher, Plan(frozenset(sites[:1])), tmp_path / "sites"))


def load_student(teacher: Teacher, plan: Plan, folder: Path) -> Teacher:
    save(apply(teacher, plan), None, plan, folder, teacher=teacher)
    return load(folder)


def test_a_layer_norm_and_a_parameter_that_no_row_names_are_refused(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path)
    block = teacher.model.model.layers[2]
    block.mlp.gain = nn.Parameter(torch.ones(WIDTH))
    with pytest.raises(ModelError, match=r"does not say whether mlp\.gain reads the residual stream"):
        widths_of(teacher)
    del block.mlp.gain
    block.input_layernorm = nn.LayerNorm(WIDTH, bias=False)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.input_layernorm is no RMS norm"):
        widths_of(teacher)


def test_what_the_architecture_does_not_say_is_found_before_anything_is_written(tmp_path: Path) -> None:
    teacher, kept, rows = teacher_of(tmp_path), basis(16), tiny.tokens(1, 12)
    require_equal(teacher, [kept], sliced(teacher, kept), rows)
    mlp = teacher.model.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: (args[0] * (1 + args[0][..., :1]),))
    with pytest.raises(ModelError, match="off those of the same model with its stream projected"):
        require_equal(teacher, [kept], sliced(teacher, kept), rows)
    hook.remove()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_half_precision_stays_within_its_rounding(compute: str, tmp_path: Path) -> None:
    """What is measured in memory is what a bfloat16 checkpoint holds, in whichever dtype it is computed."""
    teacher, kept = load(tiny.saved(tmp_path / "half", "qwen3", torch.bfloat16), dtype=compute), basis(16)
    student = sliced(teacher, kept)
    require_equal(teacher, [kept], student, tiny.tokens(1, 12))
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    assert torch.equal(logits(load(tmp_path / "out", dtype=compute).model), logits(student))


def test_transformers_has_the_type_at_that_width(tmp_path: Path) -> None:
    """What is built by hand is what from_pretrained builds of its config: nothing is left of the old width."""
    teacher = teacher_of(tmp_path, "gemma")
    student = sliced(teacher, basis(16))
    student.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(student))
    generated = [each.generate(tiny.tokens(1, 5), max_new_tokens=6, do_sample=False) for each in (again, student)]
    assert torch.equal(*generated)
