"""Metrics: how much sites, blocks and spans of blocks seem to matter, without trying every removal.

A metric is a function of a probe, with options, that gives {unit: Score}; higher = removal hurts more. A unit is a
site, a block by its position, or a run of blocks. `probe.losses` measures plans, and keeps them like those of a search.
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

# Of channel groups: a probe, with options -> {site: scores of its groups, [groups] in float64}
GROUP_METRICS: Registry[Callable[..., GroupValues]] = Registry("metric of channel groups", "group_metric")
group_metric = GROUP_METRICS.add


def require_task(probe: Probe) -> Probe:
    """The probe itself, if its tokens are a task's. Raises UsageError otherwise."""
    if probe.tokens.choices is None:
        raise UsageError(f"This metric looks at a multiple-choice task. Name one: {option('loss', 'task:FILE')}.")
    return probe


from billhook.methods.metrics import (  # noqa: E402, F401 - they file themselves in the registry above
    ablation,
    activations,
    channel_groups,
    shapley,
    taylor,
    weights,
)
