"""Recoveries: exact where theory says so, the same in memory and streamed, and never a bit of the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_probe import token_set

from billhook.core.errors import UsageError
from billhook.core.plan import Plan, Site
from billhook.data.token_sets import Document, TokenSet, pack_rows
from billhook.engine.bench import Measurer
from billhook.engine.probe import Probe
from billhook.methods.export.checkpoint import save, verify_streamed_round_trip, write_checkpoint
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.methods.recover.lora import Update, quantised
from billhook.methods.recover.ridge import DIRECTIONS, RIDGES, Moments, ridge_fit
from billhook.methods.recover.side_by_side import (
    Change,
    SiteView,
    TeacherStreams,
    equivalent_places,
    execution_order,
    lookahead_targets,
    removed_runs,
    side_by_side,
    streams_after,
)
from billhook.models.accelerator.bfloat16 import LEAST_WIDTH
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Patch, Repair, read_repair
from billhook.models.structure import output_projection
from billhook.models.surgery import apply, extract_repair

Folder = Callable[[str], Path]
PLAN = Plan.parse(["attention.0", "mlp.1", "attention.2", "mlp.2"])
TRAINED = {"apt", "bias", "partial", "full", "lora", "qa_lora"}
FREE = sorted(set(RECOVERIES) - TRAINED - {"patches", "compensate"})  # what is for plans that narrow: test_width
SHORT = {"epochs": 2, "batch": 2}
OWN = {"qa_lora": {"bits": 0}}  # what is quantised loses something first


def many_texts(texts: int = 40, seed: int = 0, length: int = 24) -> TokenSet:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (texts, length), generator=draw).tolist()
    return pack_rows([Document(i, tuple(row)) for i, row in enumerate(ids)], texts * length, length, [], "made up")


def recovered(name: str, teacher: Teacher, plan: Plan, tokens: TokenSet, **options: Any) -> Repair:
    options = (SHORT if name in {*TRAINED, "patches"} else {}) | OWN.get(name, {}) | options
    before = recovered("lowrank", teacher, plan, tokens, rank=2) if name == "patches" else NO_REPAIR
    return RECOVERIES[name](RecoveryTask(teacher, plan, before), tokens, many_texts(6, seed=9), **options)


def logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=rows, use_cache=False).logits
    return found


# -- teacher and student side by side -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_both_sides_are_what_plain_passes_give(variant: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint(variant)), token_set()
    repair = RECOVERIES["lowrank"](RecoveryTask(teacher, PLAN), tokens, tokens, rank=3)
    for plan, mended in ((PLAN, NO_REPAIR), (PLAN, repair)):
        stages: list[SiteView] = []
        bench = Measurer(teacher, tokens, "kl")

        def look(stage: SiteView, stages: list[SiteView] = stages) -> Change:
            stages.append(stage)
            return None

        assert side_by_side(TeacherStreams(bench), plan, mended, look) is mended
        assert [stage.site for stage in stages] == execution_order(bench)
        assert sorted(execution_order(bench)) == list(teacher.anatomy.sites_present())
        for model, seen in (
            (teacher.model, stages[-1].teacher_after),
            (apply(teacher, plan, repair=mended), stages[-1].after),
        ):
            ends: list[torch.Tensor] = []
            last = model.get_submodule(teacher.architecture.blocks)[-1]
            last.register_forward_hook(lambda m, a, out, e=ends: e.append(out[0] if isinstance(out, tuple) else out))
            for group in bench.groups:
                logits(model, group.ids)
            told = torch.cat([group.tokens_of(end) for end, group in zip(ends, bench.groups, strict=True)])
            assert torch.equal(told, seen)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_repaired_student_is_saved_and_measured_as_it_is(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher, tokens = load(checkpoint(variant)), many_texts(20)
    plan = Plan.parse(["attention.0", "mlp.1", "attention.2", "mlp.2"])  # block 2 stays for its patches
    repair = recovered("lowrank", teacher, plan, tokens, rank=2)
    if variant not in ("gemma2", "gemma3_text", "olmo2", "qwen3_moe"):  # of which some have no projection to refit
        repair = RECOVERIES["fold"](RecoveryTask(teacher, plan, repair), tokens, tokens)
    student = apply(teacher, plan, repair=repair)
    assert student.config.billhook["kept_blocks"] == [0, 1, 2, 3]
    save(student, None, plan, tmp_path / "out", teacher=teacher)  # compares bit for bit
    again = load(tmp_path / "out")
    assert again.anatomy.sites_present() == tuple(s for s in teacher.anatomy.sites_present() if s not in plan.removed)
    assert again.anatomy.total("parameters") == teacher.anatomy.total("parameters", plan) + repair.parameters() + sum(
        shared.parameters for shared in teacher.anatomy.shared if shared.block == 2
    )
    rows = tiny.tokens(2, 12)
    assert torch.equal(logits(again.model, rows), logits(student, rows))
    plain = Probe(teacher, tokens, "kl", repaired=(plan, repair)).losses([plan])[0].mean
    p, q = (logits(m, tokens.rows).log_softmax(-1) for m in (teacher.model, student))
    assert plain == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    dense = again.model.generate(rows, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(again.model.generate(rows, max_new_tokens=8, do_sample=False), dense)


def test_a_patched_model_can_be_pruned_again(checkpoint: Folder, tmp_path: Path) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts()
    plan, more = Plan.parse(["attention.1", "mlp.1", "attention.2"]), Plan.parse(["mlp.2", "attention.3"])
    repair = recovered("mean", teacher, plan, tokens)
    save(apply(teacher, plan, repair=repair), None, plan, tmp_path / "once", teacher=teacher)
    again = load(tmp_path / "once")
    direct = apply(teacher, plan.without(*more.removed), repair=repair)
    student = apply(again, more)
    rows = tiny.tokens(2, 12)
    assert torch.equal(logits(student, rows), logits(direct, rows))
    measured = Probe(again, tokens, "nll").losses([more])[0].mean
    q = logits(direct, tokens.rows).log_softmax(-1)[:, :-1]
    assert measured == pytest.approx(-float(q.gather(-1, tokens.rows[:, 1:, None]).mean()), rel=1e-4)
    save(student, None, more, tmp_path / "twice", teacher=again)
    assert torch.equal(logits(load(tmp_path / "twice").model, rows), logits(direct, rows))


# -- what theory promises -------------------------------------------------------------------------------------------


def planted(tmp_path: Path, variant: str, change: Callable[[Any], None], **overrides: Any) -> Teacher:
    model = tiny.build(variant, **overrides)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "planted")
    return load(tmp_path / "planted")


def constant(model: Any) -> None:
    """The MLP of block 1 and the attention of block 2 give their bias, whatever they read."""
    model.transformer.h[1].mlp.c_proj.weight.zero_()
    model.transformer.h[2].attn.c_proj.weight.zero_()


def test_a_sublayer_that_returns_a_constant_is_lossless_after_mean(tmp_path: Path) -> None:
    teacher, plan = planted(tmp_path, "gpt2", constant), Plan.parse(["mlp.1", "attention.2"])
    rows = tiny.tokens(3, 20)
    dense = logits(teacher.model, rows)
    assert (logits(apply(teacher, plan), rows) - dense).abs().max() > 0.1
    repair = recovered("mean", teacher, plan, many_texts())
    assert torch.allclose(logits(apply(teacher, plan, repair=repair), rows), dense, rtol=1e-4, atol=1e-4)
    assert list(repair.weights) == ["transformer.h.1.attn.c_proj.bias"]
    assert repair.parameters() == 0


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_constants_between_which_nothing_reads_are_one_and_go_into_a_bias(variant: str, checkpoint: Folder) -> None:
    """What stands where they were, each on its own, gives the same; of whole blocks only what holds a vector stays."""
    teacher, tokens = load(checkpoint(variant)), many_texts()
    plan = Plan.parse(["mlp.0", "attention.1", "mlp.1", "attention.2", "mlp.3"])
    repair = recovered("mean", teacher, plan, tokens)
    apart: dict[Site, Patch] = {}

    def note(stage: SiteView) -> Change:
        if not stage.removed:
            return None
        apart[stage.site] = Patch(bias=(stage.teacher_after - stage.teacher_before).mean(0))
        return apart[stage.site]

    bench = Measurer(teacher, tokens, "kl")
    side_by_side(TeacherStreams(bench), plan, NO_REPAIR, note)
    rows = tiny.tokens(2, 12)
    one, many = (logits(apply(teacher, plan, repair=r), rows) for r in (repair, NO_REPAIR.with_patches(apart)))
    assert torch.allclose(one, many, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, logits(apply(teacher, plan), rows), rtol=1e-2, atol=1e-2)
    # Between attention.0 and mlp.2 nothing reads; parallel parts read before their block.
    runs_of = 3 if bench.runner.parallel else 2
    assert len(repair.patches) + len(repair.weights) == runs_of
    assert set(map(len, equivalent_places(bench, plan))) == ({2, 4} if bench.runner.parallel else {1, 2, 5})
    block = teacher.block(0)
    name = output_projection(
        block, "attention", teacher.architecture, teacher.model.config
    )  # what stays before both runs
    biased = name is not None and getattr(block.get_submodule(name), "bias", None) is not None
    assert len(repair.weights) == (runs_of if biased else 0)
    if biased:
        student = apply(teacher, plan, repair=repair)
        assert 1 not in student.config.billhook["kept_blocks"]


def straight(model: Any) -> None:
    """The MLPs of blocks 1 and 2 are linear maps: a norm that divides by a constant, and no bias."""
    for block in model.transformer.h[1:3]:
        block.ln_2.eps = 1e8
        block.ln_2.weight.mul_(1e4)
        for bias in (block.ln_2.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
            bias.zero_()


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), ("linear", {"bias": True}), ("lowrank", {"rank": 32, "bias": False}), ("lowrank", {"rank": 99})],
)
def test_a_span_that_is_linear_is_lossless_after_a_matrix(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    teacher = planted(tmp_path, "gpt2", straight, activation_function="linear")
    for block in teacher.model.transformer.h[1:3]:
        block.ln_2.eps = 1e8  # the checkpoint has one epsilon for all norms
    plan, rows = Plan.parse(["mlp.1"]), tiny.tokens(3, 20)
    dense = logits(teacher.model, rows)
    repair = recovered(name, teacher, plan, many_texts(60), **options)
    assert (logits(apply(teacher, plan), rows) - dense).abs().max() > 0.1
    assert torch.allclose(logits(apply(teacher, plan, repair=repair), rows), dense, rtol=1e-2, atol=2e-2)


def affine(model: Any) -> None:
    """The MLP of block 1 is a linear map and a constant."""
    block = model.transformer.h[1]
    block.ln_2.eps = 1e8
    block.ln_2.weight.mul_(1e4)
    block.mlp.c_proj.bias.fill_(3)


def test_a_constant_makes_a_matrix_an_affine_map(tmp_path: Path) -> None:
    """By least squares of centred streams; without it the constant stays."""
    teacher = planted(tmp_path, "gpt2", affine, activation_function="linear")
    teacher.model.transformer.h[1].ln_2.eps = 1e8
    plan, rows, tokens = Plan.parse(["mlp.1"]), tiny.tokens(3, 20), many_texts(60)
    dense = logits(teacher.model, rows)
    without, with_it = (recovered("linear", teacher, plan, tokens, bias=bias) for bias in (False, True))
    off, on = ((logits(apply(teacher, plan, repair=r), rows) - dense).abs().max() for r in (without, with_it))
    assert on < 2e-2 < off
    patch = with_it.patches[Site(1, "mlp")]
    assert patch.bias is not None
    seen: list[SiteView] = []
    side_by_side(TeacherStreams(Measurer(teacher, tokens, "kl")), plan, NO_REPAIR, lambda view: seen.append(view))
    view = next(view for view in seen if view.site == Site(1, "mlp"))
    lacking = view.teacher_after - view.after
    assert torch.allclose(patch.forward(view.inputs).mean(0), lacking.mean(0), atol=1e-4)


def test_a_fused_matrix_is_a_matrix_on_the_output_before_the_run(checkpoint: Folder) -> None:
    teacher, plan, tokens = load(checkpoint("llama")), Plan.parse(["attention.2", "mlp.2"]), many_texts()
    repair = recovered("linear", teacher, plan, tokens, where="fused")
    (name,) = repair.weights
    assert name == "model.layers.1.mlp.down_proj.weight"
    assert not repair.patches
    before = teacher.model.get_parameter(name).detach()
    t, *_ = torch.linalg.lstsq(before.T, repair.weights[name].T)
    assert torch.allclose(before.T @ t, repair.weights[name].T, atol=1e-4)  # T · W, for one T [width, width]


def test_fold_leaves_an_untouched_model_alone(checkpoint: Folder) -> None:
    assert recovered("fold", load(checkpoint("llama")), Plan(), many_texts()) == NO_REPAIR


def test_fold_is_the_ridge_regression_of_what_the_stream_lacks(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts()
    plan = Plan.parse(["mlp.2"])
    repair = recovered("fold", teacher, plan, tokens, parts="mlp", ahead=False)
    (name,) = repair.weights
    assert name == "model.layers.3.mlp.down_proj.weight"
    read: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    student = apply(teacher, plan)
    last = student.model.layers[-1]
    last.mlp.down_proj.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    for model in (student, teacher.model):
        model.model.layers[-1].register_forward_hook(lambda m, a, out: ends.append(out))
        logits(model, tokens.rows)
    x, lacking = read[0].flatten(0, 1).double(), (ends[1] - ends[0]).flatten(0, 1).double()
    weight = 1 / ends[1].flatten(0, 1).double().square().mean(-1, keepdim=True)
    weight = weight / weight.mean()
    change = (repair.weights[name] - teacher.model.get_parameter(name).detach()).double()
    # At the minimum the gradient is that of the ridge: proportional to the change itself and to the square of what each
    # channel carries, with one factor for all.
    slope = (x * weight).T @ (lacking - x @ change.T)
    pull = (x.square() * weight).sum(0)[:, None] * change.T
    ridge = float((slope * pull).sum() / pull.square().sum())
    assert any(ridge == pytest.approx(one, rel=1e-2) for one in RIDGES)
    assert torch.allclose(slope, ridge * pull, rtol=1e-2, atol=1e-3 * float(slope.abs().max()))


def test_of_a_single_text_some_documents_choose_the_ridge(checkpoint: Folder) -> None:
    teacher, ids = load(checkpoint("llama")), many_texts(40).rows.tolist()
    one = pack_rows([Document(0, tuple(row)) for row in ids], 40 * 24, 24, [], "one text")
    held = RecoveryTask(teacher, PLAN).validation_mask(Measurer(teacher, one, "kl"), one)
    assert int(held.sum()) == 5 * 24, "every eighth of forty documents"
    assert recovered("fold", teacher, PLAN, one).weights


def test_fold_looks_behind_the_run_that_follows(checkpoint: Folder) -> None:
    """Right before a run the stream is fitted to what the teacher has behind it."""
    teacher, tokens, plan = load(checkpoint("llama")), many_texts(60), Plan.parse(["mlp.1", "attention.2", "mlp.2"])
    bench = Measurer(teacher, tokens, "kl")
    assert lookahead_targets(execution_order(bench), plan) == {Site(1, "attention"): Site(2, "mlp")}
    lacking: dict[bool, float] = {}
    for ahead in (False, True):
        repair = recovered("fold", teacher, plan, tokens, ahead=ahead)
        assert ("model.layers.1.self_attn.o_proj.weight" in repair.weights) == ahead
        ends: list[SiteView] = []

        def look(stage: SiteView, ends: list[SiteView] = ends) -> Change:
            ends.append(stage)
            return None

        side_by_side(TeacherStreams(bench), plan, repair, look)
        behind = next(stage for stage in ends if stage.site == Site(2, "mlp"))
        assert torch.equal(streams_after(TeacherStreams(bench), [behind.site])[behind.site], behind.teacher_after)
        lacking[ahead] = float((behind.teacher_after - behind.after).square().sum())
    assert lacking[True] < 0.9 * lacking[False]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_streams_after_sites_are_those_that_both_sides_show(variant: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint(variant)), token_set()
    bench, shown = Measurer(teacher, tokens, "kl"), dict[Site, torch.Tensor]()

    def look(stage: SiteView) -> Change:
        shown[stage.site] = stage.teacher_after
        return None

    side_by_side(TeacherStreams(bench), Plan(), NO_REPAIR, look)
    found = streams_after(TeacherStreams(bench), teacher.anatomy.sites_present())
    assert found.keys() == shown.keys()
    assert all(torch.allclose(found[site], shown[site], atol=1e-5) for site in found)


@pytest.mark.parametrize("variant", ["llama", "phi"])
def test_the_teacher_is_gone_through_once_where_its_streams_fit(variant: str, checkpoint: Folder) -> None:
    teacher, tokens, plans = load(checkpoint(variant)), many_texts(), [PLAN, Plan.parse(["attention.1", "mlp.1"])]
    subject = RecoveryTask(teacher, PLAN)
    kept = replace(subject, streams_by_tokens={})
    alone = [RECOVERIES["fold"](replace(subject, plan=plan), tokens, tokens) for plan in plans]
    together = [RECOVERIES["fold"](replace(kept, plan=plan), tokens, tokens) for plan in plans]
    anew = [RECOVERIES["fold"](replace(subject, plan=plan, memory=2**20), tokens, tokens) for plan in plans]
    for one, *others in zip(alone, together, anew, strict=True):
        for other in others:
            assert one.weights.keys() == other.weights.keys()
            assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert kept.streams_by_tokens
    (side,) = kept.streams_by_tokens.values()
    passes, sites = side.bench.runner.computed / tokens.rows.numel(), len(teacher.anatomy.sites_present())
    assert passes < 3.5 * sites, "one of the teacher, two of students; it was six"
    small = TeacherStreams(Measurer(teacher, tokens, "kl", memory=2**20), again=True)
    streams_after(small, [])
    first = small.bench.runner.computed
    streams_after(small, [])
    assert small.bench.runner.computed == 2 * first, "what does not fit is computed again"
    streams_after(side, [])
    assert side.bench.runner.computed == passes * tokens.rows.numel(), "what fits is not"


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text", "olmo2"])
def test_fold_says_where_it_cannot(variant: str, checkpoint: Folder) -> None:
    with pytest.raises(UsageError, match=r"fold finds no output projection .* lowrank, linear or lora"):
        recovered("fold", load(checkpoint(variant)), PLAN, many_texts())


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_many_outputs_get_nearly_the_best_ridge_of_all_and_the_exact_fit(noise: float) -> None:
    draw = torch.Generator().manual_seed(1)
    x, true = torch.randn(300, 40, generator=draw), torch.randn(40, 3 * DIRECTIONS, generator=draw)
    y = x @ true + noise * torch.randn(300, 3 * DIRECTIONS, generator=draw)
    even, held = torch.ones(300), torch.arange(300) % 4 == 0
    fit = ridge_fit(x, y, even, held)
    seen, unseen = (Moments(x[some], y[some], even[some]) for some in (~held, held))
    errors = {ridge: unseen.error(seen.solve(ridge)) for ridge in RIDGES}
    assert errors[fit.ridge] < 1.01 * min(errors.values())
    assert fit.remaining_error == pytest.approx(errors[fit.ridge] / unseen.yy, rel=0.1)
    assert torch.allclose(fit.matrix.T.double(), Moments(x, y, even).solve(fit.ridge), atol=1e-5)


def test_the_regression_is_that_of_numpy_and_chooses_its_ridge_on_held_out_rows() -> None:
    draw = torch.Generator().manual_seed(3)
    x, true = torch.randn(500, 7, generator=draw), torch.randn(7, 3, generator=draw)
    y = x @ true + 0.01 * torch.randn(500, 3, generator=draw)
    even, held = torch.ones(500), torch.arange(500) % 5 == 0
    exact = torch.linalg.lstsq(x.double(), y.double()).solution
    assert torch.allclose(Moments(x, y, even).solve(0.0), exact, atol=1e-5)
    fit = ridge_fit(x, y, even, held)
    assert fit.remaining_error < 0.01
    assert torch.allclose(fit.matrix.T.double(), exact, atol=1e-2)
    noise = ridge_fit(x, torch.randn(500, 3, generator=draw), even, held)
    assert noise.remaining_error > 0.9
    assert noise.ridge > fit.ridge
    seen, unseen = (Moments(x[some], y[some], even[some]) for some in (~held, held))
    assert fit.ridge == min(RIDGES, key=lambda ridge: unseen.error(seen.solve(ridge))), "of all"
    units = torch.tensor([1e-3, 1.0, 1.0, 1e3, 1.0, 1.0, 1.0])
    plain, scaled = Moments(x, y, even), Moments(x * units, y, even)
    assert torch.allclose(scaled.solve(0.1) * units[:, None], plain.solve(0.1), rtol=1e-4), (
        "no input counts by its unit"
    )
    penalty = 0.1 * plain.xx.diagonal().diag()
    assert torch.allclose(plain.solve(0.1), torch.linalg.solve(plain.xx + penalty, plain.xy), atol=1e-6)
    idle = Moments(torch.cat((x, torch.zeros(500, 2)), 1), y, even).solve(0.1)
    assert torch.allclose(idle[:7], plain.solve(0.1), atol=1e-6)
    assert not idle[7:].any(), "what reads nothing is given nothing"
    twice = Moments(x, y, torch.where(held, 2.0, 1.0))
    doubled = torch.cat((x, x[held])), torch.cat((y, y[held]))
    assert torch.allclose(twice.xx, Moments(*doubled, torch.ones(len(doubled[0]))).xx, rtol=1e-5)


def test_scale_gives_the_stream_its_length(checkpoint: Folder) -> None:
    teacher, plan, tokens = load(checkpoint("llama")), Plan.parse(["attention.1", "mlp.1", "mlp.3"]), many_texts()
    repair = recovered("scale", teacher, plan, tokens)
    assert list(repair.patches) == [Site(1, "mlp"), Site(3, "mlp")]
    lengths: dict[Site, tuple[float, float]] = {}

    def look(stage: SiteView) -> Change:
        lengths[stage.site] = (float(stage.after.norm(dim=-1).mean()), float(stage.teacher_after.norm(dim=-1).mean()))
        return None

    side_by_side(TeacherStreams(Measurer(teacher, tokens, "kl")), plan, repair, look)
    for site in repair.patches:
        assert lengths[site][0] == pytest.approx(lengths[site][1], rel=1e-4)
    with pytest.raises(UsageError, match=r"attention\.1: its norm is kept\. Use mean, lowrank or fold"):
        recovered("scale", load(checkpoint("phi")), plan, tokens)


def test_runs_of_removed_sites_follow_each_other() -> None:
    sites = [Site(b, part) for b in range(3) for part in ("attention", "mlp")]
    plan = Plan.parse(["mlp.0", "attention.1", "mlp.2"])
    assert removed_runs(sites, plan) == [(Site(0, "mlp"), Site(1, "attention")), (Site(2, "mlp"),)]


# -- updates by groups of inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "group"), [(12, 4), (10, 4), (3, 8), (16, 1)])
def test_an_update_by_groups_is_what_is_merged(inputs: int, group: int) -> None:
    draw = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(inputs, 6)
    before = linear.weight.detach().clone()
    update = Update(linear, linear.weight.detach(), group, rank=2, scale=1.5, draw=draw)
    x = torch.randn(5, inputs, generator=draw)
    torch.testing.assert_close(linear(x), x @ before.T + linear.bias)
    with torch.no_grad():
        update.up.copy_(torch.randn(6, 2, generator=draw))
    hooked = linear(x)
    update.merge()
    torch.testing.assert_close(linear(x), hooked)
    change = linear.weight.detach() - before
    assert change.abs().max() > 0.01
    for start in range(0, inputs, group):
        piece = change[:, start : start + group]
        torch.testing.assert_close(piece, piece[:, :1].expand_as(piece))


def test_quantised_weights_have_few_values_and_stay_so_after_training(checkpoint: Folder) -> None:
    """What qa_lora gives is quantised by minimum and maximum again without a loss."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    rounded = quantised(weight, 8, 3)
    steps = torch.cat([(p.amax(1) - p.amin(1))[:, None].expand_as(p) / 7 for p in weight.split(8, 1)], 1)
    assert ((rounded - weight).abs() <= steps / 2 + 1e-6).all()
    torch.testing.assert_close(quantised(rounded, 8, 3), rounded)
    assert quantised(weight, 8, 0) is weight
    teacher = load(checkpoint("llama"))
    repair = recovered("qa_lora", teacher, PLAN, many_texts(60), bits=4, group=8)
    linear = [w for name, w in repair.weights.items() if name.endswith("_proj.weight")]
    assert len(linear) == 7 * 4 - sum(4 if site.part == "attention" else 3 for site in PLAN.removed)
    for found in linear:
        torch.testing.assert_close(quantised(found, 8, 4), found, atol=1e-5, rtol=1e-5)
    plain = [teacher.model.get_parameter(name) for name in repair.weights if name.endswith("_proj.weight")]
    updates = [w - quantised(old, 8, 4) for w, old in zip(linear, plain, strict=True)]
    assert max(float(update.abs().max()) for update in updates) > 1e-4, "something was learnt"
    with pytest.raises(UsageError, match="bits from 0 to 8"):
        recovered("qa_lora", teacher, PLAN, many_texts(60), bits=9)


# -- contracts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(RECOVERIES) - {"compensate"}))
def test_no_recovery_writes_to_the_teacher_or_raises_the_loss_it_learns_by(name: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama_tied")), many_texts(60)
    bits = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    repair = recovered(name, teacher, PLAN, tokens)
    assert all(torch.equal(value, bits[key]) for key, value in teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in apply(teacher, PLAN, repair=repair).parameters() if p.grad is not None)
    assert repair != NO_REPAIR
    sides = [apply(teacher, PLAN), apply(teacher, PLAN, repair=repair)]
    p = logits(teacher.model, tokens.rows).log_softmax(-1)
    before, after = (float((p.exp() * (p - logits(m, tokens.rows).log_softmax(-1))).sum(-1).mean()) for m in sides)
    if name != "scale":
        assert after <= before * 1.02


@pytest.mark.parametrize("name", FREE)
def test_the_same_repair_comes_of_a_model_that_is_streamed(name: str, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", "llama", torch.bfloat16)
    tokens = many_texts(20)
    resident, streamed = (recovered(name, load(folder, memory=m), PLAN, tokens) for m in (None, 0))
    assert resident.weights.keys() == streamed.weights.keys()
    assert list(resident.patches) == list(streamed.patches)
    for key, value in resident.weights.items():
        assert torch.allclose(value, streamed.weights[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi", "falcon"])
def test_a_streamed_model_is_repaired_file_to_file(variant: str, tmp_path: Path) -> None:
    folder, tokens = tiny.saved(tmp_path / "model", variant, torch.bfloat16), many_texts(20)
    teacher = load(folder, memory=0)
    repair = recovered("lowrank", teacher, PLAN, tokens, rank=2)
    repair = RECOVERIES["fold"](RecoveryTask(teacher, PLAN, repair), tokens, tokens).cast_through(teacher.dtype)
    out = tmp_path / "out"
    write_checkpoint(apply(teacher, PLAN, repair=repair), None, PLAN, out, teacher=teacher)
    rows = tiny.tokens(2, 12)
    verify_streamed_round_trip(teacher, PLAN, out, rows, repair=repair)
    whole = load(folder)
    assert torch.allclose(logits(load(out).model, rows), logits(apply(whole, PLAN, repair=repair), rows), atol=1e-5)


def test_a_repair_survives_its_file(checkpoint: Folder, tmp_path: Path) -> None:
    patch = Patch(torch.randn(8), torch.randn(1), torch.randn(2, 8), torch.randn(8, 2))
    repair = Repair(
        {"model.a.weight": torch.randn(3, 3)}, {Site(3, "mlp"): patch, Site(1, "attention"): Patch(torch.ones(8))}
    )
    repair.save(tmp_path / "repair.safetensors")
    again = read_repair(tmp_path / "repair.safetensors")
    assert again.key() == repair.key() != NO_REPAIR.key()
    assert [path.name for path in tmp_path.iterdir()] == ["repair.safetensors"]
    assert (
        repair.cast_through(torch.bfloat16).cast_through(torch.bfloat16).key()
        == repair.cast_through(torch.bfloat16).key()
    )


@pytest.mark.parametrize(("name", "options", "told"), [
    ("fold", {"parts": "head"}, "fold takes parts"),
    ("lowrank", {"rank": 0}, "rank of at least 1"),
    ("linear", {"where": "here"}, "inserted or fused"),
    ("linear", {"where": "fused", "bias": True}, "A fused matrix has no constant"),
    ("bias", {"vectors": "some"}, "vectors called 'some'.*all, biases, norms"),
    ("lora", {"loss": "l2"}, "none of nll, kl and mse. Use one of them"),
    ("full", {"rate": 0.0}, "a rate above 0"),
])  # fmt: skip
def test_options_are_refused(name: str, options: dict[str, Any], told: str, checkpoint: Folder) -> None:
    with pytest.raises(UsageError, match=told):
        recovered(name, load(checkpoint("llama")), PLAN, many_texts(), **options)


# -- training -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_killed_training_ends_as_an_undisturbed_one(name: str, checkpoint: Folder, tmp_path: Path) -> None:
    teacher, tokens, valid = load(checkpoint("llama")), many_texts(24), many_texts(6, seed=9)
    whole = RECOVERIES[name](RecoveryTask(teacher, PLAN), tokens, valid, **SHORT)
    calls = 0

    def watch(event: Any) -> None:
        nonlocal calls
        calls += event.values.get("objective") == "kl"
        if calls == 9:
            calls = 100
            raise Killed

    subject = RecoveryTask(teacher, PLAN, work=tmp_path, watch=watch, save_every=0.0)
    with pytest.raises(Killed):
        RECOVERIES[name](subject, tokens, valid, **SHORT)
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == [*4 * ["teacher"], "training.pt"]
    again = RECOVERIES[name](subject, tokens, valid, **SHORT)
    for key, value in whole.weights.items():
        assert torch.allclose(again.weights[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_what_the_teacher_says_is_written_once(loss: str, checkpoint: Folder, tmp_path: Path) -> None:
    """On disk it is the same as in memory; only what was written whole is read again, and only for the same texts."""
    teacher, tokens, valid = load(checkpoint("llama")), many_texts(9), many_texts(3, seed=9)
    heard: list[str] = []
    options = SHORT | {"loss": loss}

    def watch(event: Any) -> None:
        heard.append(str(event.values.get("step")))
        if event.values.get("step") == "teacher_outputs" and len(heard) == stop:
            raise Killed

    bare = RECOVERIES["bias"](RecoveryTask(teacher, PLAN), tokens, valid, **options)
    subject, stop = RecoveryTask(teacher, PLAN, work=tmp_path, watch=watch), 1
    with pytest.raises(Killed):
        RECOVERIES["bias"](subject, tokens, valid, **options)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    heard, stop = [], 0
    assert RECOVERIES["bias"](subject, tokens, valid, **options).key() == bare.key()
    assert "teacher_outputs" in heard
    assert not list(tmp_path.glob("*.partial"))
    heard.clear()
    assert RECOVERIES["bias"](subject, tokens, valid, **options).key() == bare.key()
    assert "teacher_outputs" not in heard
    RECOVERIES["bias"](subject, many_texts(9, seed=5), valid, **options)
    assert "teacher_outputs" in heard


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_gradient_checkpointing_keeps_less_and_learns_the_same(name: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts(8)
    kept: list[int] = []
    found: list[Repair] = []
    for checkpointing in (False, True):
        held = dict[int, int]()  # bytes of the tensors that wait for a backward pass, by where they are

        def keep(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            found.append(recovered(name, teacher, PLAN, tokens, epochs=1, batch=8, checkpointing=checkpointing))
        kept.append(sum(held.values()))
    assert kept[1] < 0.7 * kept[0]
    assert found[0].weights.keys() == found[1].weights.keys()
    for key, value in found[0].weights.items():
        assert torch.allclose(found[1].weights[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("variant", ["llama", "gpt2", "falcon", "gemma", "opt"])
@pytest.mark.parametrize("name", ["partial", "patches"])
def test_blocks_that_do_not_learn_stay_in_bfloat16(name: str, variant: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint(variant), dtype="bfloat16"), many_texts(16)
    repair = recovered(name, teacher, PLAN, tokens)
    assert torch.isfinite(logits(apply(teacher, PLAN, repair=repair), tokens.rows)).all()


def test_dropout_of_lora_drops(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts(16)
    none, some, again = (recovered("lora", teacher, PLAN, tokens, dropout=rate).key() for rate in (0.0, 0.5, 0.5))
    assert none != some == again


def test_a_training_does_not_go_on_with_other_texts(checkpoint: Folder, tmp_path: Path) -> None:
    teacher, tokens, valid = load(checkpoint("llama")), many_texts(12), many_texts(6, seed=9)
    subject = RecoveryTask(teacher, PLAN, work=tmp_path, save_every=0.0)
    RECOVERIES["bias"](subject, many_texts(12, seed=5), valid, **SHORT)
    assert (tmp_path / "training.pt").is_file()
    anew = RECOVERIES["bias"](RecoveryTask(teacher, PLAN), tokens, valid, **SHORT)
    assert RECOVERIES["bias"](subject, tokens, valid, **SHORT).key() == anew.key()


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_model_in_bfloat16_learns_in_float32(name: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama"), dtype="bfloat16"), many_texts(24)
    repair = recovered(name, teacher, PLAN, tokens)
    assert repair.weights
    held = torch.bfloat16 if name in ("apt", "lora", "qa_lora") else torch.float32  # of which only the factors learn
    assert {value.dtype for value in repair.weights.values()} == {held}
    assert apply(teacher, PLAN, repair=repair).dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"Train with dtype='bfloat16' or float32"):
        recovered(name, load(checkpoint("llama"), dtype="float16"), PLAN, tokens)


@pytest.mark.parametrize("loss", ["nll", "kl", "mse"])
def test_a_cpu_that_multiplies_bfloat16_trains_in_it(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned is nearly what float32 learns, and in float32; the head computes in it, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    teacher, tokens = load(tiny.saved(tmp_path / "wide", "llama", hidden_size=LEAST_WIDTH)), many_texts(12)
    seen: set[tuple[str, torch.dtype]] = set()
    for name in ("model.layers.1.self_attn.q_proj", "lm_head"):
        look = lambda module, args, out, name=name: seen.add((name, out.dtype))  # noqa: E731
        teacher.model.get_submodule(name).register_forward_hook(look)
    best: list[list[float]] = []
    for bfloat16 in (False, True):
        best.append([])
        watch = lambda event, to=best[-1]: to.append(event.values["best"]) if "best" in event.values else None  # noqa: E731
        task = RecoveryTask(teacher, PLAN, bfloat16=bfloat16, watch=watch)
        repair = RECOVERIES["full"](task, tokens, tokens, loss=loss, rate=1e-3, epochs=4, batch=4)
        assert {value.dtype for value in repair.weights.values()} == {torch.float32}
    attention = "model.layers.1.self_attn.q_proj"
    expected = {(attention, torch.float32), (attention, torch.bfloat16)}
    assert seen == expected | ({("lm_head", torch.float32)} if loss != "mse" else set())
    (first, *_, wide), (_, *_, narrowed) = best
    assert wide < first - 0.01
    assert narrowed == pytest.approx(wide, abs=0.2 * (first - wide))
    assert best[0] != best[1]


@pytest.mark.parametrize("loss", ["nll", "kl", "mse"])
def test_training_lowers_its_loss_and_patches_learn_too(loss: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts(24)
    patched = recovered("mean", teacher, PLAN, tokens)
    repair = RECOVERIES["bias"](
        RecoveryTask(teacher, PLAN, patched), tokens, tokens, loss=loss, epochs=4, rate=5e-3, batch=4
    )
    assert set(repair.patches) == set(patched.patches)
    assert all(not torch.equal(repair.patches[s].bias, patched.patches[s].bias) for s in repair.patches)  # type: ignore[arg-type]
    student = apply(teacher, PLAN, repair=repair)
    assert extract_repair(teacher, PLAN, student).key() == repair.key()
    if loss == "kl":
        p = logits(teacher.model, tokens.rows).log_softmax(-1)
        told = [
            float((p.exp() * (p - logits(apply(teacher, PLAN, repair=r), tokens.rows).log_softmax(-1))).sum(-1).mean())
            for r in (patched, repair)
        ]
        assert told[1] < told[0]


@pytest.mark.parametrize(("vectors", "head"), [("all", False), ("biases", False), ("norms", True)])
def test_the_ladder_of_perp_trains_what_it_says(vectors: str, head: bool, checkpoint: Folder) -> None:
    teacher = load(checkpoint("phi"))
    student = apply(teacher, PLAN)
    repair = recovered("bias", teacher, PLAN, many_texts(16), vectors=vectors, head=head)
    one = {name for name, p in student.named_parameters() if p.dim() == 1}
    biases = {name for name in one if name.endswith("bias")}
    expected = {"all": one, "biases": biases, "norms": one - biases}[vectors] | ({"lm_head.weight"} if head else set())
    assert 0 < len(repair.weights) == len(expected)
    assert {value.dim() for value in repair.weights.values()} == ({1, 2} if head else {1})


def test_a_tied_head_is_not_trained_alone(checkpoint: Folder) -> None:
    with pytest.raises(UsageError, match="head of this model is its embedding"):
        recovered("bias", load(checkpoint("llama_tied")), PLAN, many_texts(16), head=True)


def test_only_patches_learn_from_where_the_closed_form_ended(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), many_texts(24)
    closed = recovered("lowrank", teacher, PLAN, tokens, rank=2)
    subject = RecoveryTask(teacher, PLAN, closed)
    repair = RECOVERIES["patches"](subject, tokens, tokens, epochs=4, rate=5e-3, batch=4)
    assert repair.weights == {}
    before, after = (Probe(teacher, tokens, "kl", repaired=(PLAN, r)).losses([PLAN])[0].mean for r in (closed, repair))
    assert after < before
    with pytest.raises(UsageError, match="run lowrank first: recover='lowrank,patches'"):
        RECOVERIES["patches"](RecoveryTask(teacher, PLAN), tokens, tokens)


def test_minutes_bound_the_steps(checkpoint: Folder) -> None:
    told: list[int | None] = []
    subject = RecoveryTask(load(checkpoint("llama")), PLAN, watch=lambda event: told.append(event.total))
    RECOVERIES["bias"](subject, many_texts(24), many_texts(6), epochs=10**6, minutes=0.02, batch=8)
    assert told
    assert 0 < (told[-1] or 0) < 10**5, "and not the three million of all epochs"


def test_a_model_larger_than_memory_is_not_trained(checkpoint: Folder) -> None:
    with pytest.raises(UsageError, match="larger than the memory cannot be trained"):
        recovered("lora", load(checkpoint("llama"), memory=0), PLAN, many_texts())
