"""Workers that are actors of a Ray cluster find what one process finds, whoever is refused or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import tiny
from test_workers import Kept, same, searched

from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.core.plan import Plan
from billhook.engine.measurements import DocumentIds, Known
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers.crew import parse_workers
from billhook.engine.workers.hiring import hiring
from billhook.engine.workers.team import Team
from billhook.models.load import Teacher, load

ATTEMPTS = 5  # Ray gives up the start of a node after 30 seconds, however busy the machine is
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # a token would be written to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_health_check_failure_threshold": "1000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_object_store_allow_slow_storage": "1",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray cluster of this machine with room for two workers, with little shared memory and without a dashboard."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        for left in reversed(range(ATTEMPTS)):
            try:
                ray.init(
                    address="local", num_cpus=2, num_gpus=0, object_store_memory=80 * 2**20,
                    include_dashboard=False, log_to_driver=False,
                    _plasma_directory=str(tmp_path_factory.mktemp("plasma")),
                )  # fmt: skip
                break
            except Exception as error:
                ray.shutdown()
                if not left or "timed out during startup" not in str(error):
                    raise
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("ray") / "model", "llama", num_hidden_layers=6))


def actors() -> list[int]:
    """The processes of the actors of this cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::Worker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.usefixtures("cluster")
def test_actors_find_what_one_process_finds_also_when_one_is_killed(teacher: Teacher) -> None:
    told: list[Event] = []
    cache = Kept()
    crew = parse_workers("ray")

    class Killing(Kept):
        """Kills an actor after some pieces."""

        def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
            cache.add_partial(quality, nats)
            if len(cache.measured) > 60 and alive:
                os.kill(alive.pop(), signal.SIGKILL)

        def lookup(self, plans: Sequence[Plan]) -> list[Known]:
            return cache.lookup(plans)

    with Team(teacher, hiring(crew, teacher), watch=told.append) as team:
        team.wait()
        assert team.workers == (0, 1, 2), "as many as there are CPUs"
        alive = actors()[:1]
        with pytest.raises(UsageError, match="0 CPUs and 0 GPUs free, and a worker needs 1 and 0"):
            hiring(crew, teacher)
        same(searched(teacher, "swap", team, Killing()), searched(teacher, "swap", None))
        assert len(team.workers) == 2
        loads = team.loads()
        assert loads["rate.1"] > 0
        assert loads["rate.2"] > 0
    (lost,) = [str(event.values["lost"]) for event in told if "lost" in event.values]
    assert "actor" in lost.lower()
    assert set(cache.measured.values()) == {1}, "nothing is measured twice"
    while actors():
        os.sched_yield()


@pytest.mark.usefixtures("cluster")
def test_a_checkpoint_that_has_changed_is_refused_in_an_actor(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "model", "llama")
    loaded = load(folder)
    told: list[Event] = []
    (folder / "model.safetensors").unlink()  # which the loaded model reads
    tiny.saved(folder, "llama", seed=1)
    with Team(loaded, hiring(parse_workers("ray:n=1,cpus=1"), loaded), watch=told.append) as team:
        team.wait()
        assert team.workers == (0,)
    assert [str(event.values["refused"]).partition(" ")[0] for event in told] == ["model"]


@pytest.mark.usefixtures("cluster")
def test_ray_address_says_which_cluster() -> None:
    code = (
        "from billhook.engine.workers.ray_actors import connect; connect(); import ray; print(ray.nodes()[0]['NodeID'])"
    )
    address = ray.get_runtime_context().gcs_address
    told = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RAY_ADDRESS": address}, check=True, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert ray.nodes()[0]["NodeID"] in told.stdout
