"""Messages between a coordinator and its workers, and what a worker does with them.

A coordinator names each token set that it measures by a `number`, and each request by a `ticket`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import transformers

import billhook
from billhook.core.errors import BillhookError, ModelError, ResourceError
from billhook.core.plan import KeptGroups
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.prefix_trie import WalkJob
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers.division import Division
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
    """Prepare for jobs of a token set."""

    number: int
    tokens: TokenSet
    loss: str
    memory: int | None
    division: Division


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


Message = Start | Open | Own | Narrow | Begin | Measure | Release | Close | Call


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
class Failed:
    """The model or the request cannot be measured, by any worker."""

    ticket: int
    error: BillhookError


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, or never came."""

    reason: str


Answer = Hello | Measured | Failed | Lost


def hello_of(teacher: Teacher) -> Hello:
    """Return what is computed with, where this teacher is loaded."""
    software = f"billhook {billhook.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return Hello(software, teacher.fingerprint, teacher.compute_key)


class Desk:
    """What a worker has at hand: its teacher, and a measurer for each token set."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._measurers: dict[int, Measurer] = {}

    @torch.inference_mode()
    def answers(self, message: Message) -> Iterator[Answer]:
        """Do what a message says, and yield the answers.

        Raises ResourceError where memory ran out: another worker may have more.
        """
        match message:
            case Open(number, tokens, loss, memory, division):
                self._measurers[number] = Measurer(self.teacher, tokens, loss, memory=memory, division=division)
            case Own(number, groups):
                self._measurers[number].own(groups)
            case Narrow(number, narrowed):
                self._measurers[number].bits.add(narrowed)
            case Begin(number, plans, base):
                self._measurers[number].begin(plans, base)
                with suppress(ModelError):  # which the first request meets again
                    self._measurers[number].bounds  # noqa: B018 - computes what every request needs
            case Measure():
                yield from self._measured(message)
            case Release(number):
                self._measurers[number].release()
            case Close(number):
                self._measurers.pop(number, None)
            case Call(function, arguments):
                function(self.teacher, *arguments)

    def _measured(self, asked: Measure) -> Iterator[Answer]:
        try:
            yield from waves(self._measurers[asked.number], asked)
        except ResourceError:
            raise
        except BillhookError as error:
            yield Failed(asked.ticket, error)


def waves(measurer: Measurer, asked: Measure) -> Iterator[Measured]:
    """Measure what is asked, in waves, and yield the answer of each."""
    start, before = time.perf_counter(), measurer.runner.computed
    for sums in measurer.pieces(asked.quality, asked.jobs):
        end, after = time.perf_counter(), measurer.runner.computed
        yield Measured(asked.ticket, sums, end - start, after - before)
        start, before = time.perf_counter(), after
