"""Plans, anatomies, budgets and problems: every rule against brute force over all subsets of small models."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from billhook.budget import UNITS, Budget
from billhook.errors import BudgetError, PlanError
from billhook.plan import PARTS, Anatomy, Plan, Rest, Site, SiteSize
from billhook.problem import Problem, protection

SITES = st.builds(Site, st.integers(0, 120), st.sampled_from(PARTS))


def anatomy_of(parameters: dict[Site, int], blocks: int, rest: int = 7) -> Anatomy:
    """Sizes whose four measures differ, so that no test can confuse them."""
    sizes = (SiteSize(s, n, 2 * n + 1, 3 if s.part == "attention" else 0, 5 * n) for s, n in sorted(parameters.items()))
    return Anatomy("tiny", blocks, tuple(sizes), Rest(rest, 2 * rest, 11, 1))


def plain(blocks: int, attention: int = 4, mlp: int = 9, rest: int = 7) -> Anatomy:
    return anatomy_of({Site(b, p): attention if p == "attention" else mlp for b in range(blocks) for p in PARTS},
                      blocks, rest)  # fmt: skip


@st.composite
def anatomies(draw: st.DrawFn) -> Anatomy:
    """Up to 4 blocks of uneven size, some sites already gone, at least one of each part left."""
    blocks = draw(st.sampled_from([1, 2, 3, 4, 4]))
    sites = [Site(b, p) for b in range(blocks) for p in PARTS]
    alive = set(sites) - draw(st.sets(st.sampled_from(sites), max_size=3))
    alive |= {Site(draw(st.integers(0, blocks - 1)), part) for part in PARTS}
    return anatomy_of({s: draw(st.integers(1, 9)) for s in sorted(alive)}, blocks, draw(st.integers(0, 20)))


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    unit, share = draw(st.sampled_from(sorted(UNITS))), draw(st.booleans())
    top = 100 if share else 60 if unit == "params" else 7
    return Budget.parse(f"{draw(st.integers(1, top))}{'%' if share else ''}{unit}")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    anatomy = draw(anatomies())
    everywhere = [Site(b, p) for b in range(anatomy.blocks) for p in PARTS]
    protected = draw(st.sets(st.sampled_from(everywhere), max_size=draw(st.integers(0, 3))))
    return Problem(anatomy, draw(budgets()), frozenset(protected))


@st.composite
def solvable(draw: st.DrawFn) -> Problem:
    """A problem whose budget can be met, often only just."""
    problem = draw(problems())
    most = Problem(problem.anatomy, Budget.parse(f"1{problem.budget.unit}"), problem.protected).most()
    assume(most > 0)
    amount = most - draw(st.integers(0, most - 1))
    return Problem(problem.anatomy, Budget.parse(f"{amount}{problem.budget.unit}"), problem.protected)


def subsets(sites: tuple[Site, ...]) -> list[Plan]:
    return [Plan(frozenset(c)) for c in chain.from_iterable(combinations(sites, k) for k in range(len(sites) + 1))]


def allowed(problem: Problem, plan: Plan) -> bool:
    """One of each part stays, and everything protected."""
    left = set(problem.anatomy.alive()) - plan.removed
    return {s.part for s in left} == set(PARTS) and not plan.removed & problem.protected


def worth(anatomy: Anatomy, unit: str, plan: Plan) -> int:
    """What `plan` takes away, counted by hand."""
    gone = [size for size in anatomy.sites if size.site in plan.removed]
    if unit == "params":
        return sum(size.parameters for size in gone)
    if unit == "blocks":
        before = {s.block for s in anatomy.alive()}
        return len(before) - len({s.block for s in anatomy.alive() if s not in plan.removed})
    return sum(unit in ("sites", size.site.part) for size in gone)


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
    assert Plan.of(json.loads(json.dumps(plan.names()))) == plan


def test_without_leaves_the_plan_as_it_was() -> None:
    plan = Plan(frozenset({Site(1, "mlp")}))
    assert plan.without(Site(2, "mlp")) != plan == Plan(frozenset({Site(1, "mlp")}))
    assert plan.without(Site(1, "mlp")) == plan


def test_a_plan_refuses_a_site_that_is_named_twice() -> None:
    with pytest.raises(PlanError, match=r"names mlp\.2 more than once.*Name every site once"):
        Plan.of(["mlp.2", "attention.2", "mlp:2"])


@given(st.sets(st.builds(Site, st.integers(0, 5), st.sampled_from(PARTS))))
def test_blocks_are_those_that_lost_both_sites(sites: set[Site]) -> None:
    expected = [b for b in range(6) if Site(b, "attention") in sites and Site(b, "mlp") in sites]
    assert Plan(frozenset(sites)).blocks() == expected


# --- anatomies ---------------------------------------------------------------------------------------------------


@given(anatomies(), st.data())
def test_what_goes_and_what_stays_add_up(anatomy: Anatomy, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(subsets(anatomy.alive())))
    for what in ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token"):
        gone = sum(getattr(size, what) for size in anatomy.sites if size.site in plan.removed)
        everything = sum(getattr(size, what) for size in anatomy.sites)
        assert anatomy.total(what) == everything + getattr(anatomy.rest, what)
        assert anatomy.total(what, plan) == anatomy.total(what) - gone


@given(problems())
def test_check_refuses_exactly_what_must_stay(problem: Problem) -> None:
    for plan in subsets(problem.anatomy.alive()):
        if allowed(problem, plan):
            assert problem.anatomy.check(plan, problem.protected) is plan
        else:
            with pytest.raises(PlanError):
                problem.anatomy.check(plan, problem.protected)


def test_check_says_what_was_wrong_and_what_to_do() -> None:
    half = anatomy_of({Site(0, "attention"): 1, Site(0, "mlp"): 1, Site(2, "attention"): 1, Site(2, "mlp"): 1}, 3)
    cases = [
        (Plan.of(["attention.3"]), frozenset(), r"no attention\.3.*blocks 0 to 2"),
        (Plan(frozenset({Site(-1, "mlp")})), frozenset(), r"no mlp\.-1.*blocks 0 to 2"),
        (Plan.of(["mlp.1"]), frozenset(), r"mlp\.1 is already gone.*billhook inspect"),
        (Plan.of(["mlp.2"]), frozenset({Site(2, "mlp")}), r"removes mlp\.2, which --protect keeps\. Change one"),
        (Plan.of(["mlp.0", "mlp.2"]), frozenset(), r"every mlp site\. At least one of each kind must stay"),
        (Plan.of(["attention.0", "attention.2"]), frozenset(), r"every attention site"),
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
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_budget_is_read(text: str) -> None:
    assert Budget.parse(text) == Budget(*SPELLINGS[text])


@given(st.integers(1, 10**13), st.sampled_from(sorted(UNITS)))
def test_a_count_is_written_as_it_is_read(number: int, unit: str) -> None:
    assert Budget.parse(str(Budget(Fraction(number), unit, False))) == Budget(Fraction(number), unit, False)


@given(st.decimals("0.01", 100, places=2), st.sampled_from(sorted(UNITS)))
def test_a_share_is_written_as_it_is_read(number: object, unit: str) -> None:
    budget = Budget.parse(f"{number}%{unit}")
    assert budget.amount == Fraction(str(number))
    assert Budget.parse(str(budget)) == budget


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
        ("3blokcs", r"'blokcs', which is no unit\. Did you mean blocks\? Units: .*params"),
        ("3atention", r"Did you mean attention\?"),
        ("25%heads", r"'heads', which is no unit.* Units: sites, attention, mlp, blocks, params"),
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
    everything = worth(anatomy, budget.unit, Plan(frozenset(anatomy.alive())))
    if budget.unit == "params":
        everything += anatomy.rest.parameters
    for plan in subsets(anatomy.alive()):
        spent = worth(anatomy, budget.unit, plan)
        assert budget.spent(anatomy, plan) == spent
        enough = 100 * spent >= budget.amount * everything if budget.share else spent >= budget.amount
        assert budget.met(anatomy, plan) == enough
    needed = budget.needed(anatomy)
    if budget.share and budget.unit != "params":
        assert needed == math.ceil(budget.amount * everything / 100)


def test_a_bare_share_is_of_all_parameters_and_not_of_the_sites() -> None:
    anatomy = plain(4, attention=4, mlp=9, rest=48)  # 52 in the sites, 100 in all
    assert Budget.parse("13%").needed(anatomy) == 13
    assert Budget.parse("13%sites").needed(anatomy) == 2


# --- problems ----------------------------------------------------------------------------------------------------


@given(problems() | solvable())
def test_check_raises_exactly_when_no_subset_meets_the_budget(problem: Problem) -> None:
    anatomy = problem.anatomy
    plans = [plan for plan in subsets(anatomy.alive()) if allowed(problem, plan)]
    most = max(worth(anatomy, problem.budget.unit, plan) for plan in plans)
    assert problem.most() == most
    if most >= problem.budget.needed(anatomy):
        assert problem.check() is problem
    else:
        with pytest.raises(BudgetError, match=rf"cannot be met.*at most {most} can go.*Ask for less"):
            problem.check()


@given(problems() | solvable(), st.data())
def test_moves_are_all_that_may_go_and_still_lead_to_the_budget(problem: Problem, data: st.DataObject) -> None:
    anatomy, unit = problem.anatomy, problem.budget.unit
    blocks = [tuple(s for s in anatomy.alive() if s.block == b) for b in range(anatomy.blocks)]
    everything = subsets(anatomy.alive())
    plan = Plan()
    while True:
        steps = [tuple(s for s in b if s not in plan.removed) for b in blocks]
        if unit != "blocks":
            steps = [(s,) for b in steps for s in b if unit in ("sites", "params", s.part)]
        legal = [step for step in steps if step and allowed(problem, plan.without(*step))]
        ends = [p for p in everything if allowed(problem, p) and problem.met(p)]
        expected = [step for step in legal if any(plan.without(*step).removed <= end.removed for end in ends)]
        assert problem.moves(plan) == expected
        if problem.met(plan) or not expected:
            break
        plan = plan.without(*data.draw(st.sampled_from(expected)))
    assert problem.met(plan) == bool(ends)  # no walk ends before the budget is met, if any plan meets it


def test_half_pruned_blocks_do_not_hide_the_way_to_a_budget() -> None:
    sites = {Site(0, "attention"): 1, Site(0, "mlp"): 1, Site(1, "attention"): 1, Site(2, "mlp"): 1}
    problem = Problem(anatomy_of(sites, 3), Budget.parse("2blocks")).check()
    assert problem.moves(Plan()) == [(Site(1, "attention"),), (Site(2, "mlp"),)]  # without block 0 only one more can go


@given(problems())
def test_a_move_is_worth_what_the_budget_counts_it_as(problem: Problem) -> None:
    for move in problem.moves(Plan()):
        assert problem.cost(move) == worth(problem.anatomy, problem.budget.unit, Plan(frozenset(move))) > 0


# --- protection --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["", "attention", "mlp"]), st.integers(0, 8), st.integers(0, 8)), max_size=5))
def test_protection_is_the_union_of_its_pieces(pieces: list[tuple[str, int, int]]) -> None:
    words, expected = [], set()
    for word, a, b in pieces:
        first, last = min(a, b), max(a, b)
        words.append(f"{word}{'.' * bool(word)}{first}{f'-{last}' * (first < last)}")
        expected |= {Site(b, part) for b in range(first, last + 1) for part in PARTS if word in ("", part)}
    assert protection(", ".join(words), plain(9)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn.3", r"'ffn\.3' cannot be protected\. Write attention\.0, mlp\.27-29 or 0-3"),
        ("0,first", "'first' cannot be protected"),
        ("mlp.-1", "'mlp.-1' cannot be protected"),
        ("4", r"'4' is out of range: the model has blocks 0 to 3"),
        ("mlp.2-4", r"'mlp\.2-4' is out of range"),
        ("3-1", r"'3-1' is out of range"),
    ],
)
def test_protection_that_cannot_be_read_says_what_to_write(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        protection(text, plain(4))
