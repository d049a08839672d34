"""What every stage of one run shares."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from billhook.core.events import Event, EventListener, begin_run, fan_out, hear_all
from billhook.engine.workers.crew import parse_workers
from billhook.engine.workers.hiring import hiring
from billhook.engine.workers.team import Team
from billhook.models.device import devices_name, environment, pick_devices
from billhook.models.load import Teacher
from billhook.runs.recipe import EvalOptions, Recipe
from billhook.runs.store import Store


def run_environment(device: str, store: Store) -> dict[str, Any]:
    """Where a run is measured, the folder that its paths start from, and its store. `device`: as a user names it."""
    places = {"folder": str(Path.cwd()), "store": str(store.path.resolve())}
    return asdict(environment(devices_name(pick_devices(device)))) | places


def store_and_watch(store: Store, run: str, watch: EventListener) -> EventListener:
    """Return the one listener of a run: it stores every event, and hands it on to `watch`."""
    begin_run(watch, store.path, run)
    return fan_out(partial(store.add_event, run), watch)


@contextmanager
def with_team(job: RunContext, teacher: Teacher) -> Iterator[RunContext]:
    """Yield the run with the workers that its recipe asks for; they end with the block, unless it had them before."""
    recipe, crew = job.recipe, parse_workers(job.recipe.workers)
    if crew.alone or job.team is not None:
        yield job
        return
    with Team(
        teacher, hiring(crew, teacher), memory=recipe.memory_bytes, trust_remote_code=recipe.trust_remote_code,
        watch=job.watch,
    ) as team:  # fmt: skip
        yield replace(job, team=team)
        if len(team.workers) > 1:
            job.watch(team.loads_event())


def report_loads(job: RunContext) -> None:
    """Store how busy the workers of a run are, and tell those who hear all."""
    if job.team is not None:
        event = job.team.loads_event()
        job.store.add_event(job.run, event)
        hear_all(job.watch, event)


O_co = TypeVar("O_co", bound=EvalOptions, covariant=True)


@dataclass(frozen=True)
class Context(Generic[O_co]):
    """What every stage of one run shares. `options`: what it was told; of a pruning its recipe."""

    options: O_co
    store: Store
    run: str
    out: Path
    watch: EventListener
    seconds: dict[str, float]
    loaded: Mapping[str, Teacher] = field(default_factory=dict)  # models that the caller loaded, by name
    team: Team | None = None  # workers that share what is measured

    @property
    def recipe(self) -> O_co:
        """The options, by the name that they have where something is pruned."""
        return self.options

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage, and store that it began and ended."""
        self.store.add_event(self.run, Event(name), at_once=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        ended = Event(name, 1, 1, {"seconds": self.seconds[name]})
        self.store.add_event(self.run, ended, at_once=True)
        hear_all(self.watch, ended)


RunContext = Context[Recipe]  # of what prunes

EvalContext = Context[EvalOptions]  # of what evaluates, a pruning among others
