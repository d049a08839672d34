"""Messages between a coordinator and its workers, and what a worker does with them.

A coordinator names each token set that it measures by a `number`, and each request by a `ticket`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import transformers

import billhook
from billhook.core.errors import BillhookError, ModelError, ResourceError
from billhook.core.plan import KeptGroups
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.prefix_trie import WalkJob
from billhook.engine.racing import Quality, Sums
from billhook.engine.statistics.group_pass import GroupPass, Step
from billhook.engine.statistics.group_pass import Sums as PassSums
from billhook.engine.workers.division import Division
from billhook.models.accelerator.bfloat16 import in_bfloat16
from billhook.models.device import dtype_name
from billhook.models.load import Teacher

# -- to a worker ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Load a checkpoint, as `billhook.models.load.load` does. `threads`: of torch; None leaves them as they are."""

    folder: str
    device: str
    dtype: str
    memory: int | None
    trust_remote_code: bool
    threads: int | None


@dataclass(frozen=True, slots=True)
class Open:
    """Prepare for jobs of a token set. `dtype`: of the model; a copy is made where the loaded one has another."""

    number: int
    tokens: TokenSet
    loss: str
    memory: int | None
    division: Division
    dtype: str


@dataclass(frozen=True, slots=True)
class Own:
    """Prepare for jobs of these document groups; drop what is cached of others."""

    number: int
    groups: frozenset[int]


@dataclass(frozen=True, slots=True)
class Narrow:
    """Give bits of masks to what is kept of narrowed sites, as `PlanBits.add` does."""

    number: int
    narrowed: list[KeptGroups]


@dataclass(frozen=True, slots=True)
class Begin:
    """Prepare for a batch of plans; see `Measurer.begin`."""

    number: int
    plans: int
    base: int | None


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure jobs. Answered by `Measured` for each wave, or by `Failed`."""

    number: int
    ticket: int
    quality: Quality
    jobs: list[WalkJob]


@dataclass(frozen=True, slots=True)
class Pass:
    """Begin a pass over document groups, without the first `skip` of its steps. Answered by `Passed`, or `Failed`.

    The answers of `AHEAD` steps are sent, and that of another for each `More`.
    """

    number: int
    ticket: int
    asked: GroupPass
    groups: tuple[int, ...]
    skip: int


AHEAD = 2  # steps of a pass: while the coordinator adds what is found in one, the next is computed


@dataclass(frozen=True, slots=True)
class More:
    """Go on with a pass."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Forget a pass."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Release:
    """Drop the cached streams."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Forget a token set."""

    number: int


@dataclass(frozen=True, slots=True)
class Call:
    """Call `function` of a module with the teacher and `arguments`. It is not answered."""

    function: Callable[..., None]
    arguments: tuple[object, ...]


Message = Start | Open | Own | Narrow | Begin | Measure | Pass | More | Stop | Release | Close | Call


# -- from a worker --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker computes with, which must be what its coordinator computes with."""

    software: str
    model: str  # its fingerprint
    compute: str  # dtype and kind of device


@dataclass(frozen=True, slots=True)
class Measured:
    """Nats of each document of each job's group; seconds that they took, and tokens times sites, with padding."""

    ticket: int
    sums: dict[WalkJob, Sums]
    seconds: float
    computed: int


@dataclass(frozen=True, slots=True)
class Passed:
    """What a step of a pass has found over the groups asked for, on the CPU; seconds and sites as of `Measured`."""

    ticket: int
    sums: PassSums
    seconds: float
    computed: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The model or the request cannot be measured, by any worker."""

    ticket: int
    error: BillhookError


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, or never came."""

    reason: str


Answer = Hello | Measured | Passed | Failed | Lost


def hello_of(teacher: Teacher) -> Hello:
    """Return what is computed with, where this teacher is loaded."""
    software = f"billhook {billhook.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return Hello(software, teacher.fingerprint, teacher.compute_key)


class Desk:
    """What a worker has at hand: its teacher, and a measurer for each token set."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._copy: Teacher | None = None  # in bfloat16, for estimates
        self._measurers: dict[int, Measurer] = {}
        self._passes: dict[int, tuple[int, Iterator[tuple[Step, Passed]]]] = {}  # by ticket: steps left, and the pass

    @torch.inference_mode()
    def answers(self, message: Message) -> Iterator[Answer]:
        """Do what a message says, and yield the answers.

        Raises ResourceError where memory ran out: another worker may have more.
        """
        match message:
            case Open(number, tokens, loss, memory, division, dtype):
                teacher = self._in_dtype(dtype)
                self._measurers[number] = Measurer(teacher, tokens, loss, memory=memory, division=division)
            case Own(number, groups):
                self._measurers[number].own(groups)
            case Narrow(number, narrowed):
                self._measurers[number].bits.add(narrowed)
            case Begin(number, plans, base):
                self._measurers[number].begin(plans, base)
                with suppress(ModelError):  # which the first request meets again
                    self._measurers[number].bounds  # noqa: B018 - computes what every request needs
            case Measure():
                yield from self._told(message.ticket, waves(self._measurers[message.number], message))
            case Pass(number, ticket, asked, _, skip):
                self._passes[ticket] = asked.steps - skip, steps(self._measurers[number], message)
                yield from self._told(ticket, self._passed(ticket, AHEAD))
            case More(ticket):
                yield from self._told(ticket, self._passed(ticket, 1))
            case Stop(ticket):
                self._passes.pop(ticket, None)
            case Release(number):
                self._measurers[number].release()
            case Close(number):
                self._measurers.pop(number, None)
            case Call(function, arguments):
                function(self.teacher, *arguments)

    def _in_dtype(self, dtype: str) -> Teacher:
        if dtype == dtype_name(self.teacher.model.dtype):
            return self.teacher
        self._copy = self._copy or in_bfloat16(self.teacher)
        return self._copy

    def _told(self, ticket: int, answers: Iterator[Measured] | Iterator[Passed]) -> Iterator[Answer]:
        """Yield the answers; `Failed` if no worker could give them."""
        try:
            yield from answers
        except ResourceError:
            raise
        except BillhookError as error:
            yield Failed(ticket, error)

    def _passed(self, ticket: int, count: int) -> Iterator[Passed]:
        """Yield the answers of so many steps of a pass, or of those that are left."""
        for _ in range(count):
            left, found = self._passes.pop(ticket, (0, iter(())))
            if not left:
                return
            _, answer = next(found)
            if left == 1:
                next(found, None)  # what is checked at the end
            else:
                self._passes[ticket] = left - 1, found
            yield replace(answer, sums={key: values.cpu() for key, values in answer.sums.items()})


def waves(measurer: Measurer, asked: Measure) -> Iterator[Measured]:
    """Measure what is asked, in waves, and yield the answer of each."""
    start, before = time.perf_counter(), measurer.runner.computed
    for sums in measurer.pieces(asked.quality, asked.jobs):
        end, after = time.perf_counter(), measurer.runner.computed
        yield Measured(asked.ticket, sums, end - start, after - before)
        start, before = time.perf_counter(), after


def steps(measurer: Measurer, asked: Pass) -> Iterator[tuple[Step, Passed]]:
    """Pass over the groups asked for, and yield each step that is not skipped, with its answer."""
    start, before = time.perf_counter(), measurer.runner.computed
    for number, step in enumerate(asked.asked.run(measurer, asked.groups)):
        if number >= asked.skip:
            end, after = time.perf_counter(), measurer.runner.computed
            yield step, Passed(asked.ticket, step[1], end - start, after - before)
            start, before = time.perf_counter(), after
