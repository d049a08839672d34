"""What every stage of one run shares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from billhook.core.events import Event, EventListener
from billhook.models.device import environment, pick_device
from billhook.runs.recipe import Recipe
from billhook.runs.store import Store


def run_environment(device: str) -> dict[str, Any]:
    """Where a run is measured, and the folder that its paths start from. `device`: as a user names it."""
    return asdict(environment(str(pick_device(device)))) | {"folder": str(Path.cwd())}


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every stage of one run shares."""

    recipe: Recipe
    store: Store
    run: str
    out: Path
    watch: EventListener
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage, and tell and file that it began."""
        self.store.add_event(self.run, Event(name))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.store.add_event(self.run, Event(name, 1, 1, f"{self.seconds[name]:.1f} s"))
