"""A budget of the vocabulary: first the tokens go that a text does not need, then the rest is pruned as usual."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vocabulary
import torch
import transformers
from rich.console import Console

import billhook
from billhook.cli.tables import result_table
from billhook.core.budget import Budget, rows_of
from billhook.core.errors import BillhookError
from billhook.core.events import Event
from billhook.core.plan import Plan
from billhook.core.results.run import RunResult
from billhook.data.calibration import calibration_tokens, held_out_tokens
from billhook.data.texts import TextSpec
from billhook.models.load import load
from billhook.models.surgery import apply
from billhook.models.vocabulary.entries import read_vocabulary
from billhook.report.run_report import run_page, run_verdict
from billhook.runs.recipe import Recipe
from billhook.runs.search import tell_shares
from billhook.runs.vocabulary.choosing import share_of_rows

SMALL: dict[str, Any] = {
    "tokens": 256, "length": 32, "eval_tokens": 512, "eval_length": 32, "proof": "loss", "self_share": 0.0,
    "search": "greedy", "finalists": 0,
}  # fmt: skip
ALONE: dict[str, Any] = {name: SMALL[name] for name in ("tokens", "length", "eval_tokens", "eval_length", "proof")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and text of some of its words."""
    place = tmp_path_factory.mktemp("budget")
    tokenizer = load(tiny_vocabulary.folder(place / "model")).tokenizer
    assert tokenizer is not None
    parts = [each for each in tiny_vocabulary.sentences() if 8 < len(tokenizer(each)["input_ids"]) < 44][:300]
    rows = [json.dumps({"text": f"{parts[i]} {parts[i + 1]}"}) for i in range(0, 300, 2)]
    (place / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def result(place: Path) -> RunResult:
    return billhook.prune(
        place / "model", remove="30%vocabulary,2blocks", data=place / "mine.jsonl", out=place / "both",
        store=place / "s.db", **SMALL,
    )  # fmt: skip


def kept_rows(folder: Path) -> list[int]:
    """The old ids of the rows that billhook.json says are left, in the order of their new ids."""
    told = json.loads((folder / "billhook.json").read_text())["vocabulary"]["kept"]
    ends = [list(map(int, piece.split("-"))) for piece in told.split()]
    return [index for each in ends for index in range(each[0], each[-1] + 1)]


@torch.inference_mode()
def test_logits_are_those_of_the_same_plan_without_the_missing_rows(place: Path, result: RunResult) -> None:
    """And stock transformers loads the folder, since whole blocks went."""
    teacher, kept = load(place / "model"), kept_rows(place / "both")
    assert len(kept) == result.vocabulary.rows_after if result.vocabulary else False
    plain = apply(teacher, result.plan)
    student = transformers.AutoModelForCausalLM.from_pretrained(place / "both").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "both")
    assert type(student).__name__ == "LlamaForCausalLM"
    new, alike = {old: i for i, old in enumerate(kept)}, 0
    for text in tiny_vocabulary.sentences():
        ids = teacher.tokenizer(text)["input_ids"]  # type: ignore[misc]
        if set(ids) <= new.keys() and 4 < len(ids) < 90:
            alike += 1
            assert tokenizer(text)["input_ids"] == [new[index] for index in ids]
            expected = plain(input_ids=torch.tensor([ids])).logits[..., kept]
            found = student(input_ids=torch.tensor([[new[index] for index in ids]])).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert alike > 20


@torch.inference_mode()
def test_bits_per_byte_are_against_the_model_as_it_was_given(place: Path, result: RunResult) -> None:
    cut, told = result.vocabulary, json.loads((place / "both" / "billhook.json").read_text())
    assert cut is not None
    teacher = load(place / "model")
    rows = cut.rows_before - cut.rows_after
    assert rows == math.ceil(0.3 * teacher.model.config.vocab_size)
    assert result.perplexity is None, "of other tokens"
    assert (told["model"], result.model.fingerprint) == (teacher.fingerprint, teacher.fingerprint)
    assert told["removed"] == result.plan.names()
    assert result.sizes.teacher == teacher.anatomy.sizes()
    assert result.sizes.student == load(place / "both").anatomy.sizes()
    gone = teacher.anatomy.total("parameters") - teacher.anatomy.total("parameters", result.plan)
    assert cut.parameters == result.sizes.teacher.parameters - 2 * 32 * rows, "untied, of width 32"
    assert result.sizes.student.parameters == cut.parameters - gone
    assert cut.by_plan is not None
    assert cut.text.change.value == pytest.approx(cut.alone.change.value + cut.by_plan.value)
    assert cut.text.more == cut.alone.more
    held_out = held_out_tokens(
        TextSpec(str(place / "mine.jsonl"), "text", 512, 32, 0), teacher.model, load(place / "both").tokenizer,
        halved_by=teacher.tokenizer,
    )  # fmt: skip
    for folder, estimate, tokens in (
        ("model", cut.text.before, cut.text.tokens_before), ("both", cut.text.after, cut.text.tokens_after)
    ):  # fmt: skip
        loaded, spelled = load(place / folder), load(place / "both").tokenizer
        assert loaded.tokenizer is not None
        assert spelled is not None
        passages = [
            spelled.decode(row[:n], skip_special_tokens=True)
            for row, n in zip(held_out.rows, held_out.lengths, strict=True)
        ]
        nats, count = 0.0, 0
        for text in passages:
            ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
            nats += float(loaded.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert count == tokens
        assert estimate.value == pytest.approx(nats / math.log(2) / sum(len(t.encode()) for t in passages), rel=1e-4)


def test_every_output_says_bits_per_byte_and_no_ratio_of_perplexities(place: Path, result: RunResult) -> None:
    written = RunResult.from_json(json.loads((place / "both" / "report.json").read_text()))
    assert replace(written, seconds=result.seconds) == result
    cut = result.vocabulary
    assert cut is not None
    for text in (run_page(result), (place / "both" / "README.md").read_text(), run_verdict(result)):
        assert f"{cut.text.before.value:.3f} → {cut.text.after.value:.3f}" in text
        assert f"{cut.rows_before - cut.rows_after:,} of {cut.rows_before:,} rows" in text
        assert "Held-out perplexity" not in text
        assert "Perplexity was not measured" not in text
    assert result.rows()[0]["perplexity_ratio"] is None
    assert result.rows()[0]["bits_per_byte_change"] == cut.text.change.value
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == [], "nothing is left beside"


def test_a_plan_of_the_result_fits_the_model_as_it_was_given(place: Path, result: RunResult, tmp_path: Path) -> None:
    again = billhook.prune(
        place / "model", plan=place / "both" / "billhook.json", data=place / "mine.jsonl", out=tmp_path / "plain",
        store=tmp_path / "s.db", **ALONE,
    )  # fmt: skip
    assert again.plan == result.plan
    assert again.perplexity is not None


def test_the_vocabulary_alone_is_what_the_command_of_its_own_cuts(place: Path, tmp_path: Path) -> None:
    found = billhook.prune(
        place / "model", remove="30%vocabulary", data=place / "mine.jsonl", out=tmp_path / "alone",
        store=tmp_path / "s.db", **ALONE,
    )  # fmt: skip
    report = billhook.cut_vocabulary(
        place / "model", remove="30%", data=place / "mine.jsonl", out=tmp_path / "own", store=tmp_path / "s.db",
        eval_tokens=512, eval_length=32,
    )  # fmt: skip
    cut = found.vocabulary
    assert cut is not None
    assert (cut.rows_after, cut.parameters, cut.used, cut.counted, cut.fixed) == (
        report.rows_after, report.parameters_after, report.used, report.counted, report.fixed
    )  # fmt: skip
    assert cut.alone == cut.text
    assert cut.by_plan is None
    assert (found.plan, found.recoveries, found.search.decided.total) == (Plan(), (), 0)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "billhook.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "own" / name).read_bytes(), name
    assert "No loss is seen" in (words := run_verdict(found)) or "It is worse than the model as given" in words


def test_held_out_text_is_never_counted_whatever_its_tokens(place: Path, result: RunResult) -> None:
    """Texts are halved as the model as given does it: short texts, which count by tokens, would move all others."""
    given, smaller = load(place / "model"), load(place / "both")
    texts = tiny_vocabulary.sentences()
    short = [text for text in texts if len(given.tokenizer(text)["input_ids"]) < 9 < len(text)]  # type: ignore[misc]
    mixed = [text for pair in zip(texts[:200], (short * 9)[:200], strict=True) for text in pair]
    source = place / "mixed.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in mixed), encoding="utf-8")
    spec = TextSpec(str(source), "text", 100_000, 64, 0)
    counted = calibration_tokens(spec, given.model, given.tokenizer, least=1)
    own, halved = (
        held_out_tokens(spec, given.model, smaller.tokenizer, halved_by=by) for by in (None, given.tokenizer)
    )  # fmt: skip
    plain = held_out_tokens(spec, given.model, given.tokenizer)

    def texts_of(tokens: Any, tokenizer: Any) -> set[str]:
        return {tokenizer.decode(row[:n], skip_special_tokens=True)[:20]
                for row, n in zip(tokens.rows, tokens.lengths, strict=True)}  # fmt: skip

    seen = texts_of(counted, given.tokenizer)
    assert seen & texts_of(own, smaller.tokenizer), "or the test shows nothing"
    assert seen & texts_of(halved, smaller.tokenizer) <= seen & texts_of(plain, given.tokenizer)


def test_what_was_counted_has_been_seen(place: Path, result: RunResult) -> None:
    given = load(place / "model")
    spec = TextSpec(str(place / "mine.jsonl"), "text", 100_000, 64, 0)
    counted = calibration_tokens(spec, given.model, given.tokenizer, least=1)
    assert set(counted.digests) <= set(result.seen)


def test_an_interrupted_run_resumes_with_the_same_result(place: Path, result: RunResult, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "remove": "30%vocabulary,2blocks", "data": place / "mine.jsonl", "out": tmp_path / "out",
        "store": tmp_path / "s.db", **SMALL,
    }  # fmt: skip

    def later(event: Event) -> None:  # the smaller model is saved first: the second time is the student's
        if event.stage == "save" and any(path.name.endswith(".vocabulary") for path in tmp_path.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        billhook.prune(place / "model", watch=later, **given)
    (smaller,) = [path for path in tmp_path.iterdir() if path.name.endswith(".vocabulary")]
    before = {path.name: path.stat().st_mtime_ns for path in smaller.iterdir()}
    measured = billhook.list_runs(tmp_path / "s.db")[0].losses
    assert measured > 4
    looks = []

    def look(event: Event) -> None:
        if event.stage == "search":
            looks.append({path.name: path.stat().st_mtime_ns for path in smaller.iterdir()})

    again = billhook.resume(store=tmp_path / "s.db", watch=look)
    assert looks
    assert all(each == before for each in looks), "the smaller model is not written again"
    assert again.plan == result.plan
    assert again.vocabulary == result.vocabulary
    assert again.steps == result.steps
    assert billhook.list_runs(tmp_path / "s.db")[0].losses == measured, "measured again"
    for name in ("model.safetensors", "tokenizer.json", "billhook.json"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "both" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s.db"]


def never(*given: object, **more: object) -> None:
    raise AssertionError("the model was loaded")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"remove": "60%vocabulary", "data": None}, "so it needs text of the kind that the model is for"),
    ({"remove": "60%vocabulary", "data": "self"}, "the model's own text does not say what it is for"),
    ({"remove": "60%vocabulary", "within": "3%ppl"}, "To cut the vocabulary first: billhook vocabulary"),
    ({"remove": "60%vocabulary", "plan": "mlp.1"}, "To cut the vocabulary first: billhook vocabulary"),
    ({"remove": "60%vocabulary", "search": "swap"}, "has no effect with the vocabulary alone. Add a size"),
    ({"remove": "60%vocabulary", "recover": "fold"}, "has no effect with the vocabulary alone"),
    ({"remove": "60%vocabulary", "effort": "quick"}, "chooses how a size is reached"),
    ({"remove": "60%vocabulary,10vocabulary"}, "two budgets in vocabulary"),
    ({"remove": "1.5vocabulary"}, "is not a whole number of vocabulary"),
    ({"remove": "60%vocabularys"}, "Did you mean vocabulary"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=[told for _, told in WRONG])
def test_wrong_recipes_are_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("billhook.models.load.Teacher.__init__", never)
    asked = {"data": place / "mine.jsonl", **given}
    asked = {name: value for name, value in asked.items() if value is not None}
    with pytest.raises(BillhookError, match=told):
        billhook.prune(place / "model", out=tmp_path / "out", store=tmp_path / "s.db", **asked)
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize("study", ["sweep", "transfer", "stability", "threshold"])
def test_studies_refuse_a_budget_of_the_vocabulary(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str
) -> None:
    monkeypatch.setattr("billhook.models.load.Teacher.__init__", never)
    mine = str(place / "mine.jsonl")
    more: dict[str, Any] = {"transfer": {"tasks": mine}, "stability": {"sizes": "64,128"}}.get(study, {})
    with pytest.raises(BillhookError, match=r"cuts the vocabulary, which prune alone does\. Cut it first"):
        getattr(billhook, study)(
            place / "model", remove="60%vocabulary,10%", data=mine, out=tmp_path / "out", store=tmp_path / "s.db",
            **more,
        )  # fmt: skip


def test_what_cannot_be_cut_is_refused_before_any_text_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.data.calibration.read_source", never)
    for model, remove, more, told in (
        (place / "model", "99%vocabulary", {}, "special and added tokens, bytes and what those need stay"),
        (place / "model", "100%vocabulary,1sites", {}, "Remove at most"),
        (place / "model", "30%vocabulary,99%", {}, "cannot be met"),
        (place / "model", "30%vocabulary", {"memory": "0.2MB"}, "larger than the memory that is free"),
        (tiny.with_tokenizer(tmp_path / "words"), "30%vocabulary", {}, "its tokenizer is a WordLevel"),
        (tiny.saved(tmp_path / "bare", "llama"), "30%vocabulary", {}, "has no tokenizer"),
    ):
        given = {**(ALONE if remove.endswith("vocabulary") else SMALL), **more}
        with pytest.raises(BillhookError, match=told):
            billhook.prune(
                model, remove=remove, data=place / "mine.jsonl", out=tmp_path / "out", store=tmp_path / "s.db", **given
            )
        assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_losses_of_the_smaller_model_and_writes_nothing(place: Path) -> None:
    given = {**SMALL, "data": place / "mine.jsonl"}
    before = set(place.iterdir())
    both = billhook.dry_run(place / "model", remove="30%vocabulary,2sites", **given)
    plain = billhook.dry_run(place / "model", remove="2sites", **given)
    assert both.losses == plain.losses
    assert both.remove == "30%vocabulary,2sites"
    smaller = load(place / "model").anatomy.total("bytes") - 4 * 2 * 32 * rows_of(Budget.parse("30%vocabulary"), 913)
    assert both.disk_bytes == 2 * smaller
    alone = billhook.dry_run(place / "model", remove="30%vocabulary", data=place / "mine.jsonl", **ALONE)
    assert alone.losses == 0
    assert set(place.iterdir()) == before


def test_shares_of_a_model_of_embeddings_offer_tokens_where_they_can_be_cut(place: Path, tmp_path: Path) -> None:
    """As many parameters as are asked for, rounded up to a percent."""
    teacher = load(place / "model")
    recipe, heard = Recipe(model="m", remove="10%"), list[Event]()
    tell_shares(recipe, teacher.anatomy, heard.append, lambda budget: share_of_rows(recipe, teacher, budget))
    (event,) = heard
    share, rows = int(event.values["vocabulary"]), read_vocabulary(teacher).rows
    wanted = 0.1 * teacher.anatomy.total("parameters")
    assert 2 * 32 * rows * (share - 1) / 100 < wanted <= 2 * 32 * rows * share / 100
    words = load(tiny.with_tokenizer(tmp_path / "words"))
    for of, spec in ((words, "10%"), (teacher, "20%vocabulary,10%"), (teacher, "10%flops")):
        asked = Recipe(model="m", remove=spec)
        assert share_of_rows(asked, of, asked.budgets[0]) is None


def test_the_command_prints_what_both_cuts_cost(result: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    result_table(Console(width=200), result)
    printed = capsys.readouterr().out
    for told in ("rows of the vocabulary removed", "Removed 4 of 8 sites", "Bits per byte", "Tokens of held-out text"):
        assert told in printed
    result_table(Console(width=200), replace(result, plan=Plan()))
    assert "Removed" not in capsys.readouterr().out


def test_the_command_refuses_a_budget_without_text_before_torch_is_imported(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "billhook", "prune", "--remove", "30%vocabulary,10%"]
    wrong = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 3
    assert "--data my.jsonl" in wrong.stderr
    assert not list(tmp_path.iterdir())
