"""A residual stream cut by a command: what it writes, stores and measures, and what is said of wrong inputs."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from rich.console import Console

import billhook
from billhook.cli.session import table_of
from billhook.core.errors import BillhookError
from billhook.core.plan import Plan
from billhook.core.results.exports import SliceReport
from billhook.engine.probe import logits
from billhook.models.load import load

SMALL: dict[str, Any] = {"tokens": 640, "length": 32, "eval_tokens": 640, "eval_length": 32}
TIED = 2 * 64 * 24 + 4 * (24 * (32 + 2 * 16 + 32) + 3 * 24 * 48 + 2 * 24) + 24  # of tokens, blocks, the last norm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tied head, and two texts."""
    place = tmp_path_factory.mktemp("slicing")
    tiny.with_tokenizer(place / "model", "llama_tied")
    tiny.write_texts(place / "mine.jsonl", 90)
    tiny.write_texts(place / "other.jsonl", 60, seed=1)
    return place


@pytest.fixture(scope="module")
def by_boundary(place: Path) -> SliceReport:
    """The model with a basis for each boundary."""
    return billhook.slice_model(
        place / "model", width=24, bases="boundary", data=place / "mine.jsonl", out=place / "final",
        store=place / "final.db", eval_data=str(place / "other.jsonl"), **SMALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(place: Path) -> SliceReport:
    return billhook.slice_model(
        place / "model", width=27, data=place / "mine.jsonl", out=place / "cut", store=place / "s.db",
        eval_data=[str(place / "mine.jsonl"), str(place / "other.jsonl")], **SMALL,
    )  # fmt: skip


def test_the_report_tells_sizes_energy_and_what_each_text_costs(place: Path, report: SliceReport) -> None:
    assert (report.asked, report.step, report.width_before, report.width_after) == ("27", 8, 32, 24)
    assert report.untied
    assert report.parameters_after == TIED < report.parameters_before
    assert report.bytes_before - report.bytes_after == pytest.approx(
        4 * (report.parameters_before - report.parameters_after), rel=0.2
    ), "float32, and the names of tensors"
    assert 24 / 32 < report.energy < 1, "more than any directions hold"
    assert report.calibrated == 640
    for text in report.texts:
        assert text.tokens == 640
        assert text.before.low < text.before.value < text.before.high
        assert text.ratio.value == pytest.approx(text.after.value / text.before.value)
        assert text.ratio.low < text.ratio.value < text.ratio.high
    assert report.rows()[1]["ratio_high"] == report.texts[1].ratio.high
    (stored,) = billhook.list_runs(place / "s.db")
    assert (stored.kind, stored.state, stored.out) == ("slice", "done", str(place / "cut"))
    assert billhook.show(stored.run, place / "s.db").result == report
    assert SliceReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@torch.inference_mode()
def test_the_folder_is_a_stock_checkpoint_that_says_what_was_measured(place: Path, report: SliceReport) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "cut").eval()
    assert type(model) is transformers.LlamaForCausalLM
    assert (model.config.hidden_size, model.config.head_dim, model.config.tie_word_embeddings) == (24, 8, False)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    for norm in (model.model.norm, *(block.input_layernorm for block in model.model.layers)):
        torch.testing.assert_close(norm.weight, torch.full((24,), math.sqrt(32 / 24)))
    rows, again = tiny.tokens(3, 20), load(place / "cut")
    torch.testing.assert_close(model(input_ids=rows).logits, logits(again, Plan(), rows), atol=1e-5, rtol=1e-5)
    told = json.loads((place / "cut" / "billhook.json").read_text())
    assert told["residual"] == {"width": 32, "kept": 24}
    cached = model.generate(rows[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(rows[:1], max_new_tokens=6, do_sample=False, use_cache=False))
    measured = billhook.evaluate(
        place / "cut", data=place / "mine.jsonl", eval_data=place / "other.jsonl", eval_tokens=640, eval_length=32
    )
    assert measured.perplexity is not None
    assert measured.perplexity.value == pytest.approx(report.texts[1].after.value)


def test_the_student_is_pruned_like_any_other_model(place: Path, report: SliceReport, tmp_path: Path) -> None:
    text: dict[str, Any] = {"data": place / "mine.jsonl", "tokens": 256, "length": 32}
    scores = billhook.score(place / "cut", "cosine", **text)
    assert len(scores.rows()) >= 8
    result = billhook.prune(
        place / "cut", remove="2sites", search="greedy", recover="none", self_share=0.0, skills="none",
        out=tmp_path / "student", store=tmp_path / "s.db", eval_tokens=640, eval_length=32, **text,
    )  # fmt: skip
    assert len(result.plan.removed) == 2
    assert load(tmp_path / "student").model.config.hidden_size == 24


@torch.inference_mode()
def test_with_a_basis_for_each_boundary_the_folder_says_what_was_measured(
    place: Path, report: SliceReport, by_boundary: SliceReport
) -> None:
    assert (by_boundary.bases, by_boundary.width_after, by_boundary.untied) == ("boundary", 24, True)
    assert by_boundary.parameters_after == TIED + 8 * 24**2 < by_boundary.parameters_before
    assert by_boundary.energy > report.energy, "each boundary has the best of its own"
    (stored,) = billhook.list_runs(place / "final.db")
    assert billhook.show(stored.run, place / "final.db").result == by_boundary
    assert SliceReport.from_json(json.loads(json.dumps(by_boundary.to_json()))) == by_boundary
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "final", trust_remote_code=True).eval()
    assert sum(p.numel() for p in model.parameters()) == by_boundary.parameters_after
    told = json.loads((place / "final" / "billhook.json").read_text())
    assert told["residual"] == {"width": 32, "kept": 24, "shortcuts": 8}
    measured = billhook.evaluate(
        place / "final", data=place / "mine.jsonl", eval_data=place / "other.jsonl", eval_tokens=640, eval_length=32
    )
    assert measured.perplexity is not None
    assert measured.perplexity.value == pytest.approx(by_boundary.texts[0].after.value)
    assert measured.perplexity.value != pytest.approx(report.texts[1].after.value, rel=1e-3)
    assert billhook.inspect(place / "final").total.parameters == by_boundary.parameters_after


def test_what_cannot_be_done_with_it_is_told_before_a_text_is_read(
    place: Path, by_boundary: SliceReport, tmp_path: Path
) -> None:
    final, store = place / "final", tmp_path / "s.db"
    tiny.write_texts(tmp_path / "unreadable.jsonl", 9, field="other")  # whoever reads it says that it has no `text`
    text: dict[str, Any] = {"data": tmp_path / "unreadable.jsonl"}
    for refused in (
        lambda: billhook.prune(final, remove="2sites", out=tmp_path / "out", store=store, **text),
        lambda: billhook.prune(final, plan="mlp.1", out=tmp_path / "out", store=store, **text),
        lambda: billhook.dry_run(final, remove="2sites", **text),
        lambda: billhook.score(final, "cosine", **text),
        lambda: billhook.factor(final, remove="10%", out=tmp_path / "out", store=store, **text),
        lambda: billhook.slice_model(final, width=16, out=tmp_path / "out", store=store, **text),
        lambda: billhook.slice_model(final, width=16, bases="boundary", out=tmp_path / "out", store=store, **text),
        lambda: billhook.sweep(
            final, "billhook-depth", remove="2sites", data=str(text["data"]), out=tmp_path / "out", store=store
        ),
    ):
        with pytest.raises(BillhookError, match="final has a basis for each boundary of its residual stream"):
            refused()
        assert not (tmp_path / "out").exists()
    for to in ("gguf", "deci", "stock"):
        with pytest.raises(BillhookError, match=f"The export {to} has no place for the matrices in the shortcuts"):
            billhook.export(final, to, out=tmp_path / "out", store=store)
        assert not (tmp_path / "out").exists()


def test_more_of_the_stream_costs_less(place: Path, report: SliceReport, tmp_path: Path) -> None:
    fewer = billhook.slice_model(
        load(place / "model"), width=0.3, data=place / "mine.jsonl", out=tmp_path / "cut", store=tmp_path / "s.db",
        **SMALL,
    )  # fmt: skip
    assert (fewer.asked, fewer.width_after) == ("30%", 8)
    assert fewer.energy < report.energy
    assert fewer.parameters_after < report.parameters_after


def never(*given: object, **more: object) -> None:
    raise AssertionError("the model was loaded")


def test_wrong_inputs_are_told_before_anything_is_read_or_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"width": "75%", "data": place / "mine.jsonl", "out": tmp_path / "out", "store": tmp_path / "s.db"}
    with monkeypatch.context() as patch:
        patch.setattr("billhook.models.load.Teacher.__init__", never)
        for more, told in (
            ({"width": "100%"}, "is no width. Write channels, such as 448"),
            ({"width": "0"}, "is no width"),
            ({"width": -8}, "is no width"),
            ({"width": 1.5}, "is no width"),
            ({"bases": "two"}, "is no choice of bases. Write one, for all boundaries, or boundary, one for each"),
            ({"data": tmp_path / "none.jsonl"}, "is missing. Give a .txt, .jsonl or .parquet file, pydoc"),
            ({"eval_data": str(tmp_path / "none.jsonl")}, "is missing"),
            ({"eval_length": 2}, "eval_length"),
            ({"out": place / "model"}, "is not empty"),
        ):
            with pytest.raises(BillhookError, match=told):
                billhook.slice_model(place / "model", **{**given, **more})
    half = tiny.with_tokenizer(tmp_path / "half")
    for model, more, told in (
        (place / "model", {"width": 32}, "since the head is tied, a head of its own, it would have"),
        (place / "model", {"width": 7}, "Give a multiple of 8, at most width=24"),
        (place / "model", {"width": 7, "bases": "boundary"}, "Give a multiple of 8, at most width=24"),
        (half, {"width": 32, "bases": "boundary"}, "with the width 32, with matrices in its shortcuts, it would have"),
        (half, {"width": 32}, "with the width 32 it would have 35,104. Give a multiple of 8, at most width=24"),
        (half, {"dtype": "bfloat16"}, "bfloat16 rounds those of .* Use dtype='float32'"),
        (tiny.with_tokenizer(tmp_path / "layers", "gpt_neox"), {}, "this gpt_neox cannot be cut"),
        (tiny.saved(tmp_path / "bare", "llama"), {}, "has no tokenizer"),
        (place / "model", {"tokens": 10**6}, "too short"),
    ):
        with pytest.raises(BillhookError, match=told):
            billhook.slice_model(model, **{**given, **SMALL, **more})
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "s.db").exists()


def test_the_command_prints_a_table(place: Path, report: SliceReport, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "billhook", "slice", str(place / "model"), "--store", str(tmp_path / "s.db")]
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    given = ["--width", "80%", "--bases", "boundary", "--data", str(place / "mine.jsonl"), *small, "--out", "cut"]
    done = subprocess.run([*line, *given, "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, one = " ".join(done.stdout.split()), printed(report)
    for told in (
        "residual width", "became 24: here widths are multiples of 8.", "they are two now",
        "of the squared length of the residual stream", "Checkpoint: ",
        "A search of depth, or of depth and width, loses less at equal size",
    ):  # fmt: skip
        assert told in said, done.stdout
        assert told in one, one
    told = "a matrix stands in each shortcut, as in the paper. Load the checkpoint with trust_remote_code=True"
    assert told in said, done.stdout
    assert "shortcut" not in one
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["model_type"] == "billhook-llama"


def printed(report: SliceReport) -> str:
    """What the command prints of a report, in one line."""
    console = Console(file=io.StringIO(), width=200)
    table_of(SliceReport)(console, report)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
