"""A Slurm of this machine: `sbatch`, `squeue` and `scancel`, which start jobs as processes at once.

They print what those of Slurm 22.05 print. `sacct` is that of a cluster without a database, and `srun` is only there.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

JOB = "42"  # the one array that is submitted
SBATCH = f"""#!{sys.executable}
import os, re, subprocess, sys
from pathlib import Path
home = Path(__file__).parent
script = Path(sys.argv[-1]).read_text()
options = dict(line[2:].split("=", 1) for line in re.findall(r"^#SBATCH (--.*=.*)$", script, re.MULTILINE))
if options.get("partition") == "closed":
    print("sbatch: error: invalid partition specified: closed", file=sys.stderr)
    sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
(home / "options").write_text("\\n".join(f"{{name}}={{value}}" for name, value in sorted(options.items())))
kept = home / "script.sh"
kept.write_text(script)
array = re.match(r"0-([0-9]+)%", options.get("array", ""))
for task in range(int(array[1]) + 1) if array else [None]:
    names = "JOB_NUM_NODES=1 NTASKS=1 NODEID=0 PROCID=0 LOCALID=0 JOB_NODELIST=here JOB_ID={JOB}".split()
    names += [] if task is None else ["ARRAY_JOB_ID={JOB}", f"ARRAY_TASK_ID={{task}}"]
    environment = os.environ | dict(("SLURM_" + name).split("=") for name in names)
    name = "{JOB}" if task is None else f"{JOB}_{{task}}"
    logs = [
        open(options[kind].replace("%A", "{JOB}").replace("%a", str(task)).replace("%j", "{JOB}"), "ab")
        for kind in ("output", "error")
    ]
    job = subprocess.Popen(
        ["bash", str(kept)], env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=logs[0],
        stderr=logs[1],
    )
    (home / f"pid-{{name}}").write_text(str(job.pid))
print("Submitted batch job {JOB}")
"""
SQUEUE = f"""#!{sys.executable}
import sys
from pathlib import Path
import psutil
files = sorted(Path(__file__).parent.glob("pid-*"))
if "--jobs={JOB}" not in sys.argv or not files:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
for file in files:
    pid = int(file.read_text())
    if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        print(file.name.removeprefix("pid-"))
"""
SRUN = f"#!{sys.executable}\n"
SCANCEL = f"""#!{sys.executable}
import os, signal, sys
from pathlib import Path
pid = Path(__file__).parent / f"pid-{{sys.argv[1]}}"
(Path(__file__).parent / f"cancelled-{{sys.argv[1]}}").touch()
try:
    os.killpg(int(pid.read_text()), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
SACCT = f"#!{sys.executable}\nimport sys\nsys.exit('Slurm accounting storage is disabled')\n"


class FakeSlurm:
    """The commands in a folder that PATH begins with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        commands = {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "scancel": SCANCEL, "sacct": SACCT}
        for name, text in commands.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    @property
    def options(self) -> dict[str, str]:
        """What the last submission asked of Slurm."""
        lines = (self.folder / "options").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def cancelled(self) -> set[str]:
        """The jobs that `scancel` was called for."""
        return {file.name.removeprefix("cancelled-") for file in self.folder.glob("cancelled-*")}

    def pid(self, job: str) -> int:
        """The process group of a job."""
        return int((self.folder / f"pid-{job}").read_text())

    def kill(self, job: str) -> None:
        """End a job as the loss of its machine does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid(job), signal.SIGKILL)
