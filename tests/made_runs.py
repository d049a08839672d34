"""Stores with planted prunings: what they lose, how fast they are, and how their searches went is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from billhook.core.anatomy import Anatomy, SiteSize, Unassigned
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.measured import Environment, Estimate, Step, TimingProtocol, TokenSetInfo, WorkPlan
from billhook.core.results.run import (
    Decided,
    ModelInfo,
    PerplexityChange,
    PredictedSpeed,
    Rates,
    RecoveryGain,
    RecoveryReport,
    RunData,
    RunResult,
    SearchSummary,
    SizeChange,
    SpeedChange,
    SpeedRatio,
)
from billhook.runs.recipe import parse_recipe
from billhook.runs.store import Store

TEACHER = 20.0  # perplexity
FINGERPRINT = "0123456789abcdef"


def an_anatomy(blocks: int = 10, attention: int = 10_000, mlp: int = 30_000, rest: int = 100_000) -> Anatomy:
    """Equal blocks; float32."""
    sizes = {"attention": attention, "mlp": mlp}
    sites = tuple(
        SiteSize(Site(block, part), sizes[part], 4 * sizes[part], 64 * (part == "attention"), 2 * sizes[part])
        for block in range(blocks)
        for part in PARTS
    )
    return Anatomy("llama", blocks, sites, Unassigned(rest, 4 * rest, 2 * rest))


def near(value: float, spread: float = 0.02) -> Estimate:
    """An estimate with an interval of a relative width."""
    return Estimate(value, value * (1 - spread), value * (1 + spread), 40, 40, True)


def a_run(
    nats: float = 0.5, sites: int = 4, *, speedup: float = 1.25, recovered: float | None = None,
    steps: Sequence[float] = (), seconds: float = 100.0, recipe: dict[str, Any] | None = None, **more: Any,
) -> RunResult:  # fmt: skip
    """A pruning that removes the mlps of the first blocks, and loses `nats`; `recovered`: what its fold closed."""
    anatomy, plan = an_anatomy(), Plan(frozenset(Site(block, "mlp") for block in range(sites)))
    ratio, text = math.exp(nats), TokenSetInfo("pydoc", 16384, 40, 40, 38, "text")
    asked = parse_recipe({"remove": "10%", "search": "swap", "self_share": 0.0, **(recipe or {})})
    reports = ()
    if recovered is not None:
        before = TEACHER * math.exp(nats / (1 - recovered))
        gain = RecoveryGain(TEACHER, before, TEACHER * ratio, near(TEACHER * ratio / before), recovered)
        reports = (RecoveryReport("fold", {}, 30.0, 0, 4096, "pydoc", {"held-out": gain}),)
    rates = [Rates(near(300.0 * s), near(10.0 * s), None) for s in (1.0, speedup)]
    fields: dict[str, Any] = {
        "billhook": "0", "run": "", "created": "", "out": "pruned/x", "checkpoint": "llama", "reasons": (),
        "model": ModelInfo("planted", "llama", FINGERPRINT, anatomy.blocks, "float32", "float32", "cpu"),
        "anatomy": anatomy, "already_removed": Plan(), "recipe": asked.model_dump(),
        "environment": Environment("0", "3", "2", "5", "cpu", "here", 2), "loss": "kl", "loss_unit": "nats",
        "plan": plan, "data": RunData(text, text), "seen": (),
        "steps": tuple(Step((Site(i, "mlp"),), loss, None, None) for i, loss in enumerate(steps)),
        "search": SearchSummary("exact", Decided(1), WorkPlan("layers", False, 1, 1, 1, 1, 1), 1.0), "within": None,
        "perplexity": PerplexityChange(TEACHER, TEACHER * ratio, near(ratio)), "tasks": (),
        "sizes": SizeChange(anatomy.sizes(), anatomy.sizes(plan)), "recoveries": reports,
        "speed": SpeedChange(rates[0], rates[1], SpeedRatio(near(speedup), near(speedup)), PredictedSpeed(1.2, 1.2),
                             TimingProtocol(), None),
        "answers": (), "seconds": {"load": 1.0, "search": seconds, "evaluate": 9.0},
    }  # fmt: skip
    return RunResult(**fields | more)


def file_run(store: Path, result: RunResult, *, done: bool = True) -> str:
    """File a planted pruning; returns its id."""
    with closing(Store(store)) as opened:
        run = opened.new_run("prune", result.recipe | {"model": "planted"}, {}, result.out)
        told = result.to_json() | {"run": run} if done else None
        opened.update(run, fingerprints={"model": FINGERPRINT}, result=told, state="done" if done else "interrupted")
    return run
