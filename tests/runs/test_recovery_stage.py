"""A run with recoveries: proved as they end, refused where they would spoil the proof, resumed where they stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.core.errors import DataError, FingerprintError, RecipeError, ResourceError, UnknownName, UsageError
from billhook.core.events import Event
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.registry import resolve_options
from billhook.core.results.measured import Loss
from billhook.core.results.run import RunResult
from billhook.data.splits import select_documents
from billhook.data.token_sets import Document, pack_rows
from billhook.engine.probe import Probe
from billhook.methods.evaluate.perplexity import perplexity
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.report.run_words import run_notes
from billhook.runs.executor import REFIT_CANDIDATES, RefitExecutor
from billhook.runs.prepare import recovery_tokens, tokens_for, validate
from billhook.runs.recipe import Recipe, parse_recipe
from billhook.runs.recovery import learning_texts

SHORT: dict[str, Any] = {"remove": "2sites", "search": "greedy", "tokens": 64, "length": 32, "eval_tokens": 256,
                         "eval_length": 32, "recover_tokens": 640, "recover_length": 32}  # fmt: skip


@pytest.fixture(scope="module")
def result(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    home = tmp_path_factory.mktemp("recovered")
    return billhook.prune(
        model, data=str(text), recover="mean,lowrank,bias", recover_set=["rank=3", "bias.epochs=2"], out=home / "out",
        store=home / "b.db", **SHORT,
    )  # fmt: skip


def test_every_recovery_is_proved_where_the_last_one_ended(result: RunResult) -> None:
    told = result.recoveries
    assert [each.recovery for each in told] == ["mean", "lowrank", "bias"]
    assert [each.options for each in told] == [{}, {"rank": 3}, {"epochs": 2}]
    for text in ("calibration", "held-out"):
        for before, after in pairwise(told):
            assert after.on[text].before == before.on[text].after
        assert len({each.on[text].teacher for each in told}) == 1
    assert told[-1].on["held-out"].after == pytest.approx(result.perplexity.student, rel=1e-6)
    assert told[-1].on["held-out"].teacher == pytest.approx(result.perplexity.teacher, rel=1e-6)
    for each in told:
        ratio = each.on["held-out"].ratio
        assert ratio.low <= ratio.value <= ratio.high
        assert each.seconds >= 0
        assert 0 < each.tokens <= SHORT["recover_tokens"]


def test_the_folder_holds_what_was_proved(result: RunResult) -> None:
    out = Path(result.out)
    again = billhook.load(out)
    assert result.sizes.student.parameters == again.anatomy.total("parameters")
    assert result.recoveries[-1].parameters == 2 * 32, "mean came first, and stands"
    assert sorted(p.name for p in out.parent.iterdir()) == ["b.db", "out"], "nothing half-written remains"
    assert {f"{site.part}.{site.block}" for site in again.removed_earlier.removed} == set(result.plan.names())


def test_what_does_not_help_says_so_first(result: RunResult) -> None:
    told = run_notes(result)
    for each, note in zip(result.recoveries, told, strict=False):
        assert note.startswith(each.recovery)
        assert ("DID NOT HELP" in note) == (each.on["held-out"].ratio.high >= 1)


@pytest.mark.parametrize(("names", "texts", "share"), [
    (["fold", "lora"], 60, 1 / 3), (["mean", "fold", "full"], 60, 1 / 3), (["fold", "lora"], 30, 1),
    (["fold", "mean"], 60, 1), (["lora"], 60, 1),
])  # fmt: skip
def test_a_training_after_a_fit_learns_from_other_texts_where_there_are_enough(
    names: list[str], texts: int, share: float
) -> None:
    learn = pack_rows([Document(i, tuple(range(3, 515))) for i in range(texts)], texts * 512, 512, [], "made up")
    learn = replace(learn, digests=tuple(map(str, range(texts))))
    valid, fitted, trained = learning_texts(learn, names)
    assert len(valid.digests) == texts // 10
    assert not {*valid.digests} & {*fitted.digests, *trained.digests}
    assert {*valid.digests, *fitted.digests, *trained.digests} == {*learn.digests}
    if share == 1:
        assert fitted is trained
    else:
        assert not {*fitted.digests} & {*trained.digests}
        assert fitted.tokens == pytest.approx(share * (fitted.tokens + trained.tokens), abs=512)


@pytest.mark.parametrize("at", ["1-fold", "2-lora"])
def test_a_killed_recovery_goes_on(at: str, model: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL is stood for by an exception that nothing catches but the store's own closing."""
    wanted = {"data": str(text), "recover": "fold,lora", "recover_set": ["lora.epochs=3", "lora.batch=2"]}
    whole = billhook.prune(model, **wanted, **SHORT, out=tmp_path / "whole", store=tmp_path / "whole.db")
    fits: list[str] = []

    def watch(event: Event) -> None:
        if event.stage == "recover":
            fits.append(event.stage)
            trained = event.values.get("objective") == "kl"
            if len(fits) < 1000 and (trained if at == "2-lora" else not trained) and event.done == 4:
                fits.extend([""] * 1000)
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            billhook.prune(model, **wanted, **SHORT, out="out", store="b.db", watch=watch)
        (work,) = tmp_path.glob(".out.*.recovery")
        assert (work / "1-fold.safetensors").is_file() == (at == "2-lora")
        fits.clear()
        fits.extend([""] * 1000)
        result = billhook.resume(store="b.db", watch=watch)
        assert "fold" not in fits or at == "1-fold", "what was found is not found again"
        assert not list(tmp_path.glob(".out*"))
    a, b = (billhook.load(tmp_path / name).model for name in ("whole", "out"))
    rows = tiny.tokens(2, 12)
    with torch.no_grad():
        assert torch.allclose(a(rows).logits, b(rows).logits, rtol=1e-4, atol=1e-4)
    ends = [r.recoveries[-1].on["held-out"].after for r in (whole, result)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_recovery_that_suits_no_projection_is_refused_at_once_or_left_out(text: Path, tmp_path: Path) -> None:
    """Gemma has a norm between each projection and the stream, so that fold has nothing to refit."""
    model = tiny.with_tokenizer(tmp_path / "gemma", "gemma3_text")
    asked: dict[str, Any] = {"data": str(text), "out": tmp_path / "out", "store": tmp_path / "b.db", **SHORT}
    told: list[Event] = []
    with pytest.raises(UsageError, match="a norm between"):
        billhook.prune(model, recover="fold", watch=told.append, **asked)
    assert "measure" not in {event.stage for event in told}
    result = billhook.prune(model, recover="fold?,bias", recover_set={"bias.epochs": 1}, **asked)
    assert [each.recovery for each in result.recoveries] == ["bias"]
    assert "A recovery of the recipe was left out" in " ".join(run_notes(result))


def test_recoveries_and_their_options_are_checked_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"out": tmp_path / "out", "store": tmp_path / "b.db", **SHORT}
    with pytest.raises(UnknownName, match="Did you mean 'fold'"):
        billhook.prune(model, recover="folt", **asked)
    with pytest.raises(RecipeError, match="does fold twice"):
        billhook.prune(model, recover="fold,lora,fold", **asked)
    with pytest.raises(UsageError, match=r"no option 'rnk' of lora and fold\. Did you mean rank"):
        billhook.prune(model, recover="lora,fold", recover_set={"rnk": 3}, **asked)
    with pytest.raises(UsageError, match="none of nll, kl and mse"):
        billhook.prune(model, recover="lora", recover_set={"loss": "klx"}, **asked)
    with pytest.raises(DataError, match="nowhere"):
        billhook.prune(model, recover="fold", recover_data=str(tmp_path / "nowhere.jsonl"), **asked)
    assert all(run.losses == 0 for run in billhook.list_runs(tmp_path / "b.db"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("recover", "room"), [("fold,lora", 1), ("fold,lora", 0), ("fold?,lora?", 0)])
def test_a_training_without_memory_recomputes_then_is_left_out_or_ends_the_run(
    recover: str, room: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`room` 1: with gradient checkpointing there is enough."""
    plain, asked, notes = RECOVERIES["lora"], [], []

    def lora(*task: Any, checkpointing: bool = False, epochs: int = 1, **options: Any) -> Any:
        asked.append(checkpointing)
        if not (checkpointing and room):
            raise torch.OutOfMemoryError("of 80 GB none is free.\nmore words")
        return plain(*task, checkpointing=True, **options)

    def watch(event: Event) -> None:
        notes.extend([event.values["note"]] if event.stage == "left_out" else [])

    monkeypatch.setitem(RECOVERIES._entries, "lora", lora)
    wanted = {"data": str(text), "recover": recover, "out": tmp_path / "out", "store": tmp_path / "b.db"}
    if not room and "?" not in recover:
        with pytest.raises(ResourceError, match=r"lora ran out of memory on cpu: of 80 GB none is free\. .*lora.batch"):
            billhook.prune(model, **wanted, **SHORT)
        assert not (tmp_path / "out").exists()
    else:
        result = billhook.prune(model, **wanted, **SHORT, watch=watch)
        assert [each.recovery for each in result.recoveries] == ["fold", "lora"][: 1 + room]
        assert ("recovery_left_out" in result.reasons) == (not room)
        assert notes == ([] if room else ["lora ran out of memory on cpu: of 80 GB none is free. It is left out."])
    assert asked == [False, True]


def test_held_out_text_is_not_learnt_from(model: Path, text: Path, tmp_path: Path) -> None:
    held = tiny.write_texts(tmp_path / "held.jsonl", 80, seed=5)
    wanted: dict[str, Any] = {"data": str(text), "eval_data": str(held), "recover_data": str(held), **SHORT}
    with pytest.raises((UsageError, DataError), match="held-out text too"):
        billhook.prune(model, recover="fold", out=tmp_path / "out", store=tmp_path / "b.db", **wanted)
    assert all(run.losses == 0 for run in billhook.list_runs(tmp_path / "b.db"))


def test_an_option_is_of_all_methods_that_have_it_or_of_the_one_that_is_named() -> None:
    methods = [RECOVERIES["lora"], RECOVERIES["lowrank"], RECOVERIES["fold"]]
    assert resolve_options({"rank": "4"}, *methods) == [{"rank": 4}, {"rank": 4}, {}]
    assert resolve_options({"rank": 4, "lora.rank": 8}, *methods) == [{"rank": 8}, {"rank": 4}, {}]
    with pytest.raises(UsageError, match=r"no option 'fold\.rank'"):
        resolve_options({"fold.rank": 4}, *methods)


def test_an_adapter_that_is_not_merged_goes_with_its_own_checkpoint_only(
    model: Path, text: Path, tmp_path: Path
) -> None:
    wanted: dict[str, Any] = SHORT | {"data": str(text), "recover": "fold,lora", "store": tmp_path / "b.db"}
    learning = ["lora.epochs=6", "lora.rate=0.01", "lora.batch=2", "lora.loss=nll", "merge=no"]
    result = billhook.prune(model, out=tmp_path / "out", recover_set=learning, **wanted)
    assert "without the adapter" in " ".join(run_notes(result))
    teacher = billhook.load(model)
    _, held = tokens_for(Recipe(**result.recipe), teacher, lambda event: None)
    base, both = billhook.load(tmp_path / "out").model, billhook.load_with_adapter(tmp_path / "out")
    last = result.recoveries[-1].on["held-out"]
    assert math.exp(perplexity(base, held).mean) == pytest.approx(last.before, rel=1e-4)
    assert math.exp(perplexity(both, held).mean) == pytest.approx(last.after, rel=1e-4)
    assert last.after < 0.9 * last.before
    told = (tmp_path / "out" / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in told
    assert str(model) not in told
    with pytest.raises(FingerprintError, match="other blocks under the same numbers"):
        billhook.load_with_adapter(model, tmp_path / "out" / "adapter")
    with pytest.raises(DataError, match=r"recover_set=\{'merge': 'no'\}"):
        billhook.load_with_adapter(model)
    with pytest.raises(UsageError, match="must be the last recovery"):
        billhook.prune(model, out=tmp_path / "no", **(wanted | {"recover": "lora,fold"}), recover_set=["merge=no"])


# -- a fold inside the search ---------------------------------------------------------------------------------------


def test_the_best_candidates_are_judged_after_a_fold_and_the_others_are_bounds() -> None:
    plans = tuple(Plan.parse([f"mlp.{i}"]) for i in range(8))
    plain = {plan: Loss("kl", (float(i),), (1,)) for i, plan in enumerate(plans)}
    folded = {plan: Loss("kl", (10.0 - i,), (1,)) for i, plan in enumerate(plans)}

    class Plain:
        def __call__(self, ask: MeasureRequest, told: Any = None) -> list[Loss]:
            assert ask.ceiling is None, "what a fold leaves is not held against what it began with"
            best = sorted(plain[plan].mean for plan in ask.plans)[: ask.full_results or len(ask.plans)]
            return [replace(plain[plan], bound=plain[plan].mean not in best) for plan in ask.plans]

    judged: list[Plan] = []
    measure = RefitExecutor(Plain(), lambda plan: judged.append(plan) or folded[plan])  # type: ignore[arg-type, func-returns-value]
    losses = measure(MeasureRequest(plans, full_results=2, ceiling=(0.0,)))
    assert judged == list(plans[:REFIT_CANDIDATES])
    assert losses[:REFIT_CANDIDATES] == [folded[plan] for plan in plans[:REFIT_CANDIDATES]]
    assert all(loss.bound for loss in losses[REFIT_CANDIDATES:])
    assert measure(MeasureRequest(plans[-2:], full_results=1)) == [folded[plan] for plan in plans[-2:]], (
        "few are all judged"
    )
    assert measure(MeasureRequest(plans, tokens=16)) == [plain[plan] for plan in plans], "where to look needs no fold"
    assert [ask.tokens for ask, _ in measure.rounds] == [None, None]


def test_a_search_with_folds_is_that_by_hand_and_measures_nothing_twice(
    model: Path, text: Path, tmp_path: Path
) -> None:
    wanted = SHORT | {"data": str(text), "recover_tokens": 1200, "fold_in_search": True, "remove": "2sites"}
    result = billhook.prune(model, **wanted, out=tmp_path / "a", store=tmp_path / "b.db")
    again = billhook.prune(model, **wanted, out=tmp_path / "c", store=tmp_path / "b.db")
    assert again.plan == result.plan
    assert billhook.list_runs(tmp_path / "b.db")[0].losses == 0
    teacher = billhook.load(model)
    recipe = parse_recipe({"model": str(model)} | wanted)
    calibration, _ = tokens_for(recipe, teacher, lambda event: None)
    texts = recovery_tokens(recipe, teacher, lambda event: None)
    train = select_documents(texts, [d for d, digest in enumerate(texts.digests) if digest not in calibration.digests])
    probe = Probe(teacher, calibration, "kl")
    plan = Plan()
    for step in result.steps:
        plans = [plan.without(site) for site in teacher.anatomy.sites_present() if site not in plan.removed]
        plans = [
            p
            for p in plans
            if {s.part for s in teacher.anatomy.sites_present() if s not in p.removed} == {"attention", "mlp"}
        ]
        shortlist = sorted(plans, key=lambda p: probe.losses([p])[0].mean)[:REFIT_CANDIDATES]
        told = {}
        for p in shortlist:
            repair = RECOVERIES["fold"](RecoveryTask(teacher, p), train, train, reach="next")
            told[p] = Probe(teacher, calibration, "kl", repaired=(p, repair)).losses([p])[0].mean
        plan = min(told, key=lambda p: told[p])
        assert step.loss == pytest.approx(told[plan], rel=1e-4)
    assert plan.names() == result.plan.names()


def test_a_search_that_measures_nothing_folds_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = SHORT | {"data": str(text), "fold_in_search": True, "search": "oneshot"}
    with pytest.raises(UsageError, match=r"oneshot by the metric cosine measures nothing\. Take search='greedy'"):
        billhook.prune(model, metric="cosine", out=tmp_path / "out", store=tmp_path / "b.db", **asked)
    teacher = billhook.load(model)
    assert validate(parse_recipe(asked), teacher) is None  # without a metric it measures every site
    within = {name: value for name, value in asked.items() if name != "remove"} | {"within": "3%ppl"}
    with pytest.raises(UsageError, match="measures nothing"):
        validate(parse_recipe(within | {"metric": "cosine"}), teacher)
