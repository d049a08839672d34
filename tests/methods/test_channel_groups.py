"""Metrics of channel groups, by brute force and on planted models; and the search that lets groups go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

import billhook
import billhook.models.surgery
from billhook.cli.main import app
from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.budget import Budget
from billhook.core.errors import BudgetError, UnknownName, UsageError
from billhook.core.plan import Plan, Site
from billhook.core.problem import Problem
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.methods.metrics import GROUP_METRICS
from billhook.methods.metrics.channel_groups import fuse
from billhook.methods.metrics.refitted_groups import removal_errors
from billhook.methods.search import SEARCHES, drive
from billhook.models import channel_groups, structure
from billhook.models.load import Teacher, load
from billhook.models.modeling_billhook import set_parameter

Folder = Callable[[str], Path]
NAMES = [name for name in GROUP_METRICS if not GROUP_METRICS.facts(name).experts]
OF_INPUTS = ("activation", "cfsp", "flap", "obs", "wanda_sp")


def documents(rows: int = 8, length: int = 12, seed: int = 1) -> TokenSet:
    ids = tiny.tokens(rows, length, seed)
    return token_set([tuple(r) for r in ids.tolist()], range(rows), range(rows), list(map(str, range(rows))), "rows")


def layout(teacher: Teacher, site: Site) -> tuple[torch.nn.Module, channel_groups.ChannelLayout]:
    block = teacher.block(site.block)
    of = channel_groups.find_layout(block, site.part, teacher.architecture, teacher.model.config)
    assert not isinstance(of, str)
    return block, of


def gradients(teacher: Teacher, tokens: TokenSet) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By autograd over the whole model: of the mean loss, and mean squares of each row's own."""
    model = billhook.models.surgery.shared_copy(teacher.model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    total: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    for row in tokens.rows:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1].log_softmax(-1)
        (-logits[range(len(row) - 1), row[1:]].mean()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad / len(tokens.rows)
                squares[name] = squares.get(name, 0) + parameter.grad**2 / len(tokens.rows)
    return total, squares


# -- by brute force -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "gpt_neox", "falcon", "mixtral"])
def test_taylor_is_what_autograd_says_of_the_whole_model(checkpoint: Folder, variant: str) -> None:
    """Of every group, in one tensor of all its weights: the model is cut to nothing but them."""
    teacher, tokens = load(checkpoint(variant)), documents()
    total, squares = gradients(teacher, tokens)
    probe = Probe(teacher, tokens, "nll")
    found = {name: GROUP_METRICS[name](probe) for name in NAMES if name.startswith("taylor")}
    found["group_magnitude"] = GROUP_METRICS["group_magnitude"](probe, p=1)
    for site in (Site(1, "attention"), Site(2, "mlp")):
        block, of = layout(teacher, site)
        inside = f"{teacher.architecture.blocks}.{teacher.positions.index(site.block)}."
        for group in range(0, of.groups, max(1, of.groups // 5)):
            expected = dict.fromkeys(found, 0.0)
            for slot in of.slots:
                w = block.get_parameter(slot.name).detach()
                g, f = total[inside + slot.name], squares[inside + slot.name]
                each = of.groups // of.experts
                axis = slot.axis
                if of.experts > 1:
                    w, g, f, axis = w[group // each], g[group // each], f[group // each], axis - 1
                w, g, f = (x.index_select(axis, slot.index[group % each]) for x in (w, g, f))
                across = [d for d in range(w.dim()) if d != axis]
                lines = (g * w).sum(across) if across else g * w
                expected["taylor_vector"] += float(lines.abs().sum())
                expected["taylor_element1"] += float((g * w).abs().sum())
                expected["taylor_element2"] += float((f * w * w / 2).sum())
                expected["taylor_mix"] += float((g * w - f * w * w / 2).abs().sum())
                expected["group_magnitude"] += float(w.abs().sum())
            for name, value in expected.items():
                assert float(found[name][site][group]) == pytest.approx(value, rel=2e-4), (name, site, group)


def test_activations_are_those_of_hooks_on_the_whole_model(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("qwen2")), documents()
    site = Site(2, "attention")
    heard: list[torch.Tensor] = []
    module = teacher.block(2).self_attn.o_proj  # type: ignore[union-attr]
    handle = module.register_forward_pre_hook(lambda m, args: heard.append(args[0]))
    with torch.no_grad():
        teacher.model(tokens.rows)
    handle.remove()
    x, w = heard[0].flatten(0, 1).double(), module.weight.detach().double()
    norm = x.square().sum(0).sqrt()
    probe = Probe(teacher, tokens, "nll")
    expected = {
        "activation": x.abs().mean(0),
        "wanda_sp": w.abs().mean(0) * norm,
        "flap": x.var(0) * w.square().sum(0),
    }
    for name, channels in expected.items():
        options = {"standardise": False} if name == "flap" else {}
        told = GROUP_METRICS[name](probe, **options)[site]
        assert told.tolist() == pytest.approx(channels.view(2, -1).mean(1).tolist(), rel=1e-4)
    plain = GROUP_METRICS["flap"](probe, standardise=False)
    for where, values in GROUP_METRICS["flap"](probe).items():
        assert float(values.mean()) == pytest.approx(0, abs=1e-9)
        assert float(values.std()) == pytest.approx(1)
        assert values.argsort().tolist() == plain[where].argsort().tolist()
    two = GROUP_METRICS["activation"](probe, p=2)[site]
    assert two.tolist() == pytest.approx(x.square().mean(0).sqrt().view(2, -1).mean(1).tolist(), rel=1e-4)
    with pytest.raises(UsageError, match="p=1 or p=2, not 3"):
        GROUP_METRICS["activation"](probe, p=3)
    ifv = GROUP_METRICS["flap"](probe, kind="ifv", standardise=False)[site]
    assert ifv.tolist() == pytest.approx(x.var(0).view(2, -1).mean(1).tolist(), rel=1e-4)


@pytest.mark.parametrize("site", [Site(1, "mlp"), Site(2, "attention")])
def test_cfsp_is_ranges_times_norms(checkpoint: Folder, site: Site) -> None:
    teacher, tokens = load(checkpoint("llama")), documents()
    probe, block = Probe(teacher, tokens, "nll"), teacher.block(site.block)
    _, of = layout(teacher, site)
    ranges = torch.zeros(of.groups, dtype=torch.float64)
    for slot in of.slots:
        w = block.get_parameter(slot.name).detach().double()
        lines = list(w if slot.axis == 0 else w.T)
        each = [max(0.0, float(line.max())) + abs(min(0.0, float(line.min()))) for line in lines]
        of_groups = [[each[i] for i in entries] for entries in slot.index.tolist()]
        largest = max(max(values) for values in of_groups)
        ranges += torch.tensor([sum(values) / len(values) / largest for values in of_groups], dtype=torch.float64)
    told = GROUP_METRICS["cfsp"](probe)[site]
    norms = probe.groups_of_inputs(lambda x, w: (x.square * x.tokens).sqrt())[site]
    assert told.tolist() == pytest.approx((ranges * norms).tolist(), rel=1e-5)


@pytest.mark.parametrize("sharpness", [0.5, 13.1, 80.0])
def test_coarse_cfsp_keeps_shares_by_a_sigmoid_of_angles(checkpoint: Folder, sharpness: float) -> None:
    """At every size at which no block would keep more than all; of each site the best by fine score."""
    teacher, tokens = load(checkpoint("llama")), documents()
    probe = Probe(teacher, tokens, "nll")
    with torch.no_grad():
        streams = teacher.model(tokens.rows, output_hidden_states=True).hidden_states
    last: list[torch.Tensor] = []  # before the final norm
    handle = teacher.block(3).register_forward_hook(
        lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        teacher.model(tokens.rows)
    handle.remove()
    streams = [*streams[:4], last[0]]
    angles = np.array([
        float((torch.cosine_similarity(x.double(), y.double(), dim=-1).arccos() / math.pi).mean())
        for x, y in pairwise(streams)
    ])  # fmt: skip
    sigmoids = 1 / (1 + np.exp(-sharpness * (angles - angles.mean())))
    shares = sigmoids / sigmoids.mean()
    fine, coarse = GROUP_METRICS["cfsp"](probe), GROUP_METRICS["cfsp"](probe, coarse=sharpness)
    mlps = [Site(block, "mlp") for block in range(4)]
    for site in fine:
        assert coarse[site].argsort().tolist() == fine[site].argsort(stable=True).tolist()
    limit = -0.6 / float(shares.max())
    for threshold in (limit, limit / 2, limit / 5):
        kept = [int((coarse[site] >= threshold).sum()) for site in mlps]
        expected = [len(coarse[site]) * -threshold * share for site, share in zip(mlps, shares, strict=True)]
        assert kept == pytest.approx(expected, abs=0.51)
    with pytest.raises(UsageError, match="coarse=0 or more, not -1"):
        GROUP_METRICS["cfsp"](probe, coarse=-1)


def test_obs_counts_what_the_best_refit_leaves() -> None:
    """Against least squares over what is left, for one group of two channels; and in full for the whole order."""
    torch.manual_seed(0)
    x, w = torch.randn(50, 8).double(), torch.randn(5, 8).double()
    channels, ridge = torch.arange(8).view(4, 2), 0.01
    errors = removal_errors(x.T @ x, w, channels, ridge)
    root = torch.linalg.cholesky(x.T @ x + ridge * torch.diag((x.T @ x).diagonal())).T

    def left(groups: list[int]) -> float:
        kept = [c for c in range(8) if c // 2 not in groups]
        fit = torch.linalg.lstsq(root[:, kept], root @ w.T).solution
        return float((root @ w.T - root[:, kept] @ fit).square().sum())

    order = errors.argsort().tolist()
    assert errors[order[0]] == pytest.approx(min(left([g]) for g in range(4)))
    for count in range(1, 5):
        assert errors[order[count - 1]] == pytest.approx(left(order[:count])), "refitted after each"
        if count < 4:
            ahead = {g: left([*order[: count - 1], g]) for g in order[count - 1 :]}
            assert min(ahead, key=ahead.__getitem__) == order[count - 1]


def test_obs_lets_a_twin_go_first() -> None:
    """Two channels that always say the same: either can be replaced, however large both are."""
    torch.manual_seed(1)
    x = torch.randn(40, 6).double()
    x[:, 4] = 3 * x[:, 1]
    w = torch.randn(5, 6).double()
    w[:, [1, 4]] *= 10
    errors = removal_errors(x.T @ x, w, torch.arange(6)[:, None], 1e-6)
    assert int(errors.argmin()) in (1, 4)
    assert errors.min() < 1e-3 * errors.max()


# -- planted --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, dict[Site, list[int]]]:
    """A model in which some groups do nothing at all: all their weights are zero."""
    teacher = load(checkpoint("qwen3"))
    dead = {Site(1, "attention"): [1], Site(0, "mlp"): [3, 17, 40], Site(3, "mlp"): [0]}
    model = billhook.models.surgery.shared_copy(teacher.model)
    for site, groups in dead.items():
        block = structure.blocks_of(model, teacher.architecture)[site.block]
        _, of = layout(teacher, site)
        kept = channel_groups.kept_positions(of, range(of.groups), [g for g in range(of.groups) if g not in groups])
        for name, tensor in channel_groups.zeroed_weights(block, of, kept).items():
            set_parameter(block, name, tensor)
    folder = tmp_path_factory.mktemp("planted") / "model"
    model.save_pretrained(folder)
    return load(folder), dead


@pytest.mark.parametrize("name", NAMES)
def test_dead_groups_are_found_first(planted: tuple[Teacher, dict[Site, list[int]]], name: str) -> None:
    teacher, dead = planted
    scores = GROUP_METRICS[name](Probe(teacher, documents(), "nll"))
    for site, groups in dead.items():
        assert sorted(scores[site].argsort().tolist()[: len(groups)]) == groups


@pytest.mark.parametrize("name", [name for name in NAMES if name != "saap"])
def test_letting_dead_groups_go_changes_nothing(planted: tuple[Teacher, dict[Site, list[int]]], name: str) -> None:
    teacher, dead = planted
    probe = Probe(teacher, documents(), "kl")
    scores = GROUP_METRICS[name](probe)
    mlps = {s: v.tolist() for s, v in scores.items() if s.part == "mlp" and s in dead}
    gone = 3 * 3 * 32 / teacher.anatomy.total("parameters") * 100
    problem = Problem(teacher.anatomy, (Budget.parse(f"{gone * 0.99:.4f}%params"),), group_scores=mlps)
    (plan,) = drive(SEARCHES["rank_channels"](problem), lambda ask: [])
    assert probe.losses([plan])[0].mean == pytest.approx(0, abs=1e-6)
    assert plan.narrowed
    for each in plan.narrowed:
        assert set(range(48)) - set(each.groups) <= set(dead[each.site])


# -- saap -----------------------------------------------------------------------------------------------------------


def test_saap_keeps_its_ranking_when_a_branch_grows_a_thousandfold(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), documents(), "nll")
    branches = {"vector": GROUP_METRICS["taylor_vector"](probe), "element": GROUP_METRICS["taylor_mix"](probe)}
    larger = {**branches, "vector": {site: 1000 * v for site, v in branches["vector"].items()}}
    one, other = fuse(branches, "kendall"), fuse(larger, "kendall")
    for site in one:
        assert other[site].tolist() == pytest.approx(one[site].tolist(), rel=1e-9)
    # The closed form: s² = mean minimises Σ I/(2 s²) + G log s, here against its neighbours.
    scores = torch.cat(list(branches["element"].values()))

    def cost(square: float) -> float:
        return float(scores.sum() / (2 * square) + len(scores) * math.log(square) / 2)

    best = float(scores.mean())
    assert cost(best) < min(cost(best * 1.01), cost(best / 1.01))


def test_saap_without_stability_is_plain_fusion(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), documents(), "nll")
    branches = {"vector": GROUP_METRICS["taylor_vector"](probe), "element": GROUP_METRICS["taylor_mix"](probe)}
    plain, fused = GROUP_METRICS["saap"](probe, stability=0.0), fuse(branches, "kendall")
    for site, values in plain.items():
        expected = (fused[site] - fused[site].mean()) / fused[site].std()
        assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    shaken = GROUP_METRICS["saap"](probe, stability=2.0)
    assert any(not torch.allclose(shaken[site], plain[site]) for site in plain)
    alone = GROUP_METRICS["saap"](probe, stability=0.0, fusion="vector")
    for site, values in branches["vector"].items():
        assert alone[site].argsort().tolist() == values.argsort().tolist()


def test_what_fluctuates_between_mini_batches_goes_first(checkpoint: Folder) -> None:
    """By hand: the coefficient of variation over single documents, standardised, counts against a group."""
    teacher, tokens = load(checkpoint("llama")), documents()
    site = Site(2, "mlp")
    one = []
    for row in range(8):
        single = token_set([tuple(tokens.rows[row].tolist())], [0], [0], [str(row)], "row")
        probe = Probe(teacher, single, "nll")
        branches = {"vector": GROUP_METRICS["taylor_vector"](probe), "element": GROUP_METRICS["taylor_mix"](probe)}
        one.append(fuse(branches, "kendall")[site])
    each = torch.stack(one)
    unrest = each.std(0) / each.mean(0)
    probe = Probe(teacher, tokens, "nll")
    plain, told = (GROUP_METRICS["saap"](probe, stability=s)[site] for s in (0.0, 0.5))
    expected = plain - 0.5 * (unrest - unrest.mean()) / unrest.std()
    assert told.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", OF_INPUTS)
def test_metrics_of_activations_need_no_gradients(checkpoint: Folder, name: str) -> None:
    class WithoutGradients(Probe):
        def groups_of_gradients(self, *args: Any, **options: Any) -> Any:
            pytest.fail("no gradient is needed")

    teacher = load(checkpoint("llama"))
    scores = GROUP_METRICS[name](Probe(teacher, documents(), "nll"))
    again = GROUP_METRICS[name](WithoutGradients(teacher, documents(), "nll"))
    assert scores.keys() == again.keys()
    assert all(torch.equal(scores[site], values) for site, values in again.items())


# -- the search -----------------------------------------------------------------------------------------------------


def narrowed(teacher: Teacher, budget: str, scores: Mapping[Site, Any], **options: Any) -> Plan:
    problem = Problem(teacher.anatomy, (Budget.parse(budget),), group_scores=scores)
    (plan,) = drive(SEARCHES["rank_channels"](problem, **options), lambda ask: [])
    teacher.anatomy.check(plan)
    assert problem.is_met(plan)
    return plan


def rising(teacher: Teacher) -> dict[Site, list[float]]:
    """Later groups and later sites are worth more."""
    sizes = [size for size in teacher.anatomy.sites if size.groups]
    return {s.site: [i * 1000 + g for g in range(len(s.groups))] for i, s in enumerate(sizes)}


@pytest.mark.parametrize("variant", ["llama", "mixtral", "falcon", "gpt2"])
@pytest.mark.parametrize("budget", ["5%params", "30%params", "40%kv", "25%flops"])
def test_the_search_meets_its_budget_by_the_lowest_scores(checkpoint: Folder, variant: str, budget: str) -> None:
    teacher = load(checkpoint(variant))
    scores = {site: [float(x) for x in torch.rand(len(v), generator=torch.Generator().manual_seed(1))]
              for site, v in rising(teacher).items()}  # fmt: skip
    plan = narrowed(teacher, budget, scores)
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in plan.narrowed:
        if sizes[each.site].experts == 1:
            kept = [scores[each.site][g] for g in each.groups]
            gone = [x for g, x in enumerate(scores[each.site]) if g not in each.groups]
            assert max(gone) < min(kept)
    assert plan


def test_a_site_that_loses_all_its_groups_is_removed(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    plan = narrowed(teacher, "35%params", rising(teacher))
    assert Site(0, "attention") in plan.removed
    assert Site(0, "mlp") in plan.removed
    assert len(plan.narrowed) <= 1


def test_uniform_widths_and_multiples(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    alike = narrowed(teacher, "30%params", rising(teacher), uniform=True)
    counts = {part: {len(e.groups) for e in alike.narrowed if e.site.part == part} for part in ("attention", "mlp")}
    assert all(len(found) == 1 for found in counts.values())
    assert len(alike.narrowed) == 8, "every site, and none is removed"
    rounded = narrowed(teacher, "20%params", rising(teacher), multiple=8, parts="mlp")
    assert {len(each.groups) % 8 for each in rounded.narrowed} <= {0}
    assert all(each.site.part == "mlp" for each in rounded.narrowed)
    assert not any(site.part == "attention" for site in rounded.removed)


@pytest.mark.parametrize("share", range(5, 70, 5))
def test_uniform_widths_take_no_more_than_is_needed(share: int) -> None:
    """Attention of 3 groups, a third of 200 each; by brute force over all pairs of counts, no other is as even."""
    sites = tuple(
        SiteSize(Site(b, part), n * each, 0, kv * n, 0, 0, tuple(range(n)), GroupSize(each, 0, kv, 0))
        for b in range(4)
        for part, n, each, kv in (("attention", 3, 200, 1), ("mlp", 96, 20, 0))
    )
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in sites}

    def lost(budget: str) -> tuple[int, int]:
        problem = Problem(Anatomy("llama", 4, sites, Unassigned(0, 0, 0)), (Budget.parse(budget),), group_scores=scores)
        plan = drive(SEARCHES["rank_channels"](problem, uniform=True), lambda ask: [])[-1]
        counts = {
            size.site: each.parameters // (size.parameters // len(size.groups))
            for size, each in problem.anatomy.lost(plan)
        }
        assert not plan.removed
        found = {part: {counts.get(s.site, 0) for s in sites if s.site.part == part} for part in ("attention", "mlp")}
        return found["attention"].pop() if len(found["attention"]) == 1 else -1, min(found["mlp"])

    need = share / 100 * 4 * (600 + 1920)
    exact = [(heads, mlp) for heads in range(3) for mlp in range(96) if 0 <= 4 * (200 * heads + 20 * mlp) - need < 80]
    assert lost(f"{share}%params") == min(exact, key=lambda two: abs(two[0] / 3 - two[1] / 96))
    assert lost("30%kv") == (1, 0), "neurons hold no cache"


@pytest.mark.parametrize(("multiple", "heads"), [(8, {1}), (12, set()), (16, set())])
def test_heads_are_rounded_by_their_channels(checkpoint: Folder, multiple: int, heads: set[int]) -> None:
    """Two KV heads of 8 channels: one is a multiple of 8; of 12 and 16 neither is, or only both are."""
    teacher = load(checkpoint("llama"))
    plan = narrowed(teacher, "3%params", rising(teacher), multiple=multiple)
    assert {len(each.groups) for each in plan.narrowed if each.site.part == "attention"} == heads
    assert all(len(each.groups) % multiple == 0 for each in plan.narrowed if each.site.part == "mlp")


def test_what_the_search_cannot_do_is_said(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    with pytest.raises(UsageError, match="metric='flap'"):
        drive(SEARCHES["rank_channels"](Problem(teacher.anatomy, (Budget.parse("5%"),))), lambda ask: [])
    with pytest.raises(UsageError, match=r"multiple=0 is not a number of channels. Write"):
        narrowed(teacher, "5%", rising(teacher), multiple=0)
    few = {Site(0, "mlp"): rising(teacher)[Site(0, "mlp")]}
    with pytest.raises(BudgetError, match="channel groups alone"):
        narrowed(teacher, "40%", few)
    probe = Probe(teacher, documents(4), "nll")
    with pytest.raises(UsageError, match="Give more tokens="):
        GROUP_METRICS["saap"](probe)
    for name, options in (("flap", {"kind": "x"}), ("saap", {"fusion": "x"})):
        with pytest.raises(UnknownName):
            GROUP_METRICS[name](Probe(teacher, documents(), "nll"), **options)
    with pytest.raises(UsageError, match="group_magnitude takes"):
        GROUP_METRICS["group_magnitude"](probe, p=0)


def test_a_run_by_a_metric_of_groups(model: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24, "data": str(text),
        "search": "rank_channels",
        "store": tmp_path / "b.db",
    }  # fmt: skip
    told = billhook.prune(model, remove="15%params", metric="flap", out=tmp_path / "out", **options)
    assert told.plan.narrowed
    assert told.sizes.student.parameters <= 0.85 * told.sizes.teacher.parameters
    assert load(tmp_path / "out").anatomy.total("parameters") == told.sizes.student.parameters
    again = billhook.prune(model, remove="15%params", metric="flap", out=tmp_path / "twin", **options)
    assert again.plan == told.plan
    with pytest.raises(UsageError, match="cosine scores sites or blocks, and the search rank_channels takes scores of"):
        billhook.prune(model, remove="15%params", metric="cosine", out=tmp_path / "no", **options)


def test_score_tells_of_groups_as_of_sites(model: Path, text: Path) -> None:
    options: dict[str, Any] = {"tokens": 240, "length": 24, "data": str(text)}
    told = billhook.score(model, "flap,cosine", set={"kind": "ifv"}, **options)
    assert len(told.scores["cosine"].sites) == 8
    assert told.scores["cosine"].groups == told.scores["flap"].sites == ()
    sizes = {str(size.site): size.groups for size in load(model).anatomy.sites}
    rows = {str(row.site): row for row in told.scores["flap"].groups}
    assert {site: row.numbers for site, row in rows.items()} == sizes
    assert all(len(row.values) == len(sizes[site]) for site, row in rows.items())
    alone = billhook.score(model, "flap", set={"kind": "ifv"}, **options)
    assert alone.groups == told.scores["flap"].groups
    with pytest.raises(UnknownName):
        billhook.score(model, "flab", **options)


def test_a_terminal_of_80_columns_shows_scores_of_groups(model: Path, text: Path) -> None:
    done = CliRunner().invoke(app, ["score", str(model), "--metric", "flap", "--data", str(text), "--tokens", "240",
                                    "--length", "24", "--quiet"], env={"COLUMNS": "80"})  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "mlp.3" in done.stdout
    assert "lowest is" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_model_has_the_same_scores(checkpoint: Folder, name: str) -> None:
    found = [GROUP_METRICS[name](Probe(load(checkpoint("llama"), memory=m), documents(), "nll")) for m in (None, 0)]
    for site, values in found[0].items():
        torch.testing.assert_close(found[1][site], values, rtol=1e-4, atol=1e-6)
