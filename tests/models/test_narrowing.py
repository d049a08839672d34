"""Channel groups: a part that is cut computes what the masked one does, in every architecture, saved and loaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import billhook
import billhook.models.surgery
from billhook.cli.main import app
from billhook.core.budget import Budget
from billhook.core.errors import ModelError, PlanError, UsageError
from billhook.core.plan import PARTS, KeptGroups, Plan, Site, format_ranges, parse_ranges
from billhook.data.calibration import calibration_tokens
from billhook.data.texts import TextSpec
from billhook.data.token_sets import Choices, TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.methods.export.checkpoint import verify_streamed_round_trip, write_checkpoint
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.models import channel_groups, structure
from billhook.models.architectures import Architecture
from billhook.models.load import Teacher, load
from billhook.models.modeling_billhook import set_parameter
from billhook.models.repair import NO_REPAIR, Repair, read_repair
from billhook.runs.recipe import EvalOptions

Folder = Callable[[str], Path]
WHOLE = {("falcon_alibi", "attention")}  # no groups: slopes are made for all heads at once


def uneven(teacher: Teacher, seed: int) -> Plan:
    """A plan that narrows most sites, each to groups of its own."""
    draw, narrowed = random.Random(seed), []
    for size in teacher.anatomy.sites:
        of_each = len(size.groups) // size.experts
        if of_each <= size.multiple or draw.random() < 0.2:
            continue
        keep = draw.randrange(size.multiple, of_each, size.multiple)
        groups = [
            g for e in range(size.experts) for g in draw.sample(size.groups[e * of_each : (e + 1) * of_each], keep)
        ]
        narrowed.append(KeptGroups(size.site, tuple(sorted(groups))))
    return Plan(frozenset(), frozenset(narrowed))


def masked(teacher: Teacher, plan: Plan) -> Any:
    """The teacher's model in its whole shape, with zeros where groups went."""
    model = billhook.models.surgery.shared_copy(teacher.model)
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in plan.narrowed:
        block = structure.blocks_of(model, teacher.architecture)[teacher.positions.index(each.site.block)]
        of = channel_groups.find_layout(block, each.site.part, teacher.architecture, model.config)
        assert not isinstance(of, str)
        kept = channel_groups.kept_positions(of, sizes[each.site].groups, each.groups)
        for name, tensor in channel_groups.zeroed_weights(block, of, kept).items():
            set_parameter(block, name, tensor)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_cut_is_masked_and_loads_and_generates(checkpoint: Folder, variant: str, tmp_path: Path) -> None:
    teacher, ids = load(checkpoint(variant)), tiny.tokens(2, 20)
    for seed in range(3):
        plan = uneven(teacher, seed)
        student = billhook.apply(teacher, plan)
        expected = logits(masked(teacher, plan), ids)
        assert (logits(teacher.model, ids) - expected).abs().max() > 0.01, "what went matters"
        torch.testing.assert_close(logits(student, ids), expected, atol=1e-4, rtol=1e-4)
        billhook.save(student, None, plan, tmp_path / f"{seed}", teacher=teacher)
        again = load(tmp_path / f"{seed}")
        assert torch.equal(logits(again.model, ids), logits(student, ids))
        assert sum(p.numel() for p in student.parameters()) == again.anatomy.total("parameters")
        for kind in ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token"):
            assert again.anatomy.total(kind) == teacher.anatomy.total(kind, plan), kind
        cached, plain = (
            again.model.generate(ids[:, :8], max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(cached, plain)
    without = {size.site.part for size in teacher.anatomy.sites if not size.groups}
    assert without == {part for name, part in WHOLE if name == variant}


def alike(teacher: Teacher, part: str) -> Plan:
    """The first half of the groups of every site of a part."""
    narrowed = []
    for size in teacher.anatomy.sites:
        of_each = len(size.groups) // size.experts
        keep = max(size.multiple, of_each // 2 // size.multiple * size.multiple)
        if size.site.part == part and keep < of_each:
            groups = [size.groups[e * of_each + g] for e in range(size.experts) for g in range(keep)]
            narrowed.append(KeptGroups(size.site, tuple(groups)))
    return Plan(frozenset(), frozenset(narrowed))


# What a stock config has no field for: heads narrower than their share of the width, and norms over all heads at once.
OWN_HEADS = {
    "gpt2", "gpt_neox", "gpt_neox_serial", "falcon", "falcon_new", "falcon_serial", "olmo2", "opt", "stablelm",
    "stablelm_parallel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "part"), [(v, p) for v in tiny.VARIANTS for p in ("attention", "mlp") if (v, p) not in WHOLE]
)
def test_a_model_that_is_as_narrow_everywhere_is_a_stock_model(
    checkpoint: Folder, variant: str, part: str, tmp_path: Path
) -> None:
    teacher, ids = load(checkpoint(variant)), tiny.tokens(2, 20)
    plan = alike(teacher, part)
    student = billhook.apply(teacher, plan)
    torch.testing.assert_close(logits(student, ids), logits(masked(teacher, plan), ids), atol=1e-4, rtol=1e-4)
    stock = type(student) is type(teacher.model)
    assert stock == (part == "mlp" or variant not in OWN_HEADS)
    billhook.save(student, None, plan, tmp_path / "out", teacher=teacher)
    if stock:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(plain.eval(), ids), logits(student, ids))
    again = load(tmp_path / "out")
    kept = {each.site: each.groups for each in plan.narrowed}
    assert {s.site: s.groups for s in again.anatomy.sites if s.site in kept} == kept
    more = uneven(again, 3)
    cut = billhook.apply(again, more)
    torch.testing.assert_close(logits(cut, ids), logits(masked(again, more), ids), atol=1e-4, rtol=1e-4)
    billhook.save(cut, None, more, tmp_path / "more", teacher=again)
    assert torch.equal(logits(load(tmp_path / "more").model, ids), logits(cut, ids))


@pytest.mark.parametrize("variant", ["llama", "falcon", "olmo2", "qwen3_moe_mixed", "phi3", "gpt2"])
def test_depth_and_width_are_one_plan_and_a_cut_model_is_cut_again(
    checkpoint: Folder, variant: str, tmp_path: Path
) -> None:
    """A block and a site less, then narrower; and the other way round, in numbers of the unpruned model."""
    teacher, ids = load(checkpoint(variant)), tiny.tokens(2, 20)
    both = uneven(teacher, 5).without(Site(1, "attention"), Site(1, "mlp"), Site(2, "attention"))
    whole = billhook.apply(teacher, both)
    first = Plan(frozenset(), both.narrowed)
    billhook.save(billhook.apply(teacher, first), None, first, tmp_path / "width", teacher=teacher)
    second = Plan(both.removed)
    billhook.save(billhook.apply(teacher, second), None, second, tmp_path / "depth", teacher=teacher)
    for begun, rest in (("width", second), ("depth", first)):
        again = load(tmp_path / begun)
        assert torch.equal(logits(billhook.apply(again, rest), ids), logits(whole, ids))
        billhook.save(billhook.apply(again, rest), None, rest, tmp_path / f"{begun}-both", teacher=again)
        last = load(tmp_path / f"{begun}-both")
        assert torch.equal(logits(last.model, ids), logits(whole, ids))
        left = {size.site: size.groups for size in last.anatomy.sites}
        assert {each.site: each.groups for each in both.narrowed}.items() <= left.items()
        narrower = {
            s.site: s.groups[: max(s.multiple, len(s.groups) // 2)] for s in last.anatomy.sites if s.experts == 1
        }
        more = Plan(frozenset(), frozenset(KeptGroups(site, groups) for site, groups in narrower.items() if groups))
        torch.testing.assert_close(
            logits(billhook.apply(last, more), ids), logits(masked(last, more), ids), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral"])
def test_narrower_plans_are_measured_of_a_streamed_model_too(checkpoint: Folder, variant: str) -> None:
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    assert streamed.weights is not None
    rows = [tuple(row) for row in tiny.tokens(4, 16).tolist()]
    tokens = token_set(rows, range(4), range(4), list("abcd"), "rows")
    plans = [uneven(teacher, seed) for seed in (1, 2)]
    found = (Probe(which, tokens, "kl", memory=1).losses(plans) for which in (teacher, streamed))
    for ours, theirs in zip(*found, strict=True):
        assert ours.sums == pytest.approx(theirs.sums, abs=1e-5)


@pytest.mark.parametrize(
    ("variant", "folded"),
    [(v, f) for v in ("llama", "gpt2", "phi3", "falcon_new") for f in (False, True)] + [("olmo2", False)],
)
def test_a_streamed_model_is_narrowed_from_file_to_file(
    checkpoint: Folder, variant: str, folded: bool, tmp_path: Path
) -> None:
    found = []
    for memory in (None, 0):
        teacher = load(checkpoint(variant), memory=memory)
        plan = uneven(teacher, 4).without(Site(1, "mlp"))
        repair = NO_REPAIR
        if folded:
            rows = [tuple(row) for row in tiny.tokens(24, 24, seed=5).tolist()]
            texts = token_set(rows, range(24), range(24), list(map(str, range(24))), "rows")
            repair = RECOVERIES["fold"](RecoveryTask(teacher, plan, memory=1), texts, texts)
        student = billhook.apply(teacher, plan, repair=repair)
        out = tmp_path / f"{memory}"
        write_checkpoint(student, None, plan, out, teacher=teacher)
        if teacher.weights is not None:
            verify_streamed_round_trip(teacher, plan, out, tiny.tokens(2, 16), repair=repair)
        found.append(logits(load(out).model, tiny.tokens(2, 20)))
    torch.testing.assert_close(found[0], found[1], atol=1e-3 if folded else 1e-6, rtol=1e-3)


def test_experts_of_a_streamed_model_stay_as_they_are(checkpoint: Folder) -> None:
    teacher = load(checkpoint("mixtral"), memory=0)
    with pytest.raises(PlanError, match="only be narrowed in memory"):
        billhook.apply(teacher, uneven(teacher, 1))


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_a_narrow_model_generates_padded_and_with_a_static_cache(checkpoint: Folder, variant: str) -> None:
    teacher = load(checkpoint(variant))
    student = billhook.apply(teacher, uneven(teacher, 1).without(Site(2, "attention")))
    ids = tiny.tokens(2, 9)
    ids[1, :4] = 0
    mask = (ids != 0).long()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = student.generate(ids, **options)
    assert torch.equal(found, student.generate(ids, cache_implementation="static", **options))
    assert torch.equal(found[1:, 4:], student.generate(ids[1:, 4:], max_new_tokens=6, do_sample=False))


def test_plans_that_begin_alike_are_measured_as_if_each_were_alone(checkpoint: Folder) -> None:
    teacher, ids = load(checkpoint("llama")), tiny.tokens(4, 16)
    rows = [tuple(row) for row in ids.tolist()]
    tokens = token_set(rows, range(4), range(4), list("abcd"), "rows")
    whole = uneven(teacher, 2)
    later = Plan(frozenset({Site(3, "attention")}), frozenset(n for n in whole.narrowed if n.site.block < 2))
    plans = [whole, later, Plan(), Plan(later.removed), whole, *(uneven(teacher, seed) for seed in (3, 4))]
    probe = Probe(teacher, tokens, "kl")
    for plan, found in zip(plans, probe.losses(plans), strict=True):
        alone = Probe(teacher, tokens, "kl").loss_with_repair(plan, NO_REPAIR)
        assert found.sums == pytest.approx(alone.sums, abs=1e-5)
    fresh = Probe(teacher, tokens, "kl")
    assert fresh.losses([whole])[0].sums == pytest.approx(probe.losses([whole])[0].sums, abs=1e-6)
    done = fresh.site_evaluations
    fresh.losses([later])
    assert fresh.site_evaluations - done < 0.7 * len(teacher.anatomy.sites), "what both have in common is not run again"


def test_choices_are_scored_by_the_narrower_model(checkpoint: Folder) -> None:
    teacher, ids = load(checkpoint("llama")), tiny.tokens(6, 10)
    rows = [tuple(row) for row in ids.tolist()]
    choices = Choices(first=(6,) * 6, characters=(4,) * 6, gold=(0, 1, 0))
    tokens = token_set(rows, [0, 0, 1, 1, 2, 2], range(3), list("abc"), "rows", choices=choices)
    narrow = uneven(teacher, 2)
    plans = [narrow, Plan(), Plan(frozenset({Site(1, "mlp")}), narrow.without(Site(1, "mlp")).narrowed)]
    for plan, sums in zip(plans, Probe(teacher, tokens, "task").row_sums(plans), strict=True):
        assert sums == pytest.approx(log_probabilities(billhook.apply(teacher, plan), tokens), rel=1e-4, abs=1e-4)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_narrows_what_its_plan_says_and_proves_it(model: Path, text: Path, tmp_path: Path) -> None:
    names = "attention.0[1],mlp.2[0-20 30],mlp.3"
    options: dict[str, Any] = {"tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24, "data": str(text)}
    told = billhook.prune(model, plan=names, out=tmp_path / "out", store=tmp_path / "b.db", **options)
    assert told.plan.narrowed_names() == ["attention.0[1]", "mlp.2[0-20 30]"]
    teacher, plan = load(model), Plan.parse(names.split(","))
    assert told.sizes.student.parameters == teacher.anatomy.total("parameters", plan)
    student = load(tmp_path / "out")
    assert student.anatomy.total("parameters") == told.sizes.student.parameters
    again = billhook.evaluate(tmp_path / "out", **held_out_options(options))
    assert told.perplexity.student == pytest.approx(again.perplexity.value, rel=1e-5)
    (step,) = told.steps
    probe = Probe(teacher, tokens_of(teacher, options), "kl")
    assert step.loss == pytest.approx(probe.losses([plan])[0].mean, rel=1e-6)
    whole = probe.losses([Plan(plan.removed)])[0].mean
    assert step.loss != pytest.approx(whole, rel=1e-3), "what became narrower counts"
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "2 narrowed" in page
    assert 'class="narrower" data-site="mlp.2" tabindex="-1"' in page
    assert 'data-vars="left:46%"' in page, "22 of 48"
    assert "the lower part is kept" in page
    assert "attention of block 0: 1 of 2 KV groups" in page
    assert "mlp of block 2: 22 of 48 neurons" in page
    assert "mlp of block 2: 22 of 48 neurons" in card
    shown = CliRunner().invoke(app, ["show", told.run, "--store", str(tmp_path / "b.db")]).output
    told_there = " ".join(shown.split())
    assert "Narrowed: attention of block 0: 1 of 2 KV groups; mlp of block 2: 22 of 48 neurons" in told_there
    assert max(map(len, shown.splitlines())) <= 80
    manifest = billhook.prune(
        model, plan=str(tmp_path / "out" / "billhook.json"), out=tmp_path / "twin", store=tmp_path / "b.db", **options
    )
    assert manifest.plan == told.plan
    with pytest.raises(PlanError, match="narrower"):
        billhook.prune(model, plan=names, out=tmp_path / "no", store=tmp_path / "b.db", stock=True, **options)


def held_out_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those options of a pruning that say on which text it proves its student."""
    return {name: value for name, value in options.items() if name in EvalOptions.model_fields}


def tokens_of(teacher: Teacher, options: dict[str, Any]) -> TokenSet:
    wanted = TextSpec(options["data"], "text", options["tokens"], options["length"], 0)
    return calibration_tokens(wanted, teacher.model, teacher.tokenizer)


def test_the_engine_measures_what_the_cut_model_computes(checkpoint: Folder) -> None:
    """KL to the whole model, by hand, of plans with and without removed sites; and what budgets count."""
    teacher, rows = load(checkpoint("llama")), tiny.tokens(4, 12)
    tokens = token_set([tuple(r) for r in rows.tolist()], range(4), range(4), "abcd", "rows")
    plans = [uneven(teacher, 3), uneven(teacher, 4).without(Site(1, "mlp")), Plan.parse(["mlp.1"])]
    whole = logits(teacher.model, rows).double().log_softmax(-1)
    for plan, loss in zip(plans, Probe(teacher, tokens, "kl").losses(plans), strict=True):
        cut = logits(billhook.apply(teacher, plan), rows).double().log_softmax(-1)
        expected = (whole.exp() * (whole - cut)).sum(-1).mean()
        assert loss.mean == pytest.approx(float(expected), rel=1e-4)
        for unit, kind in (("params", "parameters"), ("kv", "kv_bytes_per_token"), ("flops", "flops_per_token")):
            lost = teacher.anatomy.total(kind) - teacher.anatomy.total(kind, plan)
            assert Budget.parse(f"10%{unit}").removed_cost(teacher.anatomy, plan) == lost
        assert Budget.parse("1sites").removed_cost(teacher.anatomy, plan) == len(plan.removed)


# -- recovery ----------------------------------------------------------------------------------------------------------


def test_a_fold_gives_a_twin_what_its_copy_did(checkpoint: Folder, tmp_path: Path) -> None:
    """Neuron 5 computes what neuron 9 does; without it, neuron 9 has to count for both."""
    whole = load(checkpoint("llama"))
    model = billhook.models.surgery.shared_copy(whole.model)
    mlp = structure.blocks_of(model, whole.architecture)[2].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        weight = linear.weight.detach().clone()
        weight[5] = weight[9]
        linear.weight = torch.nn.Parameter(weight)
    model.save_pretrained(tmp_path / "twins")
    teacher = load(tmp_path / "twins")
    plan = Plan(frozenset(), frozenset([KeptGroups(Site(2, "mlp"), tuple(g for g in range(48) if g != 5))]))
    rows = tiny.tokens(24, 24, seed=5)
    texts = token_set([tuple(r) for r in rows.tolist()], range(24), range(24), list(map(str, range(24))), "rows")
    subject = RecoveryTask(teacher, plan)
    repair = RECOVERIES["fold"](subject, texts, texts, reach="next")
    ids = tiny.tokens(4, 20, seed=9)
    expected = logits(teacher.model, ids)
    apart = [(logits(billhook.apply(teacher, plan, repair=r), ids) - expected).abs().max() for r in (NO_REPAIR, repair)]
    assert apart[0] > 0.02
    assert apart[1] < 0.02 * apart[0]
    weight = billhook.apply(teacher, plan, repair=repair).get_parameter("model.layers.2.mlp.down_proj.weight")
    old = teacher.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    torch.testing.assert_close(weight[:, 8], old[:, 9] + old[:, 5], atol=2e-2, rtol=2e-2)


def constant(variant: str, checkpoint: Folder, folder: Path) -> tuple[Teacher, Plan]:
    """A model one of whose groups carries a constant, and the plan without it."""
    whole = load(checkpoint(variant))
    model = billhook.models.surgery.shared_copy(whole.model)
    block = structure.blocks_of(model, whole.architecture)[1]
    if variant == "qwen2":  # the values of the first KV group are their biases
        weight = block.self_attn.v_proj.weight.detach().clone()
        weight[: weight.shape[0] // 2] = 0
        set_parameter(block, "self_attn.v_proj.weight", weight)
        set_parameter(block, "self_attn.v_proj.bias", block.self_attn.v_proj.bias.detach() + 1)
        left = KeptGroups(Site(1, "attention"), (1,))
    else:  # neurons that see no input
        weight = block.mlp.c_fc.weight.detach().clone()
        weight[:, :20] = 0
        set_parameter(block, "mlp.c_fc.weight", weight)
        set_parameter(block, "mlp.c_fc.bias", block.mlp.c_fc.bias.detach() + 1)
        left = KeptGroups(Site(1, "mlp"), tuple(range(20, weight.shape[1])))
    model.save_pretrained(folder)
    return load(folder), Plan(frozenset(), frozenset([left]))


@pytest.mark.parametrize("variant", ["qwen2", "gpt2"])
def test_what_carries_a_constant_goes_without_a_loss_under_compensation(
    checkpoint: Folder, variant: str, tmp_path: Path
) -> None:
    """GPT-2 has biases that take it; Qwen2's attention gets one, which is saved, and stays when it is cut again."""
    teacher, plan = constant(variant, checkpoint, tmp_path / "constant")
    rows, ids = tiny.tokens(12, 24, seed=5), tiny.tokens(4, 20, seed=9)
    texts = token_set([tuple(r) for r in rows.tolist()], range(12), range(12), list(map(str, range(12))), "rows")
    repair = RECOVERIES["compensate"](RecoveryTask(teacher, plan), texts, texts)
    expected = logits(teacher.model, ids)
    assert (logits(billhook.apply(teacher, plan), ids) - expected).abs().max() > 0.1
    student = billhook.apply(teacher, plan, repair=repair)
    torch.testing.assert_close(logits(student, ids), expected, atol=1e-4, rtol=1e-4)
    assert repair.parameters() == (32 if variant == "qwen2" else 0)
    repair.save(tmp_path / "repair.safetensors")
    assert read_repair(tmp_path / "repair.safetensors").key() == repair.key()
    dense = Probe(teacher, texts, "nll").losses([Plan()])[0]
    assert Probe(teacher, texts, "nll").loss_with_repair(plan, repair).sums == pytest.approx(dense.sums, rel=1e-4)
    billhook.save(student, None, plan, tmp_path / "out", teacher=teacher)
    again = load(tmp_path / "out")
    assert torch.equal(logits(again.model, ids), logits(student, ids))
    assert again.anatomy.total("parameters") == teacher.anatomy.total("parameters", plan) + repair.parameters()
    assert getattr(teacher.block(1), "self_attn", None) is None or teacher.block(1).self_attn.o_proj.bias is None
    more = uneven(again, 3)
    cut = billhook.apply(again, more)
    torch.testing.assert_close(logits(cut, ids), logits(masked(again, more), ids), atol=1e-4, rtol=1e-4)
    billhook.save(cut, None, more, tmp_path / "more", teacher=again)
    assert torch.equal(logits(load(tmp_path / "more").model, ids), logits(cut, ids))
    with pytest.raises(UsageError, match="narrows none"):
        RECOVERIES["compensate"](RecoveryTask(teacher, Plan.parse(["mlp.2"])), texts, texts)


@pytest.mark.parametrize("recover", ["fold", "fold,lora", "compensate,bias", "compensate,fold"])
def test_a_narrow_run_recovers_and_saves_what_it_proved(model: Path, text: Path, tmp_path: Path, recover: str) -> None:
    names = "attention.0[1],mlp.2[0-30],mlp.3"
    options: dict[str, Any] = {"tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24, "data": str(text)}
    more = {"recover_set": {"epochs": 1}} if {"lora", "bias"} & set(recover.split(",")) else {}
    told = billhook.prune(
        model, plan=names, out=tmp_path / "out", store=tmp_path / "b.db", recover=recover, recover_tokens=800,
        recover_length=24, **options, **more,
    )  # fmt: skip
    assert [each.recovery for each in told.recoveries] == recover.split(",")
    first = told.recoveries[0].on["held-out"]
    bare = billhook.prune(model, plan=names, out=tmp_path / "bare", store=tmp_path / "b.db", **options)
    assert first.before == pytest.approx(bare.perplexity.student, rel=1e-6)
    again = billhook.evaluate(tmp_path / "out", **held_out_options(options))
    assert again.perplexity.value == pytest.approx(told.perplexity.student, rel=1e-5)
    biases = 64 if "compensate" in recover else 0  # of an attention and an mlp
    assert load(tmp_path / "out").anatomy.total("parameters") == bare.sizes.student.parameters + biases
    assert told.sizes.student.parameters == bare.sizes.student.parameters + biases


def test_what_was_trained_narrow_is_not_refitted(checkpoint: Folder) -> None:
    teacher, plan = load(checkpoint("llama")), Plan.parse(["mlp.2[0-30]"])
    weight = torch.zeros(31, 32)
    repair = Repair({"model.layers.2.mlp.up_proj.weight": weight})
    rows = tiny.tokens(8, 24)
    texts = token_set([tuple(r) for r in rows.tolist()], range(8), range(8), list(map(str, range(8))), "rows")
    with pytest.raises(UsageError, match="fold,lora"):
        RECOVERIES["fold"](RecoveryTask(teacher, plan, repair), texts, texts)


# -- plans ------------------------------------------------------------------------------------------------------------


# Types without a row: where parts lie, and what is unusual.
_GPTJ = Architecture(
    blocks="transformer.h", attention="attn", attention_norms=("ln_1",), mlp_norms=(), attention_output="out_proj"
)
_CODEGEN = replace(_GPTJ, attention_inputs=("qkv_proj",), fused_attention="in turn")
_MPT = Architecture(
    blocks="transformer.blocks", attention="attn", mlp=("ffn",), attention_norms=("norm_1",), mlp_norms=("norm_2",),
    mlp_inputs=("up_proj",),
)  # fmt: skip
_XGLM = Architecture(
    mlp=("fc1", "fc2"), attention_norms=("self_attn_layer_norm",), mlp_norms=("final_layer_norm",),
    attention_output="out_proj", mlp_inputs=("fc1",), mlp_output="fc2",
)  # fmt: skip
UNUSUAL: dict[str, tuple[Architecture, dict[str, str]]] = {  # types without a row, and what is unusual
    "gptj": (_GPTJ, {"mlp": "fc_in, fc_out"}),
    "codegen": (_CODEGEN, {"mlp": "fc_in, fc_out"}),
    "mpt": (_MPT, {"attention": "Wqkv, out_proj"}),
    "xglm": (_XGLM, {}),
}


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_a_part_whose_modules_have_unusual_names_has_no_groups_and_says_why(model_type: str) -> None:
    row, unusual = UNUSUAL[model_type]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=64)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    block = structure.blocks_of(model, row)[0]
    for part in PARTS:
        assert sum(p.numel() for m in structure.site_modules(block, part, row, config) for p in m.parameters()) > 0
        of = channel_groups.find_layout(block, part, row, config)
        assert isinstance(of, str) == (part in unusual), of
        if part in unusual:
            with pytest.raises(PlanError, match=rf"This {part} cannot be narrowed: .*{unusual[part]}.*Remove it whole"):
                structure.channel_layout(block, part, row, config)


def test_a_row_that_does_not_fit_says_what_is_missing(checkpoint: Folder) -> None:
    model = load(checkpoint("llama")).model
    block = structure.blocks_of(model, Architecture())[0]
    with pytest.raises(ModelError, match=r"no attn, .* has self_attn, mlp, input_layernorm, post_attention_layernorm"):
        structure.site_modules(block, "attention", Architecture(attention="attn"), model.config)
    for blocks in ("model.norm", "model.decoder.layers"):
        with pytest.raises(ModelError, match=rf"{blocks}.*where its architecture keeps the blocks"):
            structure.blocks_of(model, Architecture(blocks=blocks))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_are_read_as_they_are_written(found: set[int]) -> None:
    assert parse_ranges(format_ranges(sorted(found))) == tuple(sorted(found))


def test_plans_spell_their_groups(checkpoint: Folder) -> None:
    plan = Plan.parse(["attention.1", "mlp.2[0-3 7]", "attention.0[1]"])
    assert str(plan) == "attention.1,attention.0[1],mlp.2[0-3 7]"
    assert Plan.parse(str(plan).split(",")) == plan
    assert plan.without(Site(2, "mlp")).narrowed_names() == ["attention.0[1]"]
    assert plan.key() != Plan(plan.removed).key() == Plan.parse(["attention.1"]).key()
    anatomy = load(checkpoint("llama")).anatomy
    for wrong, match in (
        ("mlp.2[3-1]", "does not ascend"), ("mlp.2[1 1]", "does not ascend"),
        ("mlp.2[a]", "Write the numbers of those to keep"),
        ("mlp.2[0-48]", "no channel group 48: it has 0-47"), ("mlp.9[0]", "no mlp.9 to be narrowed"),
        ("attention.0[0 2]", "no channel group 2"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=match):
            anatomy.check(Plan.parse([wrong]))
    with pytest.raises(PlanError, match="more than once"):
        Plan.parse(["mlp.1", "mlp.1[0-3]"])
    with pytest.raises(PlanError, match="keep no channel group"):
        anatomy.check(Plan(frozenset(), frozenset([KeptGroups(Site(1, "mlp"), ())])))
    with pytest.raises(PlanError, match="protect= keeps"):
        anatomy.check(Plan.parse(["mlp.1[0-3]"]), frozenset([Site(1, "mlp")]))


def test_experts_share_one_shape_and_what_has_no_groups_says_why(checkpoint: Folder) -> None:
    experts = load(checkpoint("mixtral")).anatomy  # four of 48 neurons
    four = [expert * 48 + neuron for expert in range(4) for neuron in range(4)]
    for groups, match in ((range(100), "share one shape"), (four, "multiple of 8")):
        with pytest.raises(PlanError, match=match):
            experts.check(Plan(frozenset(), frozenset([KeptGroups(Site(0, "mlp"), tuple(groups))])))
    alibi = load(checkpoint("falcon_alibi"))
    with pytest.raises(PlanError, match="no channel groups"):
        alibi.anatomy.check(Plan.parse(["attention.0[0]"]))
    with pytest.raises(PlanError, match="stock=True has no place for a width"):
        billhook.apply(load(checkpoint("llama")), Plan.parse(["mlp.0[0-7]"]), stock=True)
