"""Workers as Slurm jobs, which submitit starts and which call their coordinator."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from billhook.core.errors import UsageError, option
from billhook.engine.workers.crew import MOST, SBATCH, Crew
from billhook.engine.workers.lines import Hiring, Inbox, Line, last_line, listen
from billhook.engine.workers.messages import Lost, Message
from billhook.engine.workers.network import Address, Reception, call, hang_up
from billhook.engine.workers.worker import serve
from billhook.models.device import child_environment

COMMANDS = ("sbatch", "srun", "scancel", "squeue")  # srun: submitit looks for it
SECONDS = (2.0, 120.0)  # between looks into the queue while a job has not called: first, doubled each time, at most


class JobLine:
    """Line to a Slurm job, which calls when it runs. What is sent before then waits."""

    def __init__(self, number: int, inbox: Inbox, job: Any, leave: Callable[[], None]) -> None:
        self._number, self._inbox, self.job, self._leave = number, inbox, job, leave
        self._lock = threading.Lock()
        self._line: Connection[Any, Any] | None = None
        self._unsent: list[bytes] = []
        self.settled = False  # it has called, is lost, or is closed

    def send(self, message: Message) -> None:
        """Send a message, once the job has called. To a job that is lost, nothing is sent."""
        with self._lock:
            if self._line is None:
                self._unsent.append(pickle.dumps(message))
            else:
                with suppress(OSError):
                    self._line.send_bytes(pickle.dumps(message))

    def answer(self, line: Connection[Any, Any]) -> None:
        """Talk with the job that calls, until it ends. Of a worker that is settled, a call is not answered."""
        with self._lock:
            if self.settled:
                return
            self._line, self.settled = line, True
            with suppress(OSError):  # of which `listen` learns
                for data in self._unsent:
                    line.send_bytes(data)
        listen(self._number, line, self._inbox, self._why)

    def lose_if_over(self, queue: Collection[str]) -> None:
        """Tell that the job is lost, if it has not called and is none of the jobs in the queue."""
        with self._lock:
            job = self.job
            if self.settled or job.job_id in queue:
                return
            self.settled = True
        self._inbox.put((self._number, Lost(f"Slurm job {job.job_id}{_last_words(job) or ', no longer in the queue'}")))

    def close(self) -> None:
        """End the job, also one that waits in the queue. A second time does nothing."""
        with self._lock:
            if self._line is not None:
                hang_up(self._line)
            self.settled = True
        job, self.job = self.job, None
        if job is not None:
            job.cancel(check=False)
            self._leave()

    def _why(self) -> str:
        job = self.job
        return "closed" if job is None else f"Slurm job {job.job_id}{_last_words(job)}"


def _last_words(job: Any) -> str:
    """Return the last line of a job's log behind a comma; empty where it has none that can be read."""
    try:
        return last_line(job.paths.stderr.read_text(errors="replace"))
    except OSError:  # of a job that never ran, or of a file system that is shared
        return ""


def in_queue(array: str) -> set[str] | None:
    """Return the jobs of an array that wait or run, by their ids; None where Slurm does not answer.

    It is asked by squeue, since sacct tells nothing on a cluster without a database of its own.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    asked = ["squeue", f"--jobs={array}", "--array", "--noheader", "--format=%i"]
    told = subprocess.run(asked, env=environment, capture_output=True, text=True, errors="replace")
    if told.returncode and "Invalid job id" not in told.stderr:  # which Slurm says of an array that it has forgotten
        return None
    return set(told.stdout.split())


def work(address: Address, number: int) -> None:
    """Be a worker of the coordinator at an address, until that hangs up. Runs in a Slurm job."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which submitit would ignore
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # of which it would write a line behind the reason of the end
    for warning in (signal.SIGUSR1, signal.SIGUSR2):  # of the end of the job's time
        signal.signal(warning, signal.SIG_IGN)
    serve(call(address, number))


class _Office:
    """What the jobs of one team share: where they call, and a folder for submitit's files. Closed with the last job."""

    def __init__(self, crew: Crew, gpus: int, inbox: Inbox) -> None:
        self._lines: dict[int, JobLine] = {}
        self._reception = _reception(crew, self._admit)
        self._folder = tempfile.mkdtemp(prefix="billhook-workers-", dir=Path.cwd())  # for this user alone
        self._over = threading.Event()
        try:
            jobs = _submitted(self._folder, crew, gpus, self._reception.address)
        except BaseException:
            self._close()
            raise
        self._lines |= {number: JobLine(number, inbox, job, self._leave) for number, job in enumerate(jobs, 1)}
        self._open = len(self._lines)
        array = jobs[0].job_id.partition("_")[0]
        threading.Thread(target=self._watch, args=(array,), daemon=True).start()

    @property
    def lines(self) -> list[JobLine]:
        """The lines of the jobs, by number."""
        return list(self._lines.values())

    def _admit(self, number: int, line: Connection[Any, Any]) -> None:
        if number in self._lines:
            self._lines[number].answer(line)

    def _watch(self, array: str) -> None:
        """Look for jobs that end before they call, until all have called."""
        pause, longest = SECONDS
        while not self._over.wait(pause) and not all(line.settled for line in self.lines):
            if (queue := in_queue(array)) is not None:
                for line in self.lines:
                    line.lose_if_over(queue)
            pause = min(2 * pause, longest)

    def _leave(self) -> None:
        self._open -= 1
        if not self._open:
            self._close()

    def _close(self) -> None:
        self._over.set()
        self._reception.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _reception(crew: Crew, admit: Callable[[int, Connection[Any, Any]], None]) -> Reception:
    return Reception(crew.settings.get("host", ""), int(crew.settings.get("port", 0)), admit)


def _submitted(folder: str, crew: Crew, gpus: int, address: Address) -> list[Any]:
    """Submit the jobs, as one array, with this process' Python and its search path. Returns submitit's jobs."""
    import submitit

    environment = child_environment()
    setup = [f"export {name}={shlex.quote(environment[name])}" for name in ("PYTHONPATH", "PYTHONSAFEPATH")]
    if crew.others == 1:  # which is no array, and might take itself for the job of one that runs this command
        setup.append('unset "${!SLURM_ARRAY_@}"')
    executor = submitit.SlurmExecutor(folder, python=f"{shlex.quote(sys.executable)} -P")
    executor.update_parameters(
        job_name="billhook", time=None, gpus_per_node=gpus or None, cpus_per_task=crew.cpus, setup=setup,
        array_parallelism=MOST, use_srun=False,  # whose step may have fewer CPUs than the job, and hides its last words
        additional_parameters={name: crew.settings[name] for name in SBATCH if name in crew.settings},
    )  # fmt: skip
    try:
        with executor.batch():
            return [executor.submit(work, address, number) for number in range(1, (crew.others or 0) + 1)]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UsageError(
            f"Slurm refused the workers {crew.spelled()}: {str(error).strip()[:500]}. "
            f"Correct them, or type {option('workers', 1)}."
        ) from error


def hiring(crew: Crew, gpus: int) -> Hiring:
    """Return how Slurm jobs are started, with `gpus` each.

    Raises UsageError where this machine cannot submit jobs, or is not to be called as the crew says.
    """
    if missing := next((name for name in COMMANDS if shutil.which(name) is None), None):
        raise UsageError(
            f"{option('workers', crew.spelled())} needs Slurm's {missing}, which this machine lacks. Type the command "
            f"on a machine that submits jobs, or {option('workers', 4)} for processes of this one."
        )
    _reception(crew, lambda number, line: None).close()

    def hire(inbox: Inbox) -> Sequence[Line]:
        return _Office(crew, gpus, inbox).lines

    return Hiring(crew.others or 0, hire, crew.cpus)
