"""What a GPU would wait for, launch and hold, counted on the pretended device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pretended import COSTS, NAME, pretended
from test_probe import PLANS, token_set
from test_recover import PLAN, many_texts, recovered

import billhook
from billhook.core.budget import parse_budgets
from billhook.core.errors import ResourceError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.core.results.measured import TimingProtocol
from billhook.engine.bench import Measurer
from billhook.engine.probe import Probe
from billhook.methods.evaluate.graphed_decoding import FixedDecoding
from billhook.methods.evaluate.speed import time_interleaved
from billhook.methods.search import SEARCHES, Search, drive
from billhook.models import load as loading
from billhook.models.accelerator import memory, products
from billhook.models.load import Teacher, load
from billhook.models.streaming import StreamedWeights
from billhook.models.surgery import apply
from billhook.runs.executor import Executor

Folder = Callable[[str], Path]
RECORDED = "blocks.py:_record"  # where it waits for what rows of a new shape need, once for each shape
WAITS_A_WAVE = 3  # at most: the values of a wave, and two for what is new in it


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("deep") / "model", "llama", num_hidden_layers=8)


@pytest.mark.parametrize(("name", "least"), [("swap", 5), ("joint", 8)])
def test_the_inner_loop_of_a_search_waits_three_times_a_wave(
    name: str, least: int, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measured batch of pieces counts as a wave. What is computed once, the teacher's reference, is apart."""
    waves, measure = [0], Measurer.measure

    def counted(self: Measurer, *args: object) -> object:
        waves[0] += 1
        return measure(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Measurer, "measure", counted)
    with pretended() as costs:
        teacher = load(deep, dtype="float32")
        executor = Executor(Probe(teacher, many_texts(24), "kl"))
        for tokens in (512, None):  # the second probe drops the streams of the first
            executor(MeasureRequest((Plan(),), tokens=tokens, estimate=tokens is not None))
        waves[0] = 0
        costs.reset()
        drive(_search(name, teacher), executor)
        assert waves[0] >= least
        assert costs.waited <= WAITS_A_WAVE * waves[0], costs.waits
        print(f"{waves[0]} waves, {costs.waited} waits, {costs.kernels} kernels: {costs.waits}")


def _search(name: str, teacher: Teacher) -> Search:
    """A search for sites, or the joint one with four widths of each site, of two rounds."""
    if name != "joint":
        return SEARCHES[name](Problem(teacher.anatomy, parse_budgets("4sites")))
    scores = {size.site: tuple(map(float, size.groups)) for size in teacher.anatomy.sites}
    problem = Problem(teacher.anatomy, parse_budgets("20%"), group_scores=scores)
    return SEARCHES[name](problem.check(), levels=4, rounds=2)


@pytest.mark.parametrize("loss", ["kl", "topk_kl", "js", "nll", "angular"])
def test_losses_wait_for_their_values_alone(loss: str, checkpoint: Folder) -> None:
    with pretended() as costs:
        probe = Probe(load(checkpoint("llama"), dtype="float32"), token_set(), loss)
        probe.losses([PLANS[0]])
        costs.reset()
        probe.losses(PLANS[1:3])
        assert costs.waited <= WAITS_A_WAVE, costs.waits


def test_scores_by_gradients_and_spans_wait_a_few_times(checkpoint: Folder) -> None:
    """Once a block for gradients and a few times besides, however many rows there are."""
    found = []
    for texts in (3, 9):
        with pretended() as costs:
            probe = Probe(load(checkpoint("llama"), dtype="float32"), many_texts(texts), "nll")
            for score in (
                lambda probe=probe: probe.sum_over_gradients(
                    lambda w, g, f: (w * g).abs().sum() + f.sum(), fisher=True
                ),
                lambda probe=probe: probe.mean_over_spans(lambda x, y: (x - y).norm(dim=-1), last=False),
            ):
                costs.reset()
                score()
                found.append({line: count for line, count in costs.waits.items() if line != RECORDED})
    print(found)
    by_gradients, by_spans = found[:2]
    assert found[2:] == [by_gradients, by_spans]
    assert sum(by_gradients.values()) <= 4 + 5
    assert sum(by_spans.values()) <= 2


def test_a_head_in_bfloat16_needs_no_copy_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with float32 sums: equal to float32 copies of both sides, and the head's weights once."""
    folder = tiny.saved(tmp_path / "wide", "llama", torch.bfloat16, vocab_size=4096)
    tokens, found, peaks = many_texts(6), [], []
    for kinds in (set(), {NAME}):
        monkeypatch.setattr(products, "WITH_WIDE_SUMS", kinds)
        with pretended() as costs:
            probe = Probe(load(folder, dtype="bfloat16"), tokens, "kl")
            costs.reset()
            found.append([x for loss in probe.losses(PLANS[:2]) for x in loss.sums])
            peaks.append(costs.peak)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert peaks[0] - peaks[1] > 0.9 * 4096 * 32 * 4


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """4.9 MB in float32, nearly all of it in the blocks."""
    return tiny.with_tokenizer(tmp_path / "wide", hidden_size=64, intermediate_size=1536)


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_lora_trains_on_the_shared_weights(wide: Path) -> None:
    """Less than a quarter of another model beside the teacher, while a copy of what is merged is on the device."""
    with pretended() as costs:
        teacher = load(wide, dtype="float32")
        costs.reset()
        before = costs.live
        repair = recovered("lora", teacher, PLAN, many_texts(6), rank=1, batch=1)
        assert {value.device.type for value in repair.weights.values()} == {"cpu"}
        assert costs.peak - before < weights(wide)


def test_out_of_memory_is_answered_by_less_at_a_time(deep: Path) -> None:
    with pretended() as costs:
        teacher = load(deep, dtype="float32")
        tokens = many_texts(24)
        whole = Probe(teacher, tokens, "kl")
        plans = [Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]
        whole.losses([Plan()])
        costs.reset()
        start = costs.live
        expected = [x for loss in whole.losses(plans) for x in loss.sums]
        needed = costs.peak - start
        whole.release_streams()
        del whole
        probe = Probe(teacher, tokens, "kl")
        probe.losses([Plan()])
        COSTS.limit = costs.live + needed // 2
        found = [x for loss in probe.losses(plans) for x in loss.sums]
        COSTS.limit = None
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert probe._measurer.runner.chunk < 16384


def test_no_memory_at_all_is_said(deep: Path) -> None:
    with pretended() as costs:
        probe = Probe(load(deep, dtype="float32"), many_texts(8), "kl")
        COSTS.limit = costs.live + 100
        with pytest.raises(ResourceError, match=r"Out of memory on pretended:0, 4 times.*memory"):
            probe.losses(PLANS[:2])


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        memory.with_less(fails, lambda: None, torch.device("cpu"))
    assert len(calls) == 1


@pytest.mark.usefixtures("shorter")
def test_a_model_that_fits_once_and_not_twice_is_pruned(wide: Path, text: Path, tmp_path: Path) -> None:
    """From the search to the checkpoint that was read back; the device never holds two models."""
    with pretended(limit=int(1.9 * weights(wide))) as costs:
        teacher = load(wide, dtype="float32")
        billhook.prune(
            teacher, remove="3sites", search="greedy", data=str(text), self_share=0.0, tokens=120, length=24,
            eval_tokens=240, eval_length=24, memory=None, out=tmp_path / "out", store=tmp_path / "runs.db",
        )  # fmt: skip
        assert teacher.weights is None
        assert costs.peak < 1.9 * weights(wide)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.usefixtures("shorter")
def test_a_run_on_the_cpu_holds_one_model(
    wide: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded whole once; what was written is read back block by block."""
    whole, streamed = [], []
    build, init = loading._build, StreamedWeights.__init__
    monkeypatch.setattr(loading, "_build", lambda *given: (whole.append(given[0]), build(*given))[1])

    def counted(self: StreamedWeights, folder: Path, *given: Any) -> None:
        streamed.append(folder)
        init(self, folder, *given)

    monkeypatch.setattr(StreamedWeights, "__init__", counted)
    teacher = load(wide, device="cpu", dtype="float32")
    billhook.prune(
        teacher, remove="3sites", search="greedy", data=str(text), self_share=0.0, tokens=120, length=24,
        eval_tokens=240, eval_length=24, out=tmp_path / "out", store=tmp_path / "runs.db",
    )  # fmt: skip
    assert whole == [wide]
    assert len(streamed) == 2  # headers of the teacher, and the student that was written


def test_a_model_goes_to_the_device_tensor_by_tensor(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loader, which makes the whole model in host memory, is not called."""
    import transformers

    def refuse(*_: object, **__: object) -> object:
        raise AssertionError("the whole model in host memory")

    here = load(wide, device="cpu", dtype="float32")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pretended() as costs:
        there = load(wide, dtype="float32")
        assert costs.peak < 1.2 * weights(wide)
        for (name, one), (other, two) in zip(
            there.model.state_dict().items(), here.model.state_dict().items(), strict=True
        ):
            assert name == other
            assert torch.equal(one.cpu(), two)


def test_the_peak_of_a_model_is_its_own(wide: Path) -> None:
    with pretended():
        teacher = load(wide, dtype="float32")
        other = load(wide, dtype="float32")
        one, two = time_interleaved([teacher.model, apply(teacher, PLAN)], [wide, wide], TimingProtocol(4, 2, 1, 1))
        assert other.model is not teacher.model
        assert weights(wide) * 0.9 < one.peak_bytes < 1.3 * weights(wide)  # type: ignore[operator]
        assert two.peak_bytes < one.peak_bytes  # type: ignore[operator]


# -- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt_neox"])
def test_fixed_decoding_writes_what_generation_writes_and_does_not_wait(variant: str, checkpoint: Folder) -> None:
    """A step that waits for the device is no graph."""
    for plan in (Plan(), PLAN):
        rows = tiny.tokens(2, 5)
        model = apply(load(checkpoint(variant), device="cpu", dtype="float32"), plan)
        with torch.inference_mode():
            expected = model.generate(rows, max_new_tokens=5, do_sample=False)[:, 5:]
        with pretended() as costs, torch.inference_mode():
            student = apply(load(checkpoint(variant), dtype="float32"), plan)
            decoding = FixedDecoding(student, rows.to(NAME), 8)
            found = [decoding.token.cpu()]
            for _ in range(4):
                costs.reset()
                decoding.step()
                assert not costs.waited, costs.waits
                found.append(decoding.token.cpu())
        assert torch.equal(torch.cat(found, 1), expected)
