"""Low-rank updates in rounds: cut, merged and grown without a change of outputs, and resumed round by round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_recover import logits, many_texts

from billhook.core.errors import UsageError
from billhook.core.events import Event, ignore_events
from billhook.core.plan import KeptGroups, Plan, Site
from billhook.methods.recover import RECOVERIES, RecoveryTask, Round
from billhook.methods.recover.growing import update_gains
from billhook.methods.recover.training import TrainingOptions, rows_of
from billhook.methods.recover.updates import (
    LowRank,
    Updates,
    cut_to,
    first_updates,
    grown,
    kept_entries,
    maps_of,
    merged,
    put_back,
    with_updates,
)
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
VARIANTS = ["llama", "gpt2", "phi3", "falcon_new", "gpt_neox", "qwen3_moe"]  # grouped heads, fused, turned, experts
SCALE = 1.7


def narrowed(teacher: Teacher, step: int = 2, removed: tuple[str, ...] = ("mlp.3",)) -> Plan:
    """Sites of three blocks keep every `step`-th channel group."""
    sizes = [size for size in teacher.anatomy.sites if size.site.block < 3 and size.groups and size.experts == 1]
    kept = frozenset(KeptGroups(size.site, size.groups[step - 1 :: step] or size.groups[:1]) for size in sizes)
    return Plan(Plan.parse(removed).removed, kept)


def random_updates(teacher: Teacher, rank: int = 3, seed: int = 5) -> Updates:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(of.down, 0.1 * torch.randn(of.up.shape, generator=draw))
        for name, of in first_updates(teacher, rank, seed).items()
    }


def adapted(teacher: Teacher, plan: Plan, updates: Updates) -> Any:
    """peft's model over the student of a plan."""
    student, own = apply(teacher, plan), cut_to(teacher, plan, updates)
    return with_updates(student, {name: own[of] for name, of in maps_of(teacher, student).items()}, SCALE)


# -- updates as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_give_the_outputs_of_the_updates(variant: str, checkpoint: Folder) -> None:
    teacher, rows = load(checkpoint(variant)), tiny.tokens(3, 12)
    plan, updates = narrowed(teacher), random_updates(teacher)
    bits = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    expected = logits(adapted(teacher, plan, updates), rows)
    repair = merged(RecoveryTask(teacher, plan), updates, SCALE)
    torch.testing.assert_close(logits(apply(teacher, plan, repair=repair), rows), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(apply(teacher, plan), rows), expected, atol=0.05), "the updates say something"
    assert all(torch.equal(value, bits[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_updates_are_what_surgery_cuts_of_the_whole_weights(variant: str, checkpoint: Folder) -> None:
    """Merged into the whole weights and cut then, they are the same as cut and merged."""
    teacher, rows = load(checkpoint(variant)), tiny.tokens(3, 12)
    plan, updates = narrowed(teacher), random_updates(teacher)
    whole = merged(RecoveryTask(teacher, Plan()), updates, SCALE)
    kept = {name: w for name, w in whole.weights.items() if ".3.mlp." not in name or "moe" in variant}
    first = apply(teacher, plan, repair=Repair(kept))
    second = apply(teacher, plan, repair=merged(RecoveryTask(teacher, plan), updates, SCALE))
    torch.testing.assert_close(logits(first, rows), logits(second, rows), rtol=1e-4, atol=1e-4)
    for name, (inputs, entries) in kept_entries(teacher, plan).items():
        new = LowRank(*(torch.full_like(part, 7.0) for part in (updates[name].down, updates[name].up)))
        changed = put_back(updates[name], inputs, entries, cut_to(teacher, plan, {**updates, name: new})[name])
        line = changed.down.T if inputs else changed.up
        there = torch.zeros(len(line), dtype=torch.bool)
        there[entries] = True
        assert (line[there] == 7).all(), name
        assert torch.equal(line[~there], (updates[name].down.T if inputs else updates[name].up)[~there]), name
        assert 0 < len(entries) < len(line)


def test_a_rank_that_grows_changes_no_output_and_stays_below_its_limit(checkpoint: Folder) -> None:
    teacher, rows = load(checkpoint("llama")), tiny.tokens(3, 12)
    plan, updates = narrowed(teacher), random_updates(teacher)
    before = logits(adapted(teacher, plan, updates), rows)
    names = list(maps_of(teacher, apply(teacher, plan)).values())
    gains = {name: float((7 * i) % len(names)) for i, name in enumerate(names)}
    larger = grown(updates, gains, 8 * 3, seed=2)
    torch.testing.assert_close(logits(adapted(teacher, plan, larger), rows), before, rtol=1e-5, atol=1e-5)
    middle = sorted(gains.values())[len(names) // 2]
    assert {name: of.rank for name, of in larger.items()} == {
        name: 6 if gains.get(name, -1.0) >= middle else 3 for name in updates
    }
    for name, of in larger.items():
        assert of.down[3:].abs().sum(1).gt(0).all(), "a row of zeros would never learn"
        assert of.up[:, 3:].eq(0).all(), name
    for _ in range(3):
        larger = grown(larger, gains, 8 * 3, seed=3)
    assert {of.rank for of in larger.values()} == {3, 24}


def test_what_a_map_matters_is_the_slope_of_the_loss_by_its_update(checkpoint: Folder) -> None:
    """By finite differences of the scale of one update, and by the other factor."""
    teacher, tokens = load(checkpoint("llama")), many_texts(6)
    plan, updates = narrowed(teacher), random_updates(teacher)
    student = adapted(teacher, plan, updates)
    downs = {n.rpartition(".lora_A")[0]: p for n, p in student.named_parameters() if "lora_A" in n}
    ups = {n.rpartition(".lora_B")[0]: p for n, p in student.named_parameters() if "lora_B" in n}
    rows, options = rows_of(tokens, teacher.device), TrainingOptions("nll", batch=len(tokens.rows))
    found, other = (update_gains(student, factors, rows, options) for factors in (downs, ups))
    assert found == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert min(found.values()) > 0

    def loss() -> float:
        words = logits(student, tokens.rows).double().log_softmax(-1)[:, :-1]
        return -float(words.gather(-1, tokens.rows[:, 1:, None]).mean())

    for name in list(ups)[::6]:
        ends = []
        for times in (1.01, 0.99):
            with torch.no_grad():
                ups[name].mul_(times)
                ends.append(loss())
                ups[name].div_(times)
        assert abs(ends[0] - ends[1]) / 0.02 == pytest.approx(found[name], rel=0.02, abs=1e-4), name
    apart = update_gains(student, downs, rows, replace(options, batch=1))
    assert all(apart[name] >= found[name] * (1 - 1e-4) for name in found), "sizes of batches do not cancel"


# -- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3, 4, 7])
def test_the_budget_of_the_rounds_is_cubic(rounds: int) -> None:
    shares = [Round(k, rounds, 0.0, Plan(), NO_REPAIR).share for k in range(1, rounds + 1)]
    assert shares[-1] == 1
    assert shares == sorted(set(shares))
    left = [1 - share for share in (Fraction(0), *shares)]
    assert all(some == Fraction(rounds - k, rounds) ** 3 for k, some in enumerate(left))


class Planner:
    """Says which plan a round gets: of each, more is removed; keeps what it was asked."""

    def __init__(self, teacher: Teacher) -> None:
        removed = (("mlp.3",), ("mlp.3",), ("mlp.3", "attention.0"))
        self.plans = [narrowed(teacher, step, sites) for step, sites in zip((2, 2, 4), removed, strict=True)]
        self.plans[0] = Plan(narrowed=frozenset(k for k in self.plans[0].narrowed if k.site == Site(1, "attention")))
        kept = frozenset(k for k in self.plans[2].narrowed if k.site != Site(0, "attention"))
        self.plans[2] = Plan(self.plans[2].removed, kept)
        self.asked: list[Round] = []

    def __call__(self, this: Round) -> Plan:
        self.asked.append(this)
        return self.plans[this.number - 1]


OPTIONS: dict[str, Any] = {"rounds": 3, "epochs": 2, "batch": 4, "rank": 2, "beta": 0.5, "rate": 1e-3}
TEXTS = many_texts(12), many_texts(12)  # as few random tokens teach nothing about others


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen3_moe"])
def test_each_round_trains_what_the_last_one_left(variant: str, checkpoint: Folder) -> None:
    """The last repair fits the last plan, helps, and is the same under the same seed."""
    teacher, texts = load(checkpoint(variant)), TEXTS
    planner, heard = Planner(teacher), list[float]()

    def watch(event: Event) -> None:
        heard.extend([float(event.values["best"])] if "best" in event.values else [])

    task = RecoveryTask(teacher, Plan(), replan=planner, watch=watch)
    found = RECOVERIES["apt"](task, *texts, **OPTIONS)
    assert [(asked.number, asked.rounds, asked.beta) for asked in planner.asked] == [(k, 3, 0.5) for k in (1, 2, 3)]
    assert [asked.plan for asked in planner.asked] == [Plan(), *planner.plans[:2]]
    assert planner.asked[0].repair == NO_REPAIR
    rows = tiny.tokens(2, 12)
    for asked in planner.asked[1:]:
        assert not torch.equal(*(logits(apply(teacher, asked.plan, repair=r), rows) for r in (NO_REPAIR, asked.repair)))
    teaching = logits(teacher.model, texts[0].rows).log_softmax(-1)
    students = (apply(teacher, planner.plans[-1], repair=repair) for repair in (NO_REPAIR, found))
    lost = [
        float((teaching.exp() * (teaching - logits(s, texts[0].rows).log_softmax(-1))).sum(-1).mean()) for s in students
    ]
    assert lost[1] < lost[0]
    steps = len(heard) // 3
    assert heard[steps] > heard[steps - 1], "what a round removes costs something"
    again = RECOVERIES["apt"](replace(task, replan=Planner(teacher)), *texts, **OPTIONS)
    assert again.key() == found.key()
    other = RECOVERIES["apt"](replace(task, replan=Planner(teacher), seed=1), *texts, **OPTIONS)
    assert other.key() != found.key()


@pytest.mark.parametrize("at", [2, 9, 13])
def test_a_killed_round_goes_on_and_finished_ones_are_not_trained_again(
    at: int, checkpoint: Folder, tmp_path: Path
) -> None:
    """Of 6 steps in each of 3 rounds, the process dies after so many."""
    teacher, texts = load(checkpoint("llama")), TEXTS
    whole = RECOVERIES["apt"](RecoveryTask(teacher, Plan(), replan=Planner(teacher)), *texts, **OPTIONS)
    taken = list[int]()

    def watch(event: Event) -> None:
        taken.extend([event.done] if "best" in event.values else [])
        if len(taken) == at:
            raise KeyboardInterrupt

    task = RecoveryTask(teacher, Plan(), replan=Planner(teacher), work=tmp_path, watch=watch, save_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        RECOVERIES["apt"](task, *texts, **OPTIONS)
    assert len(list(tmp_path.glob("round-*"))) == at // 6
    again = RECOVERIES["apt"](replace(task, replan=Planner(teacher)), *texts, **OPTIONS)
    assert len(taken) <= 18 + 1, "one step, at most, is taken twice"
    for name, weight in whole.weights.items():
        torch.testing.assert_close(again.weights[name], weight, rtol=1e-4, atol=1e-6)
    taken.clear()
    third = RECOVERIES["apt"](replace(task, replan=Planner(teacher)), *texts, **OPTIONS)
    assert not taken
    assert third.key() == again.key()
    if at == 2:
        other = replace(task, replan=Planner(teacher), watch=ignore_events)
        RECOVERIES["apt"](other, *texts, **OPTIONS | {"rank": 3})
        assert len(list(tmp_path.glob("round-*"))) == 6, "other updates are not taken for these"


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rank": 0}, {"beta": 1.0}, {"beta": -0.1}])
def test_options_out_of_range_are_refused_before_a_plan_is_asked_for(wrong: dict[str, Any], checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    planner = Planner(teacher)
    with pytest.raises(UsageError, match="apt takes rounds and rank from 1 and beta from 0 to below 1"):
        RECOVERIES["apt"](RecoveryTask(teacher, Plan(), replan=planner), many_texts(8), many_texts(4), **wrong)
    assert not planner.asked
