"""Several workers find the statistics of one process: the same sums, nothing computed twice, whoever is lost."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_workers import LocalLine, never, process_of, team_here, texts

from billhook.core.errors import ModelError
from billhook.core.events import Event
from billhook.core.plan import KeptGroups, MeasureRequest, Plan
from billhook.core.results.measured import Score
from billhook.data.token_sets import Document, pack_rows
from billhook.engine.probe import Probe, RacingOptions
from billhook.engine.statistics.group_pass import is_found_by_name
from billhook.engine.workers import messages
from billhook.engine.workers.lines import Hiring, Inbox, Line
from billhook.engine.workers.messages import Message, More, Pass, hello_of
from billhook.engine.workers.processes import hiring
from billhook.engine.workers.team import WORTH_WAITING, Team
from billhook.methods.evaluate.perplexity import measure_perplexity
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.metrics.activations import STATISTICS, angular_distance
from billhook.models.accelerator.bfloat16 import LEAST_WIDTH, in_bfloat16
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Repair
from billhook.runs.executor import Executor

SITE_METRICS: dict[str, dict[str, Any]] = {
    "cosine": {}, "relative_l1": {}, "sprint_local": {}, "angular_span": {"tokens": "all"}, "cca": {},
    "taylor": {"kind": "second"},
}  # fmt: skip
CHANNEL_METRICS: dict[str, dict[str, Any]] = {
    "taylor_mix": {}, "taylor_vector": {}, "flap": {}, "wanda_sp": {}, "activation": {}, "apt": {}, "obs": {},
    "saap": {}, "cfsp": {"coarse": 13.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("passes") / "model", "llama", num_hidden_layers=4))


def scores(probe: Probe, name: str, options: dict[str, Any]) -> dict[Any, list[float]]:
    """The scores of a metric, with their standard errors where it has them."""
    if name in GROUP_METRICS:
        return {site: values.tolist() for site, values in GROUP_METRICS[name](probe, **options).items()}
    found: dict[Any, Score] = METRICS[name](probe, **options)
    return {unit: [score.value, *([] if score.se is None else [score.se])] for unit, score in found.items()}


def same(found: dict[Any, list[float]], expected: dict[Any, list[float]]) -> None:
    """Equal up to the order in which float32 is added."""
    assert list(found) == list(expected)
    for unit, values in expected.items():
        size = max(map(abs, values))
        assert found[unit] == pytest.approx(values, rel=1e-4, abs=1e-5 * size), unit


# -- the same statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("name", [*SITE_METRICS, *CHANNEL_METRICS])
def test_workers_find_the_statistics_of_one_process(teacher: Teacher, name: str, workers: int) -> None:
    options = (SITE_METRICS | CHANNEL_METRICS)[name]
    alone = Probe(teacher, texts(), "kl")
    with team_here(teacher, workers) as team:
        probe = Probe(teacher, texts(), "kl", team=team)
        same(scores(probe, name, options), scores(alone, name, options))
        rates = team.loads()
    assert all(rates[f"rate.{worker}"] > 0 for worker in range(workers)), "each takes part"
    assert probe.site_evaluations == pytest.approx(alone.site_evaluations), "nothing is computed twice"


def test_workers_find_which_experts_matter(tmp_path: Path) -> None:
    mixture = load(tiny.saved(tmp_path / "mixture", "mixtral"))
    with team_here(mixture, 3) as team:
        probe = Probe(mixture, texts(), "kl", team=team)
        same(scores(probe, "reap", {}), scores(Probe(mixture, texts(), "kl"), "reap", {}))
        assert all(team.loads()[f"rate.{worker}"] > 0 for worker in range(3))


def test_the_sums_are_the_same_whoever_is_first(teacher: Teacher) -> None:
    with team_here(teacher, 4) as team:
        found = [scores(Probe(teacher, texts(), "kl", team=team), "taylor_mix", {}) for _ in range(2)]
    assert found[0] == found[1]


def test_an_mlp_that_adds_nothing_to_some_texts_only_is_no_ones_next(tmp_path: Path) -> None:
    silent = load(tiny.saved(tmp_path / "silent", "llama", num_hidden_layers=3))
    first, inputs = silent.model.model.layers[1], silent.model.get_input_embeddings().weight.data
    for block in silent.model.model.layers[:2]:  # nobody writes into the first channel
        block.self_attn.o_proj.weight.data[0] = 0
    silent.model.model.layers[0].mlp.down_proj.weight.data[0] = 0
    first.mlp.up_proj.weight.data[:, 1:] = 0  # which alone is read, and is 0 of some tokens
    inputs[3:30, 0] = 0
    rows = [Document(text, tuple(range(3, 19) if text % 2 else range(40, 56))) for text in range(24)]
    kinds = [(rows[1::2], rows[::2])[group % 2][group // 2 * 4 :][:4] for group in range(6)]  # one to each worker
    tokens = pack_rows([row for group in kinds for row in group], 24 * 16, 16, [], "made up")
    alone = Probe(silent, tokens, "kl")
    with team_here(silent, 2) as team:
        probe = Probe(silent, tokens, "kl", team=team)
        found, expected = (each.mean_at_next_mlp(STATISTICS["l2"]) for each in (probe, alone))
    assert list(found) == list(expected)
    assert [found[unit].value for unit in found] == pytest.approx([score.value for score in expected.values()])
    assert probe.site_evaluations > alone.site_evaluations, "the parts disagreed"


# -- what does not travel -------------------------------------------------------------------------------------------


def outside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y - x).abs().amax(-1)


def test_only_functions_of_billhook_are_found_by_their_names() -> None:
    assert is_found_by_name(partial(angular_distance, options=(1, "a")))
    assert is_found_by_name({"all": STATISTICS})
    for unknown in (outside, lambda x, y: x, partial(outside, 1), partial(angular_distance, {"f": outside})):
        assert not is_found_by_name(unknown)


def test_functions_of_others_are_computed_by_the_first_process(teacher: Teacher) -> None:
    asked: list[Message] = []

    def hear(message: Message) -> bool:
        asked.append(message)
        return False

    with team_here(teacher, 3, hear) as team:
        probe, alone = Probe(teacher, texts(), "kl", team=team), Probe(teacher, texts(), "kl")
        assert probe.mean_over_tokens({"largest": outside}) == alone.mean_over_tokens({"largest": outside})
        assert not asked
        ranges = probe.groups_of_inputs(lambda x, w: x.variance), alone.groups_of_inputs(lambda x, w: x.variance)
        assert any(isinstance(message, Pass) for message in asked), "what it does with sums is nobody else's matter"
    for site, values in ranges[1].items():
        torch.testing.assert_close(ranges[0][site], values, rtol=1e-9, atol=0)


# -- workers that are lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taylor_mix", "apt", "flap", "cca", "sprint_local"])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_lost_worker_had_is_found_by_the_others(teacher: Teacher, name: str, seed: int) -> None:
    draw, told, count = random.Random(seed), list[Event](), Counter[str]()
    moment = draw.randrange(1, 3 if name == "sprint_local" else 8)

    def fails(message: Message) -> bool:
        count["answers"] += isinstance(message, Pass | More)
        return count["answers"] == moment

    with team_here(teacher, draw.choice([3, 5]), fails, told.append) as team:
        found = scores(Probe(teacher, texts(), "kl", team=team), name, {})
        assert team.workers != (0,)
    same(found, scores(Probe(teacher, texts(), "kl"), name, {}))
    assert [event.values["lost"] for event in told if "lost" in event.values] == ["pulled"]


def test_a_process_that_is_killed_in_a_pass_costs_only_its_part(teacher: Teacher) -> None:
    told: list[Event] = []
    with Team(teacher, hiring(2, teacher), watch=told.append) as team:
        team.wait()
        probe, process, blocks = Probe(teacher, texts(), "kl", team=team), process_of(team, 1), list[bool]()

        def first(w: torch.Tensor, g: torch.Tensor, f: torch.Tensor | None) -> torch.Tensor:
            blocks.append(team.workers == (0, 1))
            process.kill()
            return (g * w).abs()

        found = probe.groups_of_gradients({"killing": (first, False)})["killing"]
        assert blocks[0], "the sums of the first block came from both"
        assert not blocks[-1]
    expected = Probe(teacher, texts(), "kl").groups_of_gradients({"killing": (lambda w, g, f: (g * w).abs(), False)})
    for site, values in expected["killing"].items():
        torch.testing.assert_close(found[site], values, rtol=1e-4, atol=0)
    assert [event.values["lost"] for event in told if "lost" in event.values] == ["signal 9"]


def test_what_is_not_finite_is_told_once(tmp_path: Path) -> None:
    nan = load(tiny.saved(tmp_path / "nan", "llama"))
    nan.model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with team_here(nan, 3) as team:
        probe = Probe(nan, texts(), "kl", team=team)
        for name in ("taylor_mix", "cosine", "wanda_sp"):
            with pytest.raises(ModelError, match="from block 1"):
                scores(probe, name, {})
        assert team.workers == (0, 1, 2), "no worker is lost by it"


# -- estimates and evaluations --------------------------------------------------------------------------------------


def test_workers_estimate_in_bfloat16_where_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    wide, tokens = load(tiny.saved(tmp_path / "wide", "llama", hidden_size=LEAST_WIDTH)), texts(8)
    made: list[Teacher] = []
    plans = tuple(Plan(frozenset([site])) for site in wide.anatomy.sites_present()[:3])

    def make(teacher: Teacher) -> Teacher:
        made.append(in_bfloat16(teacher))
        return made[-1]

    monkeypatch.setattr(messages, "in_bfloat16", make)
    with team_here(wide, 3) as team:
        shared = Executor(Probe(wide, tokens, "kl", team=team, bfloat16=True))
        found = shared(MeasureRequest(plans, estimate=True, tokens=192))
        assert all(team.loads()[f"rate.{worker}"] > 0 for worker in range(3))
        assert len(made) == 2, "one each, but the first process, which made its own"
        exact = shared(MeasureRequest(plans))
    expected = Executor(Probe(wide, tokens, "kl", bfloat16=True))(MeasureRequest(plans, estimate=True, tokens=192))
    assert [loss.mean for loss in found] == pytest.approx([loss.mean for loss in expected], rel=0.01)
    alone = Probe(wide, tokens, "kl").losses(plans)
    assert [loss.mean for loss in exact] == pytest.approx([loss.mean for loss in alone], rel=1e-4)


@pytest.mark.parametrize("fast", [None, RacingOptions(shortlist=3)])
def test_workers_drop_candidates_in_bfloat16_where_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: RacingOptions | None
) -> None:
    """Also of plans that narrow sites, whose bits are those of both precisions."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    wide, tokens = load(tiny.saved_peaked(tmp_path / "wide", hidden_size=LEAST_WIDTH)), texts(8)
    mlp = next(size for size in wide.anatomy.sites if size.site.part == "mlp")
    plans = [Plan(frozenset([site])) for site in wide.anatomy.sites_present()]
    plans += [Plan(frozenset(), frozenset({KeptGroups(mlp.site, mlp.groups[:kept])})) for kept in (3, 9)]
    exact = dict(zip(plans, Probe(wide, tokens, "kl").losses(plans), strict=True))
    with team_here(wide, 3) as team:
        probe = Probe(wide, tokens, "kl", team=team, bfloat16=True, fast=fast)
        assert probe.losses(plans[-1:])[0].mean == pytest.approx(exact[plans[-1]].mean, rel=1e-4), (
            "before any is dropped"
        )
        for part in (plans[:5], plans):  # the second batch narrows sites
            found = dict(probe.iter_losses(part, 1))
            best = min(part, key=lambda plan: exact[plan].mean)
            assert found[best].mean == pytest.approx(exact[best].mean, rel=1e-4)
            assert not found[best].bound
        assert all(team.loads()[f"rate.{worker}"] > 0 for worker in range(3))
    assert any(loss.bound for loss in found.values())


def test_workers_share_the_perplexity_of_bare_plans(teacher: Teacher) -> None:
    plan, name = Plan.parse(["mlp.1", "attention.2"]), "model.layers.0.mlp.down_proj.weight"
    repair = Repair(weights={name: 0.5 * teacher.model.get_parameter(name).detach()})
    students = [(Plan(), NO_REPAIR), (plan, NO_REPAIR), (plan, repair)]
    with team_here(teacher, 3) as team:
        found = list(measure_perplexity(teacher, students, texts(), team=team))
        assert all(team.loads()[f"rate.{worker}"] > 0 for worker in range(3))
    for got, expected in zip(found, measure_perplexity(teacher, students, texts()), strict=True):
        assert got.counts == expected.counts
        assert got.sums == pytest.approx(expected.sums, rel=1e-5)


def test_only_what_takes_long_waits_for_workers_that_start(teacher: Teacher) -> None:
    def late(inbox: Inbox) -> Sequence[Line]:
        line = LocalLine(1, inbox, teacher, never)
        threading.Timer(0.3, inbox.put, [(1, hello_of(teacher))]).start()
        line.send = lambda message: None  # type: ignore[method-assign]
        return [line]

    enough = int(WORTH_WAITING / (teacher.weight_bytes / 4))
    for tokens, beside, workers in ((enough // 2, True, 1), (2 * enough, False, 1), (2 * enough, True, 2)):
        with Team(teacher, Hiring(1, late, shared=beside)) as team:
            team.meet(tokens)
            assert len(team.workers) == workers
