"""Owners of a document group share its jobs: each has one worker, nearly as much work, and little is walked twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_workers import Kept, searched, team_here, texts

from billhook.core.plan import KeptGroups, Plan, Site
from billhook.engine.prefix_trie import PlanBits
from billhook.engine.probe import Probe, RacingOptions
from billhook.engine.workers import division
from billhook.engine.workers.columns import END, HEAD, Columns, Path, Trail, cost, parting
from billhook.engine.workers.division import divided
from billhook.models.load import Teacher, load

SITES = 8
Choices = tuple[int, ...]  # of each site: 0 keeps it, 1 removes it, 2 and 3 narrow it

choices = st.tuples(*[st.sampled_from([0, 0, 0, 1, 2, 3])] * SITES)
BARE = (0,) * SITES


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("columns") / "model", "llama", num_hidden_layers=6))


def path(of: Choices) -> Path:
    steps = tuple((site, site if choice == 1 else SITES + choice) for site, choice in enumerate(of) if choice)
    return (*steps, (SITES, END))


def nodes(of: Choices) -> set[Choices]:
    """What is computed of a plan, by its beginnings: a site that is removed costs nothing."""
    return {of[: site + 1] for site in range(SITES) if of[site] != 1}


@given(choices, choices)
def test_paths_part_where_plans_differ_first(one: Choices, other: Choices) -> None:
    differ = [site for site in range(SITES) if one[site] != other[site]]
    assert parting(path(one), path(other)) == (differ[0] if differ else SITES)
    assert cost(path(one), 3) == sum(choice != 1 for choice in one[3:])


@given(st.lists(choices, max_size=12), choices, st.lists(st.integers(0, SITES - 1), max_size=3))
def test_what_is_known_is_what_was_walked_and_can_still_be_used(
    walked: list[Choices], asked: Choices, based: list[int]
) -> None:
    base = tuple(int(site in based) for site in range(SITES))
    wanted = tuple(1 if based else choice for choice, based in zip(asked, base, strict=True))
    trail = Trail(path(BARE))
    for each in walked:
        trail.walk(path(each))
    for plans in ((BARE, *walked), [
        each[: next((site for site in range(SITES) if base[site] and each[site] != 1), SITES)]
        for each in (BARE, *walked)
    ]):  # fmt: skip
        common = [next((s for s, (a, b) in enumerate(zip(each, wanted, strict=False)) if a != b), len(each))
                  for each in plans]  # fmt: skip
        assert trail.known(path(wanted)) == max(common)
        trail.begin(path(base))
    trail.begin(path(base))
    assert trail.known(path(wanted)) == 0, "nothing was walked in the meantime"


@given(
    st.lists(choices, min_size=1, max_size=40, unique=True), st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1)
)
def test_each_job_has_one_owner_and_owners_have_nearly_as_much_to_do(
    plans: list[Choices], workers: int, tokens: list[int]
) -> None:
    owners = dict.fromkeys(range(len(tokens)), tuple(range(workers)))
    columns = Columns(tokens, path(BARE))
    jobs = [(group, path(plan)) for group in range(len(tokens)) for plan in plans]
    shared = columns.share(jobs, owners)
    assert set(shared) == set(jobs)
    walked: dict[tuple[int, int], set[Choices]] = {}
    work = Counter(dict.fromkeys(range(workers), 0))
    for group in range(len(tokens)):
        for plan in plans:
            worker = shared[group, path(plan)]
            assert worker in owners[group]
            known = walked.setdefault((worker, group), nodes(BARE))
            work[worker] += tokens[group] * (HEAD + len(nodes(plan) - known))
            known |= nodes(plan)
    assert max(work.values()) - min(work.values()) <= max(tokens) * (HEAD + SITES)
    assert Columns(tokens, path(BARE)).share(reversed(jobs), owners) == shared, "in any order the same"
    job = jobs[0]
    if cost(job[1], columns._trails[(shared[job] + 1) % workers, job[0]].known(job[1])) or workers == 1:
        assert columns.share([job], owners) == {job: shared[job]}, "it is finished where it was walked"


def test_removals_of_single_sites_are_shared_in_runs_that_begin_alike() -> None:
    """Of 64 sites, as after 10 removals: four owners do hardly more than a quarter each."""
    sites, gone = 64, {3, 17, 18, 30, 41, 44, 52, 53, 60, 62}
    base = tuple((site, site) for site in sorted(gone))
    plans = [(*sorted({*base, (site, site)}), (sites, END)) for site in range(sites) if site not in gone]
    columns = Columns([1], ((sites, END),))
    columns.share([(0, (*base, (sites, END)))], {0: (0,)})  # one of them has walked what all have in common
    columns.begin((*base, (sites, END)))
    work = Counter[int]()
    trails = {worker: Trail(((sites, END),)) for worker in range(4)}
    trails[0].walk((*base, (sites, END)))
    alone, only = 0, Trail((*base, (sites, END)))
    for (_, plan), worker in sorted(columns.share([(0, plan) for plan in plans], {0: (0, 1, 2, 3)}).items()):
        work[worker] += HEAD + cost(plan, trails[worker].known(plan))
        trails[worker].walk(plan)
        alone += HEAD + cost(plan, only.known(plan))
    assert max(work.values()) <= 1.2 * alone / 4


def test_paths_of_masks_part_where_their_prefixes_do() -> None:
    draw = random.Random(0)
    bits = PlanBits(range(4))
    narrow = [KeptGroups(Site(block, part), groups) for block in range(4) for part in ("attention", "mlp")
              for groups in ((0,), (0, 1))]  # fmt: skip
    bits.add(draw.sample(narrow, len(narrow)))
    masks = [0]
    for _ in range(60):
        parts = {each: draw.choice([None, None, False, *(n for n in narrow if n.site == each)])
                 for each in {n.site for n in narrow}}  # fmt: skip
        removed = frozenset(site for site, state in parts.items() if state is False)
        masks.append(bits.mask(Plan(removed, frozenset(state for state in parts.values() if state))))
    for one in masks:
        assert cost(bits.path(one), 0) == 8 - len(bits.plan(one).removed)
        for other in masks:
            same = [depth for depth in range(5) if bits.prefix(one, depth) == bits.prefix(other, depth)]
            assert parting(bits.path(one), bits.path(other)) // 2 == max(same)


def busiest(teacher: Teacher, fast: RacingOptions | None, search: str) -> int:
    """Tokens times sites of the worker that computes most: eight of them, and two document groups."""
    with team_here(teacher, 8) as team:
        probe = Probe(teacher, texts(documents=2, tokens=64), "kl", team=team, fast=fast)
        sites = [Plan.parse([str(site)]) for site in teacher.anatomy.sites_present()]
        if search == "estimate":
            dict(probe.iter_losses([Plan(), *sites], estimate=True))
        else:
            probe.losses(sites, best=1)
        return max(load.computed for load in team._loads.values())


@pytest.mark.parametrize("search", ["estimate", "best"])
def test_columns_share_the_sites_of_a_group(teacher: Teacher, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = busiest(teacher, None, search)

    def alone(groups: int, workers: Collection[int]) -> list[tuple[int, ...]]:
        return [(worker,) for worker in sorted(workers)[:groups]]

    monkeypatch.setattr(division, "teams", alone)
    assert shared < 0.5 * busiest(teacher, None, search)


def test_racing_by_columns_chooses_as_well(teacher: Teacher) -> None:
    cache = Kept()
    with team_here(teacher, 16) as team:
        path, losses = searched(teacher, "greedy", team, cache, fast=RacingOptions(shortlist=6, risk=0.05))
    assert len(path[-1].removed) == 4
    exact = Probe(teacher, texts(), "kl").losses([path[-1]])[0]
    assert losses[path[-1]].sums == pytest.approx(exact.sums, rel=1e-4, abs=1e-5)
    assert set(cache.measured.values()) == {1}


def test_a_group_has_the_same_owners_whoever_asks() -> None:
    assert divided({}, [128] * 32, range(16)) == divided({0: (3,)}, [128] * 32, range(16))
