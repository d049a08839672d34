"""Methods of other packages: an entry point each, found and used by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from billhook.core.registry import Registry
from billhook.core.results.comparisons import TaskScores
from billhook.engine.losses import ITEM_LOSSES, LOSSES
from billhook.methods.evaluate import EVALUATIONS
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.recover import RECOVERIES
from billhook.methods.search import SEARCHES

ROOT = Path(__file__).resolve().parents[1]

OTHERS = '''
import torch
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.results.measured import EvalResult
from billhook.methods.evaluate import evaluation


def heaviest(probe, *, power: float = 1.0):
    """Absolute weights of every channel group."""
    return probe.groups_of_weights(lambda w: w.abs() ** power)


@evaluation
def length(model, tokens, *, scale: float = 1.0):
    """Tokens of every row, times a scale: asks nothing of the model."""
    sums = tuple(scale * float(n) for n in tokens.lengths)
    return EvalResult("length", tokens.hash, sums, (1,) * len(sums), tuple(range(len(sums))))


def lopsided(model, tokens):
    """Forgets its texts."""
    return EvalResult("lopsided", tokens.hash, (1.0, 0.0), (1, 1), ())


def first_ones(problem):
    """Whatever comes first, once measured; says nothing of how many losses that takes."""
    plan = Plan()
    while not problem.is_met(plan):
        plan = plan.without(*problem.moves(plan)[0])
    yield MeasureRequest((plan,))
    return [plan]
'''
ENTRIES = """
[billhook.group_metric]
heaviest = others:heaviest

[billhook.evaluation]
length = others:length
lopsided = others:lopsided

[billhook.search]
first_ones = others:first_ones
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package of other people's methods."""
    home = tmp_path_factory.mktemp("site-packages")
    about = home / "others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    (home / "others.py").write_text(OTHERS)
    return home


RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from billhook.cli.main import app
done = {}
for name, arguments in json.load(sys.stdin).items():
    got = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb"}, prog_name="billhook")
    done[name] = [got.exit_code, got.stdout, got.stderr]
json.dump(done, sys.stdout)
"""


@dataclass(frozen=True)
class Answer:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return dict(json.loads(self.out))

    @property
    def words(self) -> str:
        return " ".join((self.out + self.err).split())


@pytest.fixture(scope="module")
def answers(others: Path, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Commands in one process of their own, which has the package installed: this one stays as it is."""
    home = tmp_path_factory.mktemp("answers")
    task = home / "colours.jsonl"
    items = [{"query": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", "w3 w4"], "gold": i % 2} for i in range(12)]
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    data = ("--data", text, "--tokens", "96", "--length", "16")
    ask = ("eval", model, "--data", text, "--eval-tokens", "256", "--eval-length", "16")
    on_task = ("eval", model, "--tasks", task, "--store", home / "tasks.db", "--json")
    prune = ("prune", model, "--eval-tokens", "256", "--store", home / "runs.db", *data)
    narrow = ("--remove", "20%params", "--search", "rank_channels", "--metric", "heaviest", "--out", home / "narrow")
    first = ("--remove", "2sites", "--search", "first_ones", "--out", home / "first")
    commands: dict[str, tuple[Any, ...]] = {
        "methods": ("methods", "--json"),
        "score": ("score", model, "--metric", "heaviest", "--set", "power=2", *data, "--json"),
        "narrow": (*prune, *narrow, "--json"),
        "eval": (*ask, "--evaluations", "length,perplexity", "--set", "scale=0.5", "--json"),
        "plain": (*ask, "--json"),
        "shown": (*ask, "--evaluations", "length"),
        "misspelt": (*ask, "--evaluations", "lenght"),
        "lopsided": (*ask, "--evaluations", "lopsided"),
        "unfit": (*ask, "--evaluations", "acc"),
        "every": on_task,
        "some": (*on_task, "--evaluations", "acc_norm,length"),
        "dry": (*prune, *first, "--dry-run", "--json"),
        "dry shown": (*prune, *first, "--dry-run"),
        "first": (*prune, *first, "--json"),
    }
    given = json.dumps({name: [str(piece) for piece in command] for name, command in commands.items()})
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(others)))}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=given, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: Answer(*told) for name, told in json.loads(done.stdout).items()}


def test_methods_of_another_package_are_listed(answers: dict[str, Answer]) -> None:
    listed = {row["name"]: row for row in answers["methods"].told["methods"]}
    assert listed["heaviest"]["summary"] == "Absolute weights of every channel group."
    assert {"length", "lopsided", "first_ones"} <= set(listed)


def test_a_group_metric_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    groups = answers["score"].told["scores"]["heaviest"]["groups"]
    assert len(groups) == 8
    assert all(min(row["values"]) > 0 for row in groups)
    assert answers["narrow"].told["plan"]["narrowed"]


def test_an_evaluation_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    told, plain = answers["eval"].told, answers["plain"].told
    row = told["evaluations"]["length"]
    assert row["value"] * row["n"] == pytest.approx(0.5 * told["data"]["tokens"])
    assert row["low"] <= row["value"] <= row["high"]
    for name in ("value", "low", "high"):
        assert told["evaluations"]["perplexity"][name] == pytest.approx(plain["perplexity"][name])
    assert "length" in answers["shown"].words
    assert "95% interval" in answers["shown"].words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misspelt", "Did you mean 'length'?"),
        ("lopsided", "2 outcomes, 2 counts and 0 texts. It must give one"),
        ("unfit", "accuracy needs multiple-choice items"),
    ],
)
def test_an_evaluation_that_cannot_be_asked_says_why(answers: dict[str, Answer], name: str, message: str) -> None:
    assert answers[name].code == 2
    assert message in answers[name].words


def test_a_registered_evaluation_is_asked_for_by_name_on_a_task(answers: dict[str, Answer]) -> None:
    every, some = (TaskScores.from_json(answers[name].told).scores for name in ("every", "some"))
    assert [each.score for each in every] == ["acc", "acc_norm"]
    assert [each.score for each in some] == ["acc_norm", "length"]
    assert some[0] == every[1]


def test_a_search_without_an_estimate_runs_without_an_end_in_sight(answers: dict[str, Answer]) -> None:
    told = answers["dry"].told
    assert (told["losses"], told["seconds"]["search_at_most"]) == (None, None)
    assert "search unknown" in answers["dry shown"].words
    assert answers["first"].told["plan"]["removed"] == ["attention.0", "mlp.0"]


def test_a_group_of_entry_points_has_a_name_that_packages_can_write() -> None:
    families = (METRICS, GROUP_METRICS, LOSSES, ITEM_LOSSES, SEARCHES, RECOVERIES, EVALUATIONS)
    groups = [registry.group for registry in families]
    assert groups == [f"billhook.{name}" for name in
                      ("metric", "group_metric", "loss", "task_loss", "search", "recovery", "evaluation")]  # fmt: skip
    with pytest.raises(ValueError, match="no entry-point group"):
        Registry("metric of channel groups")
