"""Metrics: importance scores of sites, blocks and spans of blocks, without measuring every removal.

A metric is a function of a probe, with options, that returns {unit: Score}; higher = removal hurts more. A unit is a
site, a block by its position, or a run of blocks. `probe.losses` measures plans and caches them like those of a search.
"""

from __future__ import annotations

from collections.abc import Callable

from billhook.core.errors import UsageError, option
from billhook.core.problem import ScoredUnit
from billhook.core.registry import Registry
from billhook.core.results.measured import Score
from billhook.engine.channel_statistics import GroupValues
from billhook.engine.probe import Probe

Metric = Callable[..., dict[ScoredUnit, Score]]
METRICS: Registry[Metric] = Registry("metric")
metric = METRICS.add

# (probe, **options) -> {site: scores of its channel groups, [groups] in float64}
GROUP_METRICS: Registry[Callable[..., GroupValues]] = Registry("metric of channel groups", "group_metric")
group_metric = GROUP_METRICS.add


def require_task(probe: Probe) -> Probe:
    """Return the probe if its tokens are those of a task. Raises UsageError otherwise."""
    if probe.tokens.choices is None:
        raise UsageError(f"This metric scores a multiple-choice task. Name one: {option('loss', 'task:FILE')}.")
    return probe


from billhook.methods.metrics import (  # noqa: E402, F401 - they register themselves above
    ablation,
    activations,
    channel_groups,
    shapley,
    taylor,
    weights,
)
