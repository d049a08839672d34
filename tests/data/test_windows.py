"""Perplexity by the papers' protocols and in bytes and words, against sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

import billhook
from billhook.core.errors import DataError, UnknownName, UsageError
from billhook.data.windows import fixed_windows, per_byte_and_word


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with positions for the windows of every protocol. Read only."""
    return tiny.with_tokenizer(tmp_path_factory.mktemp("long") / "llama", max_position_embeddings=2048)


def test_windows_are_the_whole_text_cut_into_pieces(long_model: Path, tmp_path: Path) -> None:
    """As the GPTQ code counts: the mean over windows of the mean loss of a window; what fills no window is left out."""
    teacher = billhook.load(long_model)
    text = tiny.write_texts(tmp_path / "t.jsonl", 9, words=800)
    tokens = fixed_windows(str(text), "gptq", "text", teacher.tokenizer, teacher.model.config)
    joined = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines())
    ids = teacher.tokenizer(joined)["input_ids"]
    assert len(tokens.lengths) == len(ids) // 2048 > 2
    assert tokens.rows.flatten().tolist() == ids[: 2048 * len(tokens.lengths)]
    losses = []
    for row in tokens.rows:
        with torch.no_grad():
            logits = teacher.model(row[None]).logits[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    told = billhook.evaluate(long_model, protocol="gptq", data=str(text))
    assert told.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert told.protocol == "gptq"
    assert not told.perplexity.reliable, "windows of one text"


def test_bytes_and_words_are_those_of_the_predicted_tokens(long_model: Path, text: Path) -> None:
    teacher = billhook.load(long_model)
    told = billhook.evaluate(long_model, data=str(text), eval_tokens=256, eval_length=24)
    nats = math.log(told.perplexity.value) * (told.data.tokens - told.data.sequences)
    words = told.data.tokens - told.data.sequences  # every token of the tiny tokenizer is a word
    assert told.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-6)
    tokens = fixed_windows(str(text), "shortened-llama", "text", teacher.tokenizer, teacher.model.config)
    decoded = teacher.tokenizer.batch_decode(tokens.rows[:, 1:].tolist())
    size = sum(len(piece.encode()) for piece in decoded)
    assert per_byte_and_word(tokens, teacher.tokenizer, 100.0)[0] == pytest.approx(100 / math.log(2) / size)


def test_what_fits_no_window_is_refused(model: Path, long_model: Path, tmp_path: Path) -> None:
    short = tiny.write_texts(tmp_path / "t.jsonl", 2)
    with pytest.raises(DataError, match="less than two windows of 128"):
        billhook.evaluate(long_model, protocol="shortened-llama", data=str(short))
    with pytest.raises(UnknownName, match="Known: gptq, shortened-llama"):
        billhook.evaluate(model, protocol="gpt", data=str(short))
    with pytest.raises(UsageError, match=r"needs 2,048 positions, and this model has 96"):
        billhook.evaluate(model, protocol="gptq", data=str(short))
