"""REAP's score by hand, and searches that remove whole experts."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.budget import parse_budgets
from billhook.core.errors import BudgetError, UsageError
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.methods.metrics import GROUP_METRICS
from billhook.methods.search import SEARCHES, by_experts, drive, estimate_losses, kept_groups
from billhook.models.load import load

Folder = Callable[[str], Path]


def documents(rows: int = 6, length: int = 12, seed: int = 1) -> TokenSet:
    """Rows of different lengths, so that some positions are padding."""
    ids = [tuple(row[: length - i % 3]) for i, row in enumerate(tiny.tokens(rows, length, seed).tolist())]
    return token_set(ids, range(rows), range(rows), list(map(str, range(rows))), "rows")


def one_expert(module: Any, expert: int, x: torch.Tensor, model_type: str) -> torch.Tensor:
    """f(x) of one expert, by its weights."""
    if model_type == "gpt_oss":
        both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[..., ::2].clamp(max=module.limit), both[..., 1::2].clamp(-module.limit, module.limit)
        hidden = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
        found: torch.Tensor = hidden @ module.down_proj[expert] + module.down_proj_bias[expert]
        return found
    gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
    found = (torch.nn.functional.silu(gate) * up) @ module.down_proj[expert].T
    return found


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_moe_mixed"])
@pytest.mark.parametrize("memory", [None, 0])
def test_reap_is_the_mean_of_gate_times_norm_over_the_tokens_of_an_expert(
    checkpoint: Folder, variant: str, memory: int | None
) -> None:
    """Row by row through the whole model, with hooks on its routers."""
    teacher, tokens = load(checkpoint(variant)), documents()
    config, heard = teacher.model.config, dict[int, list[tuple[torch.Tensor, torch.Tensor]]]()
    sites = [size for size in teacher.anatomy.sites if size.experts > 1]
    for size in sites:
        mlp: Any = teacher.block(size.site.block).mlp
        router = mlp.router if config.model_type == "gpt_oss" else mlp.gate
        kept = heard.setdefault(size.site.block, [])
        router.register_forward_hook(lambda m, args, out, kept=kept: kept.append((args[0].reshape(-1, 32), out[0])))
    with torch.no_grad():
        for row, length in zip(tokens.rows, tokens.lengths, strict=True):
            teacher.model(row[None, :length])
    told = GROUP_METRICS["reap"](Probe(load(checkpoint(variant), memory=memory), tokens, "kl"))
    assert list(told) == [size.site for size in sites]
    for size in sites:
        x, logits = (torch.cat(pieces) for pieces in zip(*heard[size.site.block], strict=True))
        chosen = logits.topk(2).indices
        gates = logits.softmax(-1)
        if config.model_type != "qwen3_moe" or config.norm_topk_prob:
            gates = gates / gates.gather(-1, chosen).sum(-1, keepdim=True)
        experts: Any = teacher.block(size.site.block).mlp.experts  # type: ignore[union-attr]
        for expert in range(size.experts):
            mine = (chosen == expert).any(-1)
            with torch.no_grad():
                norms = one_expert(experts, expert, x[mine], config.model_type).norm(dim=-1)
            expected = float((gates[mine, expert] * norms).mean()) if mine.any() else 0.0
            values = told[size.site][expert * size.per_expert : (expert + 1) * size.per_expert]
            assert values.tolist() == pytest.approx([expected] * size.per_expert, rel=1e-4)


def test_an_expert_that_no_token_meets_goes_first_and_changes_nothing(checkpoint: Folder, tmp_path: Path) -> None:
    model = tiny.build("gpt_oss")
    for block, dead in enumerate((2, 0, 3, 1)):
        model.model.layers[block].mlp.router.bias.data[dead] = -1e4
    model.save_pretrained(tmp_path / "dead")
    teacher, tokens = load(tmp_path / "dead"), documents()
    probe = Probe(teacher, tokens, "kl")
    scores = {site: values.tolist() for site, values in GROUP_METRICS["reap"](probe).items()}
    problem = Problem(teacher.anatomy, parse_budgets("10%params"), group_scores=scores)
    (plan,) = drive(SEARCHES["rank_channels"](problem, experts=True, uniform=True), lambda ask: [])
    gone = {each.site.block: set(range(4)) - {group // 48 for group in each.groups} for each in plan.narrowed}
    assert gone == {0: {2}, 1: {0}, 2: {3}, 3: {1}}
    assert probe.losses([plan])[0].mean == pytest.approx(0, abs=1e-6)
    assert billhook.apply(teacher, plan).config.model_type == "gpt_oss"


def test_a_model_without_mixtures_is_refused(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    with pytest.raises(UsageError, match=r"reap scores the experts of mixtures, and .*llama has none"):
        GROUP_METRICS["reap"](Probe(teacher, documents(), "kl"))
    problem = Problem(teacher.anatomy, parse_budgets("10%params"), group_scores={})
    with pytest.raises(UsageError, match="no experts that can be removed"):
        estimate_losses("rank_channels", problem, experts=True)


# -- searches ---------------------------------------------------------------------------------------------------------


def mixed(budget: str, experts: int = 4, fewest: int = 2) -> Problem:
    """Three blocks: an attention of 2 groups, and a mixture of 3 neurons an expert."""
    sizes = []
    for block, part in itertools.product(range(3), ("attention", "mlp")):
        groups = 2 if part == "attention" else 3 * experts
        size = SiteSize(Site(block, part), 10 * groups, 0, 0, 0, 0, tuple(range(groups)), GroupSize(10, 0, 0, 0))  # type: ignore[arg-type]
        if part == "mlp":
            row = GroupSize(2, 0, 0, 0)
            size = replace(size, parameters=size.parameters + 2 * experts, experts=experts, expert=row, fewest=fewest)
        sizes.append(size)
    anatomy = Anatomy("mixtral", 3, tuple(sizes), Unassigned(0, 0, 0))
    draw = random.Random(budget)
    scores = {size.site: tuple(draw.random() for _ in size.groups) for size in sizes}
    return Problem(anatomy, parse_budgets(budget), group_scores=scores)


def counts(problem: Problem, plan: Plan) -> dict[Site, list[int]]:
    """Of each narrowed mixture, how many neurons each expert keeps."""
    sizes = {size.site: size for size in problem.anatomy.sites}
    return {each.site: sizes[each.site].kept_experts(each.groups) for each in plan.narrowed if each.site.part == "mlp"}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("budget", ["12%params", "25%params", "40%params"])
def test_the_lowest_experts_go_whole(budget: str, uniform: bool) -> None:
    problem = mixed(budget)
    assert problem.group_scores is not None
    (plan,) = drive(SEARCHES["rank_channels"](problem, experts=True, uniform=uniform, parts="mlp"), lambda ask: [])
    problem.anatomy.check(plan)
    assert problem.is_met(plan)
    kept = counts(problem, plan)
    for site, neurons in kept.items():
        assert set(neurons) <= {0, 3}
        means = [sum(problem.group_scores[site][3 * e : 3 * e + 3]) for e in range(4)]
        stay = [mean for mean, count in zip(means, neurons, strict=True) if count]
        assert len(stay) >= 2
        assert max([m for m, count in zip(means, neurons, strict=True) if not count], default=0.0) < min(stay)
    if uniform:
        assert len(kept) == 3
        assert len({sum(map(bool, neurons)) for neurons in kept.values()}) == 1


def test_no_fewer_experts_are_kept_than_a_token_meets() -> None:
    problem = by_experts(mixed("10%params", experts=6, fewest=4))
    size = next(size for size in problem.anatomy.sites if size.by_expert)
    order = list(range(18))
    kept = [len(kept_groups(size, order, removed, 1)) // 3 for removed in range(19)]
    assert kept == [6, 6, 6, 5, 5, 5, 4, *[4] * 12]
    with pytest.raises(BudgetError, match="cannot be met by channel groups alone"):
        list(SEARCHES["rank_channels"](mixed("60%params", experts=6, fewest=4), experts=True, uniform=True))


@pytest.mark.parametrize("seed", range(3))
def test_joint_finds_the_best_numbers_of_experts(seed: int) -> None:
    """By brute force over all widths of all sites, of a loss that adds up over them."""
    problem = mixed("33%params")
    assert problem.group_scores is not None
    draw = random.Random(seed)
    prices = {size.site: (draw.uniform(0.1, 1), draw.uniform(1, 3)) for size in problem.anatomy.sites}

    def loss(plan: Plan) -> float:
        gone = {size.site: lost.parameters / size.parameters for size, lost in problem.anatomy.lost(plan)}
        gone |= dict.fromkeys(plan.removed, 1.5)
        return sum(prices[site][0] * share ** prices[site][1] for site, share in gone.items())

    def measure(ask: MeasureRequest) -> list[Loss]:
        return [Loss("kl", (1000 * loss(plan),), (1000,)) for plan in ask.plans]

    found = drive(SEARCHES["joint"](problem, experts=True, levels=4, start="none"), measure)[-1]
    assert all(set(neurons) <= {0, 3} for neurons in counts(problem, found).values())
    options = []
    whole = by_experts(problem)
    assert whole.group_scores is not None
    for size in whole.anatomy.sites:
        scores = whole.group_scores[size.site]
        order = sorted(range(len(scores)), key=lambda place, scores=scores: (scores[place], place))
        widths = {kept_groups(size, order, removed, 1) for removed in range(len(order))}
        names = [f"{size.site}[{' '.join(map(str, kept))}]" for kept in widths if len(kept) < len(order)]
        options.append(["", str(size.site), *names])
    plans = (Plan.parse(filter(None, names)) for names in itertools.product(*options))
    best = min(loss(plan) for plan in plans if problem.is_valid(plan) and problem.is_met(plan))
    assert loss(found) == pytest.approx(best)


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_tokenizer(tmp_path_factory.mktemp("mixture") / "model", "mixtral")


def test_a_run_removes_experts_and_says_so(mixture: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24, "data": str(text),
        "store": tmp_path / "b.db", "field": "text",
    }  # fmt: skip
    told = billhook.prune(mixture, recipe="reap", remove="15%params", out=tmp_path / "out", **options)
    teacher, student = load(mixture), load(tmp_path / "out")
    assert student.model.config.model_type == "mixtral"
    assert student.model.config.num_local_experts == 3
    assert student.anatomy.total("parameters") == told.sizes.student.parameters
    assert told.sizes.student.parameters == teacher.anatomy.total("parameters", told.plan)
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "4 MLPs: 3 of 4 experts" in card
    assert "3 of 4 experts" in page
    shown = CliRunner().invoke(app, ["show", told.run, "--store", str(tmp_path / "b.db")]).output
    assert "Narrowed: all 4 MLPs: 3 of 4 experts" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "reap", "search": "rank_channels"}, "Add set={'experts': True}"),
        ({"metric": "reap", "search": "oneshot"}, "Searches for it: search='joint', search='rank_channels'"),
        ({"metric": "reap", "search": "rank_channels", "set": {"experts": True}, "remove": "80%"}, "cannot be met"),
    ],
)
def test_what_no_search_of_experts_can_do_is_said_at_once(
    mixture: Path, text: Path, tmp_path: Path, given: Mapping[str, Any], words: str
) -> None:
    options: dict[str, Any] = {"remove": "15%", "data": str(text), "store": tmp_path / "b.db", **given}
    with pytest.raises((UsageError, BudgetError)) as raised:
        billhook.prune(mixture, out=tmp_path / "no", **options)
    assert words in str(raised.value)
    assert not (tmp_path / "no").exists()


def test_scores_of_experts_are_shown(mixture: Path, text: Path) -> None:
    asked = ["score", str(mixture), "--metric", "reap", "--data", str(text), "--tokens", "240", "--length", "24"]
    done = CliRunner().invoke(app, [*asked, "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    (row, *others) = json.loads(done.stdout)["scores"]["reap"]["groups"]
    assert len(others) == 3
    assert len(set(row["values"])) == 4, "one for each expert"
