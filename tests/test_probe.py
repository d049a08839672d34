"""The measuring engine gives what a plain forward pass gives, for every architecture, in every order of asking."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_checkpoints import hooked

from billhook.data import Document, TokenSet, pick
from billhook.errors import ModelError
from billhook.loading import Teacher, load
from billhook.losses import LOSSES
from billhook.plan import Plan
from billhook.probe import Probe
from billhook.records import Loss

Folder = Callable[[str], Path]


def token_set(seed: int = 0, prefix: tuple[int, ...] = ()) -> TokenSet:
    """Three texts, four documents, rows of different lengths."""
    draw = random.Random(seed)
    found = [Document(text, tuple(draw.choices(range(3, 64), k=n))) for text, n in ((0, 30), (1, 9), (1, 21), (2, 14))]
    return pick(found, 70, 16, list(prefix), "made up")


@torch.no_grad()
def plain(teacher: Teacher, tokens: TokenSet, plan: Plan, loss: str) -> Loss:
    """One row at a time through the stock model with hooks, losses written out in float64."""
    sums, counts = [0.0] * len(tokens.clusters), [0] * len(tokens.clusters)
    for row, length, document in zip(tokens.rows, tokens.lengths, tokens.documents, strict=True):
        ids = row[None, :length]
        p = teacher.model(input_ids=ids, use_cache=False).logits[0].double().softmax(-1)
        with hooked(teacher, plan):
            q = teacher.model(input_ids=ids, use_cache=False).logits[0].double().softmax(-1)
        if loss == "kl":
            value = (p * (p / q).log()).sum()
        elif loss == "js":
            m = (p + q) / 2
            value = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        else:
            value = -q[torch.arange(length - 1), ids[0, 1:]].log().sum()
        sums[document] += float(value)
        counts[document] += length - (loss == "nll")
    return Loss(loss, tuple(sums), tuple(counts))


def close(a: Loss, b: Loss) -> None:
    assert (a.name, a.counts) == (b.name, b.counts)
    assert a.sums == pytest.approx(b.sums, rel=1e-4, abs=1e-6 * max(a.counts))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_losses_equal_the_plain_pass(variant: str, checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint(variant)), token_set()
    base = ["attention.0", "mlp.2"]
    plans = [
        Plan.of(base + more) for more in ([], ["mlp.3"], ["attention.1"], ["attention.2", "attention.3"], ["mlp.0"])
    ]
    for loss in LOSSES:
        for measured, plan in zip(Probe(teacher, tokens, loss).losses(plans), plans, strict=True):
            close(measured, plain(teacher, tokens, plan, loss))


def test_the_order_of_asking_changes_nothing(checkpoint: Folder) -> None:
    teacher, tokens, draw = load(checkpoint("llama")), token_set(), random.Random(3)
    sites = [str(site) for site in teacher.anatomy.alive()]
    plans = [Plan.of(draw.sample(sites, draw.randrange(4))) for _ in range(24)]
    alone = {plan: next(Probe(teacher, tokens, "kl").losses([plan])) for plan in plans}
    probe = Probe(teacher, tokens, "kl")
    for _ in range(3):  # several rounds, so that kept states are of another base each time
        draw.shuffle(plans)
        size = draw.randrange(2, 9)
        for start in range(0, len(plans), size):
            batch = plans[start : start + size]
            for measured, plan in zip(probe.losses(batch), batch, strict=True):
                assert measured == alone[plan]


def test_what_does_not_fit_is_computed_again(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, tokens = load(checkpoint("gemma2")), token_set()
    plans = [Plan.of([name]) for name in ("attention.0", "mlp.1", "attention.3")]
    roomy = list(Probe(teacher, tokens, "kl").losses(plans))
    monkeypatch.setattr("billhook.probe.CACHE_BYTES", 0)
    monkeypatch.setattr("billhook.probe.BATCH_LOGITS_BYTES", 1)
    tight = Probe(teacher, tokens, "kl")
    for a, b in zip(roomy, tight.losses(plans), strict=True):
        close(a, b)
    assert tight.kept_bytes() == 0


def test_removed_sublayers_are_not_computed(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), token_set()
    calls: list[str] = []
    for name, module in teacher.model.named_modules():
        if name.endswith(("self_attn", "mlp")):
            module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    probe = Probe(teacher, tokens, "kl")
    list(probe.losses([Plan.of(["attention.1"])]))
    calls.clear()
    list(probe.losses([Plan.of(["attention.1", "mlp.2"])]))
    assert "model.layers.1.self_attn" not in calls
    assert "model.layers.2.mlp" not in calls
    assert "model.layers.2.self_attn" in calls


def test_no_divergence_from_oneself_and_the_symmetry_of_js(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("qwen3")), token_set()
    for loss in ("kl", "js"):
        assert abs(next(Probe(teacher, tokens, loss).losses([Plan()])).mean) < 1e-6
    logits = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) * 3
    none = torch.zeros(50, dtype=torch.int64)
    forth, back = LOSSES["js"](logits[0], logits[1], none), LOSSES["js"](logits[1], logits[0], none)
    torch.testing.assert_close(forth, back)
    assert (forth > 0).all()
    assert (forth < 0.6932).all()
    torch.testing.assert_close(LOSSES["kl"](logits[0], logits[1] + 7, none), LOSSES["kl"](logits[0], logits[1], none))


def test_an_overflowing_block_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "m")
    teacher = load(tmp_path / "m")
    with pytest.raises(ModelError, match=r"NaN or infinite from block 2 on, in float32.*download it again"):
        list(Probe(teacher, token_set(), "kl").losses([Plan()]))
