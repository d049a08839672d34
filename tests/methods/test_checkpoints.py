"""Every architecture row: mask = delete, saved = loaded, cached = uncached, and nothing loads wrong in silence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as write_file

import billhook
from billhook.core.errors import BillhookError, ModelError
from billhook.core.plan import Plan, Site
from billhook.methods.export import Student, export_student, shards
from billhook.methods.export import checkpoint as written
from billhook.methods.export.checkpoint import save, verify_round_trip
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply, masked
from billhook.models.transformers_internals import cache_name

Folder = Callable[[str], Path]
PLANS = {
    "one": "attention.1",
    "first_attention": "attention.0,mlp.2",
    "whole_block": "attention.1,mlp.1",
    "mixed": "attention.0,mlp.0,attention.2,mlp.1",
}
ROWS = tiny.tokens(2, 20)


@contextmanager
def hooked(teacher: Teacher, plan: Plan) -> Iterator[None]:
    """The reference mask: hooks on the stock model that turn the output of a sublayer into zeros after computing it."""

    def zero(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    names = {"attention": teacher.architecture.attention, "mlp": teacher.architecture.mlp[-1]}
    handles = [getattr(teacher.block(s.block), names[s.part]).register_forward_hook(zero) for s in plan.sites()]
    yield
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def logits(model: Any, rows: torch.Tensor = ROWS) -> torch.Tensor:
    return model(input_ids=rows, use_cache=False).logits


def generate(model: Any, rows: torch.Tensor, **options: Any) -> torch.Tensor:
    return model.generate(rows, max_new_tokens=16, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_mask_is_delete_and_saving_changes_nothing(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    dense = logits(teacher.model)
    for name, sites in PLANS.items():
        plan = Plan.parse(sites.split(","))
        with hooked(teacher, plan):
            reference = logits(teacher.model)
        with masked(teacher, plan):
            assert torch.equal(logits(teacher.model), reference), name
        assert (dense - reference).abs().max() > 0.01, "a removal that does not matter tests nothing"
        student = apply(teacher, plan)
        save(student, None, plan, tmp_path / name, teacher=teacher)
        verify_round_trip(student, tmp_path / name, ROWS)
        again = load(tmp_path / name)
        assert torch.equal(logits(again.model), reference), name
        assert again.removed_earlier == plan
        assert (
            again.model.config.model_type == ("" if name == "whole_block" else "billhook-") + teacher.anatomy.model_type
        )
        assert torch.equal(logits(teacher.model), dense), "the teacher has changed"


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_cache_generates_what_no_cache_does(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    for name in ("first_attention", "mixed"):
        plan = Plan.parse(PLANS[name].split(","))
        save(apply(teacher, plan), None, plan, tmp_path / name, teacher=teacher)
        model = load(tmp_path / name).model
        rows = ROWS[:, :8]
        plain = generate(model, rows, use_cache=False)
        assert torch.equal(generate(model, rows), plain), "dynamic cache"
        if variant != "falcon_alibi":  # transformers' own falcon with ALiBi has no static cache
            assert torch.equal(generate(model, rows, cache_implementation="static"), plain), "static cache"
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), rows], 1)
        padded[1, 1:3] = ROWS[1, 10:12]  # rows of different length: 8 and 10 tokens
        mask = (padded != 0).long()
        batched = generate(model, padded, attention_mask=mask)
        for row in range(2):
            alone = generate(model, padded[row : row + 1, mask[row].argmax() :], use_cache=False)
            assert torch.equal(batched[row, mask[row].argmax() :], alone[0]), "left padding"


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_anatomy_counts_what_is_there(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    anatomy = teacher.anatomy
    assert anatomy.total("parameters") == sum(p.numel() for p in teacher.model.parameters())
    plan = Plan.parse(PLANS["mixed"].split(","))
    student = apply(teacher, plan)
    save(student, None, plan, tmp_path / "s", teacher=teacher)
    kept = load(tmp_path / "s")
    assert sum(p.numel() for p in kept.model.parameters()) == anatomy.total("parameters", plan)
    assert kept.anatomy.total("bytes") == anatomy.total("bytes", plan)
    with torch.inference_mode():
        cache = kept.model(input_ids=ROWS[:1, :5], use_cache=True)[cache_name(kept.model)]
    measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) // 5
    assert measured == anatomy.total("kv_bytes_per_token", plan)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_row_says_how_a_block_reads_and_what_the_head_does(variant: str, checkpoint: Folder) -> None:
    teacher = load(checkpoint(variant))
    seen: list[torch.Tensor] = []
    block, row = teacher.block(1), teacher.architecture
    hook = getattr(block, row.mlp[0]).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits(teacher.model)
    with masked(teacher, Plan.parse(["attention.1"])):
        logits(teacher.model)
    hook.remove()
    assert torch.equal(seen[0], seen[1]) == row.parallel(teacher.model.config)

    config, head = teacher.model.config, teacher.model.get_output_embeddings()
    final: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    told = logits(teacher.model)
    hook.remove()
    with torch.inference_mode():
        mine = torch.nn.functional.linear(final[0], head.weight, head.bias)
    mine = mine * getattr(config, row.head_scale) if row.head_scale else mine
    cap = getattr(config, row.head_softcap) if row.head_softcap else None
    torch.testing.assert_close(torch.tanh(mine / cap) * cap if cap else mine, told)


@pytest.mark.parametrize(
    "variant", ["llama", "llama_tied", "gemma2", "mixtral", "qwen3_moe", "gpt_neox", "gpt2", "opt"]
)
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_kept_tensors_are_the_sources_bit_for_bit(variant: str, compute: str, tmp_path: Path) -> None:
    source = tiny.saved(tmp_path / "source", variant, torch.bfloat16)
    teacher = load(source, dtype=compute)
    plan = Plan.parse(PLANS["mixed"].split(","))
    save(apply(teacher, plan), None, plan, tmp_path / "student", teacher=teacher)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "student" / "model.safetensors")
    assert len(before) > len(after) > 0
    for name, tensor in after.items():  # "mixed" drops block 0, so that block i was i + 1
        was = re.sub(r"(layers|h)\.(\d+)\.", lambda m: f"{m[1]}.{int(m[2]) + 1}.", name, count=1)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), before[was].view(torch.int16)), name


def test_experts_keep_the_hubs_names(checkpoint: Folder, tmp_path: Path) -> None:
    names = {"mixtral": "block_sparse_moe.experts.3.w2.weight", "qwen3_moe": "mlp.experts.3.down_proj.weight"}
    plan = Plan.parse(["attention.0", "mlp.1"])
    for variant, name in names.items():
        teacher = load(checkpoint(variant))
        save(apply(teacher, plan), None, plan, tmp_path / variant, teacher=teacher)
        saved = load_file(tmp_path / variant / "model.safetensors")
        assert f"model.layers.0.{name}" in saved
        assert not any(key.startswith("model.layers.1.") and "experts" in key for key in saved)


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "phi", "opt", "gpt_oss", "mixtral", "gpt2", "falcon"])
def test_stock_shape_holds_zeros_and_says_the_same(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    plan = Plan.parse(["attention.0", "mlp.1", "attention.2", "mlp.2"])
    with masked(teacher, plan):
        reference = logits(teacher.model)
    student = apply(teacher, plan, stock=True)
    save(student, None, plan, tmp_path / "s", teacher=teacher)
    again = load(tmp_path / "s")
    assert again.model.config.model_type == teacher.anatomy.model_type
    assert again.model.config.num_hidden_layers == 3
    assert torch.equal(logits(again.model), reference)
    assert again.removed_earlier == Plan.parse(
        ["attention.2", "mlp.2"]
    )  # zeros are still sites: they take room and time
    assert again.anatomy.total("parameters") == sum(p.numel() for p in again.model.parameters())
    zeros = Plan.parse(["attention.0", "mlp.1"])
    save(apply(again, zeros), None, zeros, tmp_path / "t", teacher=again)
    assert load(tmp_path / "t").removed_earlier == plan
    assert torch.equal(logits(load(tmp_path / "t").model), reference)


def test_pruning_again_composes_in_positions_of_the_unpruned_model(checkpoint: Folder, tmp_path: Path) -> None:
    for variant in ("llama", "gemma3_text", "gpt2", "qwen3_moe_mixed"):
        teacher = load(checkpoint(variant))
        first, second = Plan.parse(["attention.0", "attention.1", "mlp.1"]), Plan.parse(["mlp.0", "attention.3"])
        save(apply(teacher, first), None, first, tmp_path / variant / "1", teacher=teacher)
        middle = load(tmp_path / variant / "1")
        save(apply(middle, second), None, second, tmp_path / variant / "2", teacher=middle)
        again = load(tmp_path / variant / "2")
        both = Plan(first.removed | second.removed)
        assert again.removed_earlier == both
        assert again.positions == (2, 3)
        with masked(teacher, both):
            assert torch.equal(logits(again.model), logits(teacher.model))
        with pytest.raises(billhook.BillhookError, match=r"attention\.0 was already removed"):
            apply(middle, Plan.parse(["attention.0"]))


def test_sites_that_are_back_to_whole_blocks_make_a_stock_checkpoint(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("llama"))
    first, second = Plan.parse(["attention.2"]), Plan.parse(["mlp.2"])
    save(apply(teacher, first), None, first, tmp_path / "1", teacher=teacher)
    middle = load(tmp_path / "1")
    save(apply(middle, second), None, second, tmp_path / "2", teacher=middle)
    again = load(tmp_path / "2")
    assert type(again.model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "2" / "modeling_billhook.py").exists()
    with masked(teacher, Plan(first.removed | second.removed)):
        assert torch.equal(logits(again.model), logits(teacher.model))


def test_every_list_that_speaks_of_blocks_is_trimmed(checkpoint: Folder) -> None:
    plan = Plan(frozenset({Site(1, "attention"), Site(1, "mlp")}))
    config = apply(load(checkpoint("gemma3_text")), plan).config
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    config = apply(load(checkpoint("qwen2")), plan).config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.max_window_layers == 1
    config = apply(load(checkpoint("qwen3_moe_mixed")), plan).config  # dense are 0 and 2 by the step, 1 by the list
    assert (config.mlp_only_layers, config.decoder_sparse_step, config.num_hidden_layers) == ([0, 1], 1, 3)


def test_sharded_saves_load_back(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("llama_tied"))
    plan = Plan.parse(["attention.1"])
    student = apply(teacher, plan)
    files = save(student, None, plan, tmp_path / "s", teacher=teacher, shard_bytes=20_000)
    assert sum(f.suffix == ".safetensors" for f in files) > 2
    verify_round_trip(student, tmp_path / "s", ROWS)
    again = load(tmp_path / "s").model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


FOREIGN = """
import sys, torch, transformers
rows = torch.tensor([{rows}])
auto = transformers.AutoModelForCausalLM
if sys.argv[2] == "register":
    import billhook
    billhook.register()
trust = dict(trust=True, plain=False, register=None)[sys.argv[2]]
model, told = auto.from_pretrained(sys.argv[1], output_loading_info=True, trust_remote_code=trust)
assert not told["missing_keys"] and not told["unexpected_keys"], told
assert sys.argv[2] == "register" or "billhook" not in sys.modules
with torch.no_grad():
    torch.save(model(rows, use_cache=False).logits, sys.argv[3])
"""


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "mixtral"])
def test_other_processes_load_it_right_or_not_at_all(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint(variant))
    plan = Plan.parse(["attention.0", "mlp.2"])
    student = apply(teacher, plan)
    save(student, None, plan, tmp_path / "s", teacher=teacher)
    code = FOREIGN.format(rows=ROWS[:1].tolist()[0])
    told = {}
    for way in ("plain", "trust", "register"):
        target = tmp_path / way
        told[way] = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "s"), way, str(target)],
            check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
    assert told["plain"].returncode != 0
    assert "trust_remote_code" in told["plain"].stderr
    for way in ("trust", "register"):
        assert told[way].returncode == 0, told[way].stderr
        torch.testing.assert_close(torch.load(tmp_path / way), logits(student, ROWS[:1]), rtol=0, atol=1e-5)


def test_a_checkpoint_that_lost_a_tensor_does_not_load(checkpoint: Folder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    teacher = load(checkpoint("llama"))
    plan = Plan.parse(["attention.0"])
    save(apply(teacher, plan), None, plan, tmp_path / "s", teacher=teacher)
    weights = load_file(tmp_path / "s" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "s" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, such as model.layers.1.mlp.up_proj.weight"):
        load(tmp_path / "s")


# -- larger than memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_streamed_model_is_cut_and_saved_as_one_in_memory(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    """File to file, without the weights: the same tensors under the same names, and the same logits."""
    resident, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    for name, stock in (("mixed", False), ("whole_block", False), ("one", True)):
        plan = Plan.parse(PLANS[name].split(","))
        folders = []
        for teacher in (resident, streamed):
            folders.append(tmp_path / f"{name}-{teacher is streamed}")
            save(apply(teacher, plan, stock=stock), None, plan, folders[-1], teacher=teacher)
        saved = [{k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
                 for folder in folders]  # fmt: skip
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        assert torch.equal(logits(load(folders[1]).model), logits(load(folders[0]).model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral"])
def test_a_save_is_compared_block_by_block_where_a_second_copy_does_not_fit(
    variant: str, dtype: str, checkpoint: Folder, tmp_path: Path
) -> None:
    teacher = load(checkpoint(variant), dtype=dtype)
    plan = Plan.parse(PLANS["mixed"].split(","))
    student = apply(teacher, plan)
    save(student, None, plan, tmp_path / "s", teacher=teacher)
    with torch.inference_mode():
        verify_round_trip(student, tmp_path / "s", ROWS, memory=0)
        next(student.get_output_embeddings().parameters()).data = student.get_output_embeddings().weight * 1.5
        with pytest.raises(BillhookError, match="does not load back equal"):
            verify_round_trip(student, tmp_path / "s", ROWS, memory=0)


def test_saving_needs_no_second_model(checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, plan = load(checkpoint("llama")), Plan.parse(["mlp.1", "attention.2[0]"])

    def never(*_: Any) -> None:
        raise AssertionError("a model was loaded whole")

    monkeypatch.setattr("billhook.models.load._build", never)
    for name in ("transformers", "stock"):
        chosen = Plan.parse(["mlp.1"]) if name == "stock" else plan
        given = Student(apply(teacher, chosen), teacher, chosen, ROWS)
        assert export_student(name, given, tmp_path / name).difference == 0
    save(apply(teacher, plan), None, plan, tmp_path / "saved", teacher=teacher)


@pytest.mark.parametrize("memory", [None, 0])
def test_a_bit_that_the_disk_lost_is_found_in_any_row(
    memory: int | None, checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 63 of the embedding is no token that the comparison of logits reads."""
    teacher, plan = load(checkpoint("llama"), memory=memory), Plan.parse(["mlp.1"])

    def damage(write: Callable[..., None], *given: Any, **options: Any) -> None:
        write(*given, **options)
        for file in tmp_path.rglob("model*.safetensors"):
            held = load_file(file)
            if (rows := held.get("model.embed_tokens.weight")) is not None:
                rows[63, 0] += 1e-6
                write_file(held, file, metadata={"format": "pt"})

    monkeypatch.setattr(shards, "save_file", partial(damage, shards.save_file))
    monkeypatch.setattr(written, "save_torch_state_dict", partial(damage, written.save_torch_state_dict))
    with pytest.raises(BillhookError, match=r"does not hold model\.embed_tokens\.weight as it was written"):
        save(apply(teacher, plan), None, plan, tmp_path / "out", teacher=teacher)
    assert not list(tmp_path.iterdir())


def test_a_streamed_checkpoint_that_does_not_load_back_equal_is_deleted(
    checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, plan = load(checkpoint("llama"), memory=0), Plan.parse(["mlp.1"])
    assert streamed.weights is not None
    honest = streamed.weights.source
    monkeypatch.setattr(streamed.weights, "source", lambda name: honest(name) + ("layers.2.mlp" in name) * 1e-3)
    with pytest.raises(BillhookError, match="does not load back equal"):
        save(apply(streamed, plan), None, plan, tmp_path / "out", teacher=streamed)
    assert not list(tmp_path.iterdir())


def test_shards_of_a_streamed_model_are_small(checkpoint: Folder, tmp_path: Path) -> None:
    streamed, plan = load(checkpoint("mixtral"), memory=0), Plan.parse(["mlp.1"])
    files = save(apply(streamed, plan), None, plan, tmp_path / "out", teacher=streamed, shard_bytes=20_000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 4
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    verify_round_trip(apply(load(checkpoint("mixtral")), plan), tmp_path / "out", ROWS)
