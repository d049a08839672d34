"""What the runtimes of graphs share: a step over new tokens after the KV cache, and all answers made of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from billhook.runtimes.energy import Laps, Timed, rapl_counters
from billhook.runtimes.log_softmax import log_softmax
from billhook.runtimes.memory import peak_resident


class GraphModel(ABC):
    """A graph with its tokenizer in one folder, `path`."""

    _weights: int  # bytes
    _past = 0  # tokens in the KV cache

    def __init__(self, path: Path) -> None:
        self._tokenizer = path / "tokenizer.json"

    @abstractmethod
    def _forget(self) -> None:
        """Empty the KV cache."""

    @abstractmethod
    def _step(self, tokens: Sequence[int]) -> Any:
        """Append tokens to the KV cache; return the logits after each of them: [time, vocabulary]."""

    @abstractmethod
    def _kv_bytes(self) -> int: ...

    def _arguments(self, tokens: Sequence[int]) -> dict[str, npt.NDArray[np.int64]]:
        """Return the inputs of a step, in which all tokens are seen, and count it."""
        start, self._past = self._past, self._past + len(tokens)
        return {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._past), np.int64),
            "position_ids": np.arange(start, self._past, dtype=np.int64)[None],
        }

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of each next token: [time, vocabulary]."""
        self._forget()
        return log_softmax(np.asarray(self._step(tokens)))

    def tokenize(self, text: str) -> list[int]:
        found: list[int] = Tokenizer.from_file(str(self._tokenizer)).encode(text).ids
        return found

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        return self._greedy(tokens, count)[0]

    def time(self, tokens: Sequence[int], count: int) -> Timed:
        return self._greedy(tokens, count + 1)[1]

    def _greedy(self, tokens: Sequence[int], count: int) -> tuple[list[int], Timed]:
        """Return `count` tokens, and the times until the first of them, and from there to the last."""
        self._forget()
        laps = Laps(rapl_counters())
        made = [int(self._step(tokens)[-1].argmax())]
        laps.lap()
        while len(made) < count:
            made.append(int(self._step(made[-1:])[-1].argmax()))
        laps.lap()
        return made, laps.phases().numbers()

    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """Bytes of the files with the weights, of the KV cache after the last answer, and of the peak of memory."""
        return self._weights, self._kv_bytes() or None, peak_resident()
