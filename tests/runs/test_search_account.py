"""What a run tells of its search: the phase of its progress, each site's loss alone, intervals, and what was asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import billhook
from billhook.core.events import Event
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.results.measured import Loss, paired_gap
from billhook.core.results.run import RunResult
from billhook.runs.trace import losses_alone

OPTIONS = {"tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24, "self_share": 0.0}


@pytest.fixture(scope="module")
def told(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[Event]]:
    home, seen = tmp_path_factory.mktemp("account"), list[Event]()
    result = billhook.prune(
        model, remove="3sites", data=str(text), search="swap", loss="kl", fast=False, recover="", out=home / "out",
        store=home / "b.db", watch=seen.append, **OPTIONS,
    )  # fmt: skip
    return result, seen


def test_exchanges_are_called_so_and_undo_nothing(told: tuple[RunResult, list[Event]]) -> None:
    events = [event.values for event in told[1] if event.stage == "search" and "removed_sites" in event.values]
    phases = [event.get("phase", "") for event in events]
    assert list(dict.fromkeys(phases)) == ["", "exchanges"]
    assert {event["removed_sites"] for event in events if event.get("phase")} == {3}


def test_each_site_alone_costs_what_the_search_measured(told: tuple[RunResult, list[Event]]) -> None:
    result = told[0]
    losses = {each.site: each for each in result.alone}
    assert set(losses) == {size.site for size in result.anatomy.sites}
    first = result.steps[0]
    assert len(first.sites) == 1
    assert losses[first.sites[0]].loss == pytest.approx(first.loss)
    assert losses[first.sites[0]].se == pytest.approx(first.loss_se)
    assert RunResult.from_json(result.to_json()) == result
    assert result.recipe["remove"] == "3sites"
    assert {"remove", "tokens"} <= set(result.changed) <= set(result.recipe)
    assert not {"dtype", "search"} & set(result.changed)  # swap is the default


def test_of_several_measurements_alone_the_one_on_most_tokens_counts() -> None:
    few, many = Loss("kl", (1.0, 3.0), (2, 2)), Loss("kl", (4.0, 8.0, 3.0), (4, 4, 4))
    one, two = Plan.parse(["mlp.0"]), Plan.parse(["mlp.0", "mlp.1"])
    bound = dataclasses.replace(many, bound=True)
    rounds = [
        (MeasureRequest((one, two)), [few, few]),
        (MeasureRequest((one, Plan.parse(["mlp.2"]))), [many, bound]),
        (MeasureRequest((one,)), [few]),
    ]
    (alone,) = losses_alone(rounds)
    assert (alone.site, alone.loss, alone.tokens) == (Site(0, "mlp"), 15 / 12, 12)
    told = {each.site.block: each for each in losses_alone(rounds, bounds=True)}
    assert (told[0].at_least, told[2].at_least) == (False, True)
    assert told[2].loss == 15 / 12
    zero = Loss("kl", (0.0, 0.0, 0.0), (4, 4, 4))
    assert alone.se == pytest.approx(paired_gap(many, zero)[1])
