"""Several workers find what one process finds: the same plans and losses, whoever is refused or killed."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.budget import parse_budgets
from billhook.core.errors import ModelError, ResourceError, UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.data.token_sets import Document, TokenSet, pack_rows
from billhook.engine.measurements import DocumentIds, Known, NoCache
from billhook.engine.probe import Probe, RacingOptions
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers import processes
from billhook.engine.workers.division import LEAST_TURNS, abreast, divided, interleaved, left, owned, teams
from billhook.engine.workers.lines import Hiring, Inbox, Line
from billhook.engine.workers.messages import Desk, Lost, Measure, Message, Start, hello_of
from billhook.engine.workers.processes import ProcessLine, environments, hiring
from billhook.engine.workers.team import Team
from billhook.methods.search import SEARCHES, drive
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor


def texts(documents: int = 24, tokens: int = 32, seed: int = 0) -> TokenSet:
    """Random documents, each of one row."""
    draw = random.Random(seed)
    rows = [Document(text, tuple(draw.choices(range(3, 64), k=tokens))) for text in range(documents)]
    return pack_rows(rows, documents * tokens, tokens, [], "made up")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("workers") / "model", "llama", num_hidden_layers=6))


class LocalLine:
    """A worker in this process, which is lost at the first answer to a message that `fails`."""

    def __init__(self, number: int, inbox: Inbox, teacher: Teacher, fails: Callable[[Message], bool]) -> None:
        self.desk, self.number, self.inbox, self.fails, self.open = Desk(teacher), number, inbox, fails, True

    def send(self, message: Message) -> None:
        if not self.open:
            return
        if isinstance(message, Start):
            return self.inbox.put((self.number, hello_of(self.desk.teacher)))
        for answer in self.desk.answers(message):
            if self.fails(message):
                self.open = False
                return self.inbox.put((self.number, Lost("pulled")))
            self.inbox.put((self.number, answer))
        return None

    def close(self) -> None:
        self.open = False


def never(message: Message) -> bool:
    return False


def team_here(
    teacher: Teacher, workers: int, fails: Callable[[Message], bool] = never, watch: EventListener = ignore_events
) -> Team:
    """A team whose workers are all in this process, ready before anything is measured."""

    def hire(inbox: Inbox) -> Sequence[Line]:
        return [LocalLine(number, inbox, teacher, fails) for number in range(1, workers)]

    team = Team(teacher, Hiring(workers - 1, hire), watch=watch)
    team.wait()
    return team


def test_workers_are_told_where_a_checkpoint_lies_wherever_they_work(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher.folder.parent)
    nearby = replace(teacher, folder=Path(teacher.folder.name))
    told: list[Message] = []

    class Hearing(LocalLine):
        def send(self, message: Message) -> None:
            told.append(message)
            super().send(message)

    with Team(nearby, Hiring(1, lambda inbox: [Hearing(1, inbox, teacher, never)])) as team:
        team.wait()
    assert [each.folder for each in told if isinstance(each, Start)] == [str(teacher.folder)]


class Kept(NoCache):
    """Keeps every piece like the store, and counts them."""

    def __init__(self) -> None:
        self.measured: Counter[tuple[Quality, Plan, DocumentIds]] = Counter()
        self._pieces: dict[Plan, dict[Quality, dict[DocumentIds, Sums]]] = {}

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        return [Known(pieces=deepcopy(self._pieces.get(plan, {}))) for plan in plans]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        for (plan, documents), sums in nats.items():
            self.measured[quality, plan, documents] += 1
            self._pieces.setdefault(plan, {}).setdefault(quality, {})[documents] = sums


def searched(
    teacher: Teacher, search: str, team: Team | None, cache: Kept | None = None, remove: str = "4sites",
    fast: RacingOptions | None = None,
) -> tuple[list[Plan], dict[Plan, Loss]]:  # fmt: skip
    """The path of a search, and all losses that it has in full."""
    found = cache or Kept()
    measure = Executor(Probe(teacher, texts(), "kl", team=team, cache_factory=lambda *_: found, fast=fast))
    problem = Problem(teacher.anatomy, parse_budgets(remove)).check()
    if search == "joint":
        draw = random.Random(1)
        scores = {size.site: tuple(draw.random() for _ in size.groups) for size in teacher.anatomy.sites}
        problem = replace(problem, group_scores=scores)
    path = drive(SEARCHES[search](problem), measure)
    full = {
        plan: loss for ask, losses in measure.rounds if ask.tokens is None
        for plan, loss in zip(ask.plans, losses, strict=True) if not loss.bound
    }  # fmt: skip
    return path, full


def same(got: tuple[list[Plan], dict[Plan, Loss]], expected: tuple[list[Plan], dict[Plan, Loss]]) -> None:
    """Equal paths, and equal losses of every plan that both know in full, up to rounding."""
    assert got[0] == expected[0]
    both = got[1].keys() & expected[1].keys()
    assert set(expected[0]) - {Plan()} <= both
    for plan in both:
        assert got[1][plan].counts == expected[1][plan].counts
        assert got[1][plan].sums == pytest.approx(expected[1][plan].sums, rel=1e-4, abs=1e-5)


# -- division -------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(sizes, st.integers(1, 9), st.randoms(use_true_random=False))
def test_groups_are_divided_evenly_and_few_change_hands(tokens: list[int], workers: int, draw: random.Random) -> None:
    owners = divided({}, tokens, range(workers))
    assert sorted(owners) == list(range(len(tokens)))
    load = Counter(dict.fromkeys(teams(len(tokens), range(workers)), 0))
    for group, own in owners.items():
        load[own] += tokens[group]
    assert max(load.values()) - min(load.values()) <= max(tokens)
    assert divided(owners, tokens, range(workers)) == owners
    lost = draw.randrange(workers)
    rest = [worker for worker in range(workers) if worker != lost]
    if rest:
        after, until_then = divided(owners, tokens, rest), left(owners, tokens, rest)
        for new in (after, until_then):
            assert set(new) == set(owners)
            assert {worker for own in new.values() for worker in own} <= set(rest)
        if owners[0] == (0,) and len(load) == workers:  # everyone is alone
            assert owned(owners, lost) or after == owners
            assert until_then == after
        elif min(map(len, load)) > 1:
            assert until_then == {g: tuple(w for w in own if w != lost) for g, own in owners.items()}
    alone = divided(dict.fromkeys(range(len(tokens)), (0,)), tokens, range(workers))
    assert owned(alone, 0), "this process keeps a part"


@given(st.integers(1, 64), st.integers(1, 64))
def test_all_workers_have_groups_and_measure_them_in_at_least_four_turns(groups: int, workers: int) -> None:
    owners = divided({}, [128] * groups, range(workers))
    assert {worker for own in owners.values() for worker in own} == set(range(workers))
    found = teams(groups, range(workers))
    assert abreast(owners) == len(found) == len(set(owners.values())) <= groups
    assert len(found) == 1 or LEAST_TURNS * len(found) <= groups
    least, most = (pick(map(len, found)) for pick in (min, max))
    assert most - least <= 1
    assert least * len(found) > workers / 2, "so much of the crew works if teams have equal work"
    assert most == 1 or LEAST_TURNS * workers > groups, "no one needs company"


@given(sizes, st.integers(1, 9), st.randoms(use_true_random=False))
def test_groups_are_taken_in_turns_each_workers_own_in_the_given_order(
    tokens: list[int], workers: int, draw: random.Random
) -> None:
    owners = divided({}, tokens, range(workers))
    order = draw.sample(range(len(tokens)), len(tokens))
    turns = interleaved(order, owners)
    assert sorted(turns) == sorted(order)
    for worker in range(workers):
        assert [g for g in turns if worker in owners[g]] == [g for g in order if worker in owners[g]]
    everyone = set(owners.values())
    assert {owners[g] for g in turns[: len(everyone)]} == everyone
    if workers == 1:
        assert turns == order


# -- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "workers"), [("greedy", 2), ("greedy", 16), ("swap", 2), ("swap", 3), ("swap", 16), ("joint", 16)]
)
def test_workers_find_what_one_process_finds(teacher: Teacher, search: str, workers: int) -> None:
    remove = "20%" if search == "joint" else "4sites"
    with team_here(teacher, workers) as team:
        cache = Kept()
        same(searched(teacher, search, team, cache, remove), searched(teacher, search, None, remove=remove))
        assert set(cache.measured.values()) == {1}
        loads = team.loads()
        assert all(loads[f"rate.{worker}"] > 0 for worker in range(workers)), "also where groups are fewer"


def test_racing_through_workers_chooses_as_well(teacher: Teacher) -> None:
    racing = RacingOptions(shortlist=6, risk=0.05)
    with team_here(teacher, 3) as team:
        path, losses = searched(teacher, "greedy", team, fast=racing)
    assert len(path[-1].removed) == 4
    exact = Probe(teacher, texts(), "kl").losses([path[-1]])[0]
    assert losses[path[-1]].sums == pytest.approx(exact.sums, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", range(7))
def test_what_a_lost_worker_had_is_measured_by_the_others(teacher: Teacher, seed: int) -> None:
    draw, told = random.Random(seed), list[Event]()
    moment, count, cache = draw.randrange(1, 40), Counter[str](), Kept()

    def fails(message: Message) -> bool:
        count["answers"] += isinstance(message, Measure)
        return count["answers"] == moment

    workers = 16 if seed > 4 else draw.choice([2, 3, 5])  # of 12 document groups
    with team_here(teacher, workers, fails, told.append) as team:
        same(searched(teacher, "swap", team, cache), searched(teacher, "swap", None))
    assert [event.values["lost"] for event in told if "lost" in event.values] == ["pulled"]
    assert set(cache.measured.values()) == {1}, "what was answered is not asked again"


@pytest.mark.parametrize("foreign", ["model", "compute", "software"])
def test_a_worker_that_computes_something_else_is_refused(teacher: Teacher, foreign: str) -> None:
    told: list[Event] = []
    line: list[LocalLine] = []

    def hire(inbox: Inbox) -> Sequence[Line]:
        inbox.put((2, replace(hello_of(teacher), **{foreign: "another"})))
        line.extend(LocalLine(number, inbox, teacher, never) for number in (1, 2))
        line[1].send = lambda message: None  # type: ignore[method-assign]
        return line

    with Team(teacher, Hiring(2, hire), watch=told.append) as team:
        team.wait()
        assert team.workers == (0, 1)
        assert not line[1].open
        same(searched(teacher, "greedy", team), searched(teacher, "greedy", None))
    (refused,) = [str(event.values["refused"]) for event in told if "refused" in event.values]
    assert refused == f"{foreign} another instead of {getattr(hello_of(teacher), foreign)}"


def test_what_no_worker_can_measure_is_told_once(tmp_path: Path) -> None:
    broken = load(tiny.saved(tmp_path / "broken", "llama"))
    with team_here(broken, 3) as team:
        probe = Probe(broken, texts(), "kl", team=team)
        probe.losses([Plan()])
        broken.model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
        probe.release_streams()
        with pytest.raises(ModelError, match="from block 2"):
            probe.losses([Plan.parse(["mlp.0"]), Plan.parse(["mlp.1"])])


# -- processes ------------------------------------------------------------------------------------------------------


def process_of(team: Team, worker: int) -> subprocess.Popen[bytes]:
    line = team._lines[worker]
    assert isinstance(line, ProcessLine)
    return line.process


def test_a_process_that_is_killed_costs_nothing_but_what_it_measured_then(teacher: Teacher) -> None:
    told: list[Event] = []
    cache = Kept()

    class Killing(Kept):
        """Kills the worker after some pieces."""

        def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
            cache.add_partial(quality, nats)
            if len(cache.measured) > 60 and process.poll() is None:
                process.kill()

        def lookup(self, plans: Sequence[Plan]) -> list[Known]:
            return cache.lookup(plans)

    with Team(teacher, hiring(2, teacher), watch=told.append) as team:
        team.wait()
        assert team.workers == (0, 1)
        process = process_of(team, 1)
        same(searched(teacher, "swap", team, Killing()), searched(teacher, "swap", None))
        assert team.workers == (0,)
        assert team.loads()["rate.1"] > 0, "it took part"
    assert [event.values["lost"] for event in told if "lost" in event.values] == ["signal 9"]
    assert set(cache.measured.values()) == {1}


def test_a_checkpoint_that_has_changed_is_refused_in_a_process(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", "llama")
    loaded = load(folder)
    told: list[Event] = []
    (folder / "model.safetensors").unlink()  # which the loaded model reads
    tiny.saved(folder, "llama", seed=1)
    with Team(loaded, hiring(2, loaded), watch=told.append) as team:
        team.wait()
        assert team.workers == (0,)
        assert process_of(team, 1).returncode is not None
    assert [str(event.values["refused"]).partition(" ")[0] for event in told] == ["model"]


def test_a_worker_that_cannot_load_the_model_says_why(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", "llama")
    loaded = load(folder)
    told: list[Event] = []
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"broken")
    with Team(loaded, hiring(2, loaded), watch=told.append) as team:
        same(searched(loaded, "greedy", team), searched(loaded, "greedy", None))
        team.wait()
    (lost,) = [str(event.values["lost"]) for event in told]
    assert "model.safetensors" in lost


def test_there_are_no_more_workers_than_gpus_or_than_memory_has_room_for(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environments(3, teacher) == [{}, {}]
    monkeypatch.setattr(processes, "free_memory", lambda device: 3 * teacher.weight_bytes)
    with pytest.raises(ResourceError, match="workers=3, or less"):
        hiring(4, teacher)
    monkeypatch.setattr(Teacher, "device", torch.device("cuda", 1))
    monkeypatch.setattr(Teacher, "devices", (torch.device("cuda", 1),))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert environments(3, teacher) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "2"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a,7")
    assert environments(2, teacher) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UsageError, match="there are 3 GPUs that torch sees"):
        environments(4, teacher)


def test_workers_of_a_model_on_several_gpus_have_as_many_each(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "device", torch.device("cuda", 1))
    monkeypatch.setattr(Teacher, "devices", (torch.device("cuda", 1), torch.device("cuda", 4)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert environments(3, teacher) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "3,5"}]
    with pytest.raises(UsageError, match=r"workers=4 needs 2 GPUs for each worker, .* 7 GPUs .*Type workers=3"):
        environments(4, teacher)
    started: list[Message] = []

    def hire(inbox: Inbox) -> Sequence[Line]:
        line = LocalLine(1, inbox, teacher, never)
        line.send = started.append  # type: ignore[method-assign]
        return [line]

    Team(teacher, Hiring(1, hire)).start()
    assert [each.device for each in started if isinstance(each, Start)] == ["cuda:0-1"]
