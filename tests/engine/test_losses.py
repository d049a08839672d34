"""Losses of logits: written out by hand on tiny vocabularies, and what holds of them everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.engine.losses import ITEM_LOSSES, LOSSES, loss_facts, top_count, topk_and_rest

NONE = torch.zeros(6, dtype=torch.int64)
LOGITS = st.builds(
    lambda seed, words, scale: torch.randn(2, 6, words, generator=torch.Generator().manual_seed(seed)) * scale,
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.sampled_from([1e-3, 0.3, 3.0, 30.0]),
)  # teacher and student: [2, tokens, words]
some = settings(max_examples=25)
DISTANCES = [name for name in LOSSES if not loss_facts(name).counts_targets]


def value(loss: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return LOSSES[loss](p, q, NONE[: len(p)])


def by_hand(loss: str, p: list[float], q: list[float]) -> float:
    """One token, number by number. `topk_kl` over the likelier half."""
    a, b = ([math.exp(x) / sum(map(math.exp, z)) for x in z] for z in (p, q))
    m = [(x + y) / 2 for x, y in zip(a, b, strict=True)]

    def kl(x: list[float], y: list[float]) -> float:
        return sum(i * math.log(i / j) for i, j in zip(x, y, strict=True))

    if loss == "topk_kl":
        order = sorted(range(len(p)), key=lambda i: -p[i])
        top, others = order[: len(p) // 2], order[len(p) // 2 :]
        a, b = ([*(x[i] for i in top), sum(x[i] for i in others)] for x in (a, b))
    if loss == "angular":
        cosine = sum(x * y for x, y in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q)
        return math.acos(min(1.0, max(0.0, cosine)))
    told = {
        "js": lambda: (kl(a, m) + kl(b, m)) / 2,
        "finercut_js": lambda: (kl(m, a) + kl(m, b)) / 2,
        "norm": lambda: math.dist(p, q),
        "nll": lambda: -math.log(b[0]),
    }
    return told.get(loss, lambda: kl(a, b))()


@pytest.mark.parametrize("loss", sorted(LOSSES))
@some
@given(logits=LOGITS)
def test_a_loss_is_what_its_formula_says(loss: str, logits: torch.Tensor) -> None:
    expected = [by_hand(loss, p, q) for p, q in zip(*logits.double().tolist(), strict=True)]
    assert value(loss, *logits).tolist() == pytest.approx(expected, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("loss", [name for name in LOSSES if loss_facts(name).never_negative])
@some
@given(logits=LOGITS)
def test_no_token_counts_below_zero(loss: str, logits: torch.Tensor) -> None:
    assert (value(loss, *logits) > -1e-6).all()


@pytest.mark.parametrize("loss", DISTANCES)
@some
@given(logits=LOGITS)
def test_zero_from_oneself_and_only_then(loss: str, logits: torch.Tensor) -> None:
    p = logits[0] / logits[0].std()
    assert value(loss, p, p).abs().max() < 1e-6
    assert (value(loss, p, p.flip(-1) * torch.linspace(1, 2, p.shape[-1])) > 1e-6).any()


@pytest.mark.parametrize("loss", ["js", "finercut_js", "angular", "norm"])
@some
@given(logits=LOGITS)
def test_symmetric(loss: str, logits: torch.Tensor) -> None:
    torch.testing.assert_close(value(loss, *logits), value(loss, *logits.flip(0)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["kl", "topk_kl", "js", "finercut_js", "nll"])
@some
@given(logits=LOGITS, by=st.floats(-9, 9))
def test_a_shift_of_all_logits_changes_no_distribution(loss: str, logits: torch.Tensor, by: float) -> None:
    torch.testing.assert_close(value(loss, logits[0], logits[1] + by), value(loss, *logits), rtol=1e-4, atol=1e-5)


@some
@given(logits=LOGITS)
def test_topk_kl_rises_with_k_to_kl(logits: torch.Tensor) -> None:
    p, q = logits
    order, full = p.argsort(-1, descending=True), value("kl", p, q)
    by_k = [value("kl", topk_and_rest(p, order[:, :k]), topk_and_rest(q, order[:, :k])) for k in range(p.shape[-1])]
    room = 1e-5 * (1 + full)
    assert by_k[0].abs().max() < 1e-6, "all words in one bucket"
    for fewer, more in zip(by_k, [*by_k[1:], full], strict=True):
        assert (fewer <= more + room).all()
    torch.testing.assert_close(by_k[-1], full, rtol=1e-5, atol=1e-5)  # a bucket of one word
    assert (value("topk_kl", p, q) <= full + room).all()


def test_topk_kl_tells_512_words_apart_and_always_leaves_some() -> None:
    assert [top_count(words) for words in (1, 2, 7, 1023, 1024, 150_000)] == [0, 1, 3, 511, 512, 512]
    p, q = torch.randn(2, 3, 3000, generator=torch.Generator().manual_seed(0)) * 2
    top = p.topk(512).indices
    torch.testing.assert_close(value("topk_kl", p, q), value("kl", topk_and_rest(p, top), topk_and_rest(q, top)))
    moved = q.clone().scatter_(-1, top, q.gather(-1, top) - 1)  # probability that leaves the top k is seen
    assert (value("topk_kl", p, moved) > value("topk_kl", p, q)).all()


def test_topk_kl_holds_where_the_bucket_is_all_but_empty() -> None:
    p, q = torch.zeros(2, 1, 8)
    p[0, 4:], q[0, :4] = -200.0, -200.0  # all of one side's probability is where the other has none
    assert value("topk_kl", p, q).item() == pytest.approx(200, rel=1e-6)
    assert value("topk_kl", p, p).item() == 0


def test_finercut_js_is_not_the_textbooks() -> None:
    p, q = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[-1.0, 1.0, 0.0]])
    assert value("finercut_js", p, q).item() > value("js", p, q).item() * 1.05
    p, q = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]])
    assert value("js", p, q).item() == pytest.approx(math.log(2))
    assert value("finercut_js", p, q).item() == pytest.approx(30 - math.log(2)), "has no upper bound"


@some
@given(logits=LOGITS, scales=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)))
def test_an_angle_has_no_length(logits: torch.Tensor, scales: tuple[float, float]) -> None:
    angle = value("angular", *logits)
    assert (angle >= 0).all()
    assert (angle <= math.pi / 2).all()
    torch.testing.assert_close(value("angular", logits[0] * scales[0], logits[1] * scales[1]), angle)


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-6])
def test_small_angles_are_precise(small: float) -> None:
    """Where the cosine is 1 in float32, its arccos is 0 or 3e-4."""
    p = torch.tensor([[3.0, 0.0]])
    q = 5 * torch.tensor([[math.cos(small), math.sin(small)]])
    assert value("angular", p, q).item() == pytest.approx(small, rel=1e-5)
    assert value("angular", p, -p).item() == pytest.approx(math.pi / 2), "clamped"


@some
@given(logits=LOGITS, scale=st.floats(0.1, 9))
def test_a_norm_is_homogeneous(logits: torch.Tensor, scale: float) -> None:
    torch.testing.assert_close(value("norm", *(logits * scale)), value("norm", *logits) * scale)


@pytest.mark.parametrize("loss", DISTANCES)
def test_which_losses_a_rotation_of_the_logits_leaves_as_they_are(loss: str) -> None:
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64)).Q.float()
    p, q = torch.randn(2, 6, 12, generator=draw) + 1
    same = torch.allclose(value(loss, p @ rotation, q @ rotation), value(loss, p, q), rtol=1e-5)
    assert same == loss_facts(loss).rotation_free


def test_a_loss_states_its_facts_in_its_decorator() -> None:
    facts = {name: loss_facts(name) for name in (*LOSSES, *ITEM_LOSSES)}
    assert all(each.never_negative for each in facts.values())
    assert {name: each.unit for name, each in facts.items() if each.unit != "nats"} == {
        "angular": "radians", "norm": "logits"
    }  # fmt: skip
    assert [name for name, each in facts.items() if each.counts_targets] == ["nll"]
    assert [name for name, each in facts.items() if each.rotation_free] == ["angular", "norm"]
    assert [name for name, each in facts.items() if each.terms] == ["finercut_js", "js"]
    assert "kl" in LOSSES
    assert "task" not in LOSSES


@pytest.mark.parametrize("name", [name for name in LOSSES if loss_facts(name).terms])
@some
@given(logits=LOGITS)
def test_a_sum_over_words_is_the_sum_of_its_terms(name: str, logits: torch.Tensor) -> None:
    terms = loss_facts(name).terms
    assert terms is not None
    torch.testing.assert_close(terms(*logits.log_softmax(-1)).sum(-1), value(name, *logits), rtol=1e-5, atol=1e-6)
