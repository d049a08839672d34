"""A streamed checkpoint is the resident one bit for bit, on every row, and nothing of it stays in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import billhook
from billhook.core.errors import ModelError
from billhook.core.plan import Plan
from billhook.methods.export.checkpoint import save
from billhook.models import architectures, structure
from billhook.models.load import load
from billhook.models.streaming import StreamedWeights, build_on_meta
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
CPU = torch.device("cpu")
ROWS = tiny.tokens(2, 20)
HALF = ("float32", "bfloat16", "float16")


def resident(folder: Path, dtype: torch.dtype) -> Any:
    billhook.register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, StreamedWeights]:
    billhook.register()
    model = build_on_meta(folder, dtype, CPU)
    return model, StreamedWeights(folder, model, architectures.architecture_of(model.config).blocks, dtype, CPU)


def equal(mine: Any, other: Any) -> bool:
    """Of tensors bit for bit and dtype for dtype, or of tuples of them."""
    if isinstance(other, tuple):
        return len(mine) == len(other) and all(equal(a, b) for a, b in zip(mine, other, strict=True))
    if not isinstance(other, torch.Tensor):
        return mine is other is None
    return mine.device == other.device and mine.dtype == other.dtype and torch.equal(mine, other)


def calls(model: Any) -> list[tuple[Any, Any, Any]]:
    """Arguments, keyword arguments and output of every block in one forward pass."""
    found: list[tuple[Any, Any, Any]] = []
    blocks = structure.blocks_of(model, architectures.architecture_of(model.config))
    hooks = [
        block.register_forward_hook(lambda m, args, kwargs, out: found.append((args, kwargs, out)), with_kwargs=True)
        for block in blocks
    ]
    with torch.inference_mode():
        model(input_ids=ROWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def on_meta(module: torch.nn.Module) -> list[bool]:
    return [p.is_meta for p in module.parameters()]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("billhook-read")]


@torch.inference_mode()
def compare(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Everything that a streamed checkpoint gives, with what from_pretrained gives."""
    whole = resident(folder, dtype)
    told = calls(whole)
    model, weights = streamed(folder, dtype)
    assert (type(model), model.training) == (type(whole), False)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.config._attn_implementation == whole.config._attn_implementation
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert repr(model._weight_conversions) == repr(whole._weight_conversions)  # what writing a checkpoint goes by
    assert all(on_meta(model))
    assert not any(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(whole.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters()), "ties"
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(equal(buffer, buffers[name]) for name, buffer in model.named_buffers())

    path = architectures.architecture_of(model.config).blocks
    assert len(told) == len(model.get_submodule(path))
    for index, block in enumerate(weights.blocks(range(len(told)))):
        other = whole.get_submodule(f"{path}.{index}").state_dict()
        assert block is model.get_submodule(f"{path}.{index}")
        assert other.keys() == block.state_dict().keys()
        assert all(equal(value, other[name]) for name, value in block.state_dict().items())
        assert not any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))
        args, kwargs, output = told[index]
        assert equal(block(*args, **kwargs), output)

    weights.load_outside_blocks()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    filled = 0
    for name, value in model.named_parameters():
        if name.startswith(f"{path}.") or id(value) in embeddings:
            assert value.is_meta, name
        else:
            filled += 1
            assert equal(value.data, whole.get_parameter(name).data), name
    assert filled > 0
    ids = torch.tensor([5, 63, 0, 5])
    for matrix, rows in (
        (whole.get_input_embeddings().weight.data, weights.rows),
        (whole.get_output_embeddings().weight.data, weights.head_rows),
    ):
        assert equal(rows(torch.arange(64)), matrix)
        assert equal(rows(ids), matrix[ids])
    pieces = list(weights.head(25))
    assert [len(piece) for piece in pieces] == [25, 25, 14]
    assert equal(torch.cat(pieces), whole.get_output_embeddings().weight.data)


def edited(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint of one shard, with its tensors changed in place or replaced by what `change` returns."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- the same values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_streamed_is_resident(variant: str, checkpoint: Folder) -> None:
    compare(checkpoint(variant))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_streamed_is_resident_from_bfloat16(variant: str, tmp_path: Path) -> None:
    compare(tiny.saved(tmp_path / "m", variant, torch.bfloat16))


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt_oss", "mixtral", "gpt2"])
@pytest.mark.parametrize("compute", HALF[1:])
def test_streamed_is_resident_in_half_precision(variant: str, compute: str, checkpoint: Folder) -> None:
    compare(checkpoint(variant), getattr(torch, compute))


@pytest.mark.parametrize("variant", ["llama_tied", "mixtral", "gpt_neox"])
def test_shards(variant: str, tmp_path: Path) -> None:
    tiny.build(variant).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    compare(tmp_path / "m")


@pytest.mark.parametrize("variant", ["gemma3_text", "gpt_neox", "mixtral"])
def test_pruned_checkpoints(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    plan = Plan.parse(["attention.0", "mlp.0", "attention.2", "mlp.1"])
    save(apply(teacher, plan), None, plan, tmp_path / "s", teacher=teacher)
    assert build_on_meta(tmp_path / "s", torch.float32, CPU).config.model_type.startswith("billhook-")
    compare(tmp_path / "s")


def test_the_forms_that_checkpoints_come_in(checkpoint: Folder, tmp_path: Path) -> None:
    """Without the base model's prefix, with old masks and rotary buffers, with a tied head under another name."""
    mask = torch.ones(1, 1, 96, 96)

    def old_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("transformer."): t for name, t in tensors.items()} | {"h.0.attn.bias": mask}

    def old_neox(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.layers.1.attention.bias"] = mask
        tensors["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(4)

    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    def both_heads(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def two_heads(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]

    for variant, change in (
        ("gpt2", old_gpt2),
        ("gpt_neox", old_neox),
        ("llama_tied", other_head),
        ("llama_tied", both_heads),
        ("llama_tied", two_heads),
    ):
        compare(edited(checkpoint(variant), tmp_path / change.__name__, change))


# --- what is in memory -------------------------------------------------------------------------------------------


def test_a_block_leaves_when_the_next_one_comes(checkpoint: Folder) -> None:
    model, weights = streamed(checkpoint("mixtral"))
    blocks = structure.blocks_of(model, architectures.architecture_of(model.config))
    blank = list(model.parameters())
    stream = weights.blocks([2, 0, 3, 2])
    for index in (2, 0, 3, 2):
        assert next(stream) is blocks[index]
        assert [any(on_meta(block)) for block in blocks] == [i != index for i in range(4)]
        assert [all(on_meta(block)) for block in blocks] == [i != index for i in range(4)]
    assert next(stream, None) is None
    assert all(mine is before for mine, before in zip(model.parameters(), blank, strict=True))
    assert not readers()


def test_closing_early_ends_the_thread_and_frees_the_block(checkpoint: Folder) -> None:
    model, weights = streamed(checkpoint("llama"))
    stream = weights.blocks(range(4))
    block = next(stream)
    assert not any(on_meta(block))
    assert len(readers()) == 1
    stream.close()
    assert all(on_meta(model))
    assert not readers()
    assert list(weights.blocks([])) == []


def test_one_block_is_read_ahead_and_no_more(checkpoint: Folder) -> None:
    _, weights = streamed(checkpoint("llama"))
    for _ in weights.blocks([0]):
        one = weights.bytes_read
    assert one > 0
    _, weights = streamed(checkpoint("llama"))
    stream = weights.blocks(range(4))
    for turn in (1, 2, 3):
        next(stream)
        for _ in range(200):  # until the reader has had its turn
            if weights.bytes_read >= (turn + 1) * one:
                break
            threading.Event().wait(0.01)
        assert weights.bytes_read == (turn + 1) * one
    stream.close()


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_experts_are_put_together_one_at_a_time(variant: str, checkpoint: Folder) -> None:
    _, weights = streamed(checkpoint(variant))
    pieces = {recipe.first: len(recipe.split()) for recipe in weights._recipes}
    assert {name: count for name, count in pieces.items() if count > 1} == {
        f"model.layers.{block}.mlp.experts.{name}": 4 for block in range(4) for name in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("variant", ["llama", "llama_tied", "mixtral"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_pass_reads_every_byte_once_and_leaves_no_file_open(
    variant: str, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny.saved(tmp_path / "m", variant, stored)
    total = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    model, weights = streamed(folder)
    assert weights.bytes_read == 0
    for _ in weights.blocks(range(4)):
        pass
    weights.load_outside_blocks()
    pieces = list(weights.head(10))
    if not model.config.tie_word_embeddings:
        weights.rows(torch.arange(64))
    assert weights.bytes_read == total
    weights.rows(torch.tensor([7, 9, 9]))
    assert weights.bytes_read == total + 3 * 32 * stored.itemsize
    if (maps := Path("/proc/self/maps")).exists():
        assert str(folder) not in maps.read_text()
    assert sum(map(len, pieces)) == 64


# --- file to file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "llama_tied", "mixtral", "qwen3_moe_mixed", "gpt_neox", "gpt2"])
def test_targets_and_source_speak_of_the_file(variant: str, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "m", variant, torch.bfloat16)
    stored, whole = load_file(folder / "model.safetensors"), resident(folder, torch.float32)
    _, weights = streamed(folder)
    targets = weights.targets()
    assert targets.keys() == stored.keys()
    assert {name for names in targets.values() for name in names} == set(whole.state_dict())
    parts: dict[str, int] = {}
    for name, names in targets.items():
        assert equal(weights.source(name), stored[name])
        for target in names:
            parts[target] = parts.get(target, 0) + 1
            if "experts" not in target:
                assert torch.equal(stored[name].float(), whole.get_parameter(target))
    experts = variant in ("mixtral", "qwen3_moe_mixed")
    assert sorted(set(parts.values())) == ([1, 4, 8] if experts else [1])
    if variant == "llama_tied":
        assert targets["model.embed_tokens.weight"] == ("model.embed_tokens.weight", "lm_head.weight")
    if variant == "gpt_neox":
        assert targets["embed_out.weight"] == ("lm_head.weight",)


# --- what is refused ---------------------------------------------------------------------------------------------

UP, EXPERT = "model.layers.1.mlp.up_proj.weight", "model.layers.1.block_sparse_moe.experts.2.w1.weight"
MERGED = r"model\.layers\.1\.mlp\.experts\.gate_up_proj"
Tensors = dict[str, torch.Tensor]


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


FAULTS: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing": ("llama", without(UP), rf"1 missing keys, such as {UP}\. Nothing is filled .* download"),
    "missing norm": ("llama", without("model.norm"), r"1 missing keys, such as model\.norm\.weight\."),
    "missing embeddings": ("llama_tied", without("embed"), r"2 missing keys, such as lm_head\.weight\."),
    "left over": (
        "llama",
        lambda t: t | {"model.layers.1.x": t[UP]},
        r"1 unexpected keys.*layers\.1\.x\.",
    ),
    "fifth block": (
        "llama",
        lambda t: t | {UP.replace("1", "4"): t[UP]},
        r"1 unexpected keys.*layers\.4\.mlp\.up",
    ),
    "twice": ("gpt2", lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, r"1 unexpected keys.*wte\.weight\."),
    "shape": ("llama", lambda t: t | {UP: t[UP][1:]}, rf"1 mismatched keys, such as {UP}\. Nothing"),
    "turned": ("llama", lambda t: t | {UP: t[UP].T.contiguous()}, rf"1 mismatched keys, such as {UP}\. Nothing"),
    "missing expert": ("mixtral", without(EXPERT), rf"1 mismatched keys, such as {MERGED}\."),
    "missing half of all experts": ("mixtral", without(".w1."), r"4 mismatched keys, such as .*gate_up_proj\."),
    "expert's shape": ("mixtral", lambda t: t | {EXPERT: t[EXPERT][1:]}, rf"1 mismatched keys, such as {MERGED}\."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_before_anything_is_read(fault: str, checkpoint: Folder, tmp_path: Path) -> None:
    variant, change, message = FAULTS[fault]
    folder = edited(checkpoint(variant), tmp_path / "m", change)
    with pytest.raises(ModelError, match=message):
        streamed(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_is_refused_when_it_is_read(
    value: float, checkpoint: Folder, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 4] = value

    model, weights = streamed(edited(checkpoint("llama"), tmp_path / "m", spoil))
    stream = weights.blocks(range(4))
    next(stream)
    with pytest.raises(ModelError, match=rf"^{UP} holds NaN or infinite weights\. Download"):
        next(stream)
    assert all(on_meta(model))
    assert not readers()


def test_embeddings_and_the_rest_are_checked_too(checkpoint: Folder, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name][40] = float("nan")
        tensors["model.norm.weight"][0] = float("inf")

    _, weights = streamed(edited(checkpoint("llama"), tmp_path / "m", spoil))
    weights.rows(torch.tensor([39, 41]))
    with pytest.raises(ModelError, match=r"^model\.embed_tokens\.weight holds NaN"):
        weights.rows(torch.tensor([39, 40]))
    with pytest.raises(ModelError, match=r"^lm_head\.weight holds NaN"):
        weights.head_rows(torch.tensor([40]))
    with pytest.raises(ModelError, match=r"^lm_head\.weight holds NaN"):
        list(weights.head(16))
    with pytest.raises(ModelError, match=r"^model\.norm\.weight holds NaN"):
        weights.load_outside_blocks()


def test_a_file_that_breaks_meanwhile_reaches_the_consumer(checkpoint: Folder, tmp_path: Path) -> None:
    _, weights = streamed(edited(checkpoint("llama"), tmp_path / "m", lambda tensors: None))
    stream = weights.blocks([0, 1, 2])
    next(stream)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged .* Download it again"):
        list(stream)
    assert not readers()
