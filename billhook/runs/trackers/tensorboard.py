"""TensorBoard: event files in a folder a run, below TENSORBOARD_LOGDIR or `tensorboard`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from billhook.core.results.json_form import Row
from billhook.runs.trackers import TrackedRun, Tracker, numbers_of, tracker


@tracker("tensorboard")
def tensorboard(run: TrackedRun) -> Tracker:
    """A folder of TensorBoard: parameters and rows as text, metrics with steps. Pages are left out."""
    return _TensorBoard(run)


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        home = Path(os.environ.get("TENSORBOARD_LOGDIR", "tensorboard"))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self._writer, self._step = SummaryWriter(str(home / f"{run.kind}-{stamp}-{os.getpid()}")), 0
        self._writer.add_text("params", _as_code(dict(run.params)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, rows: Sequence[Row], page: Path | None) -> None:
        for name, value in numbers_of(rows).items():
            self._writer.add_scalar(f"result/{name}", value, self._step + 1)
        self._writer.add_text("result", _as_code(list(rows)))

    def close(self, failed: bool) -> None:
        self._writer.add_scalar("failed", float(failed), self._step + 1)
        self._writer.close()


def _as_code(value: object) -> str:
    """JSON as TensorBoard shows it, line by line."""
    return "\n".join(f"    {line}" for line in json.dumps(value, indent=1, default=str).splitlines())
