"""A store with three prunings of a tiny model: one is real, two are made from it. Tests copy it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from billhook import api
from billhook.core.plan import KeptGroups, Plan
from billhook.core.results.run import PerplexityChange, RunResult, SizeChange
from billhook.runs.store import Store

FOUR, TWO, NARROW = "four", "two", "narrow"  # folders of the students


def another(store: Store, first: RunResult, plan: Plan, ratio: float, out: str) -> str:
    """A run like the first one, with another plan and another perplexity."""
    assert first.perplexity is not None
    old = store.run(first.run)
    asked = {"remove": f"{len(plan.removed)}sites"} if plan.removed else {"remove": "10%params", "search": "joint"}
    run = store.new_run(old.kind, old.spec | asked, old.environment, out)
    change = first.perplexity
    result = replace(
        first, run=run, out=out, plan=plan, recipe=first.recipe | asked,
        steps=first.steps[: len(plan.removed)], sizes=SizeChange(first.sizes.teacher, first.anatomy.sizes(plan)),
        perplexity=PerplexityChange(
            change.teacher, change.teacher * ratio,
            replace(change.ratio, value=ratio, low=ratio / 1.05, high=ratio * 1.05),
        ),
    )  # fmt: skip
    store.update(run, state="done", result=result.to_json(), fingerprints=old.fingerprints)
    return run


@pytest.fixture(scope="session")
def pruned_store(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: a greedy search for 4 sites, its first 2, and one of widths. Read only."""
    home = tmp_path_factory.mktemp("dashboard")
    told = {"tokens": 256, "length": 32, "eval_tokens": 512, "eval_length": 64, "self_share": 0.0}
    first = api.prune(
        model, remove="4sites", search="greedy", out=home / FOUR, store=home / "runs.db", data=text, **told
    )
    with closing(Store(home / "runs.db")) as store:
        two = Plan(frozenset(site for step in first.steps[:2] for site in step.sites))
        another(store, first, two, 1.05, str(home / TWO))
        mlp = next(size for size in first.anatomy.sites if size.site.part == "mlp")
        narrow = Plan(narrowed=frozenset({KeptGroups(mlp.site, mlp.groups[: len(mlp.groups) // 2])}))
        another(store, first, narrow, 1.004, str(home / NARROW))
    return home / "runs.db"


@pytest.fixture
def store(pruned_store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be changed."""
    with closing(sqlite3.connect(pruned_store)) as db, closing(sqlite3.connect(tmp_path / "runs.db")) as copy:
        db.backup(copy)
    return tmp_path / "runs.db"
