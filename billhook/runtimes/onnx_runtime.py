"""ONNX Runtime on CPUs, for a graph whose KV cache goes in and comes out with each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from billhook.runtimes.graph import GraphModel

TOKENS = ("input_ids", "attention_mask", "position_ids")


class Model(GraphModel):
    """The folder of an ONNX graph. The KV cache has the type of the graph, and is copied once a step."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        super().__init__(Path(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = Path(path) / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._weights = sum(each.stat().st_size for each in (file, file.with_name("model.onnx.data")) if each.exists())
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._cache: dict[str, Any] = {}

    def _forget(self) -> None:
        self._past = 0
        self._cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([int(size) if str(size).isdigit() else int(axis == 0) for axis, size in enumerate(each.shape)],
                         np.float32)
            )
            for name, each in self._inputs.items()
            if name not in TOKENS
        }  # fmt: skip

    def _step(self, tokens: Sequence[int]) -> Any:
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
            for name, value in self._arguments(tokens).items()
            if name in self._inputs
        }
        logits, *cache = self._session.run_with_ort_values(self._outputs, feed | self._cache)
        self._cache = dict(zip(self._cache, cache, strict=True))
        return logits.numpy()[0]

    def _kv_bytes(self) -> int:
        return sum(4 * int(np.prod(each.shape())) for each in self._cache.values())
