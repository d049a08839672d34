"""Results as JSON and back: equal values, whatever they hold, and refusals that say what to do."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.anatomy import Anatomy, GroupSize, SharedNorms, SiteSize, Unassigned
from billhook.core.errors import ResultError
from billhook.core.plan import PARTS, KeptGroups, Plan, Site
from billhook.core.results.json_form import Result, decode, encode
from billhook.core.results.measured import Estimate


@dataclass(frozen=True)
class Part:
    name: str
    change: Estimate | None
    pairs: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, repr=False)
class Made(Result):
    kind: ClassVar[str] = "made"

    verdict: Literal["better", "worse"]
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    share: Fraction
    spec: dict[str, Any]
    late: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        return [{"name": part.name, "change": part.change.value if part.change else None} for part in self.parts]


numbers = st.floats(allow_nan=False)
estimates = st.builds(
    Estimate, numbers, numbers, numbers, st.integers(), st.integers(), st.booleans(), st.sampled_from(["", "one_text"])
)
parts = st.builds(
    Part, st.text(), st.none() | estimates, st.lists(st.tuples(st.integers(), st.text()), max_size=2).map(tuple)
)
results = st.builds(
    Made, st.sampled_from(["better", "worse"]), st.lists(parts, max_size=3).map(tuple),
    st.dictionaries(st.text(), parts, max_size=2), st.fractions(), st.just({"remove": ["10%"], "seed": 0}),
    st.none() | numbers,
)  # fmt: skip


@given(results)
def test_json_and_back_is_the_same_value(result: Made) -> None:
    text = json.dumps(result.to_json(), allow_nan=False)  # JSON that a browser reads too
    assert Made.from_json(json.loads(text)) == result


def a_result(**changed: Any) -> Made:
    one = Part("<b>", Estimate(1.0, -math.inf, math.inf, 1, 1, False, "one_text"))
    return Made(**({"verdict": "worse", "parts": (one,), "by_name": {}, "share": Fraction(1, 3), "spec": {}} | changed))


def test_other_schemas_kinds_and_missing_fields_are_refused() -> None:
    told = a_result().to_json()
    for wrong in ({}, told | {"schema": 1}, told | {"kind": "sweep"}):
        with pytest.raises(ResultError, match="Run the command again"):
            Made.from_json(wrong)
    del told["parts"][0]["change"]
    with pytest.raises(ResultError, match=r"change.*Run the command again"):
        Made.from_json(told)


def test_a_field_with_a_default_may_be_missing() -> None:
    told = a_result(late=2.0).to_json()
    del told["late"]
    assert Made.from_json(told).late is None


def test_a_notebook_shows_the_rows_escaped_and_a_prompt_one_line() -> None:
    assert "&lt;b&gt;" in a_result()._repr_html_()
    assert "<b>" not in a_result()._repr_html_()
    assert repr(a_result()) == "Made(1 row: .rows(), .to_json())"


groups = st.lists(st.integers(0, 40), unique=True, min_size=1).map(lambda ids: tuple(sorted(ids)))
sites = st.builds(Site, st.integers(0, 9), st.sampled_from(PARTS))
plans = st.builds(
    lambda removed, narrow: Plan(frozenset(removed), frozenset(KeptGroups(s, g) for s, g in narrow.items())),
    st.lists(sites.filter(lambda site: site.block < 5)),
    st.dictionaries(sites.filter(lambda site: site.block > 4), groups, max_size=3),
)
sizes = st.integers(0, 2**40)
site_sizes = st.builds(
    SiteSize, sites, sizes, sizes, sizes, sizes, groups=st.just(()) | groups,
    group=st.none() | st.builds(GroupSize, sizes, sizes, sizes, sizes),
)  # fmt: skip
anatomies = st.builds(
    Anatomy, st.text(), st.integers(1, 9), st.lists(site_sizes, max_size=3).map(tuple),
    st.builds(Unassigned, sizes, sizes, sizes), st.lists(st.builds(SharedNorms, sizes, sizes, sizes)).map(tuple),
)  # fmt: skip


@given(plans, anatomies)
def test_plans_and_anatomies_write_themselves(plan: Plan, anatomy: Anatomy) -> None:
    for kind, value in ((Plan, plan), (Anatomy, anatomy)):
        assert decode(kind, json.loads(json.dumps(encode(value)))) == value
    assert encode(plan) == {"removed": plan.names(), "narrowed": plan.narrowed_names(), "key": plan.key()}
