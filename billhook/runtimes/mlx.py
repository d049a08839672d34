"""MLX through mlx-lm, on the device that it takes by itself: a GPU of Apple, or CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from billhook.runtimes.energy import Laps, Timed, rapl_counters
from billhook.runtimes.log_softmax import log_softmax
from billhook.runtimes.memory import peak_resident


class Model:
    """A folder of safetensors in MLX. It is timed in the dtype of its weights, and computes in float32 otherwise.

    MLX computes in the dtype of the weights, whose rounding would hide a wrong tensor. `threads`: MLX chooses.
    """

    def __init__(self, path: str, context: int, threads: int) -> None:
        import mlx_lm  # which imports transformers: a process that serves no model does without

        self._lm: Any = mlx_lm
        self._path = Path(path)
        self._stored, self._config = mlx_lm.utils.load_model(self._path)
        self._exact: Any = None
        self._tokenizer: Any = None
        self._caches: list[Any] = []

    def _float32(self) -> Any:
        """Return the model with its weights in float32, read when it is first asked for."""
        if self._exact is None:
            self._exact, _ = self._lm.utils.load_model(self._path, lazy=True)
            self._exact.set_dtype(mx.float32)
        return self._exact

    def _forget(self, model: Any) -> None:
        self._caches = self._lm.models.cache.make_prompt_cache(model)

    def _decode(self, model: Any, tokens: Sequence[int]) -> Any:
        """Return the logits after each of these tokens, which follow those before: [time, vocabulary]."""
        logits = model(mx.array([list(tokens)]), cache=self._caches)[0]
        mx.eval(logits)
        return logits

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of each next token: [time, vocabulary]."""
        model = self._float32()
        self._forget(model)
        return log_softmax(np.array(self._decode(model, tokens).astype(mx.float32)))

    def tokenize(self, text: str) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = self._lm.tokenizer_utils.load(self._path, eos_token_ids=self._config.get("eos_token_id"))
        return list(map(int, self._tokenizer.encode(text)))

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        return self._greedy(self._float32(), tokens, count)[0]

    def time(self, tokens: Sequence[int], count: int) -> Timed:
        return self._greedy(self._stored, tokens, count + 1)[1]

    def _greedy(self, model: Any, tokens: Sequence[int], count: int) -> tuple[list[int], Timed]:
        """Return `count` tokens, and the times until the first of them, and from there to the last."""
        self._forget(model)
        laps = Laps(rapl_counters())
        made = [int(self._decode(model, tokens)[-1].argmax().item())]
        laps.lap()
        while len(made) < count:
            made.append(int(self._decode(model, made[-1:])[-1].argmax().item()))
        laps.lap()
        return made, laps.phases().numbers()

    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """Bytes of weights, of the KV cache after the last answer, and at the peak of this process."""
        leaves: Any = tree_flatten(self._stored.parameters())
        weights = sum(int(tensor.nbytes) for _, tensor in leaves)
        kv = sum(int(each.nbytes) for each in self._caches)
        return weights, kv or None, peak_resident()
