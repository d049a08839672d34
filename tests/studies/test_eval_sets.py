"""Tasks of every kind in a comparison: choices, questions that are answered in writing, and tasks of the harness."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import HOSTILE, OVERFLOW, Tab
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.core.errors import DataError, MissingExtra, ResourceError, UsageError
from billhook.core.files.cache_keys import HarnessKey
from billhook.core.results.comparisons import TaskScores
from billhook.data.choice_tasks import task_tokens
from billhook.data.generation_tasks import build_prompts
from billhook.methods.evaluate.generation import flexible_number, generate_answers, score_answers
from billhook.methods.evaluate.multiple_choice import log_probabilities, score_choices
from billhook.report import compare_page
from billhook.runs.evaluation import BATCH_ITEMS
from billhook.runs.store import Store
from billhook.studies.eval_sets import BATCH_QUESTIONS
from billhook.studies.lm_harness import HARNESS_BATCH_REQUESTS

SHORT: dict[str, Any] = {"eval_tokens": 512, "eval_length": 24}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports


def phrases(seed: int) -> Callable[[int], str]:
    draw = random.Random(seed)
    return lambda n: " ".join(draw.choices(tiny.WORDS, k=n))


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def choices(home: Path) -> Path:
    words, draw = phrases(1), random.Random(2)
    return lines(home / "choices.jsonl", [
        {"query": words(5), "choices": [words(2) for _ in range(3)], "gold": draw.randrange(3)} for _ in range(60)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def questions(home: Path, model: Path) -> Path:
    """Of every second question the target is what the model writes; the others have none that is a number."""
    words, teacher = phrases(3), billhook.load(model)
    rows = [{"query": words(6), "answer": words(3), "target": "none"} for _ in range(30)]
    file = lines(home / "questions.jsonl", rows)
    prompts = build_prompts(file, teacher.tokenizer, positions=positions(teacher), new_tokens=positions(teacher) // 2)
    for number, answer in zip(prompts.tokens.clusters, generate_answers(teacher.model, prompts), strict=True):
        if number % 2:
            rows[number - 1]["target"] = flexible_number(answer)
    return lines(file, rows)


@pytest.fixture(scope="module")
def pruned(model: Path, home: Path) -> Path:
    teacher, plan = billhook.load(model), billhook.Plan.parse(["attention.1", "mlp.2"])
    billhook.save(billhook.apply(teacher, plan), teacher.tokenizer, plan, home / "pruned", teacher=teacher)
    return home / "pruned"


def positions(teacher: billhook.Teacher) -> int:
    return int(teacher.model.config.max_position_embeddings)


# -- answered in writing --------------------------------------------------------------------------------------------


def test_questions_are_compared_by_what_both_models_write(
    model: Path, pruned: Path, questions: Path, tmp_path: Path
) -> None:
    told = billhook.compare(
        model, pruned, data=(), tasks=str(questions), score="flexible_match", timed=False, out=tmp_path / "out",
        store=tmp_path / "b.db",
    )  # fmt: skip
    (each,), sides = told.sets, []
    for folder in (model, pruned):
        teacher = billhook.load(folder)
        most = positions(teacher)
        prompts = build_prompts(questions, teacher.tokenizer, positions=most, new_tokens=most // 2)
        answers = generate_answers(teacher.model, prompts)
        right = score_answers(prompts, answers)["flexible_match"].sums
        sides.append({n: (r, a) for n, r, a in zip(prompts.tokens.clusters, right, answers, strict=True)})
    assert each.score == "flexible_match"
    assert each.n == 30, "no search looks at questions, so all of them count"
    assert each.values[0].estimate.value == 0.5
    assert [value.scores["strict_match"] for value in each.values] == [0, 0]
    assert each.values[1].estimate.value == pytest.approx(sum(right for right, _ in sides[1].values()) / 30)
    flipped = {n for n in sides[0] if sides[0][n][0] != sides[1][n][0]}
    assert {flip.number for flip in each.flips} == flipped != set()
    for flip in each.flips:
        assert list(flip.answers) == [side[flip.number][1] for side in sides]


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_shows_what_both_wrote(
    tab: Tab, model: Path, pruned: Path, questions: Path, tmp_path: Path, width: int
) -> None:
    told = billhook.compare(
        model, pruned, data=(), tasks=str(questions), score="flexible_match", timed=False, out=tmp_path / "out",
        store=tmp_path / "b.db",
    )  # fmt: skip
    tab.show(tmp_path / "out" / "index.html", width, "light")
    assert tab.run(OVERFLOW) <= 0
    (each,) = told.sets
    assert tab.run("document.querySelectorAll('dl.answers').length") == len(each.flips)
    assert tab.run("document.querySelector('dl.answers dd').textContent") == each.flips[0].answers[0]
    flips = tuple(replace(flip, query=HOSTILE, target=HOSTILE, answers=(HOSTILE, HOSTILE)) for flip in each.flips)
    hostile = replace(told, sets=(replace(each, flips=flips),))
    (tmp_path / "hostile.html").write_text(compare_page.comparison_page(hostile), encoding="utf-8")
    tab.show(tmp_path / "hostile.html", width, "light")
    assert tab.run(OVERFLOW) <= 0
    assert tab.complaints() == []
    assert tab.run("document.title") != "owned"


def test_answers_are_stored_as_they_come(model: Path, tmp_path: Path) -> None:
    """More questions than one batch holds, whose answers must not be written twice."""
    words = phrases(5)
    rows = [{"query": words(6), "answer": words(3), "target": "none"} for _ in range(2 * BATCH_QUESTIONS + 20)]
    many = lines(tmp_path / "many.jsonl", rows)

    def killed(event: billhook.Event) -> None:
        if event.stage == "evaluate":
            finished.append(event.done)
            if event.done > BATCH_QUESTIONS:
                raise KeyboardInterrupt

    finished: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        billhook.evaluate_tasks(model, str(many), store=tmp_path / "b.db", watch=killed)
    rest: list[int] = []
    told = billhook.evaluate_tasks(
        model, str(many), store=tmp_path / "b.db",
        watch=lambda e: rest.append(e.done) if e.stage == "evaluate" else None,
    )  # fmt: skip
    assert finished[0] <= BATCH_QUESTIONS < min(rest), "the first batch of answers is known"
    assert rest[-1] == len(rows)
    assert {each.score for each in told.scores} == {"strict_match", "flexible_match"}
    for each in told.scores:
        assert each.estimate.n == len(rows)
        assert each.estimate.low <= each.estimate.value <= each.estimate.high


def test_scores_of_questions_are_those_that_were_planted(model: Path, questions: Path, tmp_path: Path) -> None:
    told = billhook.evaluate_tasks(model, str(questions), store=tmp_path / "b.db")
    assert {each.score: each.estimate.value for each in told.scores} == {"strict_match": 0, "flexible_match": 0.5}
    assert all(each.estimate.n == 30 for each in told.scores)


def test_progress_is_that_of_the_whole_task(model: Path, tmp_path: Path) -> None:
    words = phrases(7)
    rows = [{"query": words(4), "choices": [words(1), words(2)], "gold": 0} for _ in range(2 * BATCH_ITEMS + 50)]
    many = lines(tmp_path / "many.jsonl", rows)
    events: list[billhook.Event] = []
    told = billhook.evaluate_tasks(model, str(many), store=tmp_path / "b.db", watch=events.append)
    seen = [(event.done, event.total) for event in events if event.stage == "evaluate"]
    assert told.sets[0].tokens is not None
    total = told.sets[0].tokens.tokens
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {each[1] for each in seen} == {total}


# -- choices and shots ----------------------------------------------------------------------------------------------


def test_eval_measures_all_items_with_shots(model: Path, choices: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, [
        "eval", str(model), "--tasks", str(choices), "--shots", "2", "--store", str(tmp_path / "b.db"), "--json", "-q",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    teacher = billhook.load(model)
    tokens = task_tokens(choices, teacher.tokenizer, positions=positions(teacher), shots=(choices, 2))
    right = score_choices(tokens, log_probabilities(teacher.model, tokens))
    told = {each.score: each.estimate for each in TaskScores.from_json(json.loads(run.stdout)).scores}
    assert {name: each.value for name, each in told.items()} == {n: pytest.approx(r.mean) for n, r in right.items()}
    assert {each.n for each in told.values()} == {58}, "of 60, without the two that are shown solved"
    shown = CliRunner().invoke(app, ["eval", str(model), "--tasks", str(choices), "--store", str(tmp_path / "b.db")])
    assert "acc_norm" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80


def test_wrong_sets_say_what_to_type(model: Path, choices: Path, home: Path, tmp_path: Path) -> None:
    store = tmp_path / "b.db"
    for options, match in (
        ({"score": "f1"}, "score='f1' is no score"),
        ({"shots_from": str(choices)}, "Add shots=5"),
        ({"shots": 100}, "100 shots are wanted"),
    ):
        with pytest.raises((UsageError, DataError), match=match):
            billhook.compare(model, model, data=(), tasks=str(choices), store=store, **options)
    with pytest.raises(UsageError, match="brings its own examples"):
        billhook.evaluate_tasks(model, "lmeval:piqa", shots=1, shots_from=str(choices), store=store)
    with pytest.raises(DataError, match="is missing"):
        billhook.evaluate_tasks(model, str(tmp_path / "none.jsonl"), store=store)
    refused = CliRunner().invoke(app, ["eval", str(model), "--tasks", str(choices), "--data", "pydoc"])
    assert refused.exit_code == 2
    assert "in the place of text" in refused.output


def test_a_model_that_is_streamed_is_tested_on_choices_alone(
    model: Path, choices: Path, questions: Path, tmp_path: Path
) -> None:
    told = [
        billhook.evaluate_tasks(model, str(choices), store=tmp_path / f"{memory}.db", memory=memory).scores
        for memory in (None, "0.1MB")
    ]
    assert [each.estimate.value for each in told[0]] == [each.estimate.value for each in told[1]]
    with pytest.raises(ResourceError, match="larger than the memory"):
        billhook.evaluate_tasks(model, str(questions), store=tmp_path / "b.db", memory="0.1MB")


def test_a_gate_takes_all_kinds_and_a_stored_baseline(
    model: Path, pruned: Path, choices: Path, questions: Path, tmp_path: Path
) -> None:
    tasks, store = [str(choices), str(questions)], tmp_path / "b.db"
    wanted: dict[str, Any] = {"data": (), "tasks": tasks, "score": ["acc_norm", "flexible_match"], "store": store}
    for _ in range(2):
        billhook.save_baseline("v1", model, **wanted)
    told = billhook.gate(pruned, "v1", store=store)
    direct = billhook.gate(pruned, model, **wanted)
    assert told.checks == direct.checks
    assert [check.score for check in told.checks] == ["acc_norm", "flexible_match"]
    assert told.checks[1].baseline == 0.5


# -- the harness ----------------------------------------------------------------------------------------------------


def of_harness(folder: Path, name: str, data: Path, **config: Any) -> str:
    """The .yaml of a task of the harness for a file of rows."""
    told = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "num_fewshot": 0, "doc_to_text": "query", **config,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in told.items()))
    return f"lmeval:{folder / f'{name}.yaml'}"


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("offline")
def test_a_task_of_the_harness_equals_the_same_file(model: Path, pruned: Path, choices: Path, tmp_path: Path) -> None:
    task = of_harness(
        tmp_path, "of_choices", choices, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold",
        metric_list=[metric("acc"), metric("acc_norm")],
    )  # fmt: skip
    store = tmp_path / "b.db"
    told = billhook.compare(model, pruned, data=(), tasks=task, timed=False, out=tmp_path / "out", store=store)
    (each,) = told.sets
    for value, folder in zip(each.values, (model, pruned), strict=True):
        ours = billhook.evaluate_tasks(folder, str(choices), store=store).scores
        assert value.scores == {score.score: pytest.approx(score.estimate.value) for score in ours}
    assert each.n == 60
    pair = each.pairs[0]
    assert pair is not None
    assert pair.gained is not None
    assert pair.lost is not None
    assert len(each.flips) == pair.gained + pair.lost > 0
    for flip in each.flips:
        best = [max(range(3), key=lambda i, p=p: p[i]) == flip.gold for p in flip.probabilities]  # type: ignore[misc]
        assert best == list(flip.right)
    again = billhook.gate(pruned, model, data=(), tasks=task, store=store)
    assert again.checks[0].lost.value == pytest.approx(-100 * pair.change.value)


@pytest.mark.usefixtures("offline")
def test_answers_to_the_harness_are_stored_in_batches(model: Path, tmp_path: Path) -> None:
    words, many = phrases(9), HARNESS_BATCH_REQUESTS + 60
    rows = [{"query": words(2), "target": "none"} for _ in range(many)]
    task = of_harness(
        tmp_path, "in_writing", lines(tmp_path / "many.jsonl", rows), output_type="generate_until",
        doc_to_target="target", generation_kwargs={"until": ["w0"], "max_gen_toks": 1},
        metric_list=[metric("exact_match")],
    )  # fmt: skip

    def killed(event: billhook.Event) -> None:
        if event.stage == "evaluate":
            raise KeyboardInterrupt

    store = tmp_path / "b.db"
    with pytest.raises(KeyboardInterrupt):
        billhook.evaluate_tasks(model, task, store=store, watch=killed)
    told = billhook.evaluate_tasks(model, task, store=store)
    assert [each.score for each in told.scores] == ["exact_match"]
    assert told.scores[0].estimate.n == many
    with closing(Store(store)) as opened:
        asked = opened.all_of(HarnessKey)
    assert sorted(map(len, asked)) == [60, HARNESS_BATCH_REQUESTS], "each batch once"


def test_a_task_that_the_harness_does_not_have(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no task 'no_such_task'"):
        billhook.evaluate_tasks(model, "lmeval:no_such_task", store=tmp_path / "b.db")
    with pytest.raises(DataError, match="is missing"):
        billhook.evaluate_tasks(model, f"lmeval:{tmp_path / 'none.yaml'}", store=tmp_path / "b.db")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"billhook\[eval\]"):
        billhook.evaluate_tasks(model, "lmeval:piqa", store=tmp_path / "b.db")
