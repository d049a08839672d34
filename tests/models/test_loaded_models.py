"""Every public function takes a loaded model in place of its name, and gives the same."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook import Event, Teacher
from billhook.core.errors import UsageError
from billhook.methods.evaluate.speed import TimingProtocol
from billhook.models.load import Model, loaded_by_name

TEXT: dict[str, Any] = {"eval_tokens": 256, "eval_length": 24}
SMALL: dict[str, Any] = TEXT | {"tokens": 96, "length": 24, "self_share": 0.0}
MODELS = ("model", "models", "other", "student", "baseline")  # parameters


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("loaded")
    tiny.with_tokenizer(home / "tiny")
    tiny.write_texts(home / "text.jsonl", 80)
    draw = random.Random(0)
    rows = [f'{{"query": "w{draw.randint(1, 50)}", "choices": ["w1", "w2"], "gold": {i % 2}}}' for i in range(30)]
    (home / "task.jsonl").write_text("\n".join(rows) + "\n")
    return home


@pytest.fixture
def teacher(home: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.chdir(home)
    return billhook.load("tiny")


def test_every_parameter_that_is_a_model_may_be_loaded() -> None:
    for name in billhook.__all__:
        function = getattr(billhook, name)
        if not inspect.isfunction(function) or name in (
            "load",
            "load_with_adapter",
            "save",
            "apply",
            "masked",
            "watch",
        ):
            continue
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name in MODELS:
                assert parameter.annotation in (Model, Model | None), f"{name}({parameter.name})"


def test_what_is_loaded_is_not_loaded_again_and_gives_the_same(teacher: Teacher, tmp_path: Path) -> None:
    store, data = tmp_path / "runs.db", {"data": "text.jsonl"}
    told: list[Event] = []
    calls: list[tuple[Any, dict[str, Any]]] = [
        (billhook.evaluate, TEXT | data),
        (billhook.score, {"tokens": 96, "length": 24} | data),
        (billhook.dry_run, SMALL | data | {"remove": "1sites", "search": "greedy"}),
        (billhook.evaluate_tasks, {"tasks": "task.jsonl", "store": store}),
        (billhook.measure_speed, {"protocol": TimingProtocol(8, 4, 1, 2), "store": store}),
    ]
    for function, given in calls:
        loaded = function(teacher, watch=told.append, **given)
        named = function("tiny", **given)
        assert getattr(loaded, "model", "tiny") == getattr(named, "model", "tiny")
        if function in (billhook.evaluate, billhook.score):
            assert loaded.rows() == named.rows()
    assert "load" not in {event.stage for event in told}


def test_a_loaded_model_is_pruned_compared_and_studied(teacher: Teacher, tmp_path: Path) -> None:
    store, data = {"store": tmp_path / "runs.db"}, {"data": "text.jsonl"}
    pruned = [
        billhook.prune(model, plan="mlp.1", out=tmp_path / str(i), **store, **data, **SMALL)
        for i, model in enumerate((teacher, "tiny"))
    ]
    assert pruned[0].plan == pruned[1].plan
    assert pruned[0].perplexity.student == pytest.approx(pruned[1].perplexity.student, rel=1e-6)
    student = billhook.load(tmp_path / "0")
    both = billhook.compare(teacher, student, timed=False, seen=True, out=tmp_path / "c", **data, **store, **TEXT)
    assert [each.model for each in both.models] == ["tiny", str(tmp_path / "0")]
    assert student.model is not None, "its owner keeps it"
    kept = billhook.gate(student, teacher, seen=True, **data, **store, **TEXT)
    assert (kept.student, kept.baseline) == (str(tmp_path / "0"), "tiny")
    swept = billhook.sweep(teacher, ["shortgpt"], remove=[0.25], out=tmp_path / "s", **data, **store, **SMALL)
    assert swept.model == "tiny"


def test_options_must_be_those_that_would_have_loaded_it(teacher: Teacher) -> None:
    billhook.evaluate(teacher, data="text.jsonl", dtype="float32", device="cpu", memory="4GB", **TEXT)
    for options, message in (
        ({"dtype": "bfloat16"}, r"tiny is loaded in float32, not by dtype='bfloat16'\. Load it so"),
        ({"memory": "0.1MB"}, r"loaded whole and takes .* MB, which memory= of 0\.1 MB has no room for"),
    ):
        with pytest.raises(UsageError, match=message):
            billhook.evaluate(teacher, data="text.jsonl", **TEXT, **options)
    with pytest.raises(UsageError, match="loaded in float32"):
        billhook.inspect(teacher, dtype="float16")
    with pytest.raises(UsageError, match="Two loaded models are called tiny"):
        loaded_by_name(teacher, billhook.load("tiny"))
