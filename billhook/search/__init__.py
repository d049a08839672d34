"""Searches: generators that yield Asks, are sent their losses and return the path of plans to the answer.

A search sees a Problem and losses: no model, no file, no clock, no torch. The returned path starts with the first
removal and ends with the plan that meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from billhook.plan import Ask, Plan
from billhook.records import Loss
from billhook.registry import Registry

Search = Generator[Ask, list[Loss], list[Plan]]
SEARCHES: Registry[Callable[..., Search]] = Registry("search")
search = SEARCHES.add


def settle(steps: Search, measure: Callable[[Ask], list[Loss]]) -> list[Plan]:
    """Run a search: measure each Ask it yields, send the losses back, return its path."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send(measure(ask))
    except StopIteration as end:
        path: list[Plan] = end.value
        return path


def price(rise: float, worth: float) -> float:
    """What a move costs per unit of the budget that it frees: the rise of the loss, divided by what it is worth.

    A removal that lowers the loss is the better, the more it frees. Lower goes first.
    """
    return rise / worth if rise > 0 else rise * worth


from billhook.search import greedy, oneshot  # noqa: E402, F401 - importing a method files it under its name
