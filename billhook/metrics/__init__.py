"""Metrics: how much sites, blocks and spans of blocks seem to matter, without trying every removal.

A metric is a function of a probe, and of options if it has any, that gives {unit: Score}; higher = removal hurts more.
"""

from __future__ import annotations

from collections.abc import Callable

from billhook.records import Score, Unit
from billhook.registry import Registry

Metric = Callable[..., dict[Unit, Score]]
METRICS: Registry[Metric] = Registry("metric")
metric = METRICS.add

from billhook.metrics import activations, gradients, weights  # noqa: E402, F401 - importing a method files it
