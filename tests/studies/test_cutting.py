"""A vocabulary cut by a command: what it writes, stores and measures, and what is said of wrong inputs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vocabulary
import torch
import transformers

import billhook
from billhook.core.errors import BillhookError
from billhook.core.results.exports import VocabularyReport
from billhook.models.load import load
from billhook.runs.vocabulary.measuring import Passages, compare_on


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the text that it is for, text with the same words, and text in another alphabet."""
    place = tmp_path_factory.mktemp("vocabulary")
    tokenizer = load(tiny_vocabulary.folder(place / "model")).tokenizer
    assert tokenizer is not None
    parts = [each for each in tiny_vocabulary.sentences() if 8 < len(tokenizer(each)["input_ids"]) < 44][:400]
    write(place / "mine.jsonl", [f"{parts[i]} {parts[i + 1]}" for i in range(0, 400, 2)])
    write(place / "again.jsonl", [f"{parts[i]} {parts[i + 3]}" for i in range(0, 120, 2)])
    write(place / "other.jsonl", [tiny_vocabulary.OTHER[i : i + 40] for i in range(0, 2400, 40)])
    return place


SMALL: dict[str, Any] = {"eval_tokens": 1024, "eval_length": 32}


@pytest.fixture(scope="module")
def report(place: Path) -> VocabularyReport:
    return billhook.cut_vocabulary(
        place / "model", data=place / "mine.jsonl", out=place / "cut", store=place / "s.db",
        eval_data=[str(place / "again.jsonl"), str(place / "other.jsonl")], **SMALL,
    )  # fmt: skip


def test_the_report_tells_sizes_and_what_each_text_costs(place: Path, report: VocabularyReport) -> None:
    again, other = report.texts
    assert again.more.value == again.more.low == again.more.high == 0
    assert again.tokens_before == again.tokens_after
    assert again.after.value < again.before.value, "what the removed tokens had of each distribution is shared out"
    assert other.tokens_after > other.tokens_before
    assert other.more.value == pytest.approx(other.tokens_after / other.tokens_before - 1)
    assert other.more.low < other.more.value < other.more.high
    for text in report.texts:
        assert text.change.value == pytest.approx(text.after.value - text.before.value)
    rows = report.rows_before - report.rows_after
    assert report.parameters_before - report.parameters_after == 2 * 32 * rows, "untied, of width 32"
    assert report.bytes_before - report.bytes_after > 4 * 2 * 32 * rows, "float32, and entries of the tokenizer"
    assert report.rows()[1]["more"] == other.more.value
    (stored,) = billhook.list_runs(place / "s.db")
    assert (stored.kind, stored.state, stored.out) == ("vocabulary", "done", str(place / "cut"))
    assert billhook.show(stored.run, place / "s.db").result == report


@torch.inference_mode()
def test_bits_per_byte_are_those_of_the_plain_forward_pass(place: Path, report: VocabularyReport) -> None:
    passages = tuple(tiny_vocabulary.OTHER[i : i + 15] for i in range(0, 600, 15))
    teacher, student = load(place / "model"), load(place / "cut")
    told = compare_on(Passages("other", passages, tuple(range(len(passages)))), teacher, student)
    for folder, of, tokens in (
        ("model", told.before, told.tokens_before), ("cut", told.after, told.tokens_after)
    ):  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(place / folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / folder)
        rows = [tokenizer(text)["input_ids"] for text in passages]
        nats = 0.0
        for row in rows:
            ids = torch.tensor([row])
            nats += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        assert sum(len(row) - 1 for row in rows) == tokens
        assert of.value == pytest.approx(nats / math.log(2) / told.bytes, rel=1e-5)
    assert told.bytes == sum(len(text.encode()) for text in passages)


def test_the_folder_is_a_teacher_like_any_other(place: Path, report: VocabularyReport, tmp_path: Path) -> None:
    result = billhook.prune(
        place / "cut", remove="1sites", search="greedy", self_share=0.0, data=place / "mine.jsonl", tokens=256,
        length=32, skills="none", out=tmp_path / "student", store=tmp_path / "s.db", recover="", **SMALL,
    )  # fmt: skip
    assert len(result.plan.removed) == 1
    told = json.loads((place / "cut" / "billhook.json").read_text())["vocabulary"]
    assert told["rows"] == report.rows_before
    again = billhook.cut_vocabulary(
        tmp_path / "student",
        data=place / "mine.jsonl",
        remove=0.2,
        out=tmp_path / "both",
        store=tmp_path / "s.db",
        **SMALL,
    )
    assert again.rows_after == report.rows_after - math.ceil(0.2 * report.rows_after)
    both = load(tmp_path / "both")
    assert both.removed_earlier == result.plan
    assert both.model.config.vocab_size == again.rows_after


def never(*given: object, **more: object) -> None:
    raise AssertionError("the model was loaded")


def test_wrong_inputs_are_told_before_anything_is_read_or_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("billhook.models.load.Teacher.__init__", never)
        for more, told in (
            ({"remove": "100%"}, "is no share of a vocabulary. Write a number between 0 and 100"),
            ({"remove": "20%mlp"}, "is no share of a vocabulary"),
            ({"remove": "500"}, "such as 60%"),
            ({"data": "self"}, "does not say what it is for"),
            ({"data": tmp_path / "none.jsonl"}, "is missing. Give a .txt, .jsonl or .parquet file, pydoc"),
            ({"eval_data": str(tmp_path / "none.jsonl")}, "is missing"),
            ({"eval_length": 2}, "eval_length"),
            ({"out": place / "model"}, "is not empty"),
        ):
            given = {"data": place / "mine.jsonl", "out": tmp_path / "out", "store": tmp_path / "s.db", **more}
            with pytest.raises(BillhookError, match=told):
                billhook.cut_vocabulary(place / "model", **given)
    nameless = tiny_vocabulary.folder(tmp_path / "nameless")
    tiny.change_json(nameless / "tokenizer_config.json", bos_token=None, eos_token=None)
    tiny.change_json(nameless / "tokenizer.json", post_processor=None)
    for model, more, told in (
        (nameless, {}, "neither a BOS nor an EOS token"),
        (place / "model", {"remove": "95%"}, "special and added tokens, bytes and what those need stay"),
        (tiny.with_tokenizer(tmp_path / "words"), {}, "its tokenizer is a WordLevel"),
        (tiny.saved(tmp_path / "bare", "llama"), {}, "has no tokenizer"),
    ):
        given = {"data": place / "mine.jsonl", "out": tmp_path / "out", "store": tmp_path / "s.db", **SMALL, **more}
        with pytest.raises(BillhookError, match=told):
            billhook.cut_vocabulary(model, **given)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "s.db").exists()


def test_the_command_prints_a_table_and_refuses_before_torch_is_imported(place: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "billhook", "vocabulary", str(place / "model"), "--store", str(tmp_path / "s.db")]
    wrong = subprocess.run(
        [*line, "--data", "none.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert wrong.returncode == 3
    assert "none.jsonl is missing" in wrong.stderr
    done = subprocess.run(
        [*line, "--data", str(place / "mine.jsonl"), "--remove", "30%", "--eval-tokens", "512", "--eval-length", "32",
         "--out", "cut", "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in ("tokens", "parameters", "bytes on disk", "bits a byte", "Checkpoint: cut"):
        assert told in done.stdout
