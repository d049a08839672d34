"""Passes that several workers share: each one goes over document groups of its own, and their sums are added here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from billhook.engine.bench import Measurer
from billhook.engine.statistics.group_pass import GroupPass, Passes, Step, Sums, added, is_found_by_name
from billhook.engine.workers.division import HERE
from billhook.engine.workers.messages import Failed, Lost, More, Pass, Passed, Stop, steps
from billhook.engine.workers.shared import SharedMeasurer
from billhook.engine.workers.team import Team


@dataclass
class _Share:
    """The document groups that one worker goes over in a pass: found `here`, or `arrived` from another worker."""

    worker: int
    groups: tuple[int, ...]
    here: Iterator[tuple[Step, Passed]] = field(default_factory=lambda: iter(()))
    arrived: deque[Sums] = field(default_factory=deque)


class SharedPasses(Passes):
    """Runs passes of a measurer whose document groups a team shares.

    The sums are those of one process up to the order of additions, which follows the numbers of the groups: whoever
    is first, they are the same.
    """

    def __init__(self, bench: Measurer, shared: SharedMeasurer, team: Team) -> None:
        super().__init__(bench)
        self._shared, self._team = shared, team

    def run(self, asked: GroupPass) -> Iterator[Step]:
        """Yield the steps of a pass, with the sums over all document groups.

        What a lost worker has not answered, others find. Raises as the pass does, whichever worker it was.
        """
        if not self._travels(asked):
            yield from super().run(asked)
            return
        self._team.meet(sum(group.ids.numel() for group in self.bench.groups))
        shares: dict[int, _Share] = {}  # by ticket
        try:
            with self._team.at_work():
                self._ask(asked, shares, range(len(self.bench.groups)), 0)
                for step in range(asked.steps):
                    yield self._step(asked, shares, step)
                for share in shares.values():
                    next(share.here, None)  # what is checked at the end
        finally:
            for ticket, share in shares.items():
                if share.worker in self._team.workers and share.worker != HERE:
                    self._team.send(share.worker, Stop(ticket))

    def _travels(self, asked: GroupPass) -> bool:
        """Return whether a pass may be shared.

        Sums as large as weights travel slower than a GPU finds them. A streamed teacher's weights are read once by one
        process; every other one would read all of them too.
        """
        teacher = self.bench.teacher
        slow = asked.heavy and teacher.device.type != "cpu"
        return teacher.weights is None and not slow and len(self.bench.groups) > 1 and is_found_by_name(asked.run)

    def _ask(self, asked: GroupPass, shares: dict[int, _Share], groups: Iterable[int], skip: int) -> None:
        """Begin a pass over these groups, by the workers that have them; `skip` steps are not needed."""
        for worker, own in self._shared.shares(groups).items():
            ticket = self._team.new_ticket()
            message = Pass(self._shared.number, ticket, asked, own, skip)
            shares[ticket] = _Share(worker, own)
            if worker == HERE:
                shares[ticket].here = steps(self.bench, message)
            else:
                self._team.send(worker, message)

    def _step(self, asked: GroupPass, shares: dict[int, _Share], step: int) -> Step:
        """Return what all shares have found in a step, once they have, and let other workers go on."""
        found: dict[tuple[int, ...], Sums] = {}  # by document groups
        block: nn.Module | None = None
        while missing := {ticket: share for ticket, share in shares.items() if share.groups not in found}:
            for share in missing.values():
                if share.worker == HERE:
                    (block, found[share.groups]), done = next(share.here)
                    self._team.count(HERE, done)
            for ticket, share in missing.items():
                if share.arrived:
                    found[share.groups] = share.arrived.popleft()
                    self._team.send(share.worker, More(ticket))
            if any(share.groups not in found for share in shares.values()):
                self._receive(asked, shares, {group for groups in found for group in groups}, step)
        return block, added(found[groups] for groups in sorted(found))

    def _receive(self, asked: GroupPass, shares: dict[int, _Share], found: set[int], step: int) -> None:
        """Wait for answers. The groups of a worker that is lost go to others, with this step unless it is `found`."""
        for worker, answer in self._team.answers(wait=True):
            if isinstance(answer, Lost):
                for ticket in [ticket for ticket, share in shares.items() if share.worker == worker]:
                    groups = shares.pop(ticket).groups
                    skip = step + found.issuperset(groups)
                    if skip < asked.steps:
                        self._ask(asked, shares, groups, skip)
            elif isinstance(answer, Failed) and answer.ticket in shares:
                raise answer.error
            elif isinstance(answer, Passed) and answer.ticket in shares:
                shares[answer.ticket].arrived.append(answer.sums)
                self._shared.computed += answer.computed
                self._team.count(worker, answer)
