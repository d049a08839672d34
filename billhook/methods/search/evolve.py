"""Evolution of plans: mutate, select, repeat."""

from __future__ import annotations

import math
import random
from collections.abc import Generator

from billhook.core.errors import UsageError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.core.results.measured import Loss
from billhook.methods.search import SEARCHES, Search, count_moves, drop_redundant, estimate_losses, lowest_full, search

STARTS = 64  # random plans to begin with, where there is no better start


def _losses(
    problem: Problem, *, start: str = "greedy", split: str = "free", generations: int = 50, offspring: int = 16,
    survivors: int = 2, tokens: int = 512,
) -> int:  # fmt: skip
    """Return at most how many: those of `start`, and each generation's mutants on few tokens and survivors on all."""
    n, r = count_moves(problem)
    rounds = generations or math.ceil(r * (n - r) / 1.5)
    start_losses = STARTS if start == "random" else 0 if "." in start else estimate_losses(start, problem) or 0
    return start_losses + 1 + rounds * (offspring + min(survivors, offspring))


@search(losses=_losses)
def evolve(
    problem: Problem, *, start: str = "greedy", split: str = "free", generations: int = 50, offspring: int = 16,
    survivors: int = 2, tokens: int = 512,
) -> Search:  # fmt: skip
    """Evolve plans by (1+λ) selection in two stages: on a few tokens, then on all.

    Each of `generations` makes `offspring` mutants by one to three exchanges. It keeps the best `survivors` on the
    first `tokens`, then the best of these and the parent on all tokens. `start`: a search, sites (attention.3,mlp.7;
    what no budget counts is kept), or random, the best of 64. `split`: free, or fixed, which exchanges an attention
    only for an attention. `generations=0`: as published, k(n-k)/1.5 for k of n sites.

    Formula: the lowest L of a parent and its mutants, generation by generation.
    Cost: those of `start`, and per generation `offspring` losses on `tokens` and `survivors` on all, shared beginnings
    once.

    Source: Sieberling et al. 2024, EvoPress (arXiv 2410.14649). Deviations: warm start by default; the split between
    attention and MLP is free by default; budgets in any unit, mutants being repaired to meet them; the tokens of the
    first stage are the same in every generation.
    """
    if split not in ("free", "fixed"):
        raise UsageError(f"split={split!r} is neither free nor fixed. Write one of them.")
    if offspring < 1 or survivors < 1:
        raise UsageError(f"offspring={offspring}, survivors={survivors}: a generation needs 1 of each at least.")
    draw = random.Random(problem.seed)
    parent = yield from _begin(problem, start, draw, tokens)
    removed = len([g for g in problem.groups() if set(g) <= parent.removed])
    rounds = generations or math.ceil(removed * (len(problem.groups()) - removed) / 1.5)
    for _ in range(rounds):
        drawn = dict.fromkeys(_mutant(problem, parent, split, draw) for _ in range(offspring))
        mutants = [plan for plan in drawn if plan != parent]
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
    """Return the plan to begin with."""
    if start == "random":
        plans = tuple(dict.fromkeys(_repaired(problem, Plan(), draw) for _ in range(STARTS)))
        return lowest_full(plans, (yield MeasureRequest(plans, full_results=1, tokens=tokens)))[1]
    if "." in start:
        named = problem.anatomy.parse(start.split(","), problem.protected - problem.uncounted)
        if named.narrowed:
            raise UsageError(f"start={start!r} narrows {min(named.narrowed).site}. Name sites to remove.")
        plan = Plan(named.removed - problem.uncounted)
        if not problem.is_met(plan):
            raise UsageError(f"start={start!r} does not meet the budget. Name more sites, or begin with greedy.")
        return plan
    if start not in SEARCHES:
        known = ", ".join(SEARCHES)
        raise UsageError(f"start={start!r} is not known. Write random, sites such as attention.3,mlp.7, or {known}.")
    return (yield from SEARCHES[start](problem))[-1]


def _mutant(problem: Problem, parent: Plan, split: str, draw: random.Random) -> Plan:
    """Return a parent after one to three exchanges, repaired to meet the budgets without redundant removals.

    With a fixed split there is no repair: a mutant that misses a budget, sizes being uneven, is the parent again.
    """
    plan = parent
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        restored = draw.choice(problem.removed_moves(plan))
        less = Plan(plan.removed - set(restored))
        others = [move for move in _valid_moves(problem, less) if move != restored]
        if split == "fixed":
            others = [move for move in others if [s.part for s in move] == [s.part for s in restored]]
        if others:
            plan = less.without(*draw.choice(others))
    if split == "fixed":
        return plan if problem.is_met(plan) else parent
    return _repaired(problem, plan, draw)


def _repaired(problem: Problem, plan: Plan, draw: random.Random) -> Plan:
    """Return a plan with random moves added until it meets the budgets, and redundant ones dropped at random."""
    while not problem.is_met(plan):
        moves = problem.moves(plan)
        if not moves:  # an exchange restored what the budgets need: begin again from the unpruned model
            return _repaired(problem, Plan(), draw)
        plan = plan.without(*draw.choice(moves))
    order = problem.removed_moves(plan)
    draw.shuffle(order)
    return drop_redundant(problem, plan, order)


def _valid_moves(problem: Problem, plan: Plan) -> list[Move]:
    """Return the moves that leave a working model, whether or not the budgets are met."""
    return [g for g in problem.groups(plan) if problem.is_valid(plan.without(*g))]
