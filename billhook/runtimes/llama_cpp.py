"""llama.cpp through its C API, which the package xllamacpp exports: all logits of all positions at once.

Only what its header has kept for years is used: the parameters come from its own functions as blocks of bytes, of which
the first two numbers (tokens of context and of a batch) are set, and read back from the context that they made.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from billhook.runtimes.energy import Laps, Timed, rapl_counters
from billhook.runtimes.log_softmax import log_softmax
from billhook.runtimes.memory import peak_resident

MOST_AT_ONCE = 512  # tokens that one call decodes


class Parameters(ctypes.Structure):
    """Parameters of a model or of a context, larger than either: a callee reads as far as it needs."""

    _fields_ = (("numbers", c_uint32 * 256),)


class Batch(ctypes.Structure):
    """`llama_batch` of llama.h."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
    "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_size": (c_uint64, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_synchronize": (None, [c_void_p]),
}
LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


def library() -> Any:
    """Return the functions of llama.cpp, with their types. Raises OSError or AttributeError where one is missing."""
    from xllamacpp import xllamacpp

    functions = ctypes.CDLL(xllamacpp.__file__)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions


class Model:
    """A GGUF file in llama.cpp, on the devices that it finds by itself. The KV cache is float16, its own default."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        self._api = library()
        self._said: list[str] = []
        self._keep: Callable[..., None] = LogCallback(lambda level, text, data: self._hear(text))
        self._api.llama_log_set(self._keep, None)
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(path.encode(), self._api.llama_model_default_params())
        if not self._model:
            raise ValueError(self._complaint() or "it does not load")
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(self._api.llama_vocab_n_tokens(self._vocabulary))
        parameters = self._api.llama_context_default_params()
        parameters.numbers[0], parameters.numbers[1] = context, min(context, MOST_AT_ONCE)
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(self._complaint() or "it makes no context")
        if self._api.llama_n_ctx(self._context) < context or self._api.llama_n_batch(self._context) > context:
            raise ValueError("this release of xllamacpp has parameters in another order than Billhook knows")
        self._api.llama_set_n_threads(self._context, threads, threads)
        self._batch = self._api.llama_batch_init(MOST_AT_ONCE, 0, 1)

    def _hear(self, text: bytes) -> None:
        self._said.append(text.decode(errors="replace"))
        sys.stderr.write(self._said[-1])

    def _complaint(self) -> str:
        wrong = [
            line.strip() for line in "".join(self._said).splitlines() if re.search("error|fail|invalid", line, re.I)
        ]
        return "; ".join(wrong[:2])

    def _decode(self, tokens: Sequence[int], start: int, *, every: bool) -> list[npt.NDArray[np.float32]]:
        """Run tokens at positions from `start`; return the logits after each of them, or after the last one alone."""
        found = []
        for first in range(0, len(tokens), MOST_AT_ONCE):
            part = tokens[first : first + MOST_AT_ONCE]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                last = first + i == len(tokens) - 1
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + first + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, every or last
            if (code := self._api.llama_decode(self._context, batch)) != 0:
                raise ValueError(f"it stopped decoding with {code}")
            wanted = range(len(part)) if every else range(len(part) - 1, len(part)) if last else ()
            for i in wanted:
                logits = self._api.llama_get_logits_ith(self._context, i)
                found.append(np.ctypeslib.as_array(logits, (self.vocabulary_size,)).copy())
        return found

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def logprobs(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of each next token: [time, vocabulary]."""
        self._forget()
        return log_softmax(np.stack(self._decode(tokens, 0, every=True)))

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = (c_int32 * (len(raw) + 16))()
        count = self._api.llama_tokenize(self._vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        self._forget()
        made: list[int] = []
        logits = self._decode(tokens, 0, every=False)
        for i in range(count):
            made.append(int(logits[-1].argmax()))
            if i + 1 < count:
                logits = self._decode(made[-1:], len(tokens) + i, every=False)
        return made

    def time(self, tokens: Sequence[int], count: int) -> Timed:
        self._forget()
        laps = Laps(rapl_counters())
        logits = self._decode(tokens, 0, every=False)
        laps.lap()
        for i in range(count):
            logits = self._decode([int(logits[-1].argmax())], len(tokens) + i, every=False)
        laps.lap()
        return laps.phases().numbers()

    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """Bytes of weights, of the KV cache as the log says them, and at the peak of this process."""
        text = "".join(self._said)
        told = re.findall(r"KV buffer size\s*=\s*([0-9.]+) MiB", text)
        peak = peak_resident()
        return int(self._api.llama_model_size(self._model)), int(sum(map(float, told)) * 2**20) if told else None, peak
