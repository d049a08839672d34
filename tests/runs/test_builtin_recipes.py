"""The facts of built-in recipes: derived from what each recipe says, listed by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.runs.recipe import recipe_names
from billhook.runs.recipes.builtin import describe_recipe

WIDTH = {"apt", "billhook-width", "cfsp", "flap", "llm-pruner", "reap", "saap", "wanda-sp"}


def test_every_builtin_recipe_is_listed_with_its_facts() -> None:
    found = {recipe.name: recipe for recipe in billhook.list_recipes()}
    assert list(found) == recipe_names()
    assert {name for name, recipe in found.items() if recipe.makes == "width"} == WIDTH
    both = {name for name, recipe in found.items() if recipe.makes == "both"}
    assert both == {"2ssp", "billhook", "billhook-joint", "billhook-quick", "billhook-thorough"}
    trained = {name for name, recipe in found.items() if recipe.trains}
    papers = {"apt", "partial", "perp", "shortened-llama-cpt", "shortened-llama-lora"}
    assert trained == papers | {"billhook", "billhook-thorough"}
    for name, recipe in found.items():
        assert 40 < len(recipe.summary) < 125, name
        assert recipe.summary.endswith(".")
        assert "arXiv" not in recipe.summary, "what is cited stands in `paper`"
        assert ("arXiv 2" in recipe.paper) != name.startswith("billhook")


@pytest.mark.parametrize(
    ("lines", "makes", "checkpoint", "trains"),
    [
        ("remove: 3blocks", "depth", "stock", False),
        ("remove: 3sites", "depth", "own", False),
        ("remove: 3sites\nstock: true", "depth", "stock", False),
        ("remove: 3blocks\nrecover: fold,lowrank", "depth", "own", False),
        ("remove: 3blocks\nrecover: linear", "depth", "own", False),
        ("remove: 3blocks\nrecover: linear,lora\nrecover_set: {where: fused}", "depth", "stock", True),
        ("remove: 20%\nsearch: rank_channels\nmetric: flap\nuniform: true", "width", "stock", False),
        ("remove: 20%\nsearch: rank_channels\nmetric: flap\nuniform: true\nprotect: 0-3", "width", "own", False),
        ("within: 3%ppl\nsearch: joint\nmetric: taylor_mix", "both", "own", False),
    ],
)
def test_the_facts_follow_from_the_recipe(
    lines: str, makes: str, checkpoint: str, trains: bool, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"about: Does this (Somebody 2024, arXiv 2401.00001). And that.\n{lines}\n")
    facts = describe_recipe(str(tmp_path / "recipe.yaml"))
    assert (facts.makes, facts.checkpoint, facts.trains) == (makes, checkpoint, trains)
    assert (facts.summary, facts.paper) == ("Does this.", "Somebody 2024, arXiv 2401.00001")


def test_the_command_lists_them() -> None:
    told = CliRunner().invoke(app, ["recipes"])
    assert told.exit_code == 0
    assert "flap (width, own type, 20%params)" in told.stdout
    assert "shortened-llama-lora (depth, stock type, trains, 20%blocks)" in told.stdout
    rows = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)["recipes"]
    assert rows == [recipe.to_json() for recipe in billhook.list_recipes()]
