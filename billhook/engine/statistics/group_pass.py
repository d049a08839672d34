"""Passes over a model whose sums over document groups add up, so that several processes can share one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from billhook.engine.bench import Measurer

Sums = dict[Hashable, torch.Tensor]  # by what they are of
Step = tuple[nn.Module | None, Sums]  # the block at work, valid until the next step; None after the last one
Run = Callable[[Measurer, Sequence[int]], Iterator[Step]]


@dataclass(frozen=True, slots=True)
class GroupPass:
    """A pass over the document groups of a token set.

    - `run`: of a measurer, over the document groups with these numbers; yields sums. Those of other groups under the
      same key add up.
    - `steps`: how many steps it has, whichever groups.
    - `heavy`: its sums are as large as weights.
    """

    run: Run
    steps: int = 1
    heavy: bool = False


class Passes:
    """Runs passes of one measurer over all of its document groups, in this process."""

    def __init__(self, bench: Measurer) -> None:
        self.bench = bench

    def run(self, asked: GroupPass) -> Iterator[Step]:
        """Yield the steps of a pass, with the sums over all document groups."""
        return asked.run(self.bench, range(len(self.bench.groups)))

    def sums(self, run: Run) -> Sums:
        """Return the sums of a pass of one step."""
        ((_, sums),) = self.run(GroupPass(run))
        return sums


def added(parts: Iterable[Sums]) -> Sums:
    """Return sums over the document groups of all parts, where those of the first part are."""
    total: Sums = {}
    for part in parts:
        for key, values in part.items():
            total[key] = total[key] + values.to(total[key].device) if key in total else values
    return total


def is_found_by_name(value: object) -> bool:
    """Return whether another process with the same version of Billhook finds all functions in `value` by their names.

    Methods of other packages, and functions inside functions, are not found so.
    """
    match value:
        case partial():
            return all(map(is_found_by_name, (value.func, *value.args, *value.keywords.values())))
        case Mapping():
            return all(map(is_found_by_name, value.values()))
        case list() | tuple():
            return all(map(is_found_by_name, value))
    if not callable(value):
        return True
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    return module.partition(".")[0] == "billhook" and getattr(sys.modules[module], name, None) is value
