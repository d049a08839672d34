"""One perplexity: whatever shows that of a model on the same tokens shows the same number, in every dtype."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import billhook
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.methods.evaluate.perplexity import measure_perplexity, perplexity
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply
from billhook.runs.prepare import read_held_out, recovery_tokens
from billhook.runs.recipe import parse_recipe

TEXT: dict[str, Any] = {"eval_tokens": 640, "eval_length": 32}
SEARCH: dict[str, Any] = {"tokens": 160, "length": 20, "self_share": 0.0, "search": "greedy", **TEXT}
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("text") / "texts.jsonl", 120)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_shows_a_perplexity_shows_one(dtype: str, text: Path, tmp_path: Path) -> None:
    model = str(tiny.with_tokenizer(tmp_path / "model"))
    weights: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    weights.save_pretrained(model)
    given: dict[str, Any] = {"data": str(text), "dtype": dtype}
    learn = {"recover": "fold,mean", "recover_tokens": 640, "recover_length": 32}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("search: greedy\n")

    def store(name: str) -> Path:  # of its own: nothing is recalled
        return tmp_path / f"{name}.db"

    run = billhook.prune(model, remove="2sites", out=tmp_path / "out", store=store("a"), **given, **SEARCH, **learn)
    bare = billhook.prune(model, remove="2sites", out=tmp_path / "bare", store=store("b"), **given, **SEARCH)
    told = run.recoveries
    shown = {
        "teacher": [run.perplexity.teacher, bare.perplexity.teacher, *(each.on["held-out"].teacher for each in told)],
        "bare": [bare.perplexity.student, told[0].on["held-out"].before],
        "student": [run.perplexity.student, told[-1].on["held-out"].after],
    }
    for name, folder in {"teacher": model, "bare": bare.out, "student": run.out}.items():
        alone = billhook.evaluate(folder, **given, **TEXT)
        named = billhook.evaluate(folder, evaluations="perplexity", **given, **TEXT)
        baseline = billhook.save_baseline(name, folder, store=store(name), **given, **TEXT)
        assert alone.data.hash == run.data.evaluation.hash
        assert alone.perplexity is not None
        shown[name] += [alone.perplexity.value, named.evaluations["perplexity"].value, baseline.sets[0].value]
    compared = billhook.compare(model, bare.out, run.out, timed=False, seen=True, out=tmp_path / "c", store=store("c"),
                                **given, **TEXT)  # fmt: skip
    for name, value in zip(shown, compared.sets[0].values, strict=True):
        shown[name].append(value.estimate.value)
    swept = billhook.sweep(model, [str(recipe)], remove=["1sites", "2sites"], out=tmp_path / "s", store=store("s"),
                           **given | {"data": [str(text)]},
                           **{name: value for name, value in SEARCH.items() if name != "search"})  # fmt: skip
    assert [trial.plan for trial in swept.trials][1] == bare.plan
    shown["teacher"].append(swept.teacher[str(text)].estimate.value)
    shown["bare"].append(swept.trials[1].results[str(text)].estimate.value)
    for name, values in shown.items():
        assert len(values) >= 6
        assert values == pytest.approx([values[0]] * len(values), rel=1e-12), (name, values)
    assert len({round(math.log(values[0]), 6) for values in shown.values()}) == 3


def students(teacher: Teacher, learn: TokenSet) -> dict[str, tuple[Plan, Repair]]:
    """Students of each kind: bare, narrowed, and with what repairs put inside and outside of blocks."""
    found: dict[str, tuple[Plan, Repair]] = {}
    for sites, recovery in {
        "mlp.1": "", "mlp.2[0-30],attention.0[1]": "", "mlp.2[0-30],mlp.1": "fold", "attention.2,mlp.3": "mean",
        "mlp.2[0-29]": "compensate", "mlp.3": "full",
    }.items():  # fmt: skip
        plan, repair = Plan.parse(sites.split(",")), NO_REPAIR
        if recovery:
            task = RecoveryTask(teacher, plan, seed=0, streams_by_tokens={})
            options = {"epochs": 1} if recovery == "full" else {}
            repair = RECOVERIES[recovery](task, learn, learn, **options).cast_through(teacher.dtype)
        found[f"{plan} {recovery}"] = plan, repair
    return found


def nats(teacher: Teacher, student: tuple[Plan, Repair], tokens: TokenSet) -> EvalResult:
    return next(measure_perplexity(teacher, [student], tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_that_of_the_plain_forward_pass(dtype: str, text: Path, tmp_path: Path) -> None:
    """In float32 to the last digits; in bfloat16 up to the logits that the plain pass rounds."""
    folder = tiny.with_tokenizer(tmp_path / "model")
    teacher, streamed = billhook.load(folder, dtype=dtype), billhook.load(folder, dtype=dtype, memory=1000)
    asked = parse_recipe({"remove": "1sites", "data": str(text), "recover_tokens": 640, "recover_length": 32, **SEARCH})
    tokens, learn = read_held_out(asked, teacher), recovery_tokens(asked, teacher, lambda event: None)
    some = students(teacher, learn)
    together = measure_perplexity(teacher, [(Plan(), NO_REPAIR), *some.values()], tokens)
    next(together)
    for (name, student), result in zip(some.items(), together, strict=True):
        alone = nats(teacher, student, tokens)
        assert result.sums == pytest.approx(alone.sums, rel=1e-12), name
        plain = perplexity(apply(teacher, student[0], repair=student[1]), tokens)
        near = 1e-6 if dtype == "float32" else 2e-3
        assert result.mean == pytest.approx(plain.mean, abs=near), name
        if "full" not in name:
            assert nats(streamed, student, tokens).mean == pytest.approx(result.mean, abs=near), name
    assert streamed.weights is not None
    assert teacher.model.dtype == getattr(torch, dtype)
