"""Whole experts: a router that may not choose them computes what the model without them does, saved and loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import billhook
from billhook.core.anatomy import GroupSize, SiteSize
from billhook.core.budget import UNITS, Budget
from billhook.core.errors import PlanError
from billhook.core.plan import KeptGroups, Plan, Site
from billhook.core.plan_files import read_plan
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.methods.export import form_of
from billhook.methods.export.serving import fits
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.models.load import Teacher, load

Folder = Callable[[str], Path]
Kept = dict[Site, list[int]]  # of each narrowed mixture, the experts that it keeps
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_moe_mixed")
KINDS = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")


def mixtures(teacher: Teacher) -> list[SiteSize]:
    return [size for size in teacher.anatomy.sites if size.experts > 1]


def keeping(teacher: Teacher, kept: Kept) -> Plan:
    """The plan that keeps all neurons of these experts, and nothing of others."""
    sizes = {size.site: size for size in teacher.anatomy.sites}
    return Plan(
        frozenset(),
        frozenset(
            KeptGroups(site, tuple(g for e in experts for g in share(sizes[site], e))) for site, experts in kept.items()
        ),
    )


def share(size: SiteSize, expert: int) -> tuple[int, ...]:
    """The groups of one expert."""
    return size.groups[expert * size.per_expert : (expert + 1) * size.per_expert]


def uneven(teacher: Teacher, seed: int) -> Kept:
    """Two or three of four experts of each mixture, of an odd seed but for the first of several."""
    draw, (first, *others) = random.Random(seed), mixtures(teacher)
    some = others if seed % 2 and others else [first, *others]
    return {size.site: sorted(draw.sample(range(size.experts), draw.choice((2, 3)))) for size in some}


def even(teacher: Teacher, seed: int = 0) -> Kept:
    draw = random.Random(seed)
    return {size.site: sorted(draw.sample(range(size.experts), 3)) for size in mixtures(teacher)}


@contextmanager
def forbidden(teacher: Teacher, kept: Kept) -> Iterator[None]:
    """Inside, routers have a logit of -inf for each expert that is not kept, and choose and weigh by their own rule."""
    config, handles = teacher.model.config, []
    model_type = config.model_type.removeprefix("billhook-")

    def route(experts: list[int]) -> Callable[..., Any]:
        def hook(router: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits = torch.full_like(output[0], -torch.inf)
            logits[:, experts] = output[0][:, experts]
            if model_type == "gpt_oss":
                best, chosen = logits.topk(router.top_k)
                return logits, best.softmax(-1), chosen
            best, chosen = logits.softmax(-1).topk(router.top_k)
            normed = model_type == "mixtral" or config.norm_topk_prob
            return logits, best / best.sum(-1, keepdim=True) if normed else best, chosen

        return hook

    for site, experts in kept.items():
        mlp: Any = teacher.block(site.block).mlp
        router = mlp.router if model_type == "gpt_oss" else mlp.gate
        handles.append(router.register_forward_hook(route(experts)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def documents(rows: int = 4, length: int = 16) -> TokenSet:
    ids = [tuple(row) for row in tiny.tokens(rows, length).tolist()]
    return token_set(ids, range(rows), range(rows), list(map(str, range(rows))), "rows")


# -- mask = delete ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MIXTURES)
def test_a_model_without_experts_computes_as_if_no_router_could_choose_them(
    checkpoint: Folder, variant: str, tmp_path: Path
) -> None:
    teacher, ids = load(checkpoint(variant)), tiny.tokens(2, 20)
    whole = logits(teacher.model, ids)
    for seed in range(2):
        kept = uneven(teacher, seed)
        plan = keeping(teacher, kept)
        with forbidden(teacher, kept):
            expected = logits(teacher.model, ids)
        assert (whole - expected).abs().max() > 0.01, "what went matters"
        student = billhook.apply(teacher, plan)
        torch.testing.assert_close(logits(student, ids), expected, atol=1e-5, rtol=1e-5)
        billhook.save(student, None, plan, tmp_path / f"{seed}", teacher=teacher)
        again = load(tmp_path / f"{seed}")
        assert torch.equal(logits(again.model, ids), logits(student, ids))
        left = {size.site: size for size in again.anatomy.sites}
        assert {site: left[site].experts for site in kept} == {site: len(experts) for site, experts in kept.items()}
        assert {each.site: each.groups for each in plan.narrowed} == {site: left[site].groups for site in kept}
        assert sum(p.numel() for p in student.parameters()) == again.anatomy.total("parameters")
        for kind in KINDS:
            assert again.anatomy.total(kind) == teacher.anatomy.total(kind, plan), kind
        cached, plain = (
            again.model.generate(ids[:, :8], max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(cached, plain)
    assert torch.equal(logits(teacher.model, ids), whole), "the teacher is as it was"


@pytest.mark.parametrize("variant", MIXTURES)
@pytest.mark.parametrize("memory", [None, 0])
def test_the_engine_measures_the_router_without_them(checkpoint: Folder, variant: str, memory: int | None) -> None:
    """KL to the whole model by hand; measured of the whole, and of a streamed model; alone, and among other plans."""
    teacher, tokens = load(checkpoint(variant)), documents()
    probed = load(checkpoint(variant), memory=memory)
    whole = logits(teacher.model, tokens.rows).double().log_softmax(-1)
    some = [uneven(teacher, 3), even(teacher)]
    plans = [keeping(teacher, kept).without(Site(1, "attention")) for kept in some]
    plans = [*plans, *(keeping(teacher, kept) for kept in some), Plan()]
    probe = Probe(probed, tokens, "kl", memory=1 if memory == 0 else None)
    for plan, loss in zip(plans, probe.losses(plans), strict=True):
        cut = logits(billhook.apply(teacher, plan), tokens.rows).double().log_softmax(-1)
        assert loss.mean == pytest.approx(float((whole.exp() * (whole - cut)).sum(-1).mean()), rel=1e-4, abs=1e-6)
    assert torch.equal(logits(teacher.model, tokens.rows).double().log_softmax(-1), whole)


def test_experts_and_neurons_of_those_that_stay_are_one_plan(checkpoint: Folder, tmp_path: Path) -> None:
    """Both at once, then one after the other in either order, in numbers of the unpruned model."""
    teacher, ids = load(checkpoint("gpt_oss")), tiny.tokens(2, 20)
    kept = uneven(teacher, 1)
    sizes = {size.site: size for size in teacher.anatomy.sites}
    draw = random.Random(4)
    both = Plan(frozenset({Site(0, "attention")}), frozenset(
        KeptGroups(site, tuple(g for e in experts for g in sorted(draw.sample(share(sizes[site], e), 16))))
        for site, experts in kept.items()
    ))  # fmt: skip
    student = billhook.apply(teacher, both)
    whole = logits(student, ids)
    first = keeping(teacher, kept)
    billhook.save(billhook.apply(teacher, first), None, first, tmp_path / "experts", teacher=teacher)
    again = load(tmp_path / "experts")
    torch.testing.assert_close(logits(billhook.apply(again, both), ids), whole, atol=1e-5, rtol=1e-5)
    billhook.save(student, None, both, tmp_path / "both", teacher=teacher)
    last = load(tmp_path / "both")
    assert torch.equal(logits(last.model, ids), whole)
    fewer = {size.site: [0, 1] for size in mixtures(last) if size.experts > 2}
    assert fewer
    less = keeping(last, fewer)
    with forbidden(last, fewer):
        expected = logits(last.model, ids)
    cut = billhook.apply(last, less)
    torch.testing.assert_close(logits(cut, ids), expected, atol=1e-5, rtol=1e-5)
    billhook.save(cut, None, less, tmp_path / "less", teacher=last)
    assert torch.equal(logits(load(tmp_path / "less").model, ids), logits(cut, ids))


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MIXTURES)
def test_equally_many_experts_are_a_stock_checkpoint(checkpoint: Folder, variant: str, tmp_path: Path) -> None:
    teacher, ids = load(checkpoint(variant)), tiny.tokens(2, 20)
    kept = even(teacher, 5)
    plan = keeping(teacher, kept)
    student = billhook.apply(teacher, plan)
    assert type(student) is type(teacher.model)
    billhook.save(student, None, plan, tmp_path / "out", teacher=teacher)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["model_type"], told["num_local_experts"]) == (teacher.model.config.model_type, 3)
    assert "per_layer_config" not in told
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with forbidden(teacher, kept):
        torch.testing.assert_close(logits(plain, ids), logits(teacher.model, ids), atol=1e-5, rtol=1e-5)
    assert form_of("stock", teacher, plan).sites == "zeros"
    again = load(tmp_path / "out")
    fewer = {size.site: [0, 2] for size in mixtures(again)}
    assert type(billhook.apply(again, keeping(again, fewer))) is type(teacher.model)


def test_other_numbers_of_experts_have_no_stock_shape(checkpoint: Folder) -> None:
    """Of 3 experts with 32 neurons and 2 with 48 both have 96 groups, and no config says both."""
    teacher = load(checkpoint("mixtral"))
    sizes = {size.site: size for size in mixtures(teacher)}
    plan = keeping(teacher, {site: [0, 1] for site in sizes})
    narrower = KeptGroups(Site(2, "mlp"), tuple(g for e in (0, 1, 3) for g in share(sizes[Site(2, "mlp")], e)[:32]))
    odd = plan.combined_with(Plan(frozenset(), frozenset({narrower})))
    assert {len(each.groups) for each in odd.narrowed} == {96}
    assert billhook.apply(teacher, odd).config.model_type == "billhook-mixtral"
    for some in (odd, keeping(teacher, {Site(1, "mlp"): [0, 3, 1]})):
        with pytest.raises(PlanError, match="stock has no place for mlps of different widths or numbers of experts"):
            form_of("stock", teacher, some)
    found = {fit.target: fit.fault for fit in fits(teacher, odd)}
    assert found["transformers"] is None
    assert (found["vllm"], found["llama.cpp"], found["stock"]) == ("widths", "widths", "widths")
    assert all(each.fault is None for each in fits(teacher, plan) if each.target in ("vllm", "stock", "mlx"))


def test_a_plan_file_reads_back(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("qwen3_moe"))
    plan = keeping(teacher, uneven(teacher, 1)).without(Site(0, "mlp"))
    billhook.save(billhook.apply(teacher, plan), None, plan, tmp_path / "out", teacher=teacher)
    names = plan.to_list()
    for text in (",".join(names), str(tmp_path / "out" / "billhook.json")):
        assert read_plan(text, teacher.anatomy, teacher.fingerprint) == plan
    assert all(SiteSize.from_json(json.loads(json.dumps(s.to_json()))) == s for s in teacher.anatomy.sites)


def test_what_a_recovery_trains_of_a_model_without_experts_is_measured_and_saved(
    checkpoint: Folder, tmp_path: Path
) -> None:
    teacher = load(checkpoint("mixtral"))
    plan, tokens = keeping(teacher, uneven(teacher, 1)), documents(8)
    task = RecoveryTask(teacher, plan, memory=1)
    repair = RECOVERIES["full"](task, tokens, tokens)
    assert any("experts" in name for name in repair.weights)
    student = billhook.apply(teacher, plan, repair=repair)
    billhook.save(student, None, plan, tmp_path / "out", teacher=teacher)
    assert torch.equal(logits(load(tmp_path / "out").model, tokens.rows), logits(student, tokens.rows))
    measured = Probe(teacher, tokens, "nll", repaired=(plan, repair)).losses([plan])[0].mean
    found = logits(student, tokens.rows)[:, :-1].double().log_softmax(-1)
    expected = -found.gather(-1, tokens.rows[:, 1:, None]).mean()
    assert measured == pytest.approx(float(expected), rel=1e-4)


# -- what is counted, and what is refused -----------------------------------------------------------------------------


def test_a_token_meets_as_many_experts_as_before(checkpoint: Folder) -> None:
    """By hand, of Mixtral: half the experts cost half of them and of the router's rows; a token's FLOPs, those rows."""
    teacher = load(checkpoint("mixtral"))
    size = next(s for s in mixtures(teacher) if s.site == Site(1, "mlp"))
    plan = keeping(teacher, {size.site: [0, 3]})
    expert, row = 3 * 32 * 48, 32
    assert size.expert == GroupSize(row, 4 * row, 0, 2 * row)
    assert size.lost(size.groups) == GroupSize(0, 0, 0, 0)
    found = {
        name: Budget.parse(f"1{name}").removed_cost(teacher.anatomy, plan) for name in ("params", "bytes", "flops")
    }
    assert found == {"params": 2 * (expert + row), "bytes": 8 * (expert + row), "flops": 2 * 2 * row}
    halves = Plan(
        frozenset(), frozenset({KeptGroups(size.site, tuple(g for e in (0, 3) for g in share(size, e)[:24]))})
    )
    lost = teacher.anatomy.total("flops_per_token") - teacher.anatomy.total("flops_per_token", halves)
    assert lost == 2 * (2 * 3 * 32 * 24) + 2 * 2 * row, "two experts a token, half as wide each"
    assert UNITS["kv"].total is not None
    assert Budget.parse("1kv").removed_cost(teacher.anatomy, plan) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlp.1[0-47]", "would keep 1 of its 4 experts. Keep 2 or more: each token meets as many"),
        ("mlp.1[0-47 48-63]", "keeps 16 to 48 neurons of its experts.*or none of an expert to remove it"),
        ("mlp.1[0-8 48-56]", "keeps 9 neurons of each expert. Keep a multiple of 8"),
    ],
)
def test_plans_that_no_router_can_follow_are_refused(checkpoint: Folder, name: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        load(checkpoint("mixtral")).anatomy.parse([name])


def test_experts_that_are_no_multiple_of_eight_wide_can_go_whole(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "odd", "mixtral", intermediate_size=20))
    plan = teacher.anatomy.check(keeping(teacher, {Site(0, "mlp"): [1, 2]}))
    ids = tiny.tokens(2, 12)
    with forbidden(teacher, {Site(0, "mlp"): [1, 2]}):
        expected = logits(teacher.model, ids)
    torch.testing.assert_close(logits(billhook.apply(teacher, plan), ids), expected, atol=1e-5, rtol=1e-5)


def test_experts_of_a_streamed_model_go_in_memory_alone(checkpoint: Folder) -> None:
    teacher = load(checkpoint("mixtral"), memory=0)
    with pytest.raises(PlanError, match="only be narrowed in memory"):
        billhook.apply(teacher, keeping(teacher, even(teacher)))
