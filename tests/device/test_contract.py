"""What a device computes is what the CPU computes: every architecture, loss, metric, recovery, evaluation and search.

On the pretended device, which refuses mixtures; `make test-gpu` runs this file on the GPU that is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from places import both
from test_channel_groups import documents
from test_multiple_choice import drawn, items_set
from test_probe import PLANS, token_set
from test_recover import many_texts, recovered

import billhook
from billhook.core.plan import Plan
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Loss
from billhook.engine.losses import ITEM_LOSSES, LOSSES
from billhook.engine.probe import Probe, RacingOptions
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.methods.evaluate.perplexity import measure_perplexity, perplexity
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.recover import RECOVERIES
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR
from billhook.models.residual.student import require_equal, sliced, sliced_by_boundary
from billhook.models.surgery import apply
from billhook.studies.slicing.basis import basis_of, boundary_bases

Folder = Callable[[str], Path]
PLAN = Plan.parse(["attention.0", "mlp.1", "attention.2"])
VARIANTS, LOSS_NAMES = list(tiny.VARIANTS), list(LOSSES)


def near(there: Sequence[float], here: Sequence[float], share: float = 1e-3) -> None:
    """Equal but for the order of float32 sums, by the largest value."""
    assert len(there) == len(here)
    scale = max((abs(x) for x in here if math.isfinite(x)), default=0.0)
    for one, other in zip(there, here, strict=True):
        assert one == pytest.approx(other, rel=share, abs=share * scale, nan_ok=True)


def sums(losses: Sequence[Loss]) -> list[float]:
    return [x for loss in losses for x in loss.sums]


def values(scores: dict[ScoredUnit, Any]) -> list[float]:
    return [score.value for score in scores.values()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_every_architecture(variant: str, checkpoint: Folder) -> None:
    """One loss and walk in memory, another streamed, in turn."""
    number = VARIANTS.index(variant)
    for turn, memory in enumerate((None, 0)):
        loss, walk = LOSS_NAMES[(number + 3 * turn) % len(LOSS_NAMES)], ("layers", "depth-first")[(number + turn) % 2]

        def work(teacher: Teacher, loss: str = loss, walk: str = walk) -> list[float]:
            return sums(Probe(teacher, token_set(), loss, walk=walk).losses(PLANS[:3]))

        near(*both(work, checkpoint(variant), float64=number % 2 == 0, memory=memory))


@pytest.mark.parametrize("memory", [None, 0])
def test_every_loss_and_every_choice_of_pieces(memory: int | None, checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found = [Probe(teacher, token_set(), loss).losses(PLANS) for loss in LOSSES]
        found.append(Probe(teacher, token_set(), "kl").losses(PLANS, best=2))
        found.append(Probe(teacher, token_set(), "kl", fast=RacingOptions(3)).losses(PLANS, best=2))
        found += [Probe(teacher, items_set(drawn(6, 3)), loss).losses(PLANS) for loss in ITEM_LOSSES]
        narrow = Plan.parse(["mlp.1", "attention.0[1]", "mlp.2[0-9]"])
        return sums([x for losses in found for x in losses if not x.bound]) + sums(
            Probe(teacher, token_set(), "kl").losses([narrow])
        )

    near(*both(work, checkpoint("llama"), memory=memory))


def test_every_metric_without_float64(checkpoint: Folder) -> None:
    """Sites as on an Apple GPU."""

    def work(teacher: Teacher) -> list[float]:
        found: list[float] = []
        for name in METRICS:
            tokens = items_set(drawn(3, 3)) if name.endswith("_task") else documents(4)
            few = {"pairs": 2} if name.startswith("shapley") else {}
            found += values(METRICS[name](Probe(teacher, tokens, "task" if name.endswith("_task") else "kl"), **few))
        return found

    near(*both(work, checkpoint("llama"), float64=False), share=1e-2)


def test_every_metric_of_channel_groups(checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found: list[float] = []
        mixture = any(size.experts > 1 for size in teacher.anatomy.sites)
        for name in GROUP_METRICS:
            if GROUP_METRICS.facts(name).experts != mixture:
                continue
            scores = GROUP_METRICS[name](Probe(teacher, documents(), "kl"))
            found += [float(x) for units in scores.values() for x in units]
        return found

    for variant in ("llama", "mixtral"):
        near(*both(work, checkpoint(variant)), share=2e-2)


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_every_recovery(name: str, checkpoint: Folder) -> None:
    """The loss of what is repaired is that of the CPU's repair, with and without float64."""
    tokens = many_texts(8)
    plan = Plan.parse(["mlp.1[0-30]", "attention.2"]) if name == "compensate" else PLAN
    loss = {} if name not in ("lora", "full") else {"loss": {"lora": "mse", "full": "nll"}[name]}

    def work(teacher: Teacher) -> list[float]:
        repair = recovered(name, teacher, plan, tokens, **loss)
        return sums(Probe(teacher, tokens, "kl", repaired=(plan, repair)).losses([plan]))

    near(*both(work, checkpoint("llama"), float64=name not in ("fold", "lowrank")), share=1e-2)


@pytest.mark.parametrize("variant", ["gemma", "qwen3", "mixtral"])
def test_a_narrower_residual_stream(variant: str, checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found, rows = basis_of(teacher, token_set()), tiny.tokens(1, 9)
        student = sliced(teacher, found.vectors[:, :16])
        require_equal(teacher, [found.vectors[:, :16]], student, rows)
        with torch.no_grad():
            logits = student(input_ids=rows.to(teacher.device)).logits
        return [*found.energies.tolist(), *logits.cpu().flatten().tolist()]

    near(*both(work, checkpoint(variant), float64=variant == "gemma"))


@pytest.mark.parametrize("variant", ["gemma", "qwen3"])
def test_a_basis_for_each_boundary(variant: str, checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found, rows = boundary_bases(teacher, token_set(), 16), tiny.tokens(1, 9)
        bases = [basis.vectors for basis in found]
        student = sliced_by_boundary(teacher, bases)
        require_equal(teacher, bases, student, rows)
        with torch.no_grad():
            logits = student(input_ids=rows.to(teacher.device)).logits
        energies = [x for basis in found for x in basis.energies[:16].tolist()]
        return [*energies, *logits.cpu().flatten().tolist()]

    near(*both(work, checkpoint(variant), float64=variant == "gemma"))


def test_every_evaluation(checkpoint: Folder) -> None:
    tokens = many_texts(12)

    def work(teacher: Teacher) -> list[float]:
        student = apply(teacher, PLAN)
        found = [*perplexity(student, tokens).sums, *log_probabilities(student, items_set(drawn(6, 3)))]
        for result in measure_perplexity(teacher, [(Plan(), NO_REPAIR), (PLAN, NO_REPAIR)], tokens):
            found += result.sums
        rows = tiny.tokens(2, 5).to(teacher.device)
        with torch.inference_mode():
            found += student.generate(rows, max_new_tokens=4, do_sample=False).flatten().tolist()
        return found

    near(*both(work, checkpoint("qwen3")))


RUNS: dict[str, dict[str, Any]] = {
    "swap": {"remove": "3sites", "search": "swap"},
    "fast": {"remove": "3sites", "search": "greedy", "fast": True, "audit": True, "recover": "mean"},
    "joint": {"remove": "30%", "search": "joint", "metric": "taylor_element1", "recover": "fold",
              "set": {"levels": 3, "rounds": 1, "tokens": 48, "start": "greedy"}},
    "oneshot": {"remove": "2blocks", "search": "oneshot", "metric": "cosine", "recover": "lora", "stock": True},
    "evolve": {"remove": "25%", "search": "evolve", "self_share": 0.5,
               "set": {"generations": 2, "offspring": 4, "tokens": 64}},
    "span": {"remove": "1blocks", "search": "contiguous", "metric": "angular_span", "recover": "linear"},
}  # fmt: skip


@pytest.mark.usefixtures("shorter")
@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_end_with_the_same_plan(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    """From the search to a checkpoint that loads back."""
    options = {"data": str(text), "self_share": 0.0, "tokens": 120, "length": 24, "eval_tokens": 240, "eval_length": 24,
               "seed": 1} | RUNS[name]  # fmt: skip
    options |= {"recover_tokens": 240, "recover_length": 24} if "recover" in options else {}

    def work(teacher: Teacher) -> tuple[str, float]:
        place = tmp_path / teacher.device.type
        found = billhook.prune(teacher, out=place / "out", store=place / "runs.db", **options)
        assert (place / "out" / "config.json").is_file()
        assert found.perplexity is not None
        return str(found.plan), found.perplexity.student

    (there, one), (here, other) = both(work, model)
    assert there == here
    assert one == pytest.approx(other, rel=1e-2)
