"""Recoveries: methods that restore quality after pruning, cheapest first.

A recovery takes a task, training tokens, validation tokens and options. It returns a Repair: the task's own, with its
changes added. It writes to no tensor of the teacher; its caller measures whether it helped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from billhook.core.errors import UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues, RegistryWithFacts, options
from billhook.data.splits import split_every_nth
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.methods.recover.side_by_side import TeacherStreams
from billhook.methods.recover.teacher_cache import cache_teacher_outputs
from billhook.methods.recover.training import (
    Trainer,
    TrainingOptions,
    TrainingRows,
    cache_frozen_streams,
    gradient_checkpointing,
    rows_of,
    skip_frozen_blocks,
)
from billhook.models import structure
from billhook.models.accelerator.bfloat16 import computing_in, gains_by_bfloat16
from billhook.models.accelerator.share import ALONE, Share
from billhook.models.architectures import Architecture
from billhook.models.load import Teacher
from billhook.models.modeling_billhook import PatchModule
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply, extract_repair, replace_parameters
from billhook.models.transformers_internals import is_linear

RIDGE_VALIDATION_EVERY = 8  # one text of this many chooses the ridge


@dataclass(frozen=True)
class Round:
    """A round of pruning and training in turn that is about to begin: the `number`-th of `rounds`, counted from 1.

    `plan` and `repair`: those of the round before; what is kept is removed no more. `beta`: how much of its scores of
    channel groups is the average of earlier rounds.
    """

    number: int
    rounds: int
    beta: float
    plan: Plan
    repair: Repair

    @property
    def share(self) -> Fraction:
        """How much of a run's budget is met when the round begins: 1 - (1 - number / rounds)³."""
        return 1 - (1 - Fraction(self.number, self.rounds)) ** 3


@dataclass(frozen=True)
class RecoveryTask:
    """The student to recover: what `plan` keeps of `teacher`, with the `repair` of earlier recoveries.

    `memory`: bytes for weights and activations (None: half of what is free). `work`: a folder for training checkpoints;
    a later call with the same arguments resumes from it. `streams_by_tokens`: the teacher's streams by hash of the
    tokens, cached for recoveries of other plans. `save_every`: seconds between training checkpoints (None: 30).
    `bfloat16`: training may compute in bfloat16, where that is faster. `share`: of this process in a training that
    several carry out together; then there is a `work` folder, which all of them see. `replan`: what a recovery in
    rounds asks for the plan of each, which removes what the one before did, and more; None: `plan` in all rounds.
    """

    teacher: Teacher
    plan: Plan
    repair: Repair = NO_REPAIR
    memory: int | None = None
    seed: int = 0
    work: Path | None = None
    watch: EventListener = ignore_events
    streams_by_tokens: dict[str, TeacherStreams] | None = None
    save_every: float | None = None
    bfloat16: bool = False
    share: Share = ALONE
    replan: Callable[[Round], Plan] | None = None

    def teacher_streams(self, tokens: TokenSet, *, again: bool = False) -> TeacherStreams:
        """Return the teacher's streams on `tokens`; `again`: they may be read more than once."""
        cache = {} if self.streams_by_tokens is None else self.streams_by_tokens
        if tokens.hash not in cache:
            bench = Measurer(self.teacher, tokens, "kl", memory=self.memory)
            cache[tokens.hash] = TeacherStreams(bench, again=again or self.streams_by_tokens is not None)
        return cache[tokens.hash]

    def validation_mask(self, bench: Measurer, tokens: TokenSet) -> torch.Tensor:
        """Return which tokens of `bench` choose the ridge and are not fitted: every eighth text's. [tokens], bool."""
        chosen = set(split_every_nth(tokens, RIDGE_VALIDATION_EVERY)[1])
        mask = [group.documents[i] in chosen for group in bench.groups for i in group.document_of.tolist()]
        return torch.tensor(mask, device=self.teacher.device)


Recovery = Callable[..., Repair]


def _suits_all(row: Architecture) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class RecoveryFacts:
    """What a recovery adds to a student besides new values of its weights.

    `adds`: `patches` in the place of removed sites, `constants` there, `biases` of output projections, or nothing.
    `option`: the value of an option with which it does; empty: with any. `refuse`: a reason why it finds nothing to
    change in models of an architecture. `together`: several processes may carry it out, because it does what the task's
    `share` says, as `finetune` does. `in_rounds`: it calls the task's `replan`.
    """

    adds: Literal["", "patches", "constants", "biases"] = ""
    option: tuple[str, str] = ("", "")
    refuse: Callable[[Architecture], str | None] = _suits_all
    together: bool = False
    in_rounds: bool = False


RECOVERIES: RegistryWithFacts[Recovery, RecoveryFacts] = RegistryWithFacts("recovery", unstated=RecoveryFacts())


@overload
def recovery(function: Recovery, /) -> Recovery:
    """Add a recovery that changes weights alone."""


@overload
def recovery(
    *,
    adds: Literal["", "patches", "constants", "biases"] = ...,
    option: tuple[str, str] = ...,
    refuse: Callable[[Architecture], str | None] = ...,
    together: bool = ...,
    in_rounds: bool = ...,
) -> Callable[[Recovery], Recovery]:
    """Return the decorator that adds a recovery with these facts."""


def recovery(
    function: Recovery | None = None,
    /,
    *,
    adds: Literal["", "patches", "constants", "biases"] = "",
    option: tuple[str, str] = ("", ""),
    refuse: Callable[[Architecture], str | None] = _suits_all,
    together: bool = False,
    in_rounds: bool = False,
) -> Recovery | Callable[[Recovery], Recovery]:
    """Add a recovery under its own name, with its facts: see RecoveryFacts."""
    add = RECOVERIES.add_with(RecoveryFacts(adds, option, refuse, together, in_rounds))
    return add if function is None else add(function)


def adds(name: str, given: OptionValues) -> Literal["", "patches", "constants", "biases"]:
    """Return what a recovery with the `given` options adds to a student. Raises UnknownName."""
    facts = RECOVERIES.facts(name)
    key, value = facts.option
    default = options(RECOVERIES[name]).get(key)
    return facts.adds if not key or str(given.get(f"{name}.{key}", given.get(key, default))) == value else ""


# -- trainings --------------------------------------------------------------------------------------------------------


def linear_maps(block: nn.Module) -> Iterator[str]:
    """Yield the names of the linear maps inside a block, without those of a repair."""
    patches = [name for name, module in block.named_modules() if isinstance(module, PatchModule)]
    for name, module in block.named_modules():
        if is_linear(module) and not any(name.startswith(f"{patch}.") for patch in patches):
            yield name


def unshare_parameters(student: Any, names: Iterable[str], dtype: torch.dtype | None = torch.float32) -> None:
    """Replace the student's shared parameters `names` by trainable copies in `dtype` (None: their own).

    Tied parameters stay tied.
    """
    old = dict(student.named_parameters())
    fresh = {old[name]: old[name].detach().to(dtype or old[name].dtype, copy=True) for name in names}
    replace_parameters(student, {parameter: nn.Parameter(value) for parameter, value in fresh.items()})


def trains(name: str) -> bool:
    """Return whether a recovery trains. Raises UnknownName."""
    return "epochs" in options(RECOVERIES[name])


def unfit(name: str, teacher: Teacher) -> str | None:
    """Return why a recovery can do nothing for students of a model, and what to type instead; None where it can."""
    return RECOVERIES.facts(name).refuse(teacher.architecture) or (_untrainable(teacher) if trains(name) else None)


def _untrainable(teacher: Teacher) -> str | None:
    if teacher.weights is not None:
        return f"A model larger than the memory cannot be trained. Use {option('recover')} fold or mean."
    if teacher.model.dtype == torch.float16:
        return f"float16 loses small gradients. Train with {option('dtype', 'bfloat16')} or float32."
    return None


@torch.inference_mode(False)
def finetune(
    task: RecoveryTask, tokens: tuple[TokenSet, TokenSet], options: TrainingOptions,
    learn: Callable[[Any, nn.ModuleList], dict[str, nn.Parameter]],
    on_end: Callable[[Any, TrainingRows], Any] = lambda student, valid: student,
) -> Repair:  # fmt: skip
    """Build the student, train the parameters that `learn` selects, and return the tensors that changed as a Repair.

    `on_end`: what makes the student of the trained one; it is given the validation rows with the teacher's outputs too.
    """
    options.check()
    teacher = task.teacher
    if (reason := _untrainable(teacher)) is not None:
        raise UsageError(reason)
    student = apply(teacher, task.plan, repair=task.repair)
    student.requires_grad_(False)
    blocks = structure.blocks_of(student, teacher.architecture)
    names = {name for name, _ in student.named_parameters()}
    selected = learn(student, blocks)
    if not selected:
        raise UsageError(
            "This recovery finds no trainable parameters in this model. Use lora or full, or run lowrank first: "
            f"{option('recover', 'lowrank,patches')}."
        )
    in_student = names & selected.keys()  # the others were added by `learn`
    unshare_parameters(student, sorted(in_student))
    parameters = {name: p for name, p in student.named_parameters() if name in in_student} or selected
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    first = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), 0)
    if any(p.requires_grad for p in student.get_input_embeddings().parameters()):
        first = 0
    train, valid = (rows_of(token_set, teacher.device) for token_set in tokens)
    files = task.work and task.work / f"teacher-{teacher.fingerprint}-{teacher.compute_key.replace(' on ', '-')}"
    bfloat16 = task.bfloat16 and gains_by_bfloat16(teacher)
    for rows in (train, valid):
        with teacher.lock, computing_in(teacher.model, torch.bfloat16 if bfloat16 else torch.float32):
            cache_teacher_outputs(teacher.model, rows, options.loss, task.watch, files, share=task.share)
        cache_frozen_streams(student, blocks, first, rows, task.share)
    compute = torch.bfloat16 if bfloat16 else teacher.model.dtype
    trainer = Trainer(
        student, parameters, options, task.work, task.watch, compute=compute, save_every=task.save_every,
        share=task.share,
    )  # fmt: skip
    frozen = skip_frozen_blocks(student, blocks, first, teacher.architecture.block_outputs)
    with frozen as set_inputs, gradient_checkpointing(blocks[first:] if options.checkpointing else ()):
        trainer.run(train, valid, set_inputs)
    return extract_repair(teacher, task.plan, on_end(student, valid))


from billhook.methods.recover import (  # noqa: E402, F401 - they register
    fold,
    growing,
    linear_patches,
    lora,
    mean_patches,
    tuning,
)
