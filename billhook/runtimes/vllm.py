"""vLLM in this process, on the device for which it was built, in float32.

It gives log-probabilities as lists of Python numbers, a vocabulary for each token: ask for few tokens at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from billhook.runtimes.memory import peak_resident

SETTINGS = {  # of the environment, which vLLM reads while it is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB, where it would take half of all memory
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled for a few tokens
}


class Model:
    """A Hugging Face folder in vLLM, with the code that the folder brings. `threads`: vLLM chooses."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self._model: Any = LLM(
            model=path, trust_remote_code=True, dtype="float32", max_model_len=context + 1, max_logprobs=-1,
            enforce_eager=True, enable_prefix_caching=False, max_num_seqs=1, disable_log_stats=True, seed=0,
            skip_tokenizer_init=not _has_tokenizer(path),
        )  # fmt: skip

    def _answer(self, tokens: Sequence[int], count: int, **wanted: Any) -> Any:
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, **wanted)
        return self._model.generate({"prompt_token_ids": list(tokens)}, asked, use_tqdm=False)[0]

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of each next token: [time, vocabulary]."""
        answer = self._answer(tokens, 1, logprobs=-1, prompt_logprobs=-1)
        positions = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        size = max(max(each) for each in positions) + 1
        found = np.full((len(positions), size), -np.inf, dtype=np.float32)
        for row, each in zip(found, positions, strict=True):
            row[list(each)] = [entry.logprob for entry in each.values()]
        return found

    def tokenize(self, text: str) -> list[int]:
        return list(map(int, self._model.get_tokenizer().encode(text)))

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        return list(map(int, self._answer(tokens, count).outputs[0].token_ids))

    def time(self, tokens: Sequence[int], count: int) -> tuple[float, float]:
        """The prefill counts the first token; the decoding is what `count` more take."""
        start = time.perf_counter()
        self._answer(tokens, 1)
        middle = time.perf_counter()
        self._answer(tokens, count + 1)
        return middle - start, max(0.0, time.perf_counter() - middle - (middle - start))

    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """Bytes at the peak of this process; vLLM takes a KV cache of a fixed size, so it says nothing of the rest."""
        return None, None, peak_resident()


def _has_tokenizer(path: str) -> bool:
    return any(Path(path).glob("tokenizer*"))
