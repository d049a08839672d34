"""Metrics: how much each site and block seems to matter, without trying every removal.

A metric is a function of a probe that gives {site, or block position: Score}; higher = removal hurts more.
"""

from __future__ import annotations

from collections.abc import Callable

from billhook.plan import Site
from billhook.records import Score
from billhook.registry import Registry

Metric = Callable[..., dict[Site | int, Score]]
METRICS: Registry[Metric] = Registry("metric")
metric = METRICS.add

from billhook.metrics import activations  # noqa: E402, F401 - importing a method files it under its name
