"""Decoding as a serving engine does it: a KV cache of fixed size, and one graph of kernels that is replayed each step.

A step of a model in eager mode launches a thousand kernels, which takes a GPU longer than they compute. An engine pays
for that once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

from billhook.models.accelerator.graphs import capture, captures_graphs
from billhook.models.accelerator.spreading import devices_of
from billhook.models.transformers_internals import cache_name

WARM_UPS = 3  # steps before the graph is taken: libraries choose their kernels in the first ones


class FixedDecoding:
    """Greedy decoding of one model after a prompt, in tensors that stay where they are.

    `model`: in eval mode; `ids` [batch, time]: the prompt; `steps`: the most that follow.
    """

    def __init__(self, model: Any, ids: torch.Tensor, steps: int) -> None:
        self._model, self._name = model, cache_name(model)
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        out = model(input_ids=ids, use_cache=True, **{self._name: self._cache}, **last_only)
        self.token = out.logits[:, -1:].argmax(-1)  # [batch, 1]: the next one

    def step(self) -> None:
        """Decode one token, without a wait for the device: `token` becomes the next one."""
        out = self._model(input_ids=self.token, use_cache=True, **{self._name: self._cache})
        self.token.copy_(out.logits[:, -1:].argmax(-1))


@torch.inference_mode()
def graphed_seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float | None:
    """Return the seconds of `new_tokens` replayed decoding steps after `ids` [batch, time].

    None where the device has no graphs, on several devices, or where this model's step is none: it waits for the
    device, or its cache grows.
    """
    if not captures_graphs(ids.device) or len(devices_of(model)) > 1:
        return None
    try:
        decoding = FixedDecoding(model, ids, WARM_UPS + 1 + new_tokens)
        return capture(decoding.step, WARM_UPS, ids.device).seconds(new_tokens)
    except (RuntimeError, NotImplementedError, ValueError, KeyError, TypeError, AttributeError):
        return None
