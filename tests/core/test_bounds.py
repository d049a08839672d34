"""Plans, ranges, names and numbers of any length are read or refused at once, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.budget import parse_budgets, parse_bytes
from billhook.core.errors import BillhookError, BudgetError, PlanError, RecipeError, UsageError
from billhook.core.margin import Margin
from billhook.core.plan import Plan, Site
from billhook.core.plan_files import find_path, read_plan
from billhook.core.problem import parse_protection
from billhook.core.registry import resolve_options
from billhook.methods.search import SEARCHES
from billhook.runs.recipe import parse_recipe, read_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{inside}'] * 10)}]" for inside, name in pairwise("abcdefgh")
)
ANATOMY = Anatomy(
    "llama", 3,
    tuple(SiteSize(Site(b, part), 8, 8, 0, 0, 0, tuple(range(8)), GroupSize(1, 1, 0, 0))
          for b in range(3) for part in ("attention", "mlp")),
    Unassigned(0, 0, 0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlp.1[0-99999999999]", r"mlp.1 has no channel group 8: it has 0-7"),
        ("mlp.1[2 5-70000000]", r"no channel group 8"),
        ("mlp.1[99999999999]", r"no channel group 99999999999"),
        ("mlp.1[0-" + "9" * 5000 + "]", "does not list channel groups"),
        ("mlp.1[" + "1 " * 50000 + "1]", "does not ascend"),
        ("mlp." + "9" * 5000, "is not a site"),
        ("mlp.٣", "is not a site"),
        ("attention.7[0-99999999999]", r"There is no attention.7 to be narrowed"),
        ("x" * 10**6, "is not a site"),
    ],
)
def test_a_plan_is_bounded_by_the_model_before_it_is_built(tmp_path: Path, name: str, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"removed": [], "narrowed": [name]}))
    tracemalloc.start()
    try:
        for text in (name, str(file)):
            with pytest.raises(PlanError, match=words) as error:
                read_plan(text, ANATOMY, "f")
            assert len(error.value.message) < 500
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_range_without_a_model_is_bounded_too() -> None:
    with pytest.raises(PlanError, match="no site has 4,194,304"):
        Plan.parse(["mlp.1[0-99999999999]"])


def test_many_names_are_read_in_no_time() -> None:
    names = [f"mlp.{i}" for i in range(50_000)]
    assert len(Plan.parse(names).removed) == 50_000
    with pytest.raises(PlanError, match=r"mlp.7, mlp.8 more than once"):
        Plan.parse([*names, "mlp.8", "mlp.7"])


@pytest.mark.parametrize(
    "content",
    [
        *("[" * 100_000, '{"removed": ' + "9" * 5000 + "}", '{"removed": [], "narrowed": 5}', "5", "null", '"mlp.1"'),
        *('{"removed": ["mlp.1"], "narrowed": null}', '{"drop_attn_list": [true, 5]}', '{"drop_mlp_list": "abc"}'),
        *('{"removed": {"a": 1}}', "\x00\x00", '{"plan": {"removed": [[[]]]}}'),
        '{"drop_attn_list": [' + ",".join(["-1"] * 10_000) + "]}",
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_few_words(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(PlanError) as error:
        read_plan(str(file), ANATOMY, "f")
    assert len(error.value.message) < 500


def test_names_in_a_file_are_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("attention.1,mlp.0[0-3 6]\nmlp.2\n")
    assert read_plan(str(file), ANATOMY, "f").to_list() == ["attention.1", "mlp.2", "mlp.0[0-3 6]"]


@pytest.mark.parametrize("text", ["a" * 5000, "~nobody-here/x", "a\x00b", "/" * 5000, "\ud800", ""])
def test_text_that_may_be_a_path_never_raises(text: str) -> None:
    assert find_path(text) is None or text in ("", "/" * 5000)
    for read in (lambda: read_plan(text, ANATOMY, "f"), lambda: read_yaml(Path(text))):
        try:
            read()
        except BillhookError as error:
            assert len(error.message) < 1000  # noqa: PT017


@pytest.mark.parametrize("digits", ["9" * 5000, "1e400", "nan", "-5"])
def test_numbers_that_are_none_are_refused(digits: str) -> None:
    for read in (
        lambda: parse_budgets(f"{digits}%"), lambda: Margin.parse(f"{digits}%ppl"), lambda: parse_bytes(f"{digits}GB"),
        lambda: parse_protection(f"first{digits}", ANATOMY), lambda: parse_protection(f"{digits}-{digits}", ANATOMY),
        lambda: resolve_options({"front": digits}, SEARCHES["greedy"]),
        lambda: resolve_options({"width": digits}, SEARCHES["beam"]),
    ):  # fmt: skip
        if digits == "-5" and read.__code__.co_names[0] == "resolve_options":
            continue
        with pytest.raises((UsageError, BudgetError)):
            read()


@pytest.mark.parametrize("name", ["tokens", "length", "seed", "eval_tokens", "multiple", "recover_tokens", "context"])
def test_whole_numbers_have_an_end(name: str) -> None:
    with pytest.raises(RecipeError, match=f"has {name}: "):
        parse_recipe({"remove": "10%", name: 10**30})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("remove: 10%\nset: {tried: 4, tried: 8}", "'tried' twice, in line 2"),
        ("{remove: 10%, seed: 1, \"seed\": 2}", "'seed' twice, in line 1"),
        ("remove: 10%\nset: {a: {1: x, 01: y}}", "'01' twice"),
        ("remove: 10%\nset:\n  tried: 4\n  tried: 8", "'tried' twice, in lines 3 and 4"),
        ("[" * 20_000, "cannot be read as YAML"),
        ("remove: 2024-13-45", "cannot be read as YAML"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        ("remove: &a [*a]", "aliases without end"),
        (LAUGHS, "aliases without end"),
        ("x" * 70_000, "more than 64 KB"),
        ("? [a]\n: b", "cannot be read as YAML"),
        ("1: 2", "unknown key '1'"),
    ],
)  # fmt: skip
def test_yaml_of_any_kind_is_refused_by_its_line(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=words):
        read_yaml(file)
