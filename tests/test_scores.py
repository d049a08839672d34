"""Scores of sites and blocks: the same for every architecture as from hooks on the stock model, streamed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from test_probe import documents, token_set

import billhook
from billhook import arch
from billhook.errors import UnknownName
from billhook.loading import Teacher, load
from billhook.metrics import METRICS
from billhook.plan import Site
from billhook.probe import Probe
from billhook.records import Score

Folder = Callable[[str], Path]


@torch.no_grad()
def influence(teacher: Teacher, rows: list[torch.Tensor]) -> dict[Site | int, float]:
    """Mean of 1 - cos over tokens, from the inputs and outputs of blocks and of attentions, row by row."""
    sums: dict[Site | int, list[torch.Tensor]] = {}
    for row in rows:
        seen: dict[int, dict[str, torch.Tensor]] = {p: {} for p in teacher.positions}
        handles = []
        for position, block in zip(teacher.positions, arch.blocks_of(teacher.model, teacher.row), strict=True):
            found = seen[position]

            def whole(module: Any, args: Any, kwargs: Any, output: Any, found: dict[str, torch.Tensor] = found) -> None:
                found["x"] = args[0] if args else kwargs["hidden_states"]
                found["y"] = output[0] if isinstance(output, tuple) else output

            handles.append(block.register_forward_hook(whole, with_kwargs=True))
        teacher.model(input_ids=row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for position, found in seen.items():
            value = 1 - F.cosine_similarity(found["x"][0].double(), found["y"][0].double(), dim=-1)
            sums.setdefault(position, []).append(value)
    return {unit: float(torch.cat(values).mean()) for unit, values in sums.items()}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_block_influence_is_that_of_hooks(variant: str, checkpoint: Folder) -> None:
    tokens = token_set()
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    rows = [row[:n] for row, n in zip(tokens.rows, tokens.lengths, strict=True)]
    scores = METRICS["cosine"](Probe(teacher, tokens, "kl"))
    for unit, expected in influence(teacher, rows).items():
        assert scores[unit].value == pytest.approx(expected, abs=1e-5)
    assert set(scores) == {*teacher.anatomy.alive(), *teacher.positions}
    again = METRICS["cosine"](Probe(streamed, tokens, "kl"))
    assert {unit: score.value for unit, score in again.items()} == pytest.approx(
        {unit: score.value for unit, score in scores.items()}, abs=1e-6
    )
    assert streamed.weights is not None


@pytest.mark.parametrize("variant", ["llama", "phi"])
def test_a_site_that_adds_nothing_scores_nothing(variant: str, tmp_path: Path) -> None:
    model = tiny.build(variant)
    row = arch.row_of(model.config)
    block = arch.blocks_of(model, row)[2]
    with torch.no_grad():
        for parameter in getattr(block, row.attention).parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "m")
    scores = METRICS["cosine"](Probe(load(tmp_path / "m"), documents(4), "kl"))
    assert scores[Site(2, "attention")].value == pytest.approx(0, abs=1e-6)
    assert scores[Site(2, "mlp")].value > 0.01
    assert scores[Site(1, "attention")].value > 0.01


def test_the_pass_reads_every_block_once(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"), memory=0)
    assert teacher.weights is not None
    probe = Probe(teacher, documents(4), "kl")
    before = teacher.weights.bytes_read
    METRICS["cosine"](probe)
    blocks = sum(size.bytes for size in teacher.anatomy.sites) + sum(shared.bytes for shared in teacher.anatomy.shared)
    embedding = len(torch.unique(documents(4).rows)) * 32 * 4
    assert blocks <= teacher.weights.bytes_read - before <= blocks + 8 * embedding


def test_score_gives_values_with_their_spread(model: Path, text: Path) -> None:
    told = billhook.score(str(model), "cosine", data=str(text), tokens=240, length=24)
    assert [row["site"] for row in told["sites"]] == [f"{part}.{i}" for i in range(4) for part in ("attention", "mlp")]
    assert [row["block"] for row in told["blocks"]] == [0, 1, 2, 3]
    assert all(0 < row["value"] < 2 and row["se"] > 0 for row in told["sites"] + told["blocks"])
    assert (told["streamed"], told["bytes_read"]) == (False, 0)
    streamed = billhook.score(str(model), "cosine", data=str(text), tokens=240, length=24, memory="1MB")
    assert streamed["streamed"] or model.stat().st_size < 750_000
    with pytest.raises(UnknownName, match="Did you mean 'cosine'"):
        billhook.score(str(model), "cosin")


def test_the_spread_of_a_mean_over_documents() -> None:
    """The standard error of a ratio of sums: that of the mean where all documents are as long."""
    values = [0.1, 0.4, 0.2, 0.7, 0.3]
    score = Score.of([10 * v for v in values], [10.0] * 5)
    mean = sum(values) / 5
    assert score.value == pytest.approx(mean)
    assert score.se == pytest.approx((sum((v - mean) ** 2 for v in values) / 4 / 5) ** 0.5)
    assert Score.of([3.0], [10.0]).se is None
