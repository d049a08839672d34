"""Measuring of pieces by several workers, each with document groups of its own, or a share of those of others."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from billhook.core.plan import Plan
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.prefix_trie import WalkJob
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers.columns import Columns
from billhook.engine.workers.division import HERE, Owners, abreast, divided, interleaved, left, owned
from billhook.engine.workers.messages import (
    Begin,
    Failed,
    Lost,
    Measure,
    Measured,
    Message,
    Narrow,
    Open,
    Own,
    Release,
    waves,
)
from billhook.engine.workers.team import Team
from billhook.models.device import dtype_name


class SharedMeasurer:
    """Measurer of pieces by a team: the `Measurer` that it wraps is the part of this process.

    Every other worker has a measurer of its own for the same tokens. `computed`: tokens times sites that those have
    computed.
    """

    rounding = 0.0

    def __init__(self, measurer: Measurer, tokens: TokenSet, loss: str, memory: int | None, team: Team) -> None:
        self._local, self._team, self.computed = measurer, team, 0
        self._number, self._ticket = team.new_number(self), 0
        dtype = dtype_name(measurer.teacher.model.dtype)
        self._open = Open(self._number, tokens, loss, memory, team.division, dtype)
        self._tokens = [group.tokens for group in measurer.groups]
        self._owners: Owners = dict.fromkeys(range(len(self._tokens)), (HERE,))
        self._columns = Columns(self._tokens, measurer.bits.path(0))
        self._opened = {HERE}  # workers that know the tokens
        self._narrowed = measurer.bits.added()  # in the order of their bits

    @property
    def number(self) -> int:
        """The number of the token set, by which workers know it."""
        return self._number

    @property
    def workers(self) -> int:
        """The number of workers that have document groups."""
        return len({worker for own in self._owners.values() for worker in own})

    @property
    def abreast(self) -> int:
        """How many document groups are measured at the same time."""
        return abreast(self._owners)

    @property
    def bounds(self) -> bool:
        """As `Measurer.bounds`."""
        with self._team.at_work():
            return self._local.bounds

    def interleaved(self, order: Sequence[int]) -> list[int]:
        """Return document groups in an order in which as many in a row as are measured at once occupy everyone."""
        return interleaved(order, self._owners)

    def masks(self, plans: Sequence[Plan]) -> list[int]:
        """As `Measurer.masks`."""
        unknown = self._local.bits.unknown(plans)
        masks = self._local.masks(plans)
        if unknown:
            self._narrowed += unknown
            self._tell(Narrow(self._number, unknown))
        return masks

    def release(self) -> None:
        """As `Measurer.release`."""
        self._columns.forget()
        self._local.release()
        self._tell(Release(self._number))

    def begin(self, plans: int, base: int | None = None) -> None:
        """As `Measurer.begin`. Workers that have come take their part."""
        self._team.answers(wait=False)
        self._divide()
        self._columns.begin(self._local.bits.path(base or 0))
        self._local.begin(plans, base)
        self._tell(Begin(self._number, plans, base))

    def pieces(self, quality: Quality, jobs: Sequence[WalkJob]) -> Iterator[dict[WalkJob, Sums]]:
        """Yield nats of jobs by document as workers measure them, in waves.

        What a lost worker has not answered, others measure. Raises as `Measurer.measure`, whichever worker it was.
        """
        if not jobs:
            return
        self._team.start()
        self._ticket = self._team.new_ticket()
        here: deque[Iterator[Measured]] = deque()
        pending: dict[int, set[WalkJob]] = {}  # of other workers
        with self._team.at_work():
            self._ask(quality, jobs, here, pending)
            while here or pending:
                for worker, answer in self._team.answers(wait=not here):
                    if isinstance(answer, Lost):
                        self._give(left(self._owners, self._tokens, self._team.workers))
                        self._ask(quality, sorted(pending.pop(worker, ())), here, pending)
                    elif isinstance(answer, Failed) and answer.ticket == self._ticket:
                        raise answer.error
                    elif isinstance(answer, Measured) and answer.ticket == self._ticket:
                        pending[worker] -= answer.sums.keys()
                        self.computed += answer.computed
                        self._team.count(worker, answer)
                        yield answer.sums
                pending = {worker: asked for worker, asked in pending.items() if asked}
                if here and (done := next(here[0], None)) is not None:
                    self._team.count(HERE, done)
                    yield done.sums
                elif here:
                    here.popleft()

    def _ask(
        self, quality: Quality, jobs: Sequence[WalkJob], here: deque[Iterator[Measured]],
        pending: dict[int, set[WalkJob]],
    ) -> None:  # fmt: skip
        """Ask the owners of the jobs' groups: other workers at once, this process when `here` is read."""
        workers = self._share(jobs)
        for worker in self._team.workers:
            own = [job for job in jobs if workers[job] == worker]
            asked = Measure(self._number, self._ticket, quality, own)
            if own and worker == HERE:
                here.append(waves(self._local, asked))
            elif own:
                pending[worker] = pending.get(worker, set()) | set(own)
                self._team.send(worker, asked)

    def _share(self, jobs: Sequence[WalkJob]) -> dict[WalkJob, int]:
        """Return the worker of each job."""
        if all(len(own) == 1 for own in self._owners.values()):
            return {job: self._owners[job[0]][0] for job in jobs}
        paths = {mask: self._local.bits.path(mask) for mask in {mask for _, mask in jobs}}
        workers = self._columns.share([(group, paths[mask]) for group, mask in jobs], self._owners)
        return {(group, mask): workers[group, paths[mask]] for group, mask in jobs}

    def _divide(self) -> None:
        """Divide the document groups among the workers that are there now."""
        self._give(divided(self._owners, self._tokens, self._team.workers))

    def _give(self, owners: Owners) -> None:
        """Give the document groups to these owners."""
        before, self._owners = self._owners, owners
        for worker in self._team.workers:
            own = owned(self._owners, worker)
            self._columns.keep(worker, own)
            if worker not in self._opened:
                self._opened.add(worker)
                self._team.send(worker, self._open)
                if self._narrowed:
                    self._team.send(worker, Narrow(self._number, self._narrowed))
            elif own == owned(before, worker):
                continue
            if worker == HERE:
                self._local.own(own)
            else:
                self._team.send(worker, Own(self._number, own))

    def shares(self, groups: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Divide the document groups among the workers that are there now, and return which of `groups` each passes.

        Of the owners of a group, that is the one with the fewest tokens so far.
        """
        self._divide()
        by_worker: dict[int, list[int]] = {}
        load: Counter[int] = Counter()
        for group in groups:
            worker = min(self._owners[group], key=lambda owner: (load[owner], owner))
            load[worker] += self._tokens[group]
            by_worker.setdefault(worker, []).append(group)
        return {worker: tuple(own) for worker, own in sorted(by_worker.items())}

    def _tell(self, message: Message) -> None:
        """Send a message to all other workers that know the tokens."""
        for worker in self._team.workers:
            if worker != HERE and worker in self._opened:
                self._team.send(worker, message)
