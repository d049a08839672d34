"""Scores by gradients: those of autograd on the whole model, with the gradients of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from test_metrics import rows_of, values_of
from test_probe import documents, token_set
from torch.profiler import ProfilerActivity, profile

from billhook.core.errors import ModelError, ResourceError
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.problem import ScoredUnit
from billhook.data.token_sets import TokenSet
from billhook.engine.head import Head
from billhook.engine.probe import Probe
from billhook.methods.export.checkpoint import save
from billhook.methods.metrics import METRICS
from billhook.models import structure
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
KINDS = ("element", "vector", "second")
STREAMED = ("llama", "llama_tied", "phi", "gpt2", "gpt_oss", "mixtral", "falcon", "gemma2", "opt")


def autograd(folder: Path, tokens: TokenSet) -> dict[str, dict[ScoredUnit, float]]:
    """The three scores of every unit, from gradients of the whole model, one row at a time."""
    teacher = load(folder)
    model = teacher.model.requires_grad_(True)
    total, squares = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    predicted = sum(n - 1 for n in tokens.lengths)
    for row, _ in rows_of(tokens):
        model.zero_grad()
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        count = len(row) - 1
        F.cross_entropy(logits[:-1], row[1:], reduction="mean").backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad * count / predicted
                squares[name] += p.grad**2 * count / predicted
    found: dict[str, dict[ScoredUnit, float]] = {kind: {} for kind in KINDS}
    for position in teacher.positions:
        block = teacher.block(position)
        inside = {id(p): name for name, p in model.named_parameters()}
        units: dict[ScoredUnit, list[torch.Tensor]] = {
            Site(position, part): [
                p
                for m in structure.site_modules(block, part, teacher.architecture, model.config)
                for p in m.parameters()
            ]
            for part in PARTS
        }
        units[position] = list(block.parameters())
        for unit, parameters in units.items():
            if not parameters:
                continue
            sums = dict.fromkeys(KINDS, 0.0)
            for p in parameters:
                name = inside[id(p)]
                w, g, f = p.detach(), total[name], squares[name]
                sums["element"] += float((w * g).abs().sum())
                sums["second"] += float((w * g - f * w**2 / 2).abs().sum())
                sums["vector"] += float(by_row(model.config.model_type, name, w * g).abs().sum())
            for kind, value in sums.items():
                found[kind][unit] = value
    return found


def by_row(model_type: str, name: str, product: torch.Tensor) -> torch.Tensor:
    """Summed over the inputs of every output."""
    if product.dim() == 1 or name.endswith("bias"):
        return product
    if model_type == "gpt2" or (model_type == "gpt_oss" and "experts" in name):  # [inputs, outputs]
        return product.sum(-2)
    return product.sum(-1)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_taylor_is_that_of_autograd_on_the_whole_model(variant: str, checkpoint: Folder) -> None:
    tokens = token_set()
    expected = autograd(checkpoint(variant), tokens)
    teachers = [load(checkpoint(variant)), *([load(checkpoint(variant), memory=0)] if variant in STREAMED else [])]
    for teacher in teachers:
        assert (teacher.weights is not None) == (teacher is not teachers[0])
        for kind in KINDS if teacher.weights is None else KINDS[-1:]:
            found = METRICS["taylor"](Probe(teacher, tokens, "kl"), kind=kind)
            assert values_of(found) == pytest.approx(expected[kind], rel=2e-4), kind
            assert {score.se for score in found.values()} == {None}
    assert METRICS["taylor"](Probe(teachers[0], tokens, "kl")) != found  # the element, unless told otherwise


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("variant", ["llama", "phi", "falcon"])
def test_a_model_that_was_pruned_before(variant: str, streamed: bool, checkpoint: Folder, tmp_path: Path) -> None:
    dense, gone = load(checkpoint(variant)), Plan.parse(["attention.0", "mlp.0", "attention.2", "mlp.3"])
    save(apply(dense, gone), None, gone, tmp_path / "cut", teacher=dense)
    teacher = load(tmp_path / "cut", memory=0 if streamed else None)
    expected = autograd(tmp_path / "cut", token_set())["second"]
    found = METRICS["taylor"](Probe(teacher, token_set(), "kl"), kind="second")
    assert values_of(found) == pytest.approx(expected, rel=2e-4)
    assert set(found) == {Site(1, "attention"), Site(1, "mlp"), Site(2, "mlp"), Site(3, "attention"), 1, 2, 3}


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_count_by_their_tokens_in_whatever_order(seed: int, checkpoint: Folder) -> None:
    """Other texts, and rows so many and long that they do not go through a block together."""
    tokens = documents(16, length=40, seed=seed)
    found = METRICS["taylor"](Probe(load(checkpoint("qwen2")), tokens, "kl"))
    assert values_of(found) == pytest.approx(autograd(checkpoint("qwen2"), tokens)["element"], rel=2e-4)


# -- what it leaves behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_teacher_stays_as_it_is(mode: Callable[[], torch.inference_mode], checkpoint: Folder) -> None:
    """Its tensors bit for bit, gradients that somebody else left, who wants any, and the parameters themselves."""
    teacher = load(checkpoint("mixtral"))
    for i, parameter in enumerate(teacher.model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        if i % 4 == 0:
            parameter.grad = torch.full_like(parameter, float(i))

    def state() -> list[tuple[int, bool, bytes, bytes | None]]:
        return [
            (id(p), p.requires_grad, p.detach().numpy().tobytes(), None if p.grad is None else p.grad.numpy().tobytes())
            for p in teacher.model.parameters()
        ]

    before = state()
    with mode():
        probe = Probe(teacher, token_set(), "kl")
        losses = probe.losses([Plan()])
        found = METRICS["taylor"](probe, kind="second")
        assert probe.losses([Plan()]) == losses
    assert state() == before
    assert not teacher.model.training
    assert values_of(found) == values_of(METRICS["taylor"](Probe(teacher, token_set(), "kl"), kind="second"))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_streamed_model_has_no_more_weights_afterwards(streamed: bool, checkpoint: Folder) -> None:
    """Forward and backward read every block once each, and leave none."""
    teacher = load(checkpoint("phi3"), memory=0 if streamed else None)
    before = teacher.weights.bytes_read if teacher.weights is not None else 0
    METRICS["taylor"](Probe(teacher, documents(4), "kl"))
    on_meta = [p.device.type == "meta" for p in structure.blocks_of(teacher.model, teacher.architecture).parameters()]
    assert set(on_meta) == {streamed}
    if teacher.weights is not None:
        blocks = sum(size.bytes for size in teacher.anatomy.sites) + sum(s.bytes for s in teacher.anatomy.shared)
        embedding = 64 * 32 * 4
        assert 2 * blocks <= teacher.weights.bytes_read - before <= 2 * blocks + 12 * embedding


def peak(work: Callable[[], object]) -> int:
    """Bytes of tensors that are held at most while something runs, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    told = seen.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((event for event in told if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("kind", ["element", "second"])
@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_only_one_block_has_gradients_at_a_time(variant: str, kind: str, tmp_path: Path) -> None:
    """Of a model with 8 blocks more, only the streams between them are in memory as well."""
    tokens = documents(4)
    peaks = []
    for blocks in (4, 12):
        teacher = load(tiny.saved(tmp_path / str(blocks), variant, num_hidden_layers=blocks))
        probe = Probe(teacher, tokens, "kl")
        peaks.append(peak(lambda probe=probe: METRICS["taylor"](probe, kind=kind)))  # type: ignore[misc]
    streams, weights = 8 * 4 * 24 * 32 * 4, 8 * 4 * sum(p.numel() for p in teacher.block(0).parameters())
    assert abs(peaks[1] - peaks[0] - streams) < weights / 8
    teacher.model.requires_grad_(True)
    whole = peak(lambda: teacher.model(input_ids=tokens.rows, labels=tokens.rows, use_cache=False).loss.backward())
    assert whole > peaks[1] + weights


def test_gradients_that_do_not_fit_are_refused(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), documents(4), "kl", memory=1)
    with pytest.raises(ResourceError, match=r"Gradients take 0\.00 GB .* room for 0\.00 GB. Use fewer tokens="):
        METRICS["taylor"](probe)


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter.mul_(1e25)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="NaN or infinite from block 2 on, in float32"):
        METRICS["taylor"](Probe(load(tmp_path / "m"), token_set(), "kl"))


# -- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("variant", ["llama", "gemma2", "cohere", "phi"])
def test_gradients_through_the_head(variant: str, streamed: bool, tmp_path: Path) -> None:
    """Bias, scale and cap, a vocabulary in several pieces, and tokens in several."""
    folder = tiny.saved(tmp_path / "m", variant, vocab_size=17_000)
    whole = load(folder)
    teacher: Teacher = load(folder, memory=0) if streamed else whole
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1_100, 32, generator=draw).requires_grad_()
    targets = torch.randint(0, 17_000, (1_100,), generator=draw)
    logits = whole.model.lm_head(hidden) * (whole.model.logit_scale if variant == "cohere" else 1)
    cap = getattr(whole.model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    with torch.no_grad():
        found = Head(teacher, "nll", 0).nll_gradients(hidden.detach(), targets)
    assert hidden.grad is not None
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close(kind: str, checkpoint: Folder) -> None:
    exact = METRICS["taylor"](Probe(load(checkpoint("gemma")), token_set(), "kl"), kind=kind)
    rough = METRICS["taylor"](Probe(load(checkpoint("gemma"), dtype="bfloat16"), token_set(), "kl"), kind=kind)
    assert values_of(rough) == pytest.approx(values_of(exact), rel=0.3)
