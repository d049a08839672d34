"""Recipes run from anywhere and come back from YAML; studies compare them, and measures nothing twice."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from made_studies import nats_of
from test_cli import billhook as typed
from test_cli import fits

import billhook
from billhook.core.errors import BudgetError, RecipeError, UsageError
from billhook.core.plan import Plan
from billhook.core.results.json_form import Result
from billhook.core.results.run import RunResult
from billhook.core.results.studies import SweepResult, TransferResult
from billhook.runs.recipe import BUILTIN, Recipe, parse_recipe, recipe_names, with_overrides
from billhook.runs.recipes.builtin import describe_recipe
from billhook.runs.store import Store

SMALL = {"tokens": 240, "length": 24, "eval_tokens": 480, "eval_length": 24}
FEW: dict[str, dict[str, Any]] = {
    "shortened-llama-cpt": {"remove": "3blocks"},
    "reap": {"field": "text", "remove": "15%"},
    "cfsp": {"multiple": 8},  # the model has fewer neurons than a step of the paper
    "evopress": {"set": {"start": "random", "split": "fixed", "generations": 2, "offspring": 4, "tokens": 64}},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 160)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks, so that rules about the first and last ones leave something."""
    return tiny.with_tokenizer(tmp_path_factory.mktemp("six") / "six", num_hidden_layers=9)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of four experts each, for the recipe that removes experts."""
    return tiny.with_tokenizer(tmp_path_factory.mktemp("mixture") / "mixture", "qwen3_moe")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of made-up items."""
    draw, home, files = random.Random(0), tmp_path_factory.mktemp("tasks"), []
    for name in ("first", "second"):
        rows = [
            {
                "query": " ".join(draw.choices(tiny.WORDS, k=6)),
                "choices": [" ".join(draw.choices(tiny.WORDS, k=draw.randint(1, 3))) for _ in range(3)],
                "gold": draw.randrange(3),
            }
            for _ in range(40)
        ]
        files.append(home / f"{name}_test.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


# -- recipes --------------------------------------------------------------------------------------------------------


def test_one_recipe_a_paper_and_our_own() -> None:
    papers = {"shortgpt", "deeper-look", "shortened-llama", "sleb", "finercut", "blockpruner", "evopress", "llm-drop",
              "uidl", "sprint"}  # fmt: skip
    papers |= {"shortened-llama-lora", "shortened-llama-cpt", "perp", "replaceme", "partial"}
    papers |= {"apt", "llm-pruner", "wanda-sp", "flap", "saap", "reap"}
    assert papers | {"billhook", "billhook-depth", "billhook-joint"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_yaml_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe(with_overrides(name))
    assert len(recipe.about) > 60
    assert name in ("billhook", "billhook-depth") or "arXiv 2" in recipe.about
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert parse_recipe(with_overrides(tmp_path / "again.yaml")) == recipe
    assert yaml.safe_load((BUILTIN / f"{name}.yaml").read_text()).keys() <= Recipe.model_fields.keys()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_from_anywhere(
    name: str, six: Path, mixture: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    healed = {"recover_data": str(texts), "recover_tokens": 640, "recover_length": 32}
    healed = healed if parse_recipe(with_overrides(name)).recoveries else {}
    model = mixture if name == "reap" else six
    result = billhook.prune(str(model), recipe=name, data=str(texts), **(SMALL | healed | FEW.get(name, {})))
    assert result.plan
    assert [told.recovery for told in result.recoveries] == list(parse_recipe(with_overrides(name)).recoveries)
    assert result.recipe["about"]
    kept = Plan(result.plan.removed)
    blocks = {"shortgpt", "sleb", "uidl", "replaceme", "partial"}
    if name in blocks or name.startswith("shortened-llama"):
        assert len(kept.blocks()) * 2 == len(kept.removed), "whole blocks"
    if name.startswith("shortened-llama"):
        assert set(kept.blocks()) <= {4, 5, 6}
    if name == "replaceme":
        assert Path(result.out, "config.json").read_text().count("billhook-") == 0, "a stock checkpoint"
    if name == "sleb":
        assert not {0, 8} & set(kept.blocks())
    if name in ("uidl", "replaceme", "partial"):
        assert kept.blocks() == list(range(kept.blocks()[0], kept.blocks()[0] + len(kept.blocks())))
    if name == "evopress":
        assert sum(s.part == "attention" for s in kept.removed) * 2 == len(kept.removed)
    assert (Path(result.out) / "report.html").is_file()
    facts, model_type = describe_recipe(name), json.loads(Path(result.out, "config.json").read_text())["model_type"]
    assert (facts.checkpoint == "own") == model_type.startswith("billhook-"), "as `billhook recipes` says"
    assert (facts.makes != "depth") == bool(result.plan.narrowed)


def test_what_is_typed_overrules_a_recipe_and_a_new_target_its_own() -> None:
    values = with_overrides("finercut", plan="mlp.1", tokens=64)
    assert (values["plan"], values["tokens"], "remove" in values) == ("mlp.1", 64, False)
    assert parse_recipe(values).loss == "finercut_js"
    assert parse_recipe(with_overrides("sleb", remove="2blocks")).remove == "2blocks"


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe finercutt\. Did you mean finercut\?"):
        with_overrides("finercutt")


# -- sweep ----------------------------------------------------------------------------------------------------------


def again(result: Result) -> Result:
    """A result by way of its JSON."""
    return type(result).from_json(json.loads(json.dumps(result.to_json())))


def losses(store: Path) -> int:
    with closing(Store(store)) as opened:
        return opened.count_losses()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swept")


@pytest.fixture(scope="module")
def swept(six: Path, texts: Path, tasks: list[Path], home: Path) -> SweepResult:
    return billhook.sweep(
        str(six), ["shortgpt", "billhook-depth", "sleb"], remove=["10%", "30%"], data=[str(texts)],
        tasks=[str(tasks[0])], items=15, out=home / "out", store=home / "runs.db", **SMALL,
    )  # fmt: skip


def test_a_sweep_has_a_trial_for_every_combination(swept: SweepResult, texts: Path, tasks: list[Path]) -> None:
    trials = swept.trials
    assert [(trial.recipe, trial.remove) for trial in trials] == [
        (name, size) for name in ("shortgpt", "billhook-depth", "sleb") for size in ("10%params", "30%params")
    ]
    assert swept.refused == ()
    for trial in trials:
        share = 1 - trial.sizes.parameters / swept.sizes.parameters
        assert share >= int(trial.remove.partition("%")[0]) / 100
        text, task = trial.results[str(texts)], trial.results[str(tasks[0])]
        assert text.estimate.low <= text.estimate.value <= text.estimate.high
        assert (text.kind, task.kind) == ("perplexity", "accuracy")
        assert 0 <= task.estimate.low <= task.estimate.value <= task.estimate.high <= 1
        assert trial.count("attention") + trial.count("mlp") == len(trial.plan.removed) > 0
    for size in ("10%params", "30%params"):
        outcomes = [trial.results[str(texts)] for trial in trials if trial.remove == size]
        gaps = [each.above_best.value for each in outcomes if each.above_best]
        assert min(gaps) == 0
        nats = [each.nats for each in outcomes if each.nats]
        assert gaps == pytest.approx([value - min(nats) for value in nats])
        assert len(gaps) == len(nats) == 3
    assert any("parameters" in trial.front for trial in trials)
    assert swept.evaluation[str(tasks[0])].items == 15


def test_the_front_is_what_nothing_beats(swept: SweepResult) -> None:
    for size in ("parameters", "kv_bytes_per_token"):
        points = [
            (getattr(trial.sizes, size), sum(on.nats or 0 for on in trial.results.values())) for trial in swept.trials
        ]
        for trial, (small, low) in zip(swept.trials, points, strict=True):
            beaten = any(a <= small and b <= low and (a, b) != (small, low) for a, b in points)
            assert (size in trial.front) == (not beaten)


def test_a_sweep_measures_nothing_twice_and_its_page_opens(
    swept: SweepResult, home: Path, six: Path, texts: Path
) -> None:
    before = losses(home / "runs.db")
    again = billhook.sweep(
        str(six), ["shortgpt", "billhook-depth", "sleb"], remove=["10%", "30%"], data=[str(texts)], out=home / "again",
        store=home / "runs.db", **SMALL,
    )  # fmt: skip
    assert losses(home / "runs.db") == before
    assert [trial.plan for trial in again.trials] == [trial.plan for trial in swept.trials]
    assert [trial.search_seconds for trial in again.trials] == [trial.search_seconds for trial in swept.trials]
    assert SweepResult.from_json(json.loads((home / "out" / "result.json").read_text())) == swept
    assert "<html" in Path(swept.page).read_text()


def test_a_sweep_goes_on_where_it_was_killed(six: Path, texts: Path, tmp_path: Path) -> None:
    def sweep(name: str, watch: Any = lambda event: None) -> SweepResult:
        return billhook.sweep(
            str(six), ["billhook-depth"], remove=["10%", "20%"], data=[str(texts)], out=tmp_path / name,
            store=tmp_path / "runs.db", watch=watch, **SMALL,
        )  # fmt: skip

    def impatient(event: billhook.Event) -> None:
        if event.stage == "sweep" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep("one", impatient)
    assert not list(tmp_path.glob("one*"))
    held = losses(tmp_path / "runs.db")
    assert held > 0
    told = sweep("two")
    assert len(told.trials) == 2
    assert billhook.list_runs(tmp_path / "runs.db")[0].state == "done"
    with pytest.raises(Exception, match="no unfinished run"):
        billhook.resume(store=tmp_path / "runs.db")


def test_a_recipe_that_cannot_meet_a_size_has_a_reason_and_no_trial(six: Path, texts: Path, tmp_path: Path) -> None:
    told = billhook.sweep(
        str(six), ["shortened-llama-magnitude", "shortgpt"], remove=["30%"], data=[str(texts)], out=tmp_path / "out",
        store=tmp_path / "runs.db", **SMALL, protect="0-6",
    )  # fmt: skip
    assert told.trials == ()
    assert [each.recipe for each in told.refused] == ["shortened-llama-magnitude", "shortgpt"]
    assert all("cannot be met" in each.reason for each in told.refused)


def test_calibration_text_is_an_axis(six: Path, texts: Path, tmp_path: Path) -> None:
    other = tiny.write_texts(tmp_path / "other.jsonl", 160, seed=9)
    told = billhook.sweep(
        str(six), ["shortgpt"], remove=["10%"], data=[str(texts), str(other), f"{texts}+{other}"],
        eval_data=[str(texts), str(other)], out=tmp_path / "out", store=tmp_path / "runs.db", **SMALL,
    )  # fmt: skip
    alone = billhook.sweep(
        str(six), "shortgpt", remove="10%", data=str(texts), out=tmp_path / "alone", store=tmp_path / "runs.db", **SMALL
    )
    assert [trial.plan for trial in alone.trials] == [told.trials[0].plan], "one name is a list of one"
    assert [trial.data for trial in told.trials] == [str(texts), str(other), f"{texts}+{other}"]
    assert set(told.teacher) == {str(texts), str(other)}
    for trial in told.trials:
        for text, on in trial.results.items():
            gap = nats_of(trial, text) - nats_of(told.trials[0], text)
            assert (trial is told.trials[0]) == (on.above_first_text is None)
            assert on.above_first_text is None or on.above_first_text.value == pytest.approx(gap, abs=1e-9)


# -- transfer and stability --------------------------------------------------------------------------------------------


def test_a_transfer_is_a_matrix_of_tasks(model: Path, tasks: list[Path], texts: Path, tmp_path: Path) -> None:
    told = billhook.transfer(
        str(model), [str(t) for t in tasks], remove="25%sites", items=15, data=str(texts), out=tmp_path / "out",
        store=tmp_path / "runs.db", **SMALL,
    )  # fmt: skip
    assert [trial.recipe for trial in told.trials] == ["text", "first_test", "second_test"]
    for trial in told.trials:
        for name, outcome in trial.results.items():
            assert outcome.change.value == pytest.approx(outcome.estimate.value - told.teacher[name].estimate.value)
            against = outcome.against_text
            assert against is not None
            assert against.low <= against.value <= against.high
            assert trial is not told.trials[0] or against.value == 0
    assert again(told) == told
    with pytest.raises(UsageError, match="no task to prune for"):
        billhook.transfer(str(model), [], remove="25%sites")


def test_a_sweep_over_recipes_that_write_more_or_less_themselves(model: Path, texts: Path, tmp_path: Path) -> None:
    for share in (0.0, 0.5):
        (tmp_path / f"share{share}.yaml").write_text(f"search: oneshot\nself_share: {share}\n")
    recipes = [str(tmp_path / f"share{share}.yaml") for share in (0.0, 0.5)]
    told = billhook.sweep(str(model), recipes, remove=["25%sites"], data=[str(texts)], out=tmp_path / "out",
                          store=tmp_path / "runs.db", **SMALL)  # fmt: skip
    assert [each.source for each in told.calibration] == [str(texts), f"{texts}+self"]


def test_a_sweep_over_what_the_model_writes_measures_on_text(model: Path, texts: Path, tmp_path: Path) -> None:
    both = {"remove": ["25%sites"], "store": tmp_path / "runs.db", **SMALL}
    told = billhook.sweep(
        str(model), ["shortgpt"], data=[str(texts), "self", f"{texts}+self"], out=tmp_path / "out", **both
    )
    assert list(told.evaluation) == [str(texts)]
    assert len(told.trials) == 3
    with pytest.raises(UsageError, match="eval_data='FILE'"):
        billhook.sweep(str(model), ["shortgpt"], data=["self"], **both)


def test_a_plan_is_recalled_for_the_same_dtype_and_text_only(model: Path, tmp_path: Path) -> None:
    store, texts = tmp_path / "runs.db", tiny.write_texts(tmp_path / "texts.jsonl", 160)
    heal = tiny.write_texts(tmp_path / "heal.jsonl", 80, seed=2)
    common = {"remove": ["1sites"], "data": [str(texts)], "store": store, "fold_in_search": True, "self_share": 0.0,
              "recover_data": str(heal), "recover_tokens": 640, "recover_length": 24, "search": "greedy"}  # fmt: skip
    common |= SMALL

    def searches(**options: Any) -> int:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        billhook.sweep(str(model), ["billhook-depth"], out=out, **(common | options))
        with closing(sqlite3.connect(store)) as db:
            return int(db.execute("SELECT count(*) FROM facts WHERE what = 'plan'").fetchone()[0])

    assert [searches(), searches(), searches(dtype="bfloat16")] == [1, 1, 2]
    tiny.write_texts(heal, 80, seed=3)
    assert searches() == 3


def test_stability_compares_disjoint_sets(model: Path, texts: Path, tmp_path: Path) -> None:
    told = billhook.stability(
        str(model), "cosine", sizes=[48, 240], draws=3, remove="25%sites", data=str(texts), length=24,
        out=tmp_path / "out", store=tmp_path / "runs.db",
    )  # fmt: skip
    assert [(size.tokens, size.sets, len(size.plans)) for size in told.sizes] == [(48, 3, 3), (240, 3, 3)]
    for size in told.sizes:
        for spread in (size.rank_correlation, size.overlap):
            assert -1 <= spread.low <= spread.mean <= spread.high <= 1
    assert told.sizes[1].rank_correlation.mean > 0.5, "most of a ranking is the model's"
    assert again(told) == told


def test_stability_has_room_for_texts_that_do_not_divide(model: Path, tmp_path: Path) -> None:
    texts = tiny.write_texts(tmp_path / "t.jsonl", 200, words=37)
    told = billhook.stability(
        str(model), "cosine", sizes=[64, 300], draws=4, remove="25%sites", data=str(texts), length=24,
        out=tmp_path / "out", store=tmp_path / "runs.db",
    )  # fmt: skip
    assert [size.sets for size in told.sizes] == [4, 4]
    others = tiny.write_texts(tmp_path / "u.jsonl", 34, words=37, seed=3)  # little more than its part
    mixed = billhook.stability(
        str(model), "cosine", sizes=[300], draws=4, remove="25%sites", data=f"{texts}+{others}", length=24,
        out=tmp_path / "mixed", store=tmp_path / "runs.db",
    )  # fmt: skip
    assert mixed.sizes[0].sets == 4


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_commands_of_studies(
    model: Path, texts: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    small = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    recipes = ("--recipes", "shortgpt,billhook-depth")
    swept = typed("sweep", model, *recipes, "--remove", "10%,30%", "--data", texts, *small)
    assert swept.exit_code == 0, swept.stderr
    assert fits(swept.stdout), swept.stdout
    assert "billhook" in swept.stdout
    assert list(tmp_path.glob("studies/*/index.html"))
    transferred = typed("transfer", model, "--tasks", ",".join(map(str, tasks)), "--remove", "2sites", "--items", "15",
                   "--data", texts, *small, "--json")  # fmt: skip
    assert transferred.exit_code == 0, transferred.stderr
    assert len(TransferResult.from_json(json.loads(transferred.stdout)).trials) == 3
    rest = [
        word for key, word in zip(small[::2], small[1::2], strict=True) if key != "--tokens" for word in (key, word)
    ]
    stable = typed("stability", model, "--metric", "cosine", "--sizes", "48,96", "--draws", "2", "--remove", "2sites",
                   "--data", texts, *rest)  # fmt: skip
    assert stable.exit_code == 0, stable.stderr
    assert fits(stable.stdout), stable.stdout
    wrong = typed("stability", model, "--sizes", "many", "--remove", "2sites")
    assert (wrong.exit_code, "--sizes many is no number" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["sweep", "transfer", "stability"])
def test_show_prints_what_a_study_printed(
    kind: str, model: Path, texts: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    store, out = tmp_path / "runs.db", tmp_path / "out"
    own = {
        "sweep": ["--recipes", "shortgpt,sleb", "--remove", "10%,30%", "--tasks", tasks[0], "--tokens", "240"],
        "transfer": ["--tasks", ",".join(map(str, tasks)), "--remove", "2sites", "--items", "15", "--tokens", "240"],
        "stability": ["--metric", "cosine", "--sizes", "96,48", "--draws", "2", "--remove", "2sites"],
    }[kind]
    small = ["--data", texts, "--length", "24", "--eval-tokens", "480", "--eval-length", "24"]
    done = typed(kind, model, *own, *small, "--store", store, "--out", out)
    assert done.exit_code == 0, done.stderr
    (run,) = billhook.list_runs(store)
    shown = typed("show", run.run, "--store", store)
    assert shown.exit_code == 0, shown.stderr
    assert len(done.stdout.splitlines()) > 5
    assert shown.stdout.endswith(done.stdout)
    again = typed("report", run.run, "--store", store, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    pages = [(folder / "index.html").read_text() for folder in (out, tmp_path / "again")]
    assert pages[0] == pages[1], "from the store alone"
    kept = billhook.show(run.run, store).to_json()["result"]
    assert run.kind == kind
    assert kept == json.loads((out / "result.json").read_text())


def test_a_dry_run_takes_a_recipe_as_prune_does(model: Path, texts: Path, tmp_path: Path) -> None:
    small = SMALL | {"data": str(texts)}
    told = billhook.dry_run(model, recipe="finercut", **small)
    assert told.remove == "25%sites"
    given = {"remove": "25%sites", "search": "greedy", "loss": "finercut_js", "set": {"weigh": False, "front": 0.4}}
    assert told.losses == billhook.dry_run(model, self_share=0, **given, **small).losses
    assert billhook.dry_run(model, recipe="finercut", remove="1sites", **small).remove == "1sites"
    words = [word for key, value in small.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    done = typed("prune", model, "--recipe", "finercut", "--dry-run", *words, "--store", tmp_path / "b.db", "--json")
    assert done.exit_code == 0, done.stderr
    assert {key: json.loads(done.stdout)[key] for key in ("losses", "remove", "data")} == {
        key: told.to_json()[key] for key in ("losses", "remove", "data")
    }
    with pytest.raises(RecipeError, match="There is no recipe finecut"):
        billhook.dry_run(model, recipe="finecut")


def test_several_budgets_and_options_are_typed_one_by_one(model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = typed(
        "prune", model, "--remove", "10%", "--remove", "25%kv", "--search", "beam", "--set", "width=2", "--data", texts,
        "--tokens", "240", "--length", "24", "--eval-tokens", "240", "--eval-length", "24", "--store",
        tmp_path / "runs.db", "--out", out, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = RunResult.from_json(json.loads(done.stdout))
    assert told.recipe["remove"] == "10%params,25%kv"
    assert told.recipe["set"] == {"width": "2"}
    assert told.sizes.student.kv_bytes_per_token <= 0.75 * told.sizes.teacher.kv_bytes_per_token
    assert told.sizes.student.parameters <= 0.9 * told.sizes.teacher.parameters


def test_milliseconds_are_measured_and_kept(model: Path, texts: Path, tmp_path: Path) -> None:
    small = {"data": str(texts), **SMALL, "store": tmp_path / "runs.db"}
    first = billhook.prune(str(model), remove="20%ms", out=tmp_path / "one", batch=2, context=16, **small)
    assert first.plan.removed
    again = billhook.prune(str(model), remove="20%ms", out=tmp_path / "two", batch=2, context=16, **small)
    assert again.plan == first.plan, "the same table of costs, and the same losses"
    with pytest.raises(BudgetError, match="cannot be met"):
        billhook.prune(str(model), remove="99%ms", out=tmp_path / "three", batch=2, context=16, **small)


def test_as_much_as_a_margin_allows(model: Path, texts: Path, tasks: list[Path], tmp_path: Path) -> None:
    small = {"data": str(texts), **SMALL, "store": tmp_path / "runs.db"}
    loose = billhook.prune(str(model), within="400%ppl", out=tmp_path / "one", **small)
    tight = billhook.prune(str(model), within="60%ppl", out=tmp_path / "two", **small)
    assert tight.sizes.student.parameters >= loose.sizes.student.parameters
    for result, margin in ((loose, 400), (tight, 60)):
        trials = result.within.trials
        assert all(trial.within == (trial.lost.high <= margin) for trial in trials)
        kept = max(trial.percent for trial in trials if trial.within)
        share = 1 - result.sizes.student.parameters / result.sizes.teacher.parameters
        assert share == pytest.approx(kept / 100)
        assert result.within.data.hash != result.data.evaluation.hash
    task = billhook.prune(
        str(model), within=f"90pp:{tasks[0]}", loss=f"task:{tasks[0]}", out=tmp_path / "three", **small
    )
    assert task.within.margin.kind == "pp"
    (proof,) = task.tasks
    assert proof.file == str(tasks[0])
    assert proof.change.n + task.within.data.items == 20, "half of the items are for searches"
    with pytest.raises(UsageError, match="Nothing can be removed within 0%ppl"):
        billhook.prune(str(model), within="0%ppl", out=tmp_path / "four", **small)
