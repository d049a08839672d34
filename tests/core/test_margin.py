"""Margins: how they are written, and when a student is within one."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.errors import UsageError
from billhook.core.margin import Margin, Margins
from billhook.core.results.json_form import decode, encode
from billhook.core.results.measured import EvalResult


def result(name: str, sums: list[float], counts: list[int] | None = None) -> EvalResult:
    return EvalResult(name, "t", tuple(sums), tuple(counts or [1] * len(sums)), tuple(range(len(sums))))


@pytest.mark.parametrize(
    ("text", "limit", "written"),
    [
        ("3%ppl", math.log(1.03), "3%ppl"),
        (" 2.5 % ppl ", math.log(1.025), "2.5%ppl"),
        ("1pp:a b.jsonl", 0.01, "1pp:a b.jsonl"),
        ("0pp:x.jsonl", 0.0, "0pp:x.jsonl"),
    ],
)
def test_a_margin_is_read_and_written(text: str, limit: float, written: str) -> None:
    margin = Margin.parse(text)
    assert margin.limit == pytest.approx(limit)
    assert str(margin) == written
    assert Margin.parse(str(margin)) == margin


@pytest.mark.parametrize("text", ["3%", "3ppl", "1pp", "1pp:", "ppl", "-1%ppl", "", "101pp:x"])
def test_what_is_no_margin_says_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match=r"3%ppl|1pp:x"):
        Margin.parse(text)


@given(st.floats(-0.05, 0.1), st.integers(0, 1000))
def test_a_student_that_is_worse_by_the_same_everywhere_is_within_exactly_up_to_there(rise: float, seed: int) -> None:
    draw = random.Random(seed)
    counts = [draw.randint(5, 50) for _ in range(40)]
    teacher = [count * draw.uniform(2, 4) for count in counts]
    student = [nats + count * rise for nats, count in zip(teacher, counts, strict=True)]
    for percent in (1, 3, 7):
        kept = Margin.parse(f"{percent}%ppl").check(result("p", teacher, counts), result("p", student, counts))
        assert kept.lost.value == pytest.approx(rise, abs=1e-9)
        if abs(rise - math.log1p(percent / 100)) > 1e-9:
            assert kept.within == (rise < math.log1p(percent / 100))
        assert kept.in_units("ppl").value == pytest.approx(100 * math.expm1(rise), abs=1e-6)


def test_what_counts_is_the_upper_end_and_not_the_mean() -> None:
    """The same mean loss of one point, over many items and over few."""
    margin = Margin.parse("2pp:x")
    verdicts = []
    for n in (200, 20_000):
        teacher = [1.0] * n
        student = [0.0 if i % 100 == 0 else 1.0 for i in range(n)]
        kept = margin.check(result("acc", teacher), result("acc", student))
        assert kept.in_units("pp").value == pytest.approx(1.0)
        verdicts.append(kept.within)
    assert verdicts == [False, True]


def test_a_better_student_is_within_any_margin() -> None:
    teacher, student = [0.0, 1.0] * 50, [1.0] * 100
    kept = Margin.parse("0pp:x").check(result("acc", teacher), result("acc", student))
    assert kept.within
    assert kept.lost.value == -0.5


def test_the_confidence_is_one_sided() -> None:
    """In repeated draws of texts around a loss at the margin, about one in twenty is wrongly within it."""
    draw, wrong = random.Random(3), 0
    margin = Margin.parse("5%ppl")
    for _ in range(400):
        student = [math.log(1.05) + draw.gauss(0, 0.1) for _ in range(50)]
        wrong += margin.check(result("p", [0.0] * 50), result("p", student)).within
    assert 5 <= wrong <= 40, wrong


@pytest.mark.parametrize(
    ("texts", "on_text", "on_a", "on_b"),
    [
        ((), "3%ppl", "1pp", "1pp"),
        ("2.5%ppl", "2.5%ppl", "1pp", "1pp"),
        (("2pp", "5%ppl"), "5%ppl", "2pp", "2pp"),
        (("4pp:a.jsonl", "2pp"), "3%ppl", "4pp:a.jsonl", "2pp"),
    ],
)
def test_margins_are_of_text_of_every_task_and_of_single_ones(
    texts: str | tuple[str, ...], on_text: str, on_a: str, on_b: str
) -> None:
    margins = Margins.parse(texts)
    on = (("t.txt", "perplexity"), ("a.jsonl", "acc"), ("b.jsonl", "flexible_match"))
    assert [str(margins.on(*of)) for of in on] == [on_text, on_a, on_b]
    assert decode(Margins, json.loads(json.dumps(encode(margins)))) == margins


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("1%", "3%ppl"), r"'1%' is not a margin\. Write 3%ppl .* or 1pp .* 1pp:FILE"),
        (("3%ppl", "1%ppl"), r"3%ppl and 1%ppl are both margins of perplexity"),
        (("1pp", "3pp"), r"1pp and 3pp are both margins of accuracy on every task"),
        (("1pp:x", "3pp:x"), r"both margins of accuracy on x\. Leave one of them out"),
        ("101pp", r"Write for example 1pp\."),
        ("1", "is not a margin"),
    ],
)
def test_margins_that_contradict_each_other_are_refused(texts: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Margins.parse(texts)
