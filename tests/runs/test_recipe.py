"""Recipes: YAML and back, what a recipe file may not say, and plans in everybody's spelling."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from billhook.cli import options
from billhook.core.anatomy import Anatomy, SiteSize, Unassigned
from billhook.core.errors import FingerprintError, PlanError, RecipeError, UnknownName, UsageError
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.plan_files import read_plan
from billhook.runs.recipe import (
    CONDITIONS,
    ORDER,
    Recipe,
    parse_recipe,
    read_yaml,
    recipe_names,
    require_effect,
    with_overrides,
)
from billhook.runs.recipes.effort import EFFORTS, recipe_of

BLOCKS = 5
SITES = tuple(SiteSize(Site(b, part), 10, 20, 4, 20) for b in range(BLOCKS) for part in PARTS)
ANATOMY = Anatomy("llama", BLOCKS, SITES, Unassigned(100, 200, 50))
MINE = "00000000000000aa"
SAID: list[dict[str, Any]] = [
    {"remove": "25%"},
    {"remove": "3blocks", "model": "maker/model", "seed": 7, "stock": True},
    {"plan": "attention.1,mlp.4", "data": "tëxt: with # odd 'signs'.txt", "tokens": 64, "dtype": "float16"},
    {"remove": "1.5Mparams", "protect": "0-1,mlp.3", "eval_data": "yes", "field": "null", "device": "cuda:1"},
]


def written(home: Path, text: str) -> Path:
    path = home / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", SAID)
def test_yaml_and_back(said: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(said)
    told = recipe.to_yaml()
    assert parse_recipe(read_yaml(written(tmp_path, told))) == recipe
    assert set(yaml.safe_load(told)) == set(said), "only what is not at its default"


@pytest.mark.parametrize(
    ("written", "meant"),
    [(4, 4), ("4", 4), ("ray", "ray"), ("slurm:partition=gpu, n=16", "slurm:n=16,partition=gpu")],
)
def test_workers_are_a_number_or_a_place(written: int | str, meant: int | str) -> None:
    recipe = parse_recipe({"remove": "2sites", "workers": written})
    assert recipe.workers == meant
    assert yaml.safe_load(recipe.to_yaml())["workers"] == meant
    assert parse_recipe(recipe.model_dump()) == recipe


def test_a_recipe_of_all_defaults_but_one_is_one_line() -> None:
    assert Recipe(remove="2sites").to_yaml() == "remove: 2sites\n"


def test_fields_that_are_left_out_are_those_of_our_recipe_of_whole_sites() -> None:
    ours = read_yaml(Path("billhook-depth"))
    assert Recipe(remove="25%").model_dump() == parse_recipe(ours | {"about": ""}).model_dump()
    assert {"search", "loss", "tokens", "length"} <= set(ours), "said, though they are the defaults"


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"remove": "25%"}, "billhook"),
        ({"remove": 0.1}, "billhook"),
        ({"remove": ["10%", "30%kv"], "fast": True, "recover": ""}, "billhook"),
        ({"remove": "25%sites"}, "billhook-depth"),
        ({"remove": ["10%", "1block"]}, "billhook-depth"),
        ({"remove": "20%", "memory": "4GB"}, "billhook-depth"),
        ({"remove": "20%", "stock": True}, "billhook-depth"),
        ({"remove": "20%", "export": "adapter"}, "billhook-depth"),
        ({"remove": "20%", "search": "greedy"}, None),
        ({"plan": "mlp.1"}, None),
        ({}, None),
    ],
)
def test_what_is_asked_decides_the_default(given: dict[str, Any], recipe: str | None) -> None:
    assert recipe_of(given)[0] == (recipe and Path(recipe))
    assert recipe_of(given) == recipe_of(given, effort="standard" if recipe else None)
    assert recipe_of(given, "finercut") == (Path("finercut"), {})


@pytest.mark.parametrize(("given", "share"), [({}, 0.5), ({"data": "my.jsonl"}, 0), ({"self_share": 0.25}, 0.25)])
def test_the_model_writes_half_of_the_text_where_none_is_given(given: dict[str, Any], share: float) -> None:
    asked = {"remove": "20%", **given}
    recipe, overruled = recipe_of(asked)
    assert parse_recipe(with_overrides(recipe, **{**overruled, **asked})).self_share == share


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("remove", ["25%", "3blocks"])
def test_every_effort_is_a_recipe_of_ours(effort: str, remove: str) -> None:
    recipe, overruled = recipe_of({"remove": remove}, effort=effort)
    asked = parse_recipe(with_overrides(recipe, **overruled, remove=remove))
    first_look = (effort, remove) == ("quick", "25%")
    assert bool(asked.recoveries) is not first_look, "all but a first look recover"
    assert asked.optional_recoveries == frozenset(asked.recoveries), "or does not, where nothing can be recovered"
    assert parse_recipe(with_overrides(recipe, **{**overruled, "remove": remove, "recover": "none"})).recoveries == ()


def test_a_greater_effort_measures_and_learns_more() -> None:
    for remove in ("25%", "3blocks"):
        quick, standard, thorough = (
            parse_recipe(with_overrides(recipe, **overruled, remove=remove))
            for recipe, overruled in (recipe_of({"remove": remove}, effort=effort) for effort in EFFORTS)
        )
        assert quick.tokens <= standard.tokens <= thorough.tokens
        assert quick.recover_tokens <= standard.recover_tokens < thorough.recover_tokens
        assert set(quick.recoveries) < set(standard.recoveries) <= set(thorough.recoveries)


def test_options_of_methods_are_overruled_one_by_one(tmp_path: Path) -> None:
    file = written(tmp_path, "search: joint\nmetric: taylor_mix\nremove: 20%\nset:\n  levels: 3\n  rounds: 2\n")
    for given in (["rounds=1", "tokens=64"], {"rounds": "1", "tokens": "64"}):
        assert parse_recipe(with_overrides(file, set=given)).set == {"levels": 3, "rounds": "1", "tokens": "64"}
    assert parse_recipe(with_overrides(file, set={})).set == {}, "nothing is said of them"


@pytest.mark.parametrize(
    ("given", "recipe", "told"),
    [
        ({"remove": "25%"}, "finercut", "effort='quick' chooses how a size is reached. Leave recipe= out"),
        ({"remove": "25%", "search": "greedy"}, None, "Leave search= out"),
        ({"plan": "mlp.1"}, None, "Leave plan= out"), ({}, None, "Give remove='20%'"),
    ],
)  # fmt: skip
def test_an_effort_without_a_choice_is_refused(given: dict[str, Any], recipe: str | None, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        recipe_of(given, recipe, "quick")
    with pytest.raises(UnknownName, match=r"no effort called 'thorogh'\. Did you mean 'thorough'"):
        recipe_of(given, recipe, "thorogh")


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [("25.0%", "25%params"), (" 8attention ", "8attention"), ("1block", "1blocks"), ("2kparams", "2000params")],
)
def test_a_budget_has_one_spelling_in_a_recipe(spelt: str, meant: str) -> None:
    assert Recipe(remove=spelt) == Recipe(remove=meant)
    assert Recipe(remove=Recipe(remove=spelt).remove).remove == meant


def test_a_recipe_cannot_be_edited() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(remove="2sites").seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("remove: 2sites\nserch: greedy\n", "recipe.yaml has the unknown key 'serch'. Did you mean search?"),
        ("remove: 2sites\n1: 2\n", "unknown key '1'"),
        ("out: x\nremove: 2sites\n", "unknown key 'out'"),
        ("seed: 1\nremove: 2sites\n\nseed: 1\n", "'seed' twice, in lines 1 and 4. Keep one"),
        ("remove: [1\n", "recipe.yaml cannot be read as YAML"),
        ("remove: !!python/object:os.system {}\n", "recipe.yaml cannot be read as YAML"),
        ("", "recipe.yaml holds no keys"),
        ("- remove\n", "A recipe looks like:\nmodel: demo\nremove: 25%sites"),
    ],
)
def test_a_recipe_file_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(written(tmp_path, text))
    assert told in str(caught.value)


def test_a_recipe_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe .*none\.yaml\. Give .* one of ours: 2ssp, apt, billhook, .*finercut"
    ):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        read_yaml(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"tokens": "2048"}, "The recipe has tokens: '2048'"),
        ({"tokens": True}, "The recipe has tokens: True"),
        ({"stock": "yes"}, "The recipe has stock: 'yes'"),
        ({"plan": ["attention.1"], "remove": None}, "The recipe has plan: ['attention.1']"),
        ({"seed": -1}, "The recipe has seed: -1"),
        ({"dtype": "fp16"}, "'float16'"),
        ({"workers": 0}, "workers=0 is not between 1 and 999"),
        ({"workers": "slrm:n=2"}, "Did you mean slurm?"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(said: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"remove": "2sites"} | said)
    assert told in str(caught.value)


def test_the_command_line_has_the_recipes_fields() -> None:
    assert sorted(ORDER) == sorted(Recipe.model_fields)
    fields = {name: Recipe.model_fields[name] for name in ORDER if name not in ("about", "model")}
    assert {name: (field.default, field.description) for name, field in fields.items()} == options.RECIPE
    assert list(fields) == list(options.RECIPE), "the same order"


# -- plans ----------------------------------------------------------------------------------------------------------

PLAN = Plan.parse(["attention.1", "attention.4", "mlp.1", "mlp.3"])
BOOLEANS = {"drop_attn_list": [False, True, False, False, True], "drop_mlp_list": [False, True, False, True, False]}
FORMS: dict[str, str] = {
    "inline": "mlp.3, attention.4,attention.1 ,mlp.1",
    "billhook.json": json.dumps({"model": MINE, "blocks": BLOCKS, "removed": PLAN.names()}),
    "report.json": json.dumps({"model": {"fingerprint": MINE}, "plan": {"removed": PLAN.names(), "key": PLAN.key()}}),
    "list.json": json.dumps(PLAN.names()),
    "llm-drop.json": json.dumps({"drop_attn_list": [4, 1], "drop_mlp_list": [1, 3]}),
    "llm-drop-booleans.json": json.dumps(BOOLEANS),
    "evopress.txt": "none\nattn+mlp\nnone\nmlp\nattn\n",
    "evopress-without-end.txt": "none\nattn+mlp\nnone\nmlp\nattn",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_a_plan_is_read(form: str, tmp_path: Path) -> None:
    said = FORMS[form]
    if form != "inline":
        (tmp_path / form).write_text(said)
        said = str(tmp_path / form)
    assert read_plan(said, ANATOMY, MINE) == PLAN


def test_one_kind_of_a_drop_list_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"drop_attn_list": [0, 2]}))
    assert read_plan(str(tmp_path / "a.json"), ANATOMY, MINE) == Plan.parse(["attention.0", "attention.2"])
    (tmp_path / "b.json").write_text(json.dumps({"drop_attn_list": None, "drop_mlp_list": [0]}))
    assert read_plan(str(tmp_path / "b.json"), ANATOMY, MINE) == Plan.parse(["mlp.0"])


@pytest.mark.parametrize("form", ["billhook.json", "report.json"])
def test_only_a_plan_that_says_its_model_is_held_to_it(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    path.write_text(FORMS[form])
    with pytest.raises(FingerprintError, match=rf"another model \(fingerprint {MINE}, this one is 00000000000000bb\)"):
        read_plan(str(path), ANATOMY, "00000000000000bb")
    path.write_text(json.dumps({"removed": ["mlp.2"]}))
    assert read_plan(str(path), ANATOMY, "00000000000000bb") == Plan.parse(["mlp.2"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("3", "holds no plan. Give a billhook.json"),
        ("{}", "neither `removed` nor drop lists. Name sites instead"),
        ('{"plan": {}}', "neither `removed` nor drop lists"),
        ('{"model": {}, "removed": "mlp.1"}', "neither `removed` nor drop lists"),
        ('{"removed": ["mlp.9"]}', "There is no mlp.9: the model has blocks 0 to 4"),
        ('{"removed": ["mlp.1", "mlp.1"]}', "mlp.1 more than once"),
        ('{"drop_attn_list": [1, 1]}', "negative, repeated or non-integer entries: [1, 1]"),
        ('{"drop_attn_list": [-1]}', "entries: [-1]"),
        ('{"drop_mlp_list": [1.5]}', "entries: [1.5]"),
        ('{"drop_mlp_list": [5]}', "There is no mlp.5: the model has blocks 0 to 4"),
        ('{"drop_mlp_list": [true, false]}', "lists 2 blocks, the model has 5"),
        ('{"drop_mlp_list": 3}', "a drop list that is not a list: 3. Give indices, or a boolean per block"),
        ('{"drop_attn_list": [0, 1, 2, 3, 4]}', "every attention site"),
        ("none\nattn\n", "2 lines. A drop list has 5 lines"),
        ("none\nattn\nnone\nffn\nnone", "the line 'ffn'. A drop list has 5 lines, one per block, each none, attn, mlp"),
        ("", "0 lines. A drop list has 5 lines"),
    ],
)
def test_a_plan_file_is_refused(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError) as caught:
        read_plan(str(tmp_path / "plan.json"), ANATOMY, MINE)
    assert told in str(caught.value)


def test_a_plan_is_of_sites_that_are_left() -> None:
    left = Anatomy("llama", BLOCKS, tuple(s for s in SITES if s.site != Site(2, "mlp")), ANATOMY.rest)
    with pytest.raises(PlanError, match=r"mlp\.2 was already removed from this model\. `billhook inspect`"):
        read_plan("mlp.2", left, MINE)


def test_memory_is_an_amount_with_a_unit() -> None:
    spelled = {"4GB": 4 * 10**9, "500MB": 5 * 10**8, "2.5GiB": 5 * 2**29, "1MiB": 2**20}
    for text, count in spelled.items():
        assert parse_recipe({"remove": "1sites", "memory": text}).memory_bytes == count
    assert parse_recipe({"remove": "1sites"}).memory_bytes is None
    for wrong in ("4", "4 gigs", "0GB", "-1GB", "lots"):
        with pytest.raises(RecipeError, match="Write for example 4GB"):
            parse_recipe({"remove": "1sites", "memory": wrong})


WITHOUT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # an option, what it needs, and the message
    "audit": ({"audit": True}, {"fast": True}, "without fast=True. Add that, or leave audit= out"),
    "shortlist": ({"shortlist": 5}, {"fast": True}, "no effect without fast=True"),
    "risk": ({"risk": 0.1}, {"fast": True}, "no effect without fast=True"),
    "recover_set": ({"recover_set": {"rank": 3}}, {"recover": "lowrank"}, "Add recover='fold'"),
    "recover_data": ({"recover_data": "pydoc"}, {"recover": "mean"}, "Add recover='fold'"),
    "recover_tokens": ({"recover_tokens": 640}, {"fold_in_search": True}, "Add recover='fold'"),
    "recover_length": ({"recover_length": 32}, {"recover": "mean"}, "Add recover='fold'"),
    "batch": ({"batch": 4}, {"remove": "20%ms"}, "without a budget in time. Add remove='20%ms'"),
    "context": ({"context": 64}, {"remove": "20%ms,2blocks"}, "without a budget in time"),
    "self_share": ({"self_share": 0.25, "data": "self"}, {"data": "pydoc+a.txt"}, "Give data='FILE'"),
    "of_a_task": ({"self_share": 0.25, "loss": "task:a.jsonl"}, {"loss": "nll"}, "the loss of a task"),
    "search": ({"search": "greedy", "plan": "mlp.1"}, {"plan": None, "remove": "1sites"}, "of which nothing is"),
    "fold": ({"fold_in_search": True, "plan": "mlp.1"}, {"plan": None, "remove": "1sites"}, "Give remove= instead"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WITHOUT))
def test_an_option_without_effect_is_refused_where_a_user_gave_it(name: str, tmp_path: Path) -> None:
    given, needed, words = WITHOUT[name]
    target = {} if "plan" in given else {"remove": "1sites"}
    wrong, right = target | given, target | given | needed
    right = {name: value for name, value in right.items() if value is not None}
    with pytest.raises(RecipeError, match=re.escape(words)):
        require_effect(wrong, parse_recipe(wrong))
    require_effect(right, parse_recipe(right))
    require_effect(wrong, parse_recipe(wrong), parse_recipe(right))  # it has one in some recipe
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(wrong))
    with pytest.raises(RecipeError, match=re.escape(words)):
        with_overrides(mine)
    assert with_overrides(mine, **needed)
    mine.write_text(yaml.safe_dump(right))
    assert with_overrides(mine) == right
    with_overrides(mine, plan="mlp.1", recover="", fast=False)  # a call may leave what a file says without effect
    switched_off = {"self_share": 0.0, "audit": False, "recover_set": {}, "recover_data": None}
    require_effect(switched_off, parse_recipe({"plan": "mlp.1"} | switched_off))


def test_recipes_of_ours_may_be_overruled_by_anything() -> None:
    for name in recipe_names():
        for given in ({}, {"plan": "mlp.1"}, {"recover": ""}, {"loss": "nll", "remove": "2blocks"}):
            parse_recipe(with_overrides(name, **given))
    assert {name for condition in CONDITIONS for name in condition.names} <= set(Recipe.model_fields)
