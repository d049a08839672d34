"""Recoveries: what gets back of what pruning took, cheapest first.

A recovery is a function of a subject, training tokens and validation tokens, with options, that gives a Repair: the one
that the subject has, and what the recovery adds to it. It measures nothing but what it learns from, and writes to no
tensor; whoever called it proves whether it helped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook import arch
from billhook.data import TokenSet
from billhook.errors import UsageError
from billhook.heard import hear
from billhook.loading import Teacher
from billhook.modeling_billhook import Patch
from billhook.plan import Plan
from billhook.portions import every
from billhook.probe.measure import Bench
from billhook.probe.pair import TeacherSide
from billhook.records import Watch, silent
from billhook.registry import Registry
from billhook.repair import UNTOUCHED, Repair
from billhook.surgery import apply, difference, exchange
from billhook.training import Course, Trainer, from_streams, recomputed, remember, rows_of

EVERY = 8  # of so many texts one chooses the ridge


@dataclass(frozen=True)
class Subject:
    """What is to be recovered: what `plan` leaves of `teacher`, with the `repair` of the recoveries before.

    `memory`: bytes for weights and activations (None: half of what is free); `work`: a folder for checkpoints of a
    training, which a later call with the same arguments goes on from; `sides`: of the teacher, by the hash of tokens,
    kept for recoveries of other plans.
    """

    teacher: Teacher
    plan: Plan
    repair: Repair = UNTOUCHED
    memory: int | None = None
    seed: int = 0
    work: Path | None = None
    watch: Watch = silent
    sides: dict[str, TeacherSide] | None = None

    def bench(self, tokens: TokenSet) -> Bench:
        """Where teacher and student meet on some tokens."""
        return Bench(self.teacher, tokens, "kl", memory=self.memory)

    def side(self, tokens: TokenSet, *, again: bool = False) -> TeacherSide:
        """The teacher on some tokens; `again`: where it may be gone through more than once."""
        if self.sides is None:
            return TeacherSide(self.bench(tokens), again=again)
        if tokens.hash not in self.sides:
            self.sides[tokens.hash] = TeacherSide(self.bench(tokens), again=True)
        return self.sides[tokens.hash]

    def held(self, bench: Bench, tokens: TokenSet) -> torch.Tensor:
        """Which tokens of `bench` only choose, and are not fitted to: those of every eighth text. [tokens], bool."""
        chosen = set(every(tokens, EVERY)[1])
        of = [group.documents[i] in chosen for group in bench.groups for i in group.of.tolist()]
        return torch.tensor(of, device=self.teacher.device)


Recovery = Callable[..., Repair]
RECOVERIES: Registry[Recovery] = Registry("recovery")
recovery = RECOVERIES.add

# -- trainings --------------------------------------------------------------------------------------------------------


def linear_maps(block: nn.Module) -> Iterator[str]:
    """The names of the linear maps inside a block; not those of a repair."""
    patches = [name for name, module in block.named_modules() if isinstance(module, Patch)]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(name.startswith(f"{patch}.") for patch in patches):
            yield name


def own(student: Any, names: Iterable[str]) -> None:
    """Give the student parameters of its own, which can learn, in the place of those that it shares; ties stay."""
    old = dict(student.named_parameters())
    exchange(student, {old[name]: nn.Parameter(old[name].detach().float().clone()) for name in names})


@torch.inference_mode(False)
def taught(
    subject: Subject, tokens: tuple[TokenSet, TokenSet], course: Course,
    learn: Callable[[Any, nn.ModuleList], dict[str, nn.Parameter]], end: Callable[[Any], Any] = lambda x: x,
) -> Repair:  # fmt: skip
    """Materialise the student, train what `learn` chooses of it, and note in which tensors it differs now."""
    course.check()
    teacher = subject.teacher
    if teacher.weights is not None:
        raise UsageError("The model is larger than the memory, and cannot be trained so. Recover by fold, or mean.")
    if teacher.model.dtype == torch.float16:
        raise UsageError("float16 loses small gradients. Train with --dtype bfloat16 or float32.")
    student = apply(teacher, subject.plan, repair=subject.repair)
    student.requires_grad_(False)
    blocks = arch.blocks_of(student, teacher.row)
    before = {name: id(p) for name, p in student.named_parameters()}
    chosen = learn(student, blocks)
    if not chosen:
        raise UsageError(
            "Nothing in this model would learn by this recovery. Take lora or full, or put lowrank before it."
        )
    mine = [name for name in chosen if name in before]
    own(student, mine)
    parameters = {name: p for name, p in student.named_parameters() if name in set(mine)} or chosen
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    first = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), 0)
    if any(p.requires_grad for p in student.get_input_embeddings().parameters()):
        first = 0
    learnt_from, checked = (rows_of(each, teacher.device) for each in tokens)
    for rows in (learnt_from, checked):
        kept = subject.work and subject.work / f"teacher-{teacher.fingerprint}-{teacher.compute.replace(' on ', '-')}"
        with teacher.lock:
            hear(teacher.model, rows, course.loss, subject.watch, kept)
        remember(student, blocks, first, rows)
    compute = teacher.model.dtype
    trainer = Trainer(student, parameters, course, subject.work, subject.watch, compute=compute)
    again: Iterable[nn.Module] = blocks[first:] if course.checkpointing else []
    with from_streams(student, blocks, first, teacher.row.block_outputs) as give, recomputed(again):
        trainer.run(learnt_from, checked, give)
    return difference(teacher, subject.plan, end(student))


# Importing a method files it under its name.
from billhook.recover import adapters, constants, fold, matrices, trained  # noqa: E402, F401
