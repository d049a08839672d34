"""Software that serves exported models: each runs in a process of its own, whose crash is a message here.

A runtime is a module of this package, or of another one by an entry point `billhook.runtime`, with a class `Model`. Its
constructor takes the path of an export, the number of tokens that will be asked for at once, and the number of threads.
See `Served` for its methods.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

from billhook.core.errors import BillhookError, MissingExtra
from billhook.core.registry import Entries
from billhook.runtimes.energy import Phases

if TYPE_CHECKING:  # what a mistake in a name need not wait for
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
SECONDS = 900.0  # that one answer may take


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where the code for a runtime is, what it imports, and which extra of Billhook installs that.

    `module` holds the class `Model`. `package`: as it is imported; `distribution`: as it is installed.
    """

    module: str
    package: str
    distribution: str
    extra: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The installed release, of whichever distribution brings the package; empty where there is none."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            others = packages_distributions().get(self.package, ())
            return version(others[0]) if others else ""


RUNTIMES = Entries(
    "runtime",
    {
        "llama.cpp": Runtime("billhook.runtimes.llama_cpp", "xllamacpp", "xllamacpp", "llama"),
        "mlx": Runtime("billhook.runtimes.mlx", "mlx_lm", "mlx-lm", "mlx"),
        "vllm": Runtime("billhook.runtimes.vllm", "vllm", "vllm", "vllm"),
        "onnxruntime": Runtime("billhook.runtimes.onnx_runtime", "onnxruntime", "onnxruntime", "onnx"),
        "openvino": Runtime("billhook.runtimes.open_vino", "openvino", "openvino", "openvino"),
    },
    fits=lambda value: isinstance(value, Runtime),
)


class RuntimeFailed(BillhookError):
    """A runtime that does not load an export, or stops while it runs it."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class RuntimeNumbers:
    """What a runtime says of a loaded model. Bytes; None where it does not say.

    `kv_bytes`: of the KV cache, as it was allocated. `peak_bytes`: of memory, of its process until now.
    """

    name: str
    version: str
    weight_bytes: int | None
    kv_bytes: int | None
    peak_bytes: int | None


class Served:
    """An exported model in its runtime, until `close` or the end of a `with`.

    Raises MissingExtra where the runtime is not installed, RuntimeFailed where it refuses the export or crashes.
    """

    def __init__(self, name: str, path: Path, *, context: int = 512, threads: int | None = None) -> None:
        from billhook.models.device import child_environment  # with torch, which the process has no use for

        runtime = RUNTIMES[name]
        if not runtime.installed:
            raise MissingExtra(f"Running a model in {name}", runtime.extra)
        self.name, self.path = name, path
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._line, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "billhook.runtimes.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env=child_environment(path),
        )  # fmt: skip
        theirs.close()
        try:
            self._ask(runtime.module, str(path.resolve()), context, threads or _cores())
        except BaseException:
            self.close()
            raise

    def logprobs(self, tokens: Sequence[int]) -> Floats:
        """Return the natural logarithm of the probability of each next token: [time, vocabulary]."""
        return cast("Floats", self._ask("logprobs", list(tokens)))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the model expects before it; special tokens in it are read as such."""
        return cast(list[int], self._ask("tokenize", text))

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the `count` tokens that greedy decoding with the KV cache appends, past any end of text."""
        return cast(list[int], self._ask("generate", list(tokens), count))

    def time(self, tokens: Sequence[int], count: int) -> Phases:
        """Return the seconds of a prefill of `tokens`, and of `count` decoding steps after it, with joules if counted.

        A `Model` of a runtime returns two seconds, or four numbers: the joules of both phases too.
        """
        return Phases(*cast(tuple[float, ...], self._ask("time", list(tokens), count)))

    def numbers(self) -> RuntimeNumbers:
        """Return what the runtime says of its memory."""
        weights, kv, peak = cast(tuple[int | None, int | None, int | None], self._ask("numbers"))
        return RuntimeNumbers(self.name, RUNTIMES[self.name].version, weights, kv, peak)

    def close(self) -> None:
        """End the process. A second time does nothing."""
        self._line.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, *question: object) -> Any:
        line: Connection[Any, Any] = self._line
        try:
            line.send(question)
            if not line.poll(SECONDS):
                raise RuntimeFailed(f"{self.name} gave no answer on {self.path} within {SECONDS:.0f} s.")
            failed, answer = line.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            ended = f"with signal {-code}" if code < 0 else f"with exit status {code}"
            raise RuntimeFailed(f"{self.name} ended {ended} on {self.path}.{self._last_words()}") from error
        if failed:
            raise RuntimeFailed(f"{self.name} refuses {self.path}: {answer}.{self._last_words()}")
        return answer

    def _last_words(self, most: int = 400, window: int = 2**16) -> str:
        """Return the last lines that the process wrote about an error, for a message; a trace may stand after them."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - window))
        lines = self._log.read().decode(errors="replace").splitlines()
        text = " / ".join([line.strip() for line in lines if re.search("error|fail|assert", line, re.I)][-4:])
        return f" It wrote: {text[-most:]}" if text else ""


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
