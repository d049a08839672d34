"""Weights & Biases: a run of the project `billhook`; WANDB_MODE=offline keeps it in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from billhook.core.results.json_form import Row
from billhook.runs.trackers import TrackedRun, Tracker, numbers_of, tracker


@tracker("wandb")
def wandb(run: TrackedRun) -> Tracker:
    """A run of Weights & Biases: config, metrics with steps, the result as summary and table, the page as artifact."""
    return _Wandb(run)


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30)
        self._run = wandb.init(
            project="billhook", name=run.name, job_type=run.kind, config=dict(run.params), settings=quiet
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, rows: Sequence[Row], page: Path | None) -> None:
        import wandb

        self._run.summary.update({f"result/{name}": value for name, value in numbers_of(rows).items()})
        if rows:
            cells = [[None if v is None else str(v) for v in row.values()] for row in rows]
            self._run.log({"result": wandb.Table(columns=list(rows[0]), data=cells)})
        if page is not None:
            artifact = wandb.Artifact("report", type="report")
            artifact.add_file(str(page))
            self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
