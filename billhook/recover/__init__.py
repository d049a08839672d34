"""Recoveries: what gets back of what pruning took, cheapest first.

A recovery is a function of a subject, training tokens and validation tokens, with options, that gives a Repair: the one
that the subject has, and what the recovery adds to it. It measures nothing but what it learns from, and writes to no
tensor; whoever called it proves whether it helped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from billhook.data import TokenSet
from billhook.loading import Teacher
from billhook.plan import Plan
from billhook.portions import every
from billhook.probe.measure import Bench
from billhook.records import Watch, silent
from billhook.registry import Registry
from billhook.repair import UNTOUCHED, Repair

EVERY = 8  # of so many texts one chooses the ridge


@dataclass(frozen=True)
class Subject:
    """What is to be recovered: what `plan` leaves of `teacher`, with the `repair` of the recoveries before.

    `memory`: bytes for weights and activations (None: half of what is free); `work`: a folder for checkpoints of a
    training, which a later call with the same arguments goes on from.
    """

    teacher: Teacher
    plan: Plan
    repair: Repair = UNTOUCHED
    memory: int | None = None
    seed: int = 0
    work: Path | None = None
    watch: Watch = silent

    def bench(self, tokens: TokenSet) -> Bench:
        """Where teacher and student meet on some tokens."""
        return Bench(self.teacher, tokens, "kl", memory=self.memory)

    def held(self, bench: Bench, tokens: TokenSet) -> torch.Tensor:
        """Which tokens of `bench` only choose, and are not fitted to: those of every eighth text. [tokens], bool."""
        chosen = set(every(tokens, EVERY)[1])
        of = [group.documents[i] in chosen for group in bench.groups for i in group.of.tolist()]
        return torch.tensor(of, device=self.teacher.device)


Recovery = Callable[..., Repair]
RECOVERIES: Registry[Recovery] = Registry("recovery")
recovery = RECOVERIES.add

# Importing a method files it under its name.
from billhook.recover import constants, fold, matrices, trained  # noqa: E402, F401
