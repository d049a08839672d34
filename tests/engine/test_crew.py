"""Which workers a recipe's text means: what is read, what is refused, and what a crew needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.errors import MissingExtra, RecipeError, UsageError
from billhook.engine.workers import crew, ray_actors, slurm_jobs
from billhook.engine.workers.crew import SBATCH, Crew, parse_workers, require_installed
from billhook.engine.workers.hiring import hiring, require_workers
from billhook.models.load import Teacher, load

counts = st.none() | st.integers(1, 64)
settings = st.dictionaries(st.sampled_from(SBATCH), st.sampled_from(["gpu", "1-02:00:00", "node[1-3]", "a100&nvlink"]))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("crew") / "model", "llama"))


@given(st.integers(1, 999))
def test_a_number_means_processes_of_which_this_one_is_the_first(number: int) -> None:
    assert parse_workers(number) == parse_workers(str(number)) == Crew(others=number - 1)
    assert parse_workers(number).spelled() == number
    assert parse_workers(number).alone == (number == 1)


@given(counts, counts, counts)
def test_a_crew_of_actors_is_read_as_it_is_spelled(others: int | None, gpus: int | None, cpus: int | None) -> None:
    asked = Crew("ray", others, gpus, cpus)
    assert parse_workers(asked.spelled()) == asked
    assert not asked.alone


@given(st.integers(1, 999), counts, counts, settings)
def test_a_crew_of_jobs_is_read_as_it_is_spelled(
    others: int, gpus: int | None, cpus: int | None, given: dict[str, str]
) -> None:
    asked = Crew("slurm", others, gpus, cpus, given | {"host": "10.0.0.1", "port": "5555"})
    assert parse_workers(asked.spelled()) == asked


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (0, "workers=0 is not between 1 and 999"),
        ("1000", "'1000' is not between 1 and 999"),
        (True, "neither a number, ray nor slurm"),
        (2.5, "neither a number, ray nor slurm"),
        ("", "neither a number, ray nor slurm"),
        ("-2", "neither a number, ray nor slurm"),
        ("rai:n=2", "Did you mean ray?"),
        ("slrum:n=2", "Did you mean slurm?"),
        ("processes:n=2", "neither a number, ray nor slurm"),
        ("ray:", "has ''"),
        ("ray:n", "no value for n"),
        ("ray:n=", "no value for n"),
        ("ray:n=0", "n=0, which is not between 1 and 999"),
        ("ray:n=two", "n=two, which is not between 1 and 999"),
        ("ray:gpus=-1", "gpus=-1, which is not between 0 and 64"),
        ("ray:n=2,n=3", "gives n twice"),
        ("ray:partition=gpu,n=2", "has 'partition': ray takes n, gpus, cpus"),
        ("slurm", "how many jobs to start, such as n=16"),
        ("slurm:gpus=1", "how many jobs to start, such as n=16"),
        ("slurm:n=2,partitoin=gpu", "Did you mean partition?"),
        ("slurm:n=2,account=a b", "has account='a b', with a character that no such value has"),
        ("slurm:n=2,port=22", "port=22, which is not between 1024 and 65535"),
    ],
)
def test_other_texts_are_refused_with_what_is_allowed(text: object, why: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_workers(text)
    assert why in str(refused.value)
    assert str(refused.value).endswith("Write workers=4, workers='ray:n=4' or workers='slurm:n=16,partition=gpu'.")


@pytest.mark.parametrize(("text", "extra"), [("ray", "ray"), ("slurm:n=2", "slurm")])
def test_a_missing_package_is_told_with_its_extra(text: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_installed(parse_workers(text))
    monkeypatch.setattr(crew, "find_spec", lambda module: None)
    require_installed(parse_workers(4))
    with pytest.raises(MissingExtra, match=rf"Running workers as {text} needs .*pip install 'billhook\[{extra}\]'"):
        require_installed(parse_workers(text))


@pytest.mark.parametrize(
    ("kind", "text", "gpus"),
    [
        ("cpu", "ray:n=2", 0),
        ("cpu", "ray:n=2,gpus=0", 0),
        ("cpu", "slurm:n=2,gpus=1", None),
        ("cuda", "ray:n=2", 1),
        ("cuda", "slurm:n=2,gpus=8", 8),
        ("cuda", "slurm:n=2,gres=gpu:a100:1", 0),  # which asks for the GPU itself
        ("cuda", "ray:gpus=0", None),
        ("mps", "ray:n=2", None),
    ],
)
def test_each_worker_gets_a_gpu_where_this_process_has_one(
    kind: str, text: str, gpus: int | None, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Teacher, "device", torch.device(kind))
    for module in (ray_actors, slurm_jobs):
        monkeypatch.setattr(module, "hiring", lambda crew, each: asked.append(each))
    if gpus is None:
        with pytest.raises(UsageError, match=f"and this process computes on {kind}"):
            require_workers(text, teacher)
    else:
        require_workers(text, teacher)
        hiring(parse_workers(text), teacher)
        assert asked == [gpus]


def test_jobs_need_a_machine_that_submits_them(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="needs Slurm's sbatch, which this machine lacks"):
        hiring(parse_workers("slurm:n=2"), teacher)


@pytest.mark.parametrize(
    ("address", "why"), [("ray://head:10001", "that this process is no part of"), ("", "No Ray cluster was reached")]
)
def test_actors_need_a_cluster(address: str, why: str, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def none(**given: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", none)
    with pytest.raises(UsageError, match=why) as refused:
        hiring(parse_workers("ray"), teacher)
    assert "ray start --head" in str(refused.value)
