"""Results of studies with numbers of their own for every seed, made up: what pages and tables are shown."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from billhook.core.anatomy import ModelSizes
from billhook.core.margin import Margin
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.measured import Environment, Estimate, TokenSetInfo
from billhook.core.results.studies import (
    SIZE_NAMES,
    MarginLoss,
    Outcome,
    PairSpread,
    RefusedTrial,
    SizeName,
    StabilityResult,
    StabilitySize,
    StudentOutcome,
    SweepResult,
    ThresholdData,
    ThresholdResult,
    ThresholdTrial,
    TransferResult,
    TrialResult,
)
from billhook.studies.threshold import knee

OURS = (
    "billhook", "blockpruner", "deeper-look", "deeper-look-logits", "deeper-look-loss", "deeper-look-relative-l1",
    "deeper-look-relative-l2", "evopress", "finercut", "llm-drop", "shortened-llama", "shortened-llama-magnitude",
    "shortened-llama-taylor", "shortgpt", "sleb", "sprint", "uidl",
)  # fmt: skip
SITES = [Site(block, part) for block in range(30) for part in PARTS]
TEACHER = ModelSizes(134_515_008, 538_060_032, 46080, 269_030_016)
MACHINE = Environment("0.1.0", "3.11.7", "2.13.0", "5.23.0", "cpu", "x86_64, 2 cores", 1)
PAGE = "studies/r3fa9c1/index.html"
Kind = Literal["perplexity", "accuracy"]


def described(source: str, items: int | None = None) -> TokenSetInfo:
    return TokenSetInfo(source, 16384, 40, 40, 38, "aa", items)


def estimate(value: float, low: float, high: float, reliable: bool = True) -> Estimate:
    return Estimate(value, low, high, 40, 38, reliable, "" if reliable else "few_texts")


def outcome(kind: Kind, value: float, rng: random.Random) -> Outcome:
    """Of a text `value` is in nats."""
    spread = (0.02 if kind == "perplexity" else 0.03) * (1 + rng.random())
    got = estimate(value, value - spread, value + 1.2 * spread)
    if kind == "accuracy":
        return Outcome(kind, got, None)
    return Outcome(kind, got.mapped(lambda nats: math.exp(min(nats, 700.0))), value)


def of_student(own: Outcome, value: float, before: float, spread: float) -> StudentOutcome:
    gap = value - before
    return StudentOutcome(own.kind, own.estimate, own.nats, estimate(gap, gap - spread, gap + 1.3 * spread))


def a_plan(rng: random.Random, sites: int) -> Plan:
    return Plan(frozenset(rng.sample(SITES, sites)))


def a_sweep(
    seed: int = 0,
    recipes: Sequence[str] = OURS,
    removes: Sequence[str] = ("15%sites", "25%sites", "35%sites"),
    texts: Sequence[str] = ("/data/wiki.jsonl", "/data/c4.jsonl"),
    tasks: Sequence[str] = ("/tasks/arc.jsonl", "/tasks/piqa.jsonl", "/tasks/boolq.jsonl"),
    *,
    datas: Sequence[str] = ("/data/wiki.jsonl",),
    time: bool = True,
    blown: Sequence[str] = (),
    refused: int = 0,
) -> SweepResult:
    """A sweep. `blown`: recipes whose perplexity is beyond exp(700); `refused`: so many combinations were."""
    rng = random.Random(seed)
    sizes = replace(TEACHER, ns_per_token=33_000_000 if time else 0)
    before = {name: 2.5 + rng.random() if name in texts else 0.4 + 0.3 * rng.random() for name in (*texts, *tasks)}
    kinds: dict[str, Kind] = {name: "perplexity" if name in texts else "accuracy" for name in before}
    skill = {recipe: 0.4 + 1.5 * rng.random() for recipe in recipes}
    trials: list[TrialResult] = []
    for data in datas:
        for recipe in recipes:
            for number, remove in enumerate(removes):
                share = 0.12 + 0.1 * number + 0.02 * rng.random()
                results = {}
                for name, value in before.items():
                    if name in texts:
                        lost = skill[recipe] * (4 * share) ** 2 * (0.9 + 0.2 * rng.random())
                        lost = 1000.0 if recipe in blown else lost
                    else:
                        lost = -0.6 * share * skill[recipe] * rng.random()
                    results[name] = of_student(outcome(kinds[name], value + lost, rng), value + lost, value, 0.03)
                left = (int(getattr(sizes, each.name) * (1 - share * (0.8 + 0.4 * rng.random())))
                        for each in fields(ModelSizes))  # fmt: skip
                cost = (round(10 ** (4 * rng.random()), 1), rng.randint(10, 60000), rng.random() < 0.1)
                trials.append(TrialResult(recipe, remove, data, a_plan(rng, 12), ModelSizes(*left), *cost, results))
    for text in texts:
        trials = [replace(t, results=t.results | {text: ranked(t, trials, text)}) for t in trials]
    trials = [
        replace(t, front=tuple(size for size in SIZE_NAMES if not any(dominates(u, t, size) for u in trials)))
        for t in trials
    ]
    why = "A run of 3 blocks does not fit 35%sites: it would be the whole model. Ask for less."
    return SweepResult(
        "SmolLM2-135M",
        "0123456789abcdef",
        teacher={name: outcome(kinds[name], value, rng) for name, value in before.items()},
        sizes=sizes,
        trials=tuple(trials),
        refused=tuple(RefusedTrial("uidl", f"{i}blocks", datas[0], why) for i in range(refused)),
        calibration=tuple(map(described, datas)),
        evaluation={name: described(name, None if name in texts else 200) for name in before},
        batch=1,
        context=128,
        environment=MACHINE,
        page=PAGE,
    )


def nats_of(trial: TrialResult, text: str) -> float:
    nats = trial.results[text].nats
    assert nats is not None
    return nats


def ranked(trial: TrialResult, trials: Sequence[TrialResult], text: str) -> StudentOutcome:
    """What a trial got on a text, with its gap to the best of its peers."""
    peers = [each for each in trials if (each.remove, each.data) == (trial.remove, trial.data)]
    gap = nats_of(trial, text) - min(nats_of(each, text) for each in peers)
    ends = (0.0, 0.0) if gap == 0 else (gap - 0.05, gap + 0.06)
    return replace(trial.results[text], above_best=estimate(gap, *ends))


def dominates(a: TrialResult, b: TrialResult, size: SizeName) -> bool:
    nats = [math.fsum(on.nats or 0 for on in trial.results.values()) for trial in (a, b)]
    sizes = [getattr(trial.sizes, size) for trial in (a, b)]
    better = nats[0] <= nats[1] and sizes[0] <= sizes[1] and (nats[0], sizes[0]) != (nats[1], sizes[1])
    return a.data == b.data and better


def a_transfer(seed: int = 0, tasks: Sequence[str] = ("arc", "piqa", "boolq")) -> TransferResult:
    rng = random.Random(seed)
    before = {task: 0.4 + 0.3 * rng.random() for task in tasks}
    trials: list[TrialResult] = []
    for name in ("text", *tasks):
        results: dict[str, StudentOutcome] = {}
        for task, value in before.items():
            now = value - 0.2 * rng.random() + (0.15 if name == task else 0)
            own = of_student(outcome("accuracy", now, rng), now, value, 0.04)
            gap = now - trials[0].results[task].estimate.value if trials else 0.0
            against = estimate(gap, gap - 0.05, gap + 0.05) if trials else estimate(0.0, 0.0, 0.0)
            results[task] = replace(own, against_text=against)
        sizes = ModelSizes(*(int(0.75 * getattr(TEACHER, each.name)) for each in fields(ModelSizes)))
        cost = (300 * rng.random(), 9000, False)
        trials.append(TrialResult(name, "25%sites", "pydoc", a_plan(rng, 15), sizes, *cost, results))
    return TransferResult(
        "SmolLM2-135M",
        "0123456789abcdef",
        remove="25%sites",
        teacher={task: outcome("accuracy", value, rng) for task, value in before.items()},
        sizes=TEACHER,
        trials=tuple(trials),
        evaluation={task: described(f"/tasks/{task}.jsonl", 200) for task in tasks},
        environment=MACHINE,
        page=PAGE,
    )


def a_stability(seed: int = 0, sizes: Sequence[int] = (256, 1024, 4096, 16384), sets: int = 8) -> StabilityResult:
    rng = random.Random(seed)
    order, found = rng.sample(SITES, len(SITES)), []
    for number, size in enumerate(sizes):
        sure = 6 + 2 * number
        plans = [Plan(frozenset([*order[:sure], *rng.sample(order[sure:30], 15 - sure)])) for _ in range(sets)]
        agreement, overlap = 1 - 0.5 / (number + 1), 1 - 0.6 / (number + 1)
        spreads = [PairSpread(x, x - 0.2 / (number + 1), x + 0.3 * (1 - x)) for x in (agreement, overlap)]
        found.append(StabilitySize(size, sets, *spreads, tuple(plans)))
    return StabilityResult(
        "SmolLM2-135M",
        "0123456789abcdef",
        metric="cosine",
        search="oneshot",
        remove="25%sites",
        data=described("/data/wiki.jsonl"),
        sizes=tuple(found),
        environment=MACHINE,
        page=PAGE,
    )


def a_threshold(seed: int = 0, task: str = "/tasks/arc.jsonl", **changed: Any) -> ThresholdResult:
    """Two margins, twelve steps of which five are taken."""
    rng = random.Random(seed)
    margins = (Margin.parse("3%ppl"), Margin.parse(f"1pp:{task}"))
    steps = [0.1 * 1.5**i for i in range(12)]
    shares = tuple(i / 30 for i in range(13))

    def lost(margin: Margin, value: float) -> MarginLoss:
        limit = float(margin.amount)
        high = value + 0.3 + 0.1 * rng.random()
        return MarginLoss(margin, estimate(value, value - 0.5, high, rng.random() < 0.5), limit, high <= limit)

    def trial(step: int, value: float) -> ThresholdTrial:
        losses = tuple(lost(margin, value * float(margin.amount)) for margin in margins)
        return ThresholdTrial(step, shares[step], all(each.within for each in losses), losses)

    result = ThresholdResult(
        "SmolLM2-135M",
        "0123456789abcdef",
        margins=margins,
        plan=Plan.parse(["mlp.3", "attention.4", "mlp.0[0-1 3-4]"]),
        step=5,
        steps=12,
        share=shares[5],
        confirmed=True,
        test=tuple(lost(margin, 0.5 * float(margin.amount)) for margin in margins),
        trials=(trial(0, 0.0), trial(5, 0.4), trial(9, 12.0)),
        data={str(margin): ThresholdData(described("/a"), described("/b", 40)) for margin in margins},
        shares=shares,
        losses=tuple(steps),
        loss="kl",
        knee=knee(shares[1:], steps),
        environment=MACHINE,
        page=PAGE,
    )
    return replace(result, **changed)
