"""MLflow: a run of the experiment `billhook` at MLFLOW_TRACKING_URI, which may be a folder or an SQLite file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from billhook.core.results.json_form import Row
from billhook.runs.trackers import TrackedRun, Tracker, numbers_of, tracker

MOST_PARAM = 500  # characters of a parameter that every store of MLflow takes
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # unless the user says otherwise


@tracker("mlflow")
def mlflow(run: TrackedRun) -> Tracker:
    """A run of MLflow: parameters, metrics with steps, the result as metrics of the last step, the page as artifact."""
    for name, value in QUICK.items():
        os.environ.setdefault(name, value)
    return _Mlflow(run)


class _Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, self._step = MlflowClient(), 0
        found = self._client.get_experiment_by_name("billhook")
        experiment = found.experiment_id if found is not None else self._client.create_experiment("billhook")
        opened = self._client.create_run(experiment, tags={"mlflow.runName": run.name, "billhook.kind": run.kind})
        self._run: str = opened.info.run_id
        params = [Param(name, value[:MOST_PARAM]) for name, value in run.params.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._metrics(values)

    def _metrics(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        told: list[Any] = [Metric(_spelled(name), value, now, self._step) for name, value in values.items()]
        for start in range(0, len(told), 1000):  # the most of one batch
            self._client.log_batch(self._run, metrics=told[start : start + 1000])

    def finish(self, rows: Sequence[Row], page: Path | None) -> None:
        self._step += 1
        self._metrics({f"result/{name}": value for name, value in numbers_of(rows).items()})
        self._client.log_dict(self._run, {"rows": list(rows)}, "result.json")
        if page is not None:
            self._client.log_artifact(self._run, str(page))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _spelled(name: str) -> str:
    """A name of letters that MLflow takes."""
    kept = "".join(c if (c.isalnum() and c.isascii()) or c in "_-. /" else "_" for c in name)
    return kept.replace("..", "_")[:250]
