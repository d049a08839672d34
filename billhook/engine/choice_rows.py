"""Sums over rows of a token set that are choices: what evaluations of many plans need, without building students."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.core.plan import Plan
from billhook.engine.bench import Measurer, job_batches


def row_sums(measurer: Measurer, plans: Sequence[Plan]) -> list[list[float]]:
    """Return the log-probability in nats of the choice in every row, for each plan in order, in one walk."""
    masks = dict(zip(measurer.masks(plans), plans, strict=True))
    measurer.layout = measurer.arrange(len(masks))
    rows = sum(len(group.rows) for group in measurer.groups)
    sums = {plan: [0.0] * rows for plan in plans}
    jobs = [(g, mask) for g in range(len(measurer.groups)) for mask in masks]
    sizes = [group.tokens for group in measurer.groups]
    for batch in job_batches(jobs, sizes, measurer.layout.wave, split=measurer.layout.streamed):
        for (g, mask), nats in measurer.row_nats("full", batch).items():
            for row, value in zip(measurer.groups[g].rows, nats, strict=True):
                sums[masks[mask]][row] = -value
    return [list(sums[plan]) for plan in plans]
