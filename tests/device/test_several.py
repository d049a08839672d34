"""A model whose blocks lie on two devices computes what it computes on the CPU. The devices refuse to meet.

Two pretended ones, and where gradients are needed a pretended one and the CPU, in both orders. `make test-gpu` runs
this file on two GPUs, or on the one that is there and the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import torch
from places import CPU, FIRST, SECOND, Pair, on_two, spread_over
from pretended import pretended
from test_channel_groups import documents
from test_contract import LOSS_NAMES, PLAN, RUNS, VARIANTS, near, sums, values
from test_multiple_choice import drawn, items_set
from test_probe import PLANS, token_set
from test_recover import many_texts, recovered

import billhook
from billhook.core.errors import ResourceError, UsageError
from billhook.core.plan import Plan
from billhook.engine.bench import Measurer
from billhook.engine.blocks import BlockRunner
from billhook.engine.losses import ITEM_LOSSES, LOSSES
from billhook.engine.probe import Probe
from billhook.engine.workers import crew
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.methods.evaluate.perplexity import measure_perplexity, perplexity
from billhook.methods.export import Student, export_student
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.recover import RECOVERIES, trains
from billhook.models.load import Teacher, as_teacher, load
from billhook.models.repair import NO_REPAIR
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
BOTH, GRADIENTS = (FIRST, SECOND), ((FIRST, CPU), (CPU, FIRST))
NARROW = Plan.parse(["mlp.1[0-9]", "attention.0", "mlp.2[3-40]"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_every_architecture(variant: str, checkpoint: Folder) -> None:
    """Each loss and walk in turn; the plain pass of a student too."""
    number = VARIANTS.index(variant)
    rows = tiny.tokens(2, 7)

    def work(teacher: Teacher) -> list[float]:
        loss, walk = LOSS_NAMES[number % len(LOSS_NAMES)], ("layers", "depth-first")[number % 2]
        found = sums(Probe(teacher, token_set(), loss, walk=walk).losses(PLANS[:3]))
        with torch.inference_mode():
            logits = apply(teacher, PLAN)(input_ids=rows.to(teacher.device), use_cache=False).logits
        return found + logits.flatten().tolist()

    near(*on_two(work, checkpoint(variant), BOTH))


def test_every_loss(checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found = [Probe(teacher, token_set(), loss).losses(PLANS) for loss in LOSSES]
        found.append(Probe(teacher, token_set(), "kl").losses(PLANS, best=2))
        found += [Probe(teacher, items_set(drawn(6, 3)), loss).losses(PLANS) for loss in ITEM_LOSSES]
        found.append(Probe(teacher, token_set(), "kl").losses([NARROW]))
        return sums([x for losses in found for x in losses if not x.bound])

    near(*on_two(work, checkpoint("llama"), BOTH))


@pytest.mark.parametrize("pair", GRADIENTS)
def test_every_metric(pair: Pair, checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found: list[float] = []
        for name in METRICS:
            tokens = items_set(drawn(3, 3)) if name.endswith("_task") else documents(4)
            few = {"pairs": 2} if name.startswith("shapley") else {}
            found += values(METRICS[name](Probe(teacher, tokens, "task" if name.endswith("_task") else "kl"), **few))
        return found

    near(*on_two(work, checkpoint("llama_tied" if pair[0] == CPU else "phi"), pair), share=1e-2)


@pytest.mark.parametrize(("variant", "pair"), [("llama", GRADIENTS[0]), ("mixtral", GRADIENTS[1])])
def test_every_metric_of_channel_groups(variant: str, pair: Pair, checkpoint: Folder) -> None:
    def work(teacher: Teacher) -> list[float]:
        found: list[float] = []
        for name in GROUP_METRICS:
            if GROUP_METRICS.facts(name).experts == (variant == "mixtral"):
                scores = GROUP_METRICS[name](Probe(teacher, documents(), "kl"))
                found += [float(x) for units in scores.values() for x in units]
        return found

    near(*on_two(work, checkpoint(variant), pair), share=2e-2)


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_every_recovery(name: str, checkpoint: Folder) -> None:
    tokens = many_texts(8)
    plan = Plan.parse(["mlp.1[0-30]", "attention.2"]) if name == "compensate" else PLAN
    loss = {"loss": "mse"} if name in ("lora", "bias") else {}

    def work(teacher: Teacher) -> list[float]:
        repair = recovered(name, teacher, plan, tokens, **loss)
        found = sums(Probe(teacher, tokens, "kl", repaired=(plan, repair)).losses([plan]))
        (result,) = measure_perplexity(teacher, [(plan, repair)], tokens)
        return [*found, *result.sums]

    near(*on_two(work, checkpoint("llama"), GRADIENTS[len(name) % 2] if trains(name) else BOTH), share=1e-2)


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

    near(*on_two(work, checkpoint("qwen3"), BOTH))


WHOLE = {"fast": BOTH, "joint": GRADIENTS[0], "oneshot": GRADIENTS[1]}


@pytest.mark.usefixtures("shorter")
@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_end_with_the_same_plan(name: str, model: Path, text: Path, tmp_path: Path) -> None:
    """From the search to a checkpoint that loads back; `oneshot` trains."""
    options: dict[str, Any] = {
        "data": str(text), "self_share": 0.0, "tokens": 120, "length": 24, "eval_tokens": 240, "eval_length": 24,
        "seed": 1,
    } | RUNS[name]  # fmt: skip
    options |= {"recover_tokens": 240, "recover_length": 24} if "recover" in options else {}

    def work(teacher: Teacher) -> tuple[str, float]:
        place = tmp_path / str(len(teacher.devices))
        found = billhook.prune(teacher, out=place / "out", store=place / "runs.db", **options)
        assert (place / "out" / "config.json").is_file()
        assert found.perplexity is not None
        assert found.environment.device == teacher.place
        return str(found.plan), found.perplexity.student

    (there, one), (here, other) = on_two(work, model, WHOLE[name])
    assert there == here
    assert one == pytest.approx(other, rel=1e-2)


# -- what only pretended devices count ------------------------------------------------------------------------------


def test_blocks_are_held_once_and_recorded_arguments_travel_once(checkpoint: Folder) -> None:
    """Each device holds its half of the weights. A second pass over both moves streams and nothing else."""
    gc.collect()
    whole = load(checkpoint("llama"), device="cpu").weight_bytes
    with pretended(devices=BOTH) as costs:
        before = dict(costs.on)
        teacher = load(checkpoint("llama"))
        gc.collect()
        held = [costs.on[index] - before.get(index, 0) for index in (0, 1)]
        assert sum(held) >= whole
        assert max(held) < 0.7 * whole
        assert [str(teacher.block_device(i)) for i in range(4)] == [FIRST, FIRST, SECOND, SECOND]
        assert (str(teacher.device), str(teacher.head_device)) == BOTH
        runner = BlockRunner(teacher, 512)
        ids = tiny.tokens(3, 7).to(FIRST)
        stream = runner.embed(ids)
        for _ in range(2):
            costs.reset()
            x = stream
            for index, block in enumerate(runner.blocks(range(4))):
                x = runner.call(index, block, x)
            assert costs.copied == x.nbytes  # once over the border
            assert str(x.device) == SECOND
        del teacher, runner, x


def test_what_does_not_fit_is_refused_with_figures(checkpoint: Folder) -> None:
    gc.collect()
    whole = load(checkpoint("llama"), device="cpu").weight_bytes
    with pretended(devices=BOTH, limit=int(0.55 * whole)) as costs:
        assert not costs.live
        with pytest.raises(ResourceError, match=r"4 blocks of up to .*pretended:0 0.0 GB.*device='pretended:0' reads"):
            load(checkpoint("llama"))
    with pretended(devices=BOTH, limit=int(0.75 * whole)):
        assert len(load(checkpoint("llama")).devices) == 2  # and one device of that size would stream it
        with pytest.raises(ResourceError, match=r"Several devices hold the whole model. Leave memory= out"):
            load(checkpoint("llama"), memory=whole)
    with pretended(limit=int(0.75 * whole)):
        assert load(checkpoint("llama")).weights is not None


def test_a_loaded_model_stays_where_it_is(checkpoint: Folder) -> None:
    with spread_over(BOTH):
        teacher = load(checkpoint("llama"))
        assert as_teacher(teacher) is teacher
    with pretended(), pytest.raises(UsageError, match=r"is loaded on pretended:0-1, not by device='pretended:0'"):
        as_teacher(teacher, device=FIRST)


@pytest.mark.parametrize("name", ["transformers", "stock", "deci", "gguf"])
def test_exports(name: str, model: Path, tmp_path: Path) -> None:
    """The files are those of one device, byte by byte."""
    rows = tiny.tokens(2, 9)

    def work(teacher: Teacher) -> dict[str, bytes]:
        folder, plan = tmp_path / str(len(teacher.devices)), Plan.parse(["attention.1", "mlp.1"])
        student = Student(apply(teacher, plan), teacher, plan, rows, verify=False)
        export_student(name, student, folder)
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")}

    there, here = on_two(work, tiny_gguf.folder(tmp_path / "model") if name == "gguf" else model, BOTH)
    assert there == here != {}


@pytest.mark.usefixtures("shorter")
def test_workers_are_refused_before_anything_is_measured(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "gives each worker a device of its own, and the model lies on"
    with spread_over(BOTH), pytest.raises(UsageError, match=f"{refused} pretended:0-1. Type workers=1"):
        billhook.prune(load(model), remove="1blocks", data=str(text), workers=2, out=tmp_path / "out")
    monkeypatch.setattr(crew, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=f"{refused} cuda:0-1. Type workers=1, or one device: device='cuda:0'"):
        billhook.prune(
            str(model), remove="1blocks", data=str(text), workers="ray", device="cuda:0-1", out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("walk", ["layers", "depth-first"])
def test_the_first_device_goes_on_with_the_next_groups(walk: str, checkpoint: Folder) -> None:
    """All blocks are asked of some document groups, then of the next ones; losses stay those of one device."""
    jobs = [(group, mask) for group in range(3) for mask in (0b100001, 0b1, 0)]

    @torch.inference_mode()
    def measured(teacher: Teacher) -> tuple[list[int], list[float]]:
        measurer, depths = Measurer(teacher, many_texts(9), "kl", walk=walk), list[int]()
        measurer.measure("full", jobs[:1])  # the references
        measurer.release()
        measurer.runner.chunk = 30
        measurer.walk.look = lambda depth, streams: depths.append(depth)
        found = measurer.measure("full", jobs)
        return depths, [x for job in jobs for x in found[job]]

    depths, there = measured(load(checkpoint("llama"), device="cpu"))
    with pretended(devices=BOTH):
        several, here = measured(load(checkpoint("llama")))
    near(there, here)
    assert depths.count(3) == (1 if walk == "layers" else len(jobs))
    assert several == [0, 1, 2, 3] * 3 if walk == "layers" else several.index(3) < several.index(0, 1)
