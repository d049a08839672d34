"""Bounds over many looks by enumeration and simulation, rules as they are written, and alerts as pure functions."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.errors import RecipeError, UsageError
from billhook.core.events import Event
from billhook.core.monitoring.alerts import Alert, Observation, Rule, evaluate, exact, new_alerts
from billhook.core.monitoring.rules import EXAMPLE, KINDS, default_rules, parse_rules, parse_seconds, read_rules
from billhook.core.monitoring.sequential import (
    ALPHA,
    SHARES,
    evidence_needed,
    item_losses,
    log_e_value,
    loss_bounds,
    mean_bounds,
    median_bounds,
    nats_bounds,
)
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.statistics import paired_difference

WEEKS, ROUNDS_A_WEEK, ITEMS = 200, 168, 200

cached_e_value = cache(
    lambda lost, gained, mean: log_e_value({1.0: lost, 0.0: gained, 0.5: ITEMS - lost - gained}, mean)
)


# -- the chance of a false alert -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.05, 0.5])
def test_no_e_value_is_expected_to_exceed_one(mean: float) -> None:
    """By enumeration: over all outcomes of few items whose mean loss is the limit, weighted by their chances."""
    for lost in (max(mean, 0.0), (1 + mean) / 2):
        chances = {1: lost, -1: lost - mean, 0: 1 - 2 * lost + mean}
        expected = 0.0
        for outcome in itertools.product(chances, repeat=6):
            counts = Counter((1 + loss) / 2 for loss in outcome)
            chance = math.prod(chances[loss] for loss in outcome)
            expected += chance * math.exp(log_e_value(counts, (1 + mean) / 2)) if chance else 0
        assert expected == pytest.approx(1.0), "at the limit itself; below it is less"


def test_the_shares_of_all_looks_are_one_chance() -> None:
    most = 100_000
    shares = math.fsum(math.exp(-evidence_needed(look, 3)) for look in range(1, most))
    rest = 1 / math.log(most) / SHARES * ALPHA / 3  # the integral of the tail
    assert 0.95 * ALPHA < 3 * (shares + rest) <= ALPHA


def test_no_false_alert_in_200_weeks_of_hourly_rounds_without_change() -> None:
    """Items that are answered by chance, 168 rounds a week; the baseline is one such round. The default margin, 1pp."""
    draw = np.random.default_rng(0)
    chances = draw.choice([0.02, 0.5, 0.98], p=[0.3, 0.1, 0.6], size=ITEMS)  # a tenth of the items is undecided
    baseline = draw.random(ITEMS) < chances
    alerts, naive, worst = 0, 0, 0.0
    for look in range(1, WEEKS * ROUNDS_A_WEEK + 1):
        now = draw.random(ITEMS) < chances
        lost, gained = int((baseline & ~now).sum()), int((~baseline & now).sum())
        alerts += cached_e_value(lost, gained, 0.505) >= evidence_needed(look, 6)
        mean = (lost - gained) / ITEMS
        error = math.sqrt((lost + gained) / ITEMS - mean**2) / math.sqrt(ITEMS)
        naive += mean - 1.645 * error > 0.01
        worst = max(worst, mean)
    assert alerts == 0
    assert naive > 10, "a bound of 95% a round does not hold over the rounds"
    assert worst > 0.04, "there was something to be misled by"


def test_series_at_the_very_margin_alert_no_more_often_than_is_said() -> None:
    """The worst case: a true loss of exactly the margin, new noise in each round, as many items as may be right."""
    draw, series, looks = np.random.default_rng(1), 400, 40
    found = 0
    for _ in range(series):
        lost = draw.binomial(ITEMS, 0.05, size=looks)
        found += any(cached_e_value(int(n), 0, 0.525) >= evidence_needed(i, 1) for i, n in enumerate(lost, 1))
    assert found <= ALPHA * series + 3 * math.sqrt(ALPHA * series)


@pytest.mark.parametrize(("look", "most"), [(1, 16), (168, 30), (WEEKS * ROUNDS_A_WEEK // 2, 38)])
def test_a_loss_is_seen_in_one_round_however_late(look: int, most: int) -> None:
    """Of 200 items so many that only the baseline has right are enough, with one task and a margin of 1pp."""
    needed = evidence_needed(look, 6)  # a task, errors, and latency and throughput, each in two units
    enough = next(n for n in range(ITEMS) if loss_bounds([1.0] * n + [0.0] * (ITEMS - n), needed)[0] > 0.01)
    assert enough == most


# -- bounds ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1.0]), min_size=1, max_size=40), st.floats(1, 20))
def test_bounds_are_where_the_evidence_is_enough(losses: list[float], needed: float) -> None:
    low, high = loss_bounds(losses, needed)
    mean = math.fsum(losses) / len(losses)
    assert -1 <= low <= mean + 1e-9 <= high + 2e-9 <= 1 + 3e-9
    counts = Counter((1 + loss) / 2 for loss in losses)
    if low > -0.999:
        assert log_e_value(counts, (1 + low) / 2 - 1e-6) >= needed > log_e_value(counts, (1 + low) / 2 + 1e-6)
    mirrored = loss_bounds([-loss for loss in losses], needed)
    assert mirrored == pytest.approx((-high, -low))


def test_more_evidence_is_asked_of_later_looks_and_of_more_series() -> None:
    needs = [evidence_needed(look) for look in (1, 2, 10, 1000)]
    assert needs == sorted(needs)
    assert evidence_needed(5, 4) == pytest.approx(evidence_needed(5) + math.log(4))


def test_the_bounds_of_a_median_are_values_that_a_sign_test_excludes() -> None:
    values, needed = [float(x) for x in range(1, 49)], evidence_needed(3, 4)
    low, high = median_bounds(values, needed)
    above = sum(value > low - 0.5 for value in values)
    assert log_e_value({1.0: above, 0.0: 48 - above}, 0.5) >= needed
    assert log_e_value({1.0: above - 1, 0.0: 49 - above}, 0.5) < needed
    assert low + high == 49
    assert median_bounds(values[:8], needed) == (-math.inf, math.inf), "8 signs exclude nothing"


def test_errors_are_bounded_as_counts_are() -> None:
    low, high = mean_bounds({1.0: 0, 0.0: 100}, evidence_needed(1))
    assert low == 0 < high < 0.15
    low, high = mean_bounds({1.0: 100, 0.0: 0}, evidence_needed(1))
    assert 0.85 < low < high == 1


def test_copies_of_an_item_are_one() -> None:
    before = EvalResult("acc", "h", (1.0, 1.0, 1.0, 0.0), (1,) * 4, (1, 1, 2, 3))
    now = EvalResult("acc", "h", (0.0, 1.0, 0.0, 1.0), (1,) * 4, (1, 1, 2, 3))
    assert item_losses(before, now) == [0.5, 1.0, -1.0]
    with pytest.raises(ValueError, match="not over the same items"):
        item_losses(before, EvalResult("acc", "h", (0.0,) * 4, (1,) * 4, (1, 2, 3, 4)))


def test_bounds_of_nats_are_students_over_texts() -> None:
    """At 95% two-sided they are near the bootstrap's of `paired_difference`."""
    draw = random.Random(3)
    sums = [draw.gauss(100, 10) for _ in range(60)]
    before = EvalResult("perplexity", "h", tuple(sums), (40,) * 60, tuple(range(60)))
    now = EvalResult("perplexity", "h", tuple(x + draw.gauss(2, 3) for x in sums), (40,) * 60, tuple(range(60)))
    low, high = nats_bounds(before, now, -math.log(0.025))
    other = paired_difference(before, now)
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.25 * (high - low))
    wider = nats_bounds(before, now, evidence_needed(1000, 2))
    assert wider[0] < low < high < wider[1]


# -- alerts ----------------------------------------------------------------------------------------------------------


def seen(low: float, at: float, what: str = "task", kind: str = "quality", unit: str = "pp") -> Observation:
    return Observation(kind, what, unit, Estimate(low + 1, low, low + 2, 50, 50, True), at)  # type: ignore[arg-type]


RULE = Rule("loss", "quality", "critical", 1.0, "pp", rounds=2)


def test_an_alert_holds_when_the_last_rounds_in_a_row_exceed_the_limit() -> None:
    assert evaluate([RULE], [seen(5, 1), seen(0, 2), seen(5, 3)]) == ()
    (alert,) = evaluate([RULE], [seen(5, 1), seen(0, 2), seen(5, 3), seen(6, 4), seen(7, 5)])
    assert (alert.since, alert.value.low, alert.threshold) == (3, 7, 1.0)
    assert evaluate([RULE], [seen(5, 1), seen(6, 2), seen(0.9, 3)]) == (), "its lower end is within the limit"


def test_a_rule_is_about_its_kind_its_unit_and_its_task() -> None:
    both = [seen(5, 1), seen(5, 2), seen(5, 1, "other"), seen(5, 2, "other")]
    assert [alert.what for alert in evaluate([RULE], both)] == ["other", "task"]
    one = Rule("one", "quality", "warning", 1.0, "pp", what="other")
    assert [alert.what for alert in evaluate([one], both)] == ["other"]
    assert evaluate([Rule("ppl", "quality", "warning", 1.0, "%ppl")], both) == ()
    falls = Rule("rate", "throughput", "warning", 0.5, "x", falls=True)
    assert evaluate([falls], [seen(-3, 1, kind="throughput", unit="x")])[0].value.high == -1
    assert evaluate([falls], [seen(-1, 1, kind="throughput", unit="x")]) == ()


def test_a_rule_of_a_ratio_is_about_one_reference_or_any() -> None:
    first, base = (
        seen(5, 1, kind="latency", unit="x"),
        replace(seen(5, 1, kind="latency", unit="x"), against="baseline"),
    )
    for against, found in ((None, ["", "baseline"]), ("", [""]), ("baseline", ["baseline"])):
        rule = Rule("slow", "latency", "warning", 1.0, "x", against=against)
        told = evaluate([rule], [base, first])
        assert [alert.against for alert in told] == found
        assert new_alerts(told, told[:1]) == told[1:], "each is told"
        assert all(Alert.from_event(Event("alert", values=dict(each.event().values))) == each for each in told)


def test_an_alert_is_new_until_it_was_told_and_again_after_it_was_over() -> None:
    first = evaluate([RULE], [seen(5, 1), seen(5, 2)])
    later = evaluate([RULE], [seen(5, 1), seen(5, 2), seen(5, 3)])
    assert new_alerts(first, ()) == first
    assert new_alerts(later, first) == ()
    again = evaluate([RULE], [seen(5, 1), seen(5, 2), seen(0, 3), seen(5, 4), seen(5, 5)])
    assert new_alerts(again, first) == again


def test_an_alert_survives_the_store() -> None:
    (alert,) = evaluate([Rule("r", "stopped", "warning", 0.0, "")], [Observation("stopped", "r1", "", exact(7.0), 1.0)])
    infinite = Alert("r", "critical", "latency", "x", Estimate(2, 1.5, math.inf, 3, 3, False), 1, "x", 5.0, "2 of 3")
    for each in (alert, infinite):
        assert Alert.from_event(Event("alert", values=dict(each.event().values))) == each
        assert all(isinstance(value, str | int | float) for value in each.event().values.values())


# -- rules as they are written ---------------------------------------------------------------------------------------


def test_every_kind_and_unit_that_a_message_offers_can_be_read() -> None:
    for kind, limits in KINDS.items():
        for example in limits.examples or ("",):
            rule = {"name": "a", "when": kind} | ({limits.key: example} if limits.key else {})
            (read,) = parse_rules({"rules": [rule]}, "here")
            assert (read.kind, read.falls) == (kind, limits.falls)
    (memory,) = parse_rules({"rules": [{"name": "m", "when": "memory", "above": "8GB"}]}, "here")
    (stalled,) = parse_rules({"rules": [{"name": "s", "when": "stalled", "after": "1.5h"}]}, "here")
    assert (memory.limit, memory.unit, stalled.limit, stalled.unit) == (8e9, "bytes", 5400, "s")
    assert [rule.name for rule in default_rules("watch") if rule.severity == "critical"] == [
        "quality of tasks", "quality of texts", "errors",
    ]  # fmt: skip
    assert all(rule.severity == "warning" for rule in default_rules("runs")), "which end no pruning with an error"


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("{name: a, when: qualty, loses: 1pp}", "'qualty', which is not watched. Did you mean quality"),
        ("{name: a, when: quality, looses: 1pp}", "unknown key 'looses'. Did you mean loses"),
        ("{name: a, when: quality, loses: 1}", "loses: 1"),
        ("{name: a, when: quality, loses: '1'}", "has no unit. Write loses: 1pp or loses: 3%ppl"),
        ("{name: a, when: quality, loses: 1x}", "the unit 'x'. Write loses: 1pp"),
        ("{name: a, when: quality, loses: 200pp}", "more than 100 percentage points"),
        ("{name: a, when: quality, loses: much}", "no number"),
        ("{name: a, when: quality}", "has no limit. Write loses: 1pp or loses: 3%ppl"),
        ("{name: a, when: latency, below: 2s}", "`below`, and latency takes `above`, such as above: 1.5x"),
        ("{name: a, when: latency, above: 2min}", "the unit 'min'. Write above: 1.5x or above: 2s"),
        ("{name: a, when: memory, above: 8}", "above: 8"),
        ("{name: a, when: memory, above: 8gb}", "the unit 'gb'. Write above: 8GB"),
        ("{name: a, when: stopped, after: 3h}", "`after`, and stopped has no limit"),
        ("{name: a, when: latency, above: 2x, against: base}", "against: 'base'. Did you mean baseline"),
        ("{name: a, when: latency, above: 2s, against: baseline}", "goes with a ratio. Write for example above: 1.5x"),
        ("{name: a, when: errors, above: 5%, severity: fatal}", "severity 'fatal'"),
        ("{name: a, when: errors, above: 5%, rounds: 0}", "rounds: 0"),
        ("{when: errors, above: 5%}", "has no 'name'"),
        ("text", "not a rule"),
    ],
)
def test_a_mistake_in_a_rule_is_told_with_what_is_allowed(rule: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(f"rules:\n- {{name: good, when: stopped}}\n- {rule}\n")
    with pytest.raises(RecipeError) as refused:
        read_rules(file)
    assert told in refused.value.message
    assert "rule 2" in refused.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {name: a}", "no list under the one key `rules`"),
        ("rules: 3", "no list under the one key `rules`"),
        ("rules: []\nother: 1", "no list under the one key `rules`"),
        ("rules: [\n", "cannot be read as YAML"),
        ("rules:\n- {name: a, when: stopped}\n- {name: a, when: stopped}", "two rules called 'a'"),
        ("rules:\n- {name: a, name: b, when: stopped}", "file of rules has 'name' twice"),
        ("rules: !!python/object:os.system {}", "cannot be read as YAML"),
    ],
)
def test_what_is_no_file_of_rules_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as refused:
        read_rules(file)
    assert told in refused.value.message
    with pytest.raises(RecipeError, match="There is no file of rules"):
        read_rules(tmp_path / "none.yaml")


def test_the_example_of_the_messages_is_a_file_of_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(EXAMPLE)
    assert read_rules(tmp_path / "rules.yaml") == (Rule("too slow", "latency", "warning", 1.5, "x"),)


def test_times_have_a_unit() -> None:
    assert [parse_seconds(text, "every") for text in ("1h", "30min", "0.5s", "2d")] == [3600, 1800, 0.5, 172800]
    for wrong in ("1", "1 hour", "-1h", "h"):
        with pytest.raises(UsageError, match="Write for example"):
            parse_seconds(wrong, "every")
