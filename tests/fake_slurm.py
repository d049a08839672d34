"""A Slurm of this machine: `sbatch`, `srun`, `scancel` and `sacct`, which start jobs as processes at once."""

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
    sys.exit("sbatch: error: invalid partition specified: closed")
(home / "options").write_text("\\n".join(f"{{name}}={{value}}" for name, value in sorted(options.items())))
kept = home / "script.sh"
kept.write_text(script)
array = re.match(r"0-([0-9]+)%", options.get("array", ""))
for task in range(int(array[1]) + 1) if array else [None]:
    names = "JOB_NUM_NODES=1 NTASKS=1 NODEID=0 PROCID=0 LOCALID=0 JOB_NODELIST=here JOB_ID={JOB}".split()
    names += [] if task is None else ["ARRAY_JOB_ID={JOB}", f"ARRAY_TASK_ID={{task}}"]
    environment = os.environ | dict(("SLURM_" + name).split("=") for name in names)
    job = subprocess.Popen(
        ["bash", str(kept)], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    name = "{JOB}" if task is None else f"{JOB}_{{task}}"
    (home / f"pid-{{name}}").write_text(str(job.pid))
print("Submitted batch job {JOB}")
"""
SRUN = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
first = next(place for place, word in enumerate(words) if word.startswith("/") and words[place - 1][:2] != "--")
array = os.environ.get("SLURM_ARRAY_TASK_ID")
for handle, name in ((1, "--output"), (2, "--error")):
    path = words[words.index(name) + 1].replace("%t", "0").replace("%j", "{JOB}")
    path = path.replace("%A", "{JOB}").replace("%a", array or "")
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), handle)
os.execv(words[first], words[first:])
"""
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
SACCT = f"#!{sys.executable}\nprint('JobID|State|NodeList')\n"


class FakeSlurm:
    """The commands in a folder that PATH begins with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "scancel": SCANCEL, "sacct": SACCT}.items():
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
