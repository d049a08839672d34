"""Metrics: importance scores of sites, blocks and spans of blocks, without measuring every removal.

A metric is a function of a probe, with options, that returns {unit: Score}; higher = removal hurts more. A unit is a
site, a block by its position, or a run of blocks. `probe.losses` measures plans and caches them like those of a search.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch

from billhook.core.errors import UsageError, option
from billhook.core.plan import Site
from billhook.core.problem import ScoredUnit
from billhook.core.registry import Registry, RegistryWithFacts, wrong_return
from billhook.core.results.measured import Score
from billhook.engine.probe import Probe
from billhook.engine.statistics.channel_statistics import GroupValues

Metric = Callable[..., dict[ScoredUnit, Score]]
METRICS: Registry[Metric] = Registry("metric")
metric = METRICS.add

# (probe, **options) -> {site: scores of its channel groups, [groups] in float64}
GroupMetric = Callable[..., GroupValues]


@dataclass(frozen=True, slots=True)
class GroupMetricFacts:
    """Facts that a metric of channel groups states in its decorator.

    - `experts`: it scores the experts of mixtures alone, all groups of one alike.
    """

    experts: bool = False


GROUP_METRICS: RegistryWithFacts[GroupMetric, GroupMetricFacts] = RegistryWithFacts(
    "metric of channel groups", "group_metric", unstated=GroupMetricFacts()
)


@overload
def group_metric(function: GroupMetric, /) -> GroupMetric:
    """Add a metric of channel groups without facts."""


@overload
def group_metric(*, experts: bool = ...) -> Callable[[GroupMetric], GroupMetric]:
    """Return the decorator that adds a metric of channel groups with these facts."""


def group_metric(
    function: GroupMetric | None = None, /, *, experts: bool = False
) -> GroupMetric | Callable[[GroupMetric], GroupMetric]:
    """Add a metric of channel groups under its own name, with its facts: see GroupMetricFacts."""
    add = GROUP_METRICS.add_with(GroupMetricFacts(experts))
    return add if function is None else add(function)


def metric_scores(name: str, probe: Probe, **options: Any) -> dict[ScoredUnit, Score]:
    """Return the scores of a metric by name. Raises UsageError unless they are what a metric returns."""
    scores = METRICS[name](probe, **options)
    wanted = "a dict of Score by site, block or (first, last) block"
    if not isinstance(scores, dict):
        raise wrong_return("metric", name, wanted, scores)
    for unit, score in scores.items():
        pair = isinstance(unit, tuple) and len(unit) == 2 and all(type(block) is int for block in unit)
        if not isinstance(unit, Site) and type(unit) is not int and not pair:
            raise wrong_return("metric", name, wanted, f"a key {reprlib.repr(unit)}")
        if not isinstance(score, Score) or not isinstance(score.value, float | int) or not math.isfinite(score.value):
            raise wrong_return("metric", name, wanted, f"{reprlib.repr(score)} for {unit}")
    return scores


def group_metric_scores(name: str, probe: Probe, **options: Any) -> GroupValues:
    """Return the scores of a metric of channel groups by name. Raises UsageError unless it returns such."""
    scores = GROUP_METRICS[name](probe, **options)
    wanted = "a dict with a tensor for each site, one finite number for each channel group"
    if not isinstance(scores, dict):
        raise wrong_return("metric", name, wanted, scores)
    groups = {size.site: len(size.groups) for size in probe.teacher.anatomy.sites}
    for site, values in scores.items():
        if site not in groups:
            raise wrong_return("metric", name, wanted, f"a key {reprlib.repr(site)}")
        if not isinstance(values, torch.Tensor) or values.shape != (groups[site],) or not bool(values.isfinite().all()):
            shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise wrong_return("metric", name, wanted, f"{shape} for {site}, which has {groups[site]} groups")
    return scores


def require_task(probe: Probe) -> Probe:
    """Return the probe if its tokens are those of a task. Raises UsageError otherwise."""
    if probe.tokens.choices is None:
        raise UsageError(f"This metric scores a multiple-choice task. Name one: {option('loss', 'task:FILE')}.")
    return probe


from billhook.methods.metrics import (  # noqa: E402, F401 - they register themselves above
    ablation,
    activations,
    channel_groups,
    coarse_to_fine,
    correlations,
    mixtures,
    refitted_groups,
    salience,
    shapley,
    taylor,
    weights,
)
