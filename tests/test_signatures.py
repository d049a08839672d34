"""What an editor, `help` and mypy know of the public functions: every option by name, kind and default."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook.core import options
from billhook.core.budget import spell_budget
from billhook.core.errors import BudgetError, RecipeError
from billhook.runs.recipe import CalibrationOptions, EvalOptions, Recipe, parse_options, parse_recipe

ROOT = Path(__file__).parents[1]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(billhook, name) for name in billhook.__all__ if inspect.isfunction(getattr(billhook, name))
}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(FUNCTIONS[name]).parameters)


def test_prune_shows_every_field_of_a_recipe_with_its_default() -> None:
    shown = parameters("prune")
    own = {"recipe", "effort", "out", "rules", "webhook", "store", "watch"}
    assert shown.keys() == Recipe.model_fields.keys() | own
    for name, field in Recipe.model_fields.items():
        assert shown[name].default == field.default, name
    assert "tokens: Calibration tokens" in (billhook.prune.__doc__ or "")
    assert "each round of `fast`" in (billhook.prune.__doc__ or "")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_no_public_function_has_options_that_nobody_sees(name: str) -> None:
    kinds = {parameter.kind for parameter in parameters(name).values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    documented = inspect.getdoc(FUNCTIONS[name]) or ""
    assert "--" not in documented, "flags are the command line's"
    taken = inspect.getfullargspec(inspect.unwrap(FUNCTIONS[name]))
    assert typing.Any not in [taken.annotations.get(taken.varkw or "")]


@pytest.mark.parametrize(
    ("kind", "read_by"),
    [
        (options.PruneOptions, Recipe),
        (options.EvaluateOptions, EvalOptions),
        (options.ScoreOptions, CalibrationOptions),
    ],
)
def test_the_types_are_those_of_the_fields(kind: Any, read_by: type[Recipe]) -> None:
    explicit = {"model", "set"} if kind is options.ScoreOptions else {"model"}
    assert typing.get_type_hints(kind).keys() == read_by.model_fields.keys() - explicit
    assert not kind.__required_keys__


def test_every_study_takes_fields_of_a_recipe_only() -> None:
    for kind in (options.SweepOptions, options.StudyOptions, options.StabilityOptions, options.TaskOptions):
        assert typing.get_type_hints(kind).keys() <= Recipe.model_fields.keys()


GOOD = """
from pathlib import Path
import billhook
billhook.prune("demo", remove=0.1, search="greedy", tokens=512, fast=True, set={"front": 0.4}, data=Path("a.txt"))
billhook.prune("demo", remove=["2attention", "1mlp"], recover_set=["minutes=15"], dtype="float32")
billhook.sweep("demo", ["billhook"], remove=[0.1, "20%"], tokens=512)
billhook.compare("a", "b", eval_tokens=512, dtype="bfloat16")
billhook.score("demo", "taylor", loss="nll", tokens=64)
billhook.ab_test("http://a", "http://b", "p.txt", kind="text", timeout=3.5)
"""
BAD = {
    "an option that is none": 'billhook.prune("demo", remov="10%")',
    "a text for a number": 'billhook.prune("demo", remove="10%", tokens="many")',
    "a number for a text": 'billhook.prune("demo", remove="10%", search=3)',
    "a dtype that is none": 'billhook.prune("demo", remove="10%", dtype="float8")',
    "what a sweep says itself": 'billhook.sweep("demo", plan="mlp.1")',
    "what is not scored": 'billhook.score("demo", remove="10%")',
    "what is not compared": 'billhook.compare("a", "b", search="greedy")',
    "a kind that is none": 'billhook.ab_test("a", "b", "p.txt", kind="chats")',
}


def test_mypy_takes_good_scripts_and_refuses_bad_ones(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(GOOD)
    bad.write_text("import billhook\n" + "\n".join(BAD.values()) + "\n")
    settings = tmp_path / "mypy.ini"  # other packages say nothing of ours, and take minutes to read
    settings.write_text("[mypy]\nstrict = True\nfollow_imports = skip\n[mypy-billhook.*]\nfollow_imports = silent\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), str(good), str(bad)],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert not [line for line in lines if "good.py" in line], run.stdout
    refused = {int(line.split(":")[1]) - 2 for line in lines if "bad.py" in line}
    assert [name for i, name in enumerate(BAD) if i not in refused] == [], run.stdout + run.stderr


def test_the_types_are_in_the_package() -> None:
    assert (Path(billhook.__file__).parent / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


# -- what Python writes otherwise than a shell ---------------------------------------------------------------------


def test_a_share_is_a_number_too() -> None:
    assert parse_recipe({"remove": 0.1}).remove == parse_recipe({"remove": "10%"}).remove
    assert [spell_budget(x) for x in (0.25, 0.055, 0.07, "3blocks", 0.3)] == ["25%", "5.5%", "7%", "3blocks", "30%"]
    assert parse_recipe({"remove": [0.1, "2blocks"]}).remove == "10%params,2blocks"
    for number in (25, 1.5, 0, -0.1, True):
        with pytest.raises(BudgetError):
            parse_recipe({"remove": number})


def test_paths_are_texts(tmp_path: Path) -> None:
    text = tiny.write_texts(tmp_path / "a.jsonl", 3)
    asked = parse_options(EvalOptions, {"model": tmp_path, "data": text, "eval_data": text})
    assert (asked.model, asked.data, asked.eval_data) == (str(tmp_path), str(text), str(text))
    with pytest.raises(RecipeError, match="data: 3"):
        parse_options(EvalOptions, {"data": 3})
