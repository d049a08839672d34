"""Trackers as listeners of events: what each keeps, and that none of them ends or holds up a run.

TensorBoard is the library itself. The others are modules with the calls that Billhook makes, under the signatures of
the libraries, which refuse every other call.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import billhook
from billhook.cli import main, session
from billhook.core.errors import MissingExtra, UnknownName
from billhook.core.events import Event
from billhook.core.monitoring.alerts import Observation, exact
from billhook.core.results.monitoring import WatchResult
from billhook.runs import trackers
from billhook.runs.trackers import TRACKERS, TrackedRun, Tracking

RESULT = WatchResult(
    *("here", "m", "v1", "s", 1, 1.0), (Observation("errors", "requests", "%", exact(2.5), 7.0),), (), 0.01
)
PARAMS = {"model": "demo", "remove": "20%", "plan": None, "set": {}, "tokens": 512}


def follow(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, failed: bool = False) -> list[Event]:
    """A run of two rounds with a result and a page, or one that fails; the warnings that it gave."""
    page, warnings = tmp_path / "page.html", list[Event]()
    page.write_text("<p>a page</p>")
    monkeypatch.setattr(trackers, "page_of", lambda result: page)
    tracking = Tracking.start(names, "prune", PARAMS, warnings.append)
    for number, loss in ((1, 0.5), (2, 0.75)):
        tracking(Event("round", number, 2, {"loss": loss, "removed": "mlp.1"}))
        tracking(Event("search", number, None, {"loss": -loss}))  # of which the second is held back for a second
    if not failed:
        tracking.finish(RESULT)
    tracking.close(failed=failed)
    return warnings


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGDIR", str(tmp_path / "logs"))
    assert follow("tensorboard", tmp_path, monkeypatch) == []
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("prune-")
    read = EventAccumulator(str(folder))
    read.Reload()
    losses = [(each.step, each.value) for each in read.Scalars("round/loss")]
    assert losses == [(1, 0.5), (3, 0.75)]
    assert [each.value for each in read.Scalars("search/loss")] == [-0.5, -0.75], "the last one is not lost"
    assert read.Scalars("result/value")[0].value == 2.5
    assert read.Scalars("failed")[0].value == 0
    asked = b"".join(read.Tensors("params/text_summary")[0].tensor_proto.string_val).decode()
    assert '"remove": "20%"' in asked
    assert "plan" not in asked, "what was not asked is no parameter"


def test_a_pruning_is_tracked_from_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [
        "prune", str(model), "--data", str(text), "--tokens", "240", "--length", "24", "--self-share", "0",
        "--eval-tokens", "640", "--eval-length", "32", "--remove", "1sites", "--search", "greedy", "--device", "cpu",
        "--out", str(tmp_path / "out"), "--store", str(tmp_path / "runs.db"), "--track", "tensorboard", "--json",
    ]  # fmt: skip
    done = CliRunner(env={"TENSORBOARD_LOGDIR": str(tmp_path / "logs")}).invoke(main.app, command)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    (folder,) = (tmp_path / "logs").iterdir()
    read = EventAccumulator(str(folder))
    read.Reload()
    told = read.Scalars("result/perplexity_ratio")[0].value
    assert told == pytest.approx(result["perplexity"]["ratio"]["value"], rel=1e-5)
    assert {"round/loss", "load/seconds", "result/seconds"} <= set(read.Tags()["scalars"])


# -- the others ------------------------------------------------------------------------------------------------------


class Kept:
    """What a tracker was told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def named(self, name: str) -> list[Any]:
        return [value for call, value in self.calls if call == name]


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    for member, value in members.items():
        setattr(made, member, value)
    return made


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()

    class Entity:
        def __init__(self, key: str, value: Any, timestamp: int = 0, step: int = 0) -> None:
            self.told = (key, value, step)

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            kept.calls.append(("experiment", name))
            return "7"

        def create_run(self, experiment_id: str, *, tags: dict[str, str]) -> Any:
            kept.calls.append(("run", (experiment_id, tags["mlflow.runName"])))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert run_id == "r"
            kept.calls += [("metric", each.told) for each in metrics]
            kept.calls += [("param", each.told[:2]) for each in params]

        def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
            kept.calls.append(("dict", (artifact_file, dictionary)))

        def log_artifact(self, run_id: str, local_path: str) -> None:
            kept.calls.append(("artifact", Path(local_path).read_text()))

        def set_terminated(self, run_id: str, status: str) -> None:
            kept.calls.append(("end", status))

    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", module("mlflow.entities", Metric=Entity, Param=Entity))
    return kept


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()

    class Run:
        def __init__(self) -> None:
            self.summary = types.SimpleNamespace(update=lambda values: kept.calls.append(("summary", values)))

        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            kept.calls.append(("log", (step, data)))

        def log_artifact(self, artifact: Any) -> None:
            kept.calls.append(("artifact", Path(artifact.file).read_text()))

        def finish(self, exit_code: int | None = None) -> None:
            kept.calls.append(("end", exit_code))

    def init(*, project: str, name: str, job_type: str, config: dict[str, str], settings: Any) -> Run:
        kept.calls.append(("run", (project, name, job_type, config)))
        return Run()

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.file = ""

        def add_file(self, local_path: str) -> None:
            self.file = local_path

    made = module(
        "wandb", init=init, Artifact=Artifact, Settings=lambda **options: options,
        Table=lambda columns, data: (columns, data),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", made)
    return kept


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()

    class Run:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            kept.calls.append(("log", (step, metrics)))

        def finish(self) -> None:
            kept.calls.append(("end", 0))

    def init(
        project: str, *, config: dict[str, str] | None = None, embed: bool = True, auto_log_gpu: bool | None = None,
        auto_log_cpu: bool | None = None,
    ) -> Run:  # fmt: skip
        kept.calls.append(("run", (project, config)))
        return Run()

    monkeypatch.setitem(sys.modules, "trackio", module("trackio", init=init))
    return kept


LOGGED = [
    (1, {"round/loss": 0.5, "round/done": 1.0}), (2, {"search/loss": -0.5}),
    (3, {"round/loss": 0.75, "round/done": 2.0}), (4, {"search/loss": -0.75}),
]  # fmt: skip
ASKED = {"model": "demo", "remove": "20%", "tokens": "512"}


def test_mlflow_keeps_params_metrics_result_and_page(
    mlflow: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow("mlflow", tmp_path, monkeypatch) == []
    assert mlflow.named("experiment") == ["billhook"]
    assert mlflow.named("run") == [("7", "prune demo")]
    assert dict(mlflow.named("param")) == ASKED
    metrics = [(name, value, step) for step, values in LOGGED for name, value in values.items()]
    assert mlflow.named("metric")[: len(metrics)] == metrics
    assert ("result/value", 2.5, 5) in mlflow.named("metric")
    assert mlflow.named("dict") == [("result.json", {"rows": RESULT.rows()})]
    assert mlflow.named("artifact") == ["<p>a page</p>"]
    assert mlflow.calls[-1] == ("end", "FINISHED")


def test_wandb_keeps_config_metrics_result_and_page(
    wandb: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow("wandb", tmp_path, monkeypatch) == []
    assert wandb.named("run") == [("billhook", "prune demo", "prune", ASKED)]
    *logged, (step, table) = wandb.named("log")
    assert (logged, step) == (LOGGED, None)
    assert table["result"][0] == list(RESULT.rows()[0])
    assert wandb.named("summary")[0]["result/value"] == 2.5
    assert wandb.named("artifact") == ["<p>a page</p>"]
    assert wandb.calls[-1] == ("end", 0)


def test_trackio_keeps_config_metrics_and_result(
    trackio: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow("trackio", tmp_path, monkeypatch) == []
    assert trackio.named("run") == [("billhook", ASKED)]
    assert trackio.named("log")[: len(LOGGED)] == LOGGED
    assert trackio.named("log")[-1][1]["result/value"] == 2.5
    assert trackio.calls[-1] == ("end", 0)


def test_a_run_that_fails_is_ended_as_failed(
    mlflow: Kept, wandb: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow("mlflow, wandb", tmp_path, monkeypatch, failed=True) == []
    assert mlflow.calls[-1] == ("end", "FAILED")
    assert wandb.calls[-1] == ("end", 1)
    assert not mlflow.named("dict")


# -- what goes wrong -------------------------------------------------------------------------------------------------


class Broken:
    """A tracker that fails or hangs at one of its calls."""

    def __init__(self, at: str, hangs: threading.Event | None = None) -> None:
        self.at, self.hangs, self.seen = at, hangs, list[str]()

    def _call(self, name: str) -> None:
        self.seen.append(name)
        if name == self.at:
            if self.hangs is not None:
                self.hangs.wait(60)
            raise OSError("no space left")

    def log(self, step: int, values: Any) -> None:
        self._call("log")

    def finish(self, rows: Any, page: Any) -> None:
        self._call("finish")

    def close(self, failed: bool) -> None:
        self._call("close")


@pytest.mark.parametrize("at", ["open", "log", "finish", "close"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    at: str, mlflow: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(at)

    def bad(run: TrackedRun) -> Broken:
        broken._call("open")
        return broken

    monkeypatch.setitem(TRACKERS._entries, "bad", bad)
    (warning,) = follow("bad,mlflow", tmp_path, monkeypatch)
    assert dict(warning.values) == {"tracker": "bad", "failed": "OSError: no space left"}
    assert broken.seen.count(at) == 1, "it is not called again"
    assert mlflow.calls[-1] == ("end", "FINISHED")


def test_a_failed_tracker_is_told_quietly_too_and_a_dry_run_is_not_tracked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRACKERS._entries, "bad", lambda run: Broken("close"))
    with session.CommandSession(as_json=False, quiet=True, verbose=False) as face:
        face.track("bad", "gate", {})
    assert capsys.readouterr().err == "track: bad, OSError: no space left\n"
    done = CliRunner().invoke(main.app, ["prune", "--remove", "1sites", "--dry-run", "--track", "bad"])
    assert (done.exit_code, "--dry-run is none" in done.stderr) == (2, True)


def test_a_tracker_that_hangs_does_not_hold_up_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(trackers, "MOST_WAIT_S", 0.2)
    monkeypatch.setitem(TRACKERS._entries, "slow", lambda run: Broken("log", over))
    try:
        (warning,) = follow("slow", tmp_path, monkeypatch)
    finally:
        over.set()
    assert "has not written all" in str(warning.values["failed"])


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_told_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda of, *more: None if of == name else found(of, *more))
    with pytest.raises(MissingExtra, match=rf"pip install 'billhook\[{name}\]'"):
        Tracking.start(name, "prune", PARAMS)
    done = CliRunner().invoke(
        main.app, ["prune", "--remove", "1sites", "--store", str(tmp_path / "a.db"), "--track", name]
    )
    assert done.exit_code == 2
    assert f"billhook[{name}]" in done.stderr
    assert not (tmp_path / "a.db").exists()


def test_an_unknown_tracker_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'mlflow'"):
        Tracking.start("mlfow", "prune", PARAMS)


def test_python_tracks_with_the_same_listener(wandb: Kept, tmp_path: Path) -> None:
    tracking = billhook.Tracking.start("wandb", "gate", {"student": "a"})
    tracking(Event("load", 1, 1, {"seconds": 2.0}))
    tracking.close()
    assert wandb.named("log") == [(1, {"load/seconds": 2.0, "load/done": 1.0})]
