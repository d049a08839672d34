"""Trainings by several processes of this machine, each of which holds the student and takes its rows of every step."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from billhook.core.plan import Plan
from billhook.core.registry import OptionValues
from billhook.data.token_sets import TokenSet
from billhook.engine.workers.lines import Hiring, Inbox, Line
from billhook.engine.workers.messages import Answer, Call, Lost
from billhook.engine.workers.team import Team
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.models.accelerator.share import ProcessLost, Share, abort, joined
from billhook.models.load import Teacher
from billhook.models.repair import read_repair

SECONDS = 5.0  # in which it is known that a process was lost, once a sum has failed
POLL = 0.5  # seconds in which others say why they were lost
NO_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory")  # in the reason of a lost process


@dataclass(frozen=True, slots=True)
class Part:
    """What another process of a training is told: what it recovers, as a RecoveryTask says, and who it is.

    `repair`: the file of the student's repair. `meeting`: the file in which the processes meet.
    """

    rank: int
    processes: int
    meeting: Path
    recovery: str
    plan: Plan
    repair: Path
    memory: int | None
    seed: int
    work: Path
    bfloat16: bool
    texts: tuple[TokenSet, TokenSet]
    options: OptionValues


def take_part(teacher: Teacher, part: Part) -> None:
    """Carry out one process's part of a training. What comes of it, the first process has too."""
    share = Share(part.rank, part.processes, teacher.device)
    with joined(share, part.meeting):
        task = RecoveryTask(
            teacher, part.plan, read_repair(part.repair), part.memory, part.seed, part.work, bfloat16=part.bfloat16,
            share=share,
        )  # fmt: skip
        RECOVERIES[part.recovery](task, *part.texts, **part.options)


@dataclass(frozen=True, slots=True)
class _Bell:
    """An inbox that tells at once, whoever waits for it, that a worker is lost on which a training depends.

    - `members`: numbers of those workers, once they are known.
    - `reasons`: why workers were lost, by their number.
    """

    inbox: Inbox
    lost: threading.Event
    members: set[int] = field(default_factory=set)
    reasons: dict[int, str] = field(default_factory=dict)

    def put(self, item: tuple[int, Answer], /) -> None:
        """Take an answer."""
        number, answer = item
        self.inbox.put(item)
        if isinstance(answer, Lost):
            self.reasons[number] = answer.reason
            self.look()

    def look(self) -> None:
        """Ring where a member is lost."""
        if self.members & self.reasons.keys():
            self.lost.set()
            abort()

    def reason(self) -> str:
        """Return why the training cannot go on, once that is known: the first reason, not what followed from it."""
        self.lost.wait(SECONDS)
        time.sleep(POLL)  # for the reasons of others
        said = [self.reasons[number] for number in sorted(self.members & self.reasons.keys())]
        return min(said, key=lambda each: each.startswith(ProcessLost.__name__), default="it does not answer")


def train_together(
    name: str, hiring: Hiring, task: RecoveryTask, texts: tuple[TokenSet, TokenSet], given: OptionValues,
    *, trust_remote_code: bool = False,
) -> object:  # fmt: skip
    """Return what a recovery that trains returns, carried out by this process and those of `hiring`.

    The task needs a `work` folder. Raises ProcessLost with the reason where a process is lost, MemoryError where one
    has no memory left, and what the recovery raises.
    """
    assert task.work is not None
    lost, bells = threading.Event(), list[_Bell]()

    def hire(inbox: Inbox) -> Sequence[Line]:
        bells.append(_Bell(inbox, lost))
        return hiring.hire(bells[0])

    with ExitStack() as stack:
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="billhook-"))) / "meeting"
        team = stack.enter_context(Team(
            task.teacher, replace(hiring, hire=hire), memory=task.memory, trust_remote_code=trust_remote_code,
            watch=task.watch,
        ))  # fmt: skip
        team.wait()
        processes, repair = len(team.workers), task.work / "repair.safetensors"
        if processes == 1:
            return RECOVERIES[name](task, *texts, **given)
        task.repair.save(repair)
        for rank, worker in enumerate(team.workers):
            part = Part(
                rank, processes, meeting, name, task.plan, repair, task.memory, task.seed, task.work, task.bfloat16,
                texts, given,
            )  # fmt: skip
            if rank:
                team.send(worker, Call(take_part, (part,)))
        (bell,) = bells
        bell.members.update(team.workers)
        bell.look()
        share = Share(0, processes, task.teacher.device, lost)
        try:
            with team.at_work(), joined(share, meeting):
                return RECOVERIES[name](replace(task, share=share), *texts, **given)
        except ProcessLost as error:
            reason = bell.reason()
            if any(words in reason for words in NO_MEMORY):
                raise MemoryError(reason) from error
            raise ProcessLost(reason) from error
        finally:
            repair.unlink(missing_ok=True)
