"""Plans, anatomies, budgets and problems: every rule against brute force over all subsets of small models."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from billhook.core.anatomy import Anatomy, SiteSize, Unassigned
from billhook.core.budget import UNITS, Budget, parse_budgets
from billhook.core.errors import BudgetError, PlanError
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.problem import Move, Problem, parse_protection

NOTHING = Plan()
MEASURES = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token")
FIELDS = dict(zip(("params", "bytes", "kv", "flops", "ms"), MEASURES, strict=True))  # what a unit is a share of
SITES = st.builds(Site, st.integers(0, 120), st.sampled_from(PARTS))


def anatomy_of(parameters: dict[Site, int], blocks: int, rest: int = 7) -> Anatomy:
    """Sizes whose five measures differ, so that no test can confuse them. An mlp has no cache."""
    sizes = (
        SiteSize(s, n, 2 * n + 1, 1 + n % 3 if s.part == "attention" else 0, 5 * n, 400_001 * n)
        for s, n in sorted(parameters.items())
    )
    return Anatomy("tiny", blocks, tuple(sizes), Unassigned(rest, 2 * rest, 11, 1, 900_000))


def plain(blocks: int, attention: int = 4, mlp: int = 9, rest: int = 7) -> Anatomy:
    return anatomy_of({Site(b, p): attention if p == "attention" else mlp for b in range(blocks) for p in PARTS},
                      blocks, rest)  # fmt: skip


@st.composite
def anatomies(draw: st.DrawFn) -> Anatomy:
    """Up to 4 blocks of uneven size, some sites already removed, at least one of each part left."""
    blocks = draw(st.sampled_from([1, 2, 3, 4, 4]))
    sites = [Site(b, p) for b in range(blocks) for p in PARTS]
    alive = set(sites) - draw(st.sets(st.sampled_from(sites), max_size=3))
    alive |= {Site(draw(st.integers(0, blocks - 1)), part) for part in PARTS}
    return anatomy_of({s: draw(st.integers(1, 9)) for s in sorted(alive)}, blocks, draw(st.integers(0, 20)))


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    unit, share = draw(st.sampled_from(sorted(UNITS))), draw(st.booleans())
    top = 100 if share else {"params": 60, "bytes": 120, "kv": 12, "flops": 300, "ms": 25}.get(unit, 7)
    return Budget.parse(f"{draw(st.integers(1, top))}{'%' if share else ''}{unit}")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One to three budgets, of which some cannot be met."""
    anatomy = draw(anatomies())
    several = draw(st.lists(budgets(), min_size=1, max_size=3, unique_by=lambda budget: budget.unit))
    return Problem(anatomy, tuple(several), draw(_protected(anatomy)))


def _protected(anatomy: Anatomy) -> st.SearchStrategy[frozenset[Site]]:
    everywhere = [Site(b, p) for b in range(anatomy.blocks) for p in PARTS]
    return st.integers(0, 3).flatmap(lambda n: st.frozensets(st.sampled_from(everywhere), max_size=n))


@st.composite
def solvable(draw: st.DrawFn) -> Problem:
    """A problem with up to three budgets that one plan at least meets, often only just."""
    anatomy = draw(anatomies())
    units = draw(st.lists(st.sampled_from(sorted(UNITS)), min_size=1, max_size=3, unique=True))
    problem = Problem(anatomy, tuple(Budget.parse(f"1{unit}") for unit in units), draw(_protected(anatomy)))
    found = [plan for plan in unions(problem) if all(worth(anatomy, unit, plan) for unit in units)]
    assume(found)
    goal = draw(st.sampled_from(found))
    most = {unit: worth(anatomy, unit, goal) for unit in units}
    asked = {unit: most[unit] - draw(st.integers(0, most[unit] - 1) | st.just(0)) for unit in units}
    exact = tuple(Budget(Fraction(asked[unit], 10**6 if unit == "ms" else 1), unit, False) for unit in units)
    return Problem(anatomy, exact, problem.protected)


def subsets(sites: tuple[Site, ...]) -> list[Plan]:
    return [Plan(frozenset(c)) for c in chain.from_iterable(combinations(sites, k) for k in range(len(sites) + 1))]


def allowed(problem: Problem, plan: Plan) -> bool:
    """One of each part stays, and everything protected."""
    left = set(problem.anatomy.sites_present()) - plan.removed
    return {s.part for s in left} == set(PARTS) and not plan.removed & problem.protected


def worth(anatomy: Anatomy, unit: str, plan: Plan) -> int:
    """What `plan` takes away, counted by hand; of ms in ns."""
    gone = [size for size in anatomy.sites if size.site in plan.removed]
    if unit in FIELDS:
        return sum(getattr(size, FIELDS[unit]) for size in gone)
    if unit == "blocks":
        before = {s.block for s in anatomy.sites_present()}
        return len(before) - len({s.block for s in anatomy.sites_present() if s not in plan.removed})
    return sum(unit in ("sites", size.site.part) for size in gone)


def enough(anatomy: Anatomy, budget: Budget, plan: Plan) -> bool:
    """Whether `plan` meets `budget`, counted by hand."""
    spent, fine = worth(anatomy, budget.unit, plan), 10**6 if budget.unit == "ms" else 1
    if not budget.share:
        return spent >= budget.amount * fine
    everything = worth(anatomy, budget.unit, Plan(frozenset(anatomy.sites_present())))
    if budget.unit in FIELDS:
        everything += getattr(anatomy.rest, FIELDS[budget.unit])
    return 100 * spent >= budget.amount * everything


def groups_of(problem: Problem, plan: Plan = NOTHING) -> list[Move]:
    """What may go at once: blocks where a budget counts blocks, else the sites that a budget counts. By hand."""
    anatomy, units = problem.anatomy, [budget.unit for budget in problem.budgets]
    left = [s for s in anatomy.sites_present() if s not in plan.removed]
    if "blocks" in units:
        whole = [tuple(s for s in left if s.block == b) for b in range(anatomy.blocks)]
        return [block for block in whole if block]
    return [(s,) for s in left if any(worth(anatomy, unit, Plan(frozenset({s}))) for unit in units)]


def unions(problem: Problem) -> list[Plan]:
    """Every plan that may be reached, whether or not it meets the budgets."""
    groups = groups_of(problem)
    chosen = chain.from_iterable(combinations(groups, k) for k in range(len(groups) + 1))
    plans = [Plan(frozenset(s for group in some for s in group)) for some in chosen]
    return [plan for plan in plans if allowed(problem, plan)]


def ends(problem: Problem) -> list[Plan]:
    """Every plan that meets all budgets, by brute force."""
    return [p for p in unions(problem) if all(enough(problem.anatomy, budget, p) for budget in problem.budgets)]


# --- sites and plans ---------------------------------------------------------------------------------------------


@given(SITES)
def test_a_site_is_read_as_it_is_written(site: Site) -> None:
    assert Site.parse(str(site)) == Site.parse(f"  {site.part}:{site.block} ") == site


@pytest.mark.parametrize("text", ["", "attention", "mlp.-1", "mlp.x", "7", "mlp.1.2", "attention.1,mlp.2", "ffn.3"])
def test_what_is_no_site_is_quoted_with_the_spelling_that_is_meant(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Site.parse(text)
    assert repr(text) in str(caught.value)
    assert "attention.7 or mlp.16" in str(caught.value)


MISSPELT = {"atention.7": "attention.7", "Attention.3": "attention.3", "mpl.16": "mlp.16"}


@pytest.mark.parametrize(("text", "meant"), MISSPELT.items())
def test_a_misspelt_site_names_the_nearest(text: str, meant: str) -> None:
    with pytest.raises(PlanError, match=rf"Did you mean {meant}\?"):
        Site.parse(text)


@given(st.lists(SITES, unique=True), st.randoms())
def test_a_plan_does_not_remember_the_order_of_its_removals(sites: list[Site], random: object) -> None:
    shuffled = list(sites)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = Plan().without(*sites), Plan()
    for site in shuffled:
        other = other.without(site)
    assert (one, hash(one), one.key(), str(one)) == (other, hash(other), other.key(), str(other))
    assert one.sites() == sorted(sites, key=lambda s: (s.block, s.part != "attention"))


def test_the_key_is_sixteen_hex_digits_of_the_sha256_of_the_sorted_sites() -> None:
    plan = Plan(frozenset({Site(16, "mlp"), Site(7, "mlp"), Site(7, "attention")}))
    text = b'[[7, "attention"], [7, "mlp"], [16, "mlp"]]'
    assert plan.key() == hashlib.sha256(text).hexdigest()[:16]
    assert Plan().key() == hashlib.sha256(b"[]").hexdigest()[:16]


@given(st.sets(SITES), st.sets(SITES))
def test_keys_are_equal_exactly_when_plans_are(a: set[Site], b: set[Site]) -> None:
    assert (Plan(frozenset(a)).key() == Plan(frozenset(b)).key()) == (a == b)


@given(st.sets(SITES))
def test_a_plan_survives_json_by_its_names(sites: set[Site]) -> None:
    plan = Plan(frozenset(sites))
    assert Plan.parse(json.loads(json.dumps(plan.names()))) == plan


def test_without_leaves_the_plan_as_it_was() -> None:
    plan = Plan(frozenset({Site(1, "mlp")}))
    assert plan.without(Site(2, "mlp")) != plan == Plan(frozenset({Site(1, "mlp")}))
    assert plan.without(Site(1, "mlp")) == plan


def test_a_plan_refuses_a_site_that_is_named_twice() -> None:
    with pytest.raises(PlanError, match=r"names mlp\.2 more than once.*Name each site once"):
        Plan.parse(["mlp.2", "attention.2", "mlp:2"])


@given(st.sets(st.builds(Site, st.integers(0, 5), st.sampled_from(PARTS))))
def test_blocks_are_those_that_lost_both_sites(sites: set[Site]) -> None:
    expected = [b for b in range(6) if Site(b, "attention") in sites and Site(b, "mlp") in sites]
    assert Plan(frozenset(sites)).blocks() == expected


# --- anatomies ---------------------------------------------------------------------------------------------------


@given(anatomies(), st.data())
def test_what_goes_and_what_stays_add_up(anatomy: Anatomy, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(subsets(anatomy.sites_present())))
    for what in MEASURES:
        gone = sum(getattr(size, what) for size in anatomy.sites if size.site in plan.removed)
        everything = sum(getattr(size, what) for size in anatomy.sites)
        assert anatomy.total(what) == everything + getattr(anatomy.rest, what)
        assert anatomy.total(what, plan) == anatomy.total(what) - gone


@given(problems())
def test_check_refuses_exactly_what_must_stay(problem: Problem) -> None:
    for plan in subsets(problem.anatomy.sites_present()):
        if allowed(problem, plan):
            assert problem.anatomy.check(plan, problem.protected) is plan
        else:
            with pytest.raises(PlanError):
                problem.anatomy.check(plan, problem.protected)


def test_check_says_what_was_wrong_and_what_to_do() -> None:
    half = anatomy_of({Site(0, "attention"): 1, Site(0, "mlp"): 1, Site(2, "attention"): 1, Site(2, "mlp"): 1}, 3)
    cases = [
        (Plan.parse(["attention.3"]), frozenset(), r"no attention\.3.*blocks 0 to 2"),
        (Plan(frozenset({Site(-1, "mlp")})), frozenset(), r"no mlp\.-1.*blocks 0 to 2"),
        (Plan.parse(["mlp.1"]), frozenset(), r"mlp\.1 was already removed.*billhook inspect"),
        (Plan.parse(["mlp.2"]), frozenset({Site(2, "mlp")}), r"removes mlp\.2, which protect= keeps\. Change one"),
        (Plan.parse(["mlp.0", "mlp.2"]), frozenset(), r"every mlp site\. At least one of each kind must stay"),
        (Plan.parse(["attention.0", "attention.2"]), frozenset(), r"every attention site"),
    ]
    for plan, protected, message in cases:
        with pytest.raises(PlanError, match=message):
            half.check(plan, protected)


# --- budgets -----------------------------------------------------------------------------------------------------

SPELLINGS = {
    "25%": (25, "params", True),
    "12.5 %": (Fraction(25, 2), "params", True),
    "25%params": (25, "params", True),
    "25% parameters": (25, "params", True),
    "25%sites": (25, "sites", True),
    "100%blocks": (100, "blocks", True),
    "15sites": (15, "sites", False),
    "1site": (1, "sites", False),
    " 8 attention ": (8, "attention", False),
    "4mlp": (4, "mlp", False),
    "3blocks": (3, "blocks", False),
    "1block": (1, "blocks", False),
    "17params": (17, "params", False),
    "17param": (17, "params", False),
    "2kparams": (2_000, "params", False),
    "30Mparams": (30_000_000, "params", False),
    "1.5Mparameters": (1_500_000, "params", False),
    "2Gparams": (2 * 10**9, "params", False),
    "0.1Bparams": (10**8, "params", False),
    "3 Bparams": (3 * 10**9, "params", False),
    "100MB": (10**8, "bytes", False),
    "2GB": (2 * 10**9, "bytes", False),
    "1.5kB": (1_500, "bytes", False),
    "7bytes": (7, "bytes", False),
    "1byte": (1, "bytes", False),
    "25%B": (25, "bytes", True),
    "25%bytes": (25, "bytes", True),
    "30%kv": (30, "kv", True),
    "12kkv": (12_000, "kv", False),
    "12kv": (12, "kv", False),
    "2MBkv": (2_000_000, "kv", False),
    "1.5Mflops": (1_500_000, "flops", False),
    "2Gflop": (2 * 10**9, "flops", False),
    "20%flops": (20, "flops", True),
    "5ms": (5, "ms", False),
    "0.25ms": (Fraction(1, 4), "ms", False),
    "20%ms": (20, "ms", True),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_budget_is_read(text: str) -> None:
    assert Budget.parse(text) == Budget(*SPELLINGS[text])


@given(st.integers(1, 10**13), st.sampled_from(sorted(UNITS)))
def test_a_count_is_written_as_it_is_read(number: int, unit: str) -> None:
    assert Budget.parse(str(Budget(Fraction(number), unit, False))) == Budget(Fraction(number), unit, False)


@given(st.decimals("0.0000001", 100, places=7), st.sampled_from(sorted(UNITS)))
def test_a_share_is_written_as_it_is_read(number: object, unit: str) -> None:
    budget = Budget.parse(f"{number:f}%{unit}")
    assert budget.amount == Fraction(str(number))
    assert Budget.parse(str(budget)) == budget


@given(st.lists(budgets(), min_size=1, max_size=4, unique_by=lambda budget: budget.unit))
def test_several_budgets_are_read_as_they_are_written(several: list[Budget]) -> None:
    assert parse_budgets(" , ".join(map(str, several))) == tuple(several)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20%params,3Mparams", "'20%params,3Mparams' has two budgets in params. Keep the larger one"),
        ("1GB,30%kv,20%bytes", "two budgets in bytes"),
        ("20%,15%parameters", "two budgets in params"),
        ("20%params,", "'' is not a budget"),
        ("20%params,3kvs", r"'kvs', which is not a unit\. Did you mean kv\?"),
    ],
)
def test_several_budgets_that_cannot_be_read_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("25", r"'25' has no unit: a share or a count\? Write 25% .* 25%sites .* 15sites"),
        ("0.25", r"'0\.25' has no unit"),
        ("30M", r"'30M' has no unit"),
        ("0%", r"'0%' removes nothing\. Write for example 25%"),
        ("0sites", r"'0sites' removes nothing"),
        ("120%", r"'120%' is not a share.*up to 100"),
        ("5M%", "'5M%' is not a budget"),
        ("5%Mparams", r"'5%Mparams' is not a share"),
        ("3blokcs", r"'blokcs', which is not a unit\. Did you mean blocks\? Units: .*params"),
        ("3atention", r"Did you mean attention\?"),
        ("10%layers", r"Did you mean blocks\?"),
        ("25%heads", r"'heads', which is not a unit\. Units: sites, attention, mlp, blocks, params, bytes, kv, flops"),
        ("100B", r"'100B' has no unit.* Write 100% "),
        ("5s", "'s', which is not a unit"),
        ("25%M", "'M', which is not a unit"),
        ("2.5sites", r"'2\.5sites' is not a whole number of sites\. Write 3sites"),
        ("0.5blocks", r"not a whole number of blocks\. Write 1blocks"),
        ("-3sites", "'-3sites' is not a budget. Write for example"),
        ("many", "'many' is not a budget"),
        ("", "'' is not a budget"),
    ],
)
def test_a_budget_that_cannot_be_read_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@given(anatomies(), budgets())
def test_needed_spent_and_met_agree_with_counting(anatomy: Anatomy, budget: Budget) -> None:
    everything = Plan(frozenset(anatomy.sites_present()))
    for plan in subsets(anatomy.sites_present()):
        assert budget.removed_cost(anatomy, plan) == worth(anatomy, budget.unit, plan)
        assert budget.is_met(anatomy, plan) == enough(anatomy, budget, plan)
    if budget.share and budget.unit not in FIELDS:
        assert budget.target(anatomy) == math.ceil(budget.amount * worth(anatomy, budget.unit, everything) / 100)


def test_a_bare_share_is_of_all_parameters_and_not_of_the_sites() -> None:
    anatomy = plain(4, attention=4, mlp=9, rest=48)  # 52 in the sites, 100 in all
    assert Budget.parse("13%").target(anatomy) == 13
    assert Budget.parse("13%sites").target(anatomy) == 2


def test_time_is_asked_for_in_ms_and_counted_in_ns() -> None:
    anatomy = plain(4)
    assert Budget.parse("0.25ms").target(anatomy) == 250_000
    assert Budget.parse("20%ms").target(anatomy) == Fraction(anatomy.total("ns_per_token"), 5)
    assert Budget.parse("3ms").format(1_234_500) == "1.234 ms"
    assert Budget.parse("3Mparams").format(1_234_500) == "1,234,500 params"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9sites", r"9sites cannot be met: it asks for 9 sites, and at most 6 sites can be removed while one"),
        ("99%kv", r"asks for 9 kv, and at most 6 kv can be removed"),
        ("20ms", r"asks for 20\.000 ms, and at most 15\.600 ms can be removed"),
        (
            "1sites,5attention",
            r"5attention cannot be met: it asks for 5 attention, and at most 3 attention can be removed",
        ),
        ("3blocks,50params", r"50params cannot be met: it asks for 50 params, and at most 39 params can be removed"),
    ],
)
def test_a_budget_that_cannot_be_met_says_how_much_can(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Problem(plain(4), parse_budgets(text)).check()


@pytest.mark.parametrize("text", ["20%ms", "1sites,20%ms"])
def test_a_share_of_nothing_is_refused(text: str) -> None:
    whole = plain(4)
    untimed = tuple(replace(size, ns_per_token=0) for size in whole.sites)
    anatomy = replace(whole, sites=untimed, rest=replace(whole.rest, ns_per_token=0))
    with pytest.raises(BudgetError, match=r"20%ms asks for nothing: this model has no ms to remove"):
        Problem(anatomy, parse_budgets(text)).check()


# --- problems ----------------------------------------------------------------------------------------------------


@given(problems() | solvable())
def test_check_raises_exactly_when_no_plan_meets_all_budgets(problem: Problem) -> None:
    plans = unions(problem)
    most = tuple(max(worth(problem.anatomy, budget.unit, plan) for plan in plans) for budget in problem.budgets)
    assert problem.reachable() == most
    if ends(problem):
        assert problem.check() is problem
        return
    alone = [m >= b.target(problem.anatomy) for m, b in zip(most, problem.budgets, strict=True)]
    message = "cannot all be met" if all(alone) else f"{problem.budgets[alone.index(False)]} cannot be met.*at most"
    with pytest.raises(BudgetError, match=rf"{message}.* while .*Ask for less"):
        problem.check()


def test_budgets_that_only_together_are_too_much_are_refused() -> None:
    sites = {Site(0, "attention"): 1, Site(0, "mlp"): 9, Site(1, "attention"): 5, Site(1, "mlp"): 9}  # kv: 2 and 3
    anatomy = anatomy_of(sites, 2)
    for text in ("14params", "2kv", "3kv", "14params,3kv"):
        Problem(anatomy, parse_budgets(text)).check()
    twisted = replace(anatomy.sites[0], kv_bytes_per_token=4), *anatomy.sites[1:]  # the small one has the large cache
    for text in ("14params", "4kv"):
        Problem(replace(anatomy, sites=twisted), parse_budgets(text)).check()
    with pytest.raises(BudgetError, match=r"^14params, 4kv cannot all be met while one attention"):
        Problem(replace(anatomy, sites=twisted), parse_budgets("14params,4kv")).check()


@given(problems() | solvable(), st.data())
def test_moves_are_all_that_help_and_still_lead_to_every_budget(problem: Problem, data: st.DataObject) -> None:
    anatomy, goals, plan = problem.anatomy, ends(problem), Plan()
    while True:
        short = [budget.unit for budget in problem.budgets if not enough(anatomy, budget, plan)]
        assert problem.is_met(plan) == (not short)
        expected = [
            step
            for step in groups_of(problem, plan)
            if any(plan.without(*step).removed <= goal.removed for goal in goals)
            and (not short or any(worth(anatomy, u, plan.without(*step)) > worth(anatomy, u, plan) for u in short))
        ]
        assert problem.moves(plan) == expected
        if not short or not expected:
            break
        plan = plan.without(*data.draw(st.sampled_from(expected)))
    assert problem.is_met(plan) == bool(goals)  # no walk ends before the budgets are met, if any plan meets them


@given(problems())
def test_legal_is_what_the_anatomy_lets_pass(problem: Problem) -> None:
    for plan in subsets(problem.anatomy.sites_present()):
        assert problem.is_valid(plan) == allowed(problem, plan)


def test_half_pruned_blocks_do_not_hide_the_way_to_a_budget() -> None:
    sites = {Site(0, "attention"): 1, Site(0, "mlp"): 1, Site(1, "attention"): 1, Site(2, "mlp"): 1}
    problem = Problem(anatomy_of(sites, 3), parse_budgets("2blocks")).check()
    assert problem.moves(Plan()) == [(Site(1, "attention"),), (Site(2, "mlp"),)]  # without block 0 only one more can go


@given(problems(), st.data())
def test_a_move_is_worth_what_the_budgets_count_it_as(problem: Problem, data: st.DataObject) -> None:
    anatomy, plan = problem.anatomy, data.draw(st.sampled_from(unions(problem)))
    needed = [budget.target(anatomy) for budget in problem.budgets]
    before = [worth(anatomy, budget.unit, plan) for budget in problem.budgets]
    assert problem.removed_cost(plan) == tuple(before)
    for move in groups_of(problem, plan):
        after = [worth(anatomy, budget.unit, plan.without(*move)) for budget in problem.budgets]
        gain = tuple(a - b for a, b in zip(after, before, strict=True))
        capped = [min(a, n) - min(b, n) for a, b, n in zip(after, before, needed, strict=True)]
        assert problem.cost(move) == gain
        assert problem.relative_cost(move) == sum(Fraction(g) / n for g, n in zip(gain, needed, strict=True)) > 0
        assert problem.marginal_value(move, plan) == sum(Fraction(c) / n for c, n in zip(capped, needed, strict=True))


@given(problems(), st.data())
def test_what_is_gone_comes_back_in_groups_and_what_no_budget_counts_by_itself(
    problem: Problem, data: st.DataObject
) -> None:
    plan = data.draw(st.sampled_from(subsets(problem.anatomy.sites_present())))
    groups = problem.removed_moves(plan)
    assert sorted(site for group in groups for site in group) == plan.sites()
    assert [group for group in groups_of(problem) if set(group) <= plan.removed] == [
        group for group in groups if group in groups_of(problem)
    ]
    assert all(len(group) == 1 for group in groups if group not in groups_of(problem))


# --- protection --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["", "attention", "mlp"]), st.integers(0, 8), st.integers(0, 8)), max_size=5))
def test_protection_is_the_union_of_its_pieces(pieces: list[tuple[str, int, int]]) -> None:
    words, expected = [], set()
    for word, a, b in pieces:
        first, last = min(a, b), max(a, b)
        words.append(f"{word}{'.' * bool(word)}{first}{f'-{last}' * (first < last)}")
        expected |= {Site(b, part) for b in range(first, last + 1) for part in PARTS if word in ("", part)}
    assert parse_protection(", ".join(words), plain(9)) == expected


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("first4", "0-3"),
        ("last2", "7-8"),
        ("first1,last1", "0,8"),
        ("mlp.last3", "mlp.6-8"),
        ("attention.first2", "attention.0-1"),
        ("sleb", "0,8"),
        ("shortened-llama", "0-3,7-8"),
        ("attention.5, sleb ,mlp.2", "0,attention.5,mlp.2,8"),
        ("first9", "0-8"),
        ("", ""),
    ],
)
def test_words_stand_for_ends_of_the_model(text: str, same: str) -> None:
    assert parse_protection(text, plain(9)) == parse_protection(same, plain(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ffn.3",
            r"'ffn\.3' cannot be protected\. Write .*mlp\.27-29, 0-3 .*, first4, last2 .* shortened-llama, sleb",
        ),
        ("first5", r"'first5' is out of range: the model has blocks 0 to 3"),
        ("last5", r"'last5' is out of range"),
        ("first0", r"'first0' is out of range"),
        ("shortened-llama,last9", r"'last9' is out of range"),
        ("Sleb", "'Sleb' cannot be protected"),
        ("0,first", "'first' cannot be protected"),
        ("mlp.-1", "'mlp.-1' cannot be protected"),
        ("4", r"'4' is out of range: the model has blocks 0 to 3"),
        ("mlp.2-4", r"'mlp\.2-4' is out of range"),
        ("3-1", r"'3-1' is out of range"),
    ],
)
def test_protection_that_cannot_be_read_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_protection(text, plain(4))
