"""The process of a runtime: answers the questions of `Served` over a pipe. Started by it; imports no torch."""

from __future__ import annotations

import importlib
import os
import sys
from multiprocessing.connection import Connection
from typing import Any


def main(handle: int) -> None:
    """Load the model of the first question, then answer until the pipe is closed."""
    os.dup2(2, 1)  # what a runtime prints is no answer
    line: Connection[Any, Any] = Connection(handle)
    model: Any = None
    while True:
        try:
            name, *arguments = line.recv()
        except EOFError:
            return
        try:
            if model is None:
                model = importlib.import_module(name).Model(*arguments)
                line.send((False, None))
            else:
                line.send((False, getattr(model, name)(*arguments)))
        except Exception as error:  # whatever a runtime raises is told to whoever asked
            line.send((True, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
