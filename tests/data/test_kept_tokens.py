"""The tokens that recipes get are those that version 0.1 read: golden/tokens.json keeps their hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_runs
import pytest
from token_specs import CALIBRATED, HELD_OUT, write_files

import billhook
from billhook import Recipe, Teacher
from billhook.core.errors import DataError
from billhook.core.events import ignore_events
from billhook.data.calibration import held_out_tokens
from billhook.data.texts import TextSpec
from billhook.runs.prepare import (
    read_calibration,
    read_held_out,
    read_held_out_half,
    recovery_tokens,
    tokens_for,
)
from billhook.runs.recipe import EvalOptions

KEPT: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def teacher(home: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.chdir(home)
    write_files()
    return billhook.load(golden_runs.model("llama", max_position_embeddings=64))


@pytest.mark.parametrize("name", CALIBRATED)
def test_recipes_get_the_tokens_that_they_got(name: str, teacher: Teacher) -> None:
    recipe = Recipe(remove="1sites", **CALIBRATED[name])
    calibration, held_out = tokens_for(recipe, teacher, ignore_events)
    assert [calibration.hash, held_out.hash] == KEPT["calibrated"][name]
    assert read_calibration(recipe, teacher, ignore_events).hash == calibration.hash
    if name in KEPT["recovery"]:
        assert recovery_tokens(recipe, teacher, ignore_events).hash == KEPT["recovery"][name]


@pytest.mark.parametrize("name", HELD_OUT)
def test_evaluations_and_studies_get_the_text_that_they_got(name: str, teacher: Teacher) -> None:
    options = EvalOptions(**HELD_OUT[name])
    proof, *halves = KEPT["held_out"][name]
    assert read_held_out(options, teacher).hash == proof
    for seed, kept in zip((options.seed, 0), halves, strict=False):
        assert read_held_out_half(options, options.data, teacher, seed=seed).hash == kept


def test_what_the_model_writes_alone_is_proved_on_the_documentation(teacher: Teacher) -> None:
    """All of it is held out; of a recipe that calibrates on it, half."""
    alone = read_held_out(EvalOptions(data="self", eval_tokens=10**6), teacher)
    half = read_held_out(EvalOptions(data="pydoc", eval_tokens=10**6), teacher)
    assert (alone.source, half.source) == ("pydoc", "pydoc")
    assert len(set(half.clusters)) < 0.6 * len(set(alone.clusters))


def test_held_out_text_of_the_model_itself_is_refused(teacher: Teacher) -> None:
    with pytest.raises(DataError, match="held-out text must not come from the model"):
        held_out_tokens(TextSpec("self", "text", 100, 20, 0), teacher.model, teacher.tokenizer)
    with pytest.raises(DataError, match="held-out text must not come from the model"):
        tokens_for(Recipe(remove="1sites", data="a.jsonl", eval_data="self"), teacher, ignore_events)


def test_a_mixture_that_holds_the_proof_gives_half_of_that_in_any_order(teacher: Teacher) -> None:
    sets = [
        tokens_for(
            Recipe(remove="1sites", eval_data="b.jsonl", **CALIBRATED["mixed"] | {"data": data}), teacher, ignore_events
        )
        for data in ("a.jsonl+b.jsonl", "b.jsonl+a.jsonl")
    ]
    assert sets[0][1].hash == sets[1][1].hash
    assert sorted(sets[0][0].digests) == sorted(sets[1][0].digests)
