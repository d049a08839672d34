"""Evaluations: each gives one outcome per item, in a fixed order, so that two models can be paired."""

from __future__ import annotations

from collections.abc import Callable

from billhook.records import EvalResult
from billhook.registry import Registry

EVALUATIONS: Registry[Callable[..., EvalResult]] = Registry("evaluation")
evaluation = EVALUATIONS.add

from billhook.evaluate import perplexity  # noqa: E402, F401 - importing a method files it under its name
