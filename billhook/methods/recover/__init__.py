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

from billhook.core.errors import UsageError
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import Registry
from billhook.data.splits import split_every_nth
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.methods.recover.side_by_side import TeacherStreams
from billhook.methods.recover.teacher_cache import cache_teacher_outputs
from billhook.methods.recover.training import (
    Trainer,
    TrainingOptions,
    cache_frozen_streams,
    gradient_checkpointing,
    rows_of,
    skip_frozen_blocks,
)
from billhook.models import structure
from billhook.models.load import Teacher
from billhook.models.modeling_billhook import PatchModule
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply, extract_repair, replace_parameters
from billhook.models.transformers_internals import is_linear

RIDGE_VALIDATION_EVERY = 8  # of so many texts one chooses the ridge


@dataclass(frozen=True)
class RecoveryTask:
    """What is to be recovered: what `plan` leaves of `teacher`, with the `repair` of the recoveries before.

    `memory`: bytes for weights and activations (None: half of what is free); `work`: a folder for checkpoints of a
    training, which a later call with the same arguments resumes; `streams_by_tokens`: streams of the teacher, by the
    hash of tokens, kept for recoveries of other plans.
    """

    teacher: Teacher
    plan: Plan
    repair: Repair = NO_REPAIR
    memory: int | None = None
    seed: int = 0
    work: Path | None = None
    watch: EventListener = ignore_events
    streams_by_tokens: dict[str, TeacherStreams] | None = None

    def measurer(self, tokens: TokenSet) -> Measurer:
        """Where teacher and student meet on some tokens."""
        return Measurer(self.teacher, tokens, "kl", memory=self.memory)

    def teacher_streams(self, tokens: TokenSet, *, again: bool = False) -> TeacherStreams:
        """The teacher on some tokens; `again`: where it may be gone through more than once."""
        if self.streams_by_tokens is None:
            return TeacherStreams(self.measurer(tokens), again=again)
        if tokens.hash not in self.streams_by_tokens:
            self.streams_by_tokens[tokens.hash] = TeacherStreams(self.measurer(tokens), again=True)
        return self.streams_by_tokens[tokens.hash]

    def validation_mask(self, bench: Measurer, tokens: TokenSet) -> torch.Tensor:
        """Which tokens of `measurer` only choose, and are not fitted to: those of every eighth text. [tokens], bool."""
        chosen = set(split_every_nth(tokens, RIDGE_VALIDATION_EVERY)[1])
        of = [group.documents[i] in chosen for group in bench.groups for i in group.document_of.tolist()]
        return torch.tensor(of, device=self.teacher.device)


Recovery = Callable[..., Repair]
RECOVERIES: Registry[Recovery] = Registry("recovery")
recovery = RECOVERIES.add


# -- trainings --------------------------------------------------------------------------------------------------------


def linear_maps(block: nn.Module) -> Iterator[str]:
    """The names of the linear maps inside a block; not those of a repair."""
    patches = [name for name, module in block.named_modules() if isinstance(module, PatchModule)]
    for name, module in block.named_modules():
        if is_linear(module) and not any(name.startswith(f"{patch}.") for patch in patches):
            yield name


def unshare_parameters(student: Any, names: Iterable[str]) -> None:
    """Give the student parameters of its own, which can learn, in the place of those that it shares; ties stay."""
    old = dict(student.named_parameters())
    replace_parameters(student, {old[name]: nn.Parameter(old[name].detach().float().clone()) for name in names})


@torch.inference_mode(False)
def finetune(
    task: RecoveryTask, tokens: tuple[TokenSet, TokenSet], options: TrainingOptions,
    learn: Callable[[Any, nn.ModuleList], dict[str, nn.Parameter]], on_end: Callable[[Any], Any] = lambda x: x,
) -> Repair:  # fmt: skip
    """Materialise the student, train what `learn` chooses of it, and note in which tensors it differs now."""
    options.check()
    teacher = task.teacher
    if teacher.weights is not None:
        raise UsageError("The model is larger than the memory, and cannot be trained so. Recover by fold, or mean.")
    if teacher.model.dtype == torch.float16:
        raise UsageError("float16 loses small gradients. Train with --dtype bfloat16 or float32.")
    student = apply(teacher, task.plan, repair=task.repair)
    student.requires_grad_(False)
    blocks = structure.blocks_of(student, teacher.architecture)
    before = {name: id(p) for name, p in student.named_parameters()}
    chosen = learn(student, blocks)
    if not chosen:
        raise UsageError(
            "Nothing in this model would learn by this recovery. Take lora or full, or put lowrank before it."
        )
    mine = [name for name in chosen if name in before]
    unshare_parameters(student, mine)
    parameters = {name: p for name, p in student.named_parameters() if name in set(mine)} or chosen
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    first = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), 0)
    if any(p.requires_grad for p in student.get_input_embeddings().parameters()):
        first = 0
    learnt_from, checked = (rows_of(each, teacher.device) for each in tokens)
    for rows in (learnt_from, checked):
        kept = task.work and task.work / f"teacher-{teacher.fingerprint}-{teacher.compute_key.replace(' on ', '-')}"
        with teacher.lock:
            cache_teacher_outputs(teacher.model, rows, options.loss, task.watch, kept)
        cache_frozen_streams(student, blocks, first, rows)
    compute = teacher.model.dtype
    trainer = Trainer(student, parameters, options, task.work, task.watch, compute=compute)
    again: Iterable[nn.Module] = blocks[first:] if options.checkpointing else []
    with (
        skip_frozen_blocks(student, blocks, first, teacher.architecture.block_outputs) as give,
        gradient_checkpointing(again),
    ):
        trainer.run(learnt_from, checked, give)
    return extract_repair(teacher, task.plan, on_end(student))


from billhook.methods.recover import (  # noqa: E402, F401 - they file themselves in the registry above
    fold,
    linear_patches,
    lora,
    mean_patches,
    tuning,
)
