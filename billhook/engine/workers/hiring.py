"""How the workers of a search are started, wherever they run."""

from __future__ import annotations

from billhook.core.errors import UsageError, option
from billhook.engine.workers import processes, ray_actors, slurm_jobs
from billhook.engine.workers.crew import Crew, parse_workers, require_installed, require_one_device
from billhook.engine.workers.lines import Hiring
from billhook.models.load import Teacher


def require_workers(workers: int | str, teacher: Teacher) -> None:
    """Raise RecipeError, UsageError, MissingExtra or ResourceError where workers cannot do what this process does."""
    _require(parse_workers(workers), teacher)


def hiring(crew: Crew, teacher: Teacher) -> Hiring:
    """Return how a crew is started. Raises as `require_workers`, and where there is no cluster to start it on."""
    _require(crew, teacher)
    match crew.place:
        case "processes":
            return processes.hiring((crew.others or 0) + 1, teacher)
        case "ray":
            return ray_actors.hiring(crew, _gpus(crew, teacher))
        case "slurm":
            return slurm_jobs.hiring(crew, _gpus(crew, teacher))


def _require(crew: Crew, teacher: Teacher) -> None:
    require_one_device(crew, [str(device) for device in teacher.devices])
    if crew.place == "processes":
        processes.environments((crew.others or 0) + 1, teacher)
    else:
        require_installed(crew)
        _gpus(crew, teacher)


def _gpus(crew: Crew, teacher: Teacher) -> int:
    """Return the GPUs of each worker: where this process computes on one at least one, elsewhere none."""
    kind = teacher.device.type
    gpus = (1 if kind == "cuda" and "gres" not in crew.settings else 0) if crew.gpus is None else crew.gpus
    if kind not in ("cpu", "cuda") or (crew.gpus is not None and (kind == "cuda") != (gpus > 0)):
        raise UsageError(
            f"{option('workers', crew.spelled())} gives each worker {gpus} GPUs, and this process computes on "
            f"{kind}: all must compute alike. Leave gpus out, or run the command itself on a machine with a GPU, and "
            f"with {option('device', 'cuda')}; or type {option('device', 'cpu')} and gpus=0."
        )
    return gpus
