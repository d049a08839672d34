"""Trackio: a run of the local project `billhook`, which `trackio show` serves."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from billhook.core.results.json_form import Row
from billhook.runs.trackers import TrackedRun, Tracker, numbers_of, tracker


@tracker("trackio")
def trackio(run: TrackedRun) -> Tracker:
    """A run of Trackio: config, metrics with steps, and the result as metrics of the last step. Pages are left out."""
    return _Trackio(run)


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        on_stderr = partial(print, file=sys.stderr)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "trackio":  # whose words are no result, and stdout may hold one
                vars(module)["print"] = on_stderr
        quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self._step = 0
        self._run: Any = trackio.init(project="billhook", config=dict(run.params), **quiet)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def finish(self, rows: Sequence[Row], page: Path | None) -> None:
        values = {f"result/{name}": value for name, value in numbers_of(rows).items()}
        if values:
            self._run.log(values, step=self._step + 1)

    def close(self, failed: bool) -> None:
        self._run.finish()
