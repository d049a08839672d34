"""Runs whose results are kept: plans, counts and digests must be what they were, and numbers as near as CPUs are."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_runs
import pytest
from golden_runs import PRUNES, RUNS

import billhook

KEPT = golden_runs.kept_results()
TRAINED = {"bias", "patches", "full", "partial", "lora", "qa_lora"}  # many steps of an optimiser


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    now = json.loads(json.dumps(RUNS[name]()))
    assert not [*differences(KEPT[name], now, *tolerance(name), name)]


def tolerance(name: str) -> tuple[float, float]:
    """Relative and absolute: another CPU adds up in another order. BILLHOOK_GOLDEN=exact: none, on the same one."""
    if os.environ.get("BILLHOOK_GOLDEN") == "exact":
        return 0.0, 0.0
    trained = name in PRUNES and TRAINED & set(PRUNES[name][2].get("recover", "").split(","))
    return (2e-3, 2e-3) if trained else (3e-5, 3e-5)


def differences(kept: Any, now: Any, rel: float, small: float, at: str = "") -> Iterator[str]:
    """Where two results differ: floats by more than both tolerances, all else at all."""
    if isinstance(kept, float) and isinstance(now, int | float) and not isinstance(now, bool):
        if abs(kept - now) > max(rel * abs(kept), small):
            yield f"{at}: {kept!r} was kept, {now!r} is found"
    elif isinstance(kept, dict) and isinstance(now, dict):
        for name in [*kept, *(name for name in now if name not in kept)]:
            if name in kept and name in now:
                yield from differences(kept[name], now[name], rel, small, f"{at}.{name}")
            else:
                yield f"{at}.{name} is {'gone' if name in kept else 'new'}"
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for number, (a, b) in enumerate(zip(kept, now, strict=True)):
            yield from differences(a, b, rel, small, f"{at}[{number}]")
    elif kept != now or type(kept) is not type(now):
        yield f"{at}: {kept!r} was kept, {now!r} is found"


def test_every_method_is_in_one_of_the_runs() -> None:
    by_family: dict[str, set[str]] = {}
    for row in billhook.list_methods():
        row = row if isinstance(row, dict) else golden_runs.plain(row)
        by_family.setdefault(row["family"], set()).add(row["name"])
    options = [options for _, _, options in PRUNES.values()]
    searches = {each["search"] for each in options if "search" in each}
    assert searches == by_family["search"]
    assert {name for each in options for name in each.get("recover", "").split(",") if name} == by_family["recovery"]
    scored = {name for names in golden_runs.METRICS.values() for name in names.split(",")}
    assert scored == by_family["metric"] | by_family["metric of channel groups"]
    assert {each.get("loss", "kl").partition(":")[0] for each in options} == by_family["loss"] | {"task"}


def test_a_number_that_moved_is_found() -> None:
    draw = random.Random(0)
    kept = {"a": [{"loss": draw.random()} for _ in range(3)], "n": 3, "plan": ["mlp.1"]}
    moved: Any = json.loads(json.dumps(kept))
    assert not [*differences(kept, moved, 0, 0)]
    moved["a"][1]["loss"] *= 1 + 1e-5
    assert len([*differences(kept, moved, 1e-6, 0)]) == 1
    assert not [*differences(kept, moved, 1e-4, 0)]
    moved |= {"n": 4, "plan": ["mlp.2"], "new": 0}
    assert len([*differences(kept, moved, 1, 1)]) == 3


def test_the_models_are_the_same_on_every_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    found = golden_runs.of_checkpoint(Path(golden_runs.model("llama")), exact=True)
    kept = KEPT["streamed_greedy"]["checkpoint"]
    assert kept["model.embed_tokens.weight"] == found["model.embed_tokens.weight"]
    assert set(kept.values()) <= set(found.values())
