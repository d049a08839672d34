"""Plans, recipes and stores of any content. Each is read or refused."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import NAMES, bounded, edits, examples, json_bytes, scalars, values
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.anatomy import Anatomy
from billhook.core.events import Event
from billhook.core.files.cache_keys import ChoicesKey, EvaluationKey, LossKey, PlanKey, PlanLossKey, TimingKey
from billhook.core.plan import Plan
from billhook.core.plan_files import read_plan
from billhook.core.results.measured import Environment, EvalResult, Loss, Timing, TimingProtocol
from billhook.core.results.stored import read_result
from billhook.models.load import load
from billhook.runs.recipe import Recipe, parse_recipe, read_yaml, with_overrides
from billhook.runs.store import Store


@pytest.fixture(scope="module")
def anatomy(model: Path) -> Anatomy:
    return load(model).anatomy


names = st.sampled_from([*NAMES, "mlp.1[0-7 8-15]", "mlp.1[7-0]", "attention.1[0]", "mlp.1[0-4294967295]"])


@examples(200)
@given(text=st.lists(names | st.text(max_size=12), max_size=5).map(",".join) | st.text(max_size=30))
def test_plans_as_text(text: str, anatomy: Anatomy) -> None:
    with bounded():
        read_plan(text, anatomy, "0" * 16)


PLAN_FILES: tuple[Any, ...] = (
    {"model": "0" * 16, "blocks": 4, "removed": ["mlp.1"], "narrowed": ["mlp.2[0-7]"], "already_removed": []},
    {"model": {"fingerprint": "0" * 16}, "plan": {"removed": ["mlp.1"], "narrowed": []}},
    {"drop_attn_list": [1], "drop_mlp_list": [False, True, False, False]},
    ["mlp.1", "attention.2"],
)


@examples(300)
@given(data=st.data())
def test_files_of_plans(anatomy: Anatomy, tmp_path: Path, data: st.DataObject) -> None:
    changed = [edits(value).map(lambda each: json.dumps(each).encode()) for value in PLAN_FILES]
    lines = st.lists(st.sampled_from(["none", "attn", "mlp", "attn+mlp", "x" * 9999, "\x1b"]), max_size=5)
    path = tmp_path / "plan.json"
    path.write_bytes(data.draw(st.one_of(json_bytes, *changed, lines.map("\n".join).map(str.encode))))
    with bounded():
        read_plan(str(path), anatomy, "0" * 16)


YAML = st.sampled_from(
    [b"a: &a [*a]", b"&a {b: *a}", b"? [a]\n: b", b"remove: !!python/object:os.system {}", b"- 1", b"a: 1\na: 2",
     b"remove: 2001-99-99", b"seed: 0x" + b"f" * 400, b"seed: 1:" + b"59:" * 30 + b"1", b"set: {a: 1, a: 2}",
     b"a: " + b"[" * 5000, b"x: &x [1,1,1,1]\ny: &y [*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y]\nremove: [*z,*z,*z]"]
)  # fmt: skip


@examples(100)
@given(data=st.data())
def test_recipes(tmp_path: Path, data: st.DataObject) -> None:
    fields = st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)), values, max_size=4)
    path, given = tmp_path / "recipe.yaml", data.draw(fields)
    path.write_bytes(data.draw(st.one_of(YAML, json_bytes, fields.map(lambda each: json.dumps(each).encode()))))
    with bounded():
        parse_recipe({"remove": "1sites"} | read_yaml(path))
    with bounded():
        parse_recipe(with_overrides(None, **given))


# -- stores ---------------------------------------------------------------------------------------------------------

LOSSES = LossKey("model", "tokens", "kl", "float32")
HERE = Environment("0", "3", "2", "5", "cpu", "a machine", 1)
KEYS: tuple[tuple[Any, Any], ...] = (
    (PlanLossKey(LOSSES, Plan()), Loss("kl", (0.1, 0.2), (3, 4))),
    (EvaluationKey("model", Plan(), "perplexity", "t", "float32"), EvalResult("perplexity", "t", (1.5,), (10,), (0,))),
    (
        TimingKey("model", Plan(), Plan(), HERE, "float32", TimingProtocol()),
        Timing((0.1, 0.2), (1.0, 1.1), 8, 2, 1, None),
    ),
    (ChoicesKey("model", Plan(), "float32", "t"), [1.0, 2.0]),
)
COLUMNS = (
    *(("runs", name) for name in ("recipe", "environment", "bound", "result", "state", "created", "out", "kind")),
    *(("losses", name) for name in ("sums", "counts")), ("evaluations", "clusters"), ("timings", "timing"),
    ("facts", "value"), *(("events", name) for name in ("values", "resources", "done", "total", "at")),
)  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds a run and a value of every kind."""
    path = tmp_path_factory.mktemp("store") / "runs.db"
    with closing(Store(path)) as store:
        run = store.new_run("prune", {"model": "demo", "remove": "1sites"}, {"torch": "2"}, "out")
        for key, value in KEYS:
            store.add(key, value, run)
        store.add_event(run, Event("search", 1, 2, {"lowest": 0.5}), at_once=True)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    return path


def read_all(path: Path, read_only: bool) -> None:
    with closing(Store(path, read_only=read_only)) as store:
        for run in store.runs():
            store.events(run.id)
            if run.result is not None:
                read_result(run.kind, run.result)
        for key, _ in KEYS:
            store.lookup(key)
        store.all_of(PlanKey)


def fresh(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "runs.db"
    for old in tmp_path.glob("runs.db*"):
        old.unlink()
    path.write_bytes(content)
    return path


@examples(150)
@given(data=st.data())
def test_stores_with_other_values(filled: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, read_only = fresh(tmp_path, filled.read_bytes()), data.draw(st.booleans())
    text = values.map(json.dumps) | scalars.filter(lambda each: not isinstance(each, int) or abs(each) < 2**63)
    places = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3))
    others = [data.draw(text | st.binary(max_size=9)) for _ in places]
    with closing(sqlite3.connect(path)) as db:
        for (table, column), value in zip(places, others, strict=True):
            with suppress(sqlite3.IntegrityError, UnicodeEncodeError):  # null, or half of a surrogate pair: as it was
                db.execute(f'UPDATE {table} SET "{column}" = ?', (value,))
        db.commit()
    with bounded():
        read_all(path, read_only)


byte = st.tuples(st.integers(0, 10**6), st.integers(0, 255))


@examples(100)
@given(bytes_=st.lists(byte, max_size=4), end=st.integers(0, 10**5) | st.none(), read_only=st.booleans())
def test_stores_with_other_bytes(
    bytes_: list[tuple[int, int]], end: int | None, read_only: bool, filled: Path, tmp_path: Path
) -> None:
    content = bytearray(filled.read_bytes())
    for place, new in bytes_:
        content[place % len(content)] = new
    path = fresh(tmp_path, bytes(content[:end]))
    with bounded():
        read_all(path, read_only)
