"""Mutate, select, repeat."""

from __future__ import annotations

import math
import random
from collections.abc import Generator

from billhook.core.errors import UsageError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.core.results.measured import Loss
from billhook.methods.search import SEARCHES, Search, drop_redundant, estimate_losses, lowest_full, removals, search

STARTS = 64  # random plans to begin with, where there is no better start


def _losses(
    problem: Problem,
    *,
    start: str = "greedy",
    split: str = "free",
    generations: int = 50,
    offspring: int = 16,
    survivors: int = 2,
    tokens: int = 512,
) -> int:
    """At most: those of `start`, and all mutants of every generation on few tokens, some on all; twins count once."""
    n, r = removals(problem)
    rounds = generations or math.ceil(r * (n - r) / 1.5)
    begun = STARTS if start == "random" else 0 if "." in start else estimate_losses(start, problem) or 0
    return begun + 1 + rounds * (offspring + min(survivors, offspring))


@search(losses=_losses)
def evolve(
    problem: Problem,
    *,
    start: str = "greedy",
    split: str = "free",
    generations: int = 50,
    offspring: int = 16,
    survivors: int = 2,
    tokens: int = 512,
) -> Search:
    """A (1+λ) evolution of plans, selected in two stages: on a few tokens, then on all.

    Each of `generations` makes `offspring` mutants by one to three exchanges, keeps the best `survivors` on the first
    `tokens`, and the best of these and the parent on all tokens. `start`: a search, sites (attention.3,mlp.7), or
    random, the best of 64. `split`: free, or fixed: an attention only for an attention. `generations=0`: as published,
    k(n-k)/1.5 for k of n sites.

    Formula: the lowest L of a parent and its mutants, generation by generation.
    Cost: those of `start`, and per generation `offspring` losses on `tokens` and `survivors` on all, shared beginnings
    once.

    Source: Sieberling et al. 2024, EvoPress (arXiv 2410.14649). Deviations: warm start by default; the split between
    attention and MLP is free by default; budgets in any unit, mutants being repaired to meet them; the tokens of the
    first stage are the same in every generation.
    """
    if split not in ("free", "fixed"):
        raise UsageError(f"split={split!r} is neither free nor fixed.")
    if offspring < 1 or survivors < 1:
        raise UsageError(f"offspring={offspring}, survivors={survivors}: a generation needs 1 of each at least.")
    draw = random.Random(problem.seed)
    parent = yield from _begin(problem, start, draw, tokens)
    gone = len([g for g in problem.groups() if set(g) <= parent.removed])
    rounds = generations or math.ceil(gone * (len(problem.groups()) - gone) / 1.5)
    for _ in range(rounds):
        found = {_mutant(problem, parent, split, draw): None for _ in range(offspring)}
        mutants = [plan for plan in found if plan != parent]
        if not mutants:
            continue
        if len(mutants) > survivors:
            losses = yield MeasureRequest(tuple(mutants), full_results=survivors, tokens=tokens)
            full = [(loss.mean, i) for i, loss in enumerate(losses) if not loss.bound]
            mutants = [mutants[i] for _, i in sorted(full)[:survivors]]
        rivals = (parent, *mutants)
        parent = lowest_full(rivals, (yield MeasureRequest(rivals, full_results=1)))[1]
    return [parent]


def _begin(
    problem: Problem, start: str, draw: random.Random, tokens: int
) -> Generator[MeasureRequest, list[Loss], Plan]:
    if start == "random":
        found = {_repaired(problem, Plan(), draw): None for _ in range(STARTS)}
        plans = tuple(found)
        return lowest_full(plans, (yield MeasureRequest(plans, full_results=1, tokens=tokens)))[1]
    if "." in start:
        plan = problem.anatomy.check(Plan.parse(start.split(",")), problem.protected)
        if not problem.is_met(plan):
            raise UsageError(f"start={start!r} does not meet the budget. Name more sites, or begin with greedy.")
        return plan
    if start not in SEARCHES:
        known = ", ".join(SEARCHES)
        raise UsageError(f"start={start!r} is not random, no site such as attention.3,mlp.7, and none of {known}.")
    path = yield from SEARCHES[start](problem)
    return path[-1]


def _mutant(problem: Problem, parent: Plan, split: str, draw: random.Random) -> Plan:
    """A parent after one to three exchanges, repaired so that it meets the budgets and removes nothing to spare.

    With a fixed split there is no repair: a mutant that misses a budget, sizes being uneven, is the parent again.
    """
    plan = parent
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        back = draw.choice(problem.removed_moves(plan))
        less = Plan(plan.removed - set(back))
        others = [g for g in _free(problem, less) if g != back]
        if split == "fixed":
            others = [g for g in others if [s.part for s in g] == [s.part for s in back]]
        if others:
            plan = less.without(*draw.choice(others))
    if split == "fixed":
        return plan if problem.is_met(plan) else parent
    return _repaired(problem, plan, draw)


def _repaired(problem: Problem, plan: Plan, draw: random.Random) -> Plan:
    while not problem.is_met(plan):
        moves = problem.moves(plan)
        if not moves:  # an exchange gave away what the budgets need: begin with what must go at any rate
            return _repaired(problem, Plan(), draw)
        plan = plan.without(*draw.choice(moves))
    order = problem.removed_moves(plan)
    draw.shuffle(order)
    return drop_redundant(problem, plan, order)


def _free(problem: Problem, plan: Plan) -> list[Move]:
    """What may go next without breaking the model, wherever the budgets stand."""
    return [g for g in problem.groups(plan) if problem.is_valid(plan.without(*g))]
