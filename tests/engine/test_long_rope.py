"""Rows give what they give alone where the factors of a rope depend on the longest row of a batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.core.plan import Plan
from billhook.data.calibration import calibration_tokens, held_out_tokens
from billhook.data.choice_tasks import task_tokens
from billhook.data.prefixes import SharingCosts
from billhook.data.texts import TextSpec
from billhook.data.token_sets import Document, pack_rows
from billhook.engine.probe import Probe
from billhook.methods.evaluate.generation import _batches
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.methods.evaluate.perplexity import perplexity
from billhook.models.structure import rope_boundary

BOUNDARY = 24
ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 8.0, 16.0, 32.0], "original_max_position_embeddings": BOUNDARY,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rope") / "m"
    return billhook.load(tiny.with_tokenizer(folder, "phi3", rope_parameters=ROPE,
                                             original_max_position_embeddings=BOUNDARY))  # fmt: skip


def alone(teacher: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """The log-probability of every token but the first, from a pass of its own."""
    with torch.inference_mode():
        logits = teacher.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_the_boundary_is_the_ropes(teacher: Any) -> None:
    assert rope_boundary(teacher.model.config) == BOUNDARY
    assert rope_boundary(tiny.build("llama").config) is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert rope_boundary(tiny.build("llama", rope_parameters=dynamic).config) == 96


def test_rows_of_different_lengths_give_what_they_give_alone(teacher: Any) -> None:
    draw = random.Random(0)
    lengths = [10, 60, 24, 25, 12, 40, 23, 26]
    found = [Document(i, tuple(draw.choices(range(3, 64), k=n))) for i, n in enumerate(lengths)]
    tokens = pack_rows(found, 10**6, 64, [], "made up")
    expected = [-float(alone(teacher, document.ids).sum()) for document in found]
    assert perplexity(teacher.model, tokens).sums == pytest.approx(expected, rel=1e-5)
    (loss,) = Probe(teacher, tokens, "nll").losses([Plan()])
    assert loss.sums == pytest.approx(expected, rel=1e-4)


def test_choices_give_what_they_give_alone(teacher: Any, tmp_path: Path) -> None:
    draw = random.Random(1)
    items = [
        {"query": " ".join(draw.choices(tiny.WORDS, k=n)), "choices": ["w1 w2", "w3", "w4 w5 w6"], "gold": 0}
        for n in (4, 40, 21, 12, 30)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tokens = task_tokens(tmp_path / "t.jsonl", teacher.tokenizer)
    assert tokens.choices is not None
    expected = [
        float(alone(teacher, tuple(row[:n].tolist()))[first - 1 :].sum())
        for row, n, first in zip(tokens.rows, tokens.lengths, tokens.choices.first, strict=True)
        if not n - 1 <= BOUNDARY < n  # the last token is read and never an input
    ]
    for costs in (SharingCosts(), SharingCosts(0, 0, 0.0)):
        found = log_probabilities(teacher.model, tokens, sharing=costs)
        kept = [value for value, n in zip(found, tokens.lengths, strict=True) if not n - 1 <= BOUNDARY < n]
        assert kept == pytest.approx(expected, rel=1e-4)


def test_rows_of_text_are_within_the_boundary(teacher: Any, tmp_path: Path) -> None:
    path = str(tiny.write_texts(tmp_path / "a.jsonl", 40))
    spec = TextSpec(path, "text", 400, 48, 0)
    for tokens in (
        calibration_tokens(spec, teacher.model, teacher.tokenizer),
        held_out_tokens(spec, teacher.model, teacher.tokenizer),
    ):
        assert max(tokens.lengths) == BOUNDARY


def test_prompts_that_may_reach_beyond_it_are_with_prompts_of_their_length() -> None:
    lengths = [30, 30, 20, 12, 12, 9]
    assert list(_batches(lengths, 8, 10**6, BOUNDARY)) == [[0, 1], [2], [3, 4, 5]]
    assert list(_batches(lengths, 8, 10**6)) == [[0, 1, 2, 3, 4, 5]]
