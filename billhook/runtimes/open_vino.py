"""OpenVINO on CPUs, for a graph that holds its KV cache as state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from billhook.runtimes.graph import GraphModel

# OpenVINO by itself rounds where the processor is faster so; here the graph is computed as it is.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Model(GraphModel):
    """The folder of an OpenVINO graph, computed in float32 with a KV cache in float32."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        super().__init__(Path(path))
        file = Path(path) / "openvino_model.xml"
        self._weights = file.with_suffix(".bin").stat().st_size
        compiled = openvino.Core().compile_model(str(file), "CPU", {**EXACT, "INFERENCE_NUM_THREADS": threads})
        self._request = compiled.create_infer_request()
        self._inputs = {each.get_any_name() for each in compiled.inputs}

    def _forget(self) -> None:
        self._past = 0
        self._request.reset_state()

    def _step(self, tokens: Sequence[int]) -> Any:
        feed = {**self._arguments(tokens), "beam_idx": np.zeros(1, np.int32)}
        self._request.infer({name: value for name, value in feed.items() if name in self._inputs})
        return self._request.get_tensor("logits").data[0]

    def _kv_bytes(self) -> int:
        return sum(int(each.state.byte_size) for each in self._request.query_state())
