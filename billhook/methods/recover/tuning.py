"""Recoveries by training: each says which parameters learn; the loop is the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, finetune, recovery
from billhook.methods.recover.training import TrainingOptions
from billhook.models.modeling_billhook import PatchModule
from billhook.models.repair import Repair

LAST_BLOCKS = 3  # blocks that `partial` trains


@recovery
def bias(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 2e-3, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train what is a vector: biases, norms, and the constants of a repair before.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of what the heads read)
    Cost: a forward and a backward pass of the student a step, a forward pass of the teacher a row; nothing at
    inference.
    Source: Zimmer et al. 2023, PERP (arXiv 2312.15230). Deviation: distilled from the teacher by default.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        return {name: p for name, p in student.named_parameters() if p.dim() == 1}

    course = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), course, learn)


@recovery
def patches(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train what the recoveries before put in the place of removed sublayers, as after `lowrank,patches`.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of what the heads read)
    Cost: a forward and a backward pass of the student a step, a forward pass of the teacher a row; nothing more at
    inference.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its low-rank adapters.
    Deviation: it begins where the closed form ends.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        inside = {id(p) for module in student.modules() if isinstance(module, PatchModule) for p in module.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in inside}

    course = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), course, learn)


@recovery
def partial(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 2e-4, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train the last three blocks, the final norm, and the head unless it is the embedding too.

    What the blocks before give is computed once.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of what the heads read)
    Cost: a forward pass of the student and the teacher a row, then passes of three blocks and the head; nothing at
    inference.
    Source: partial-layer tuning, Reassessing Layer Pruning in LLMs (arXiv 2411.15558). Deviations: distilled from the
    teacher by default; a tied head stays, since it would take the embedding along.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        chosen = {id(p) for block in blocks[-LAST_BLOCKS:] for p in block.parameters()}
        chosen |= {id(p) for p in _final(task, student)}
        head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
        if head.weight is not embedding.weight:
            chosen |= {id(p) for p in head.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in chosen}

    course = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), course, learn)


@recovery
def full(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-4, epochs: int = 1, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train every parameter: continued pretraining with `loss=nll`, distillation with `loss=kl`.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of what the heads read)
    Cost: a forward and a backward pass of the student a step, a forward pass of the teacher a row, memory for four
    copies of the student; nothing at inference.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), its continued pretraining. Deviation: distilled by
    default.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        return dict(student.named_parameters())

    course = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), course, learn)


def _final(task: RecoveryTask, student: Any) -> Iterable[nn.Parameter]:
    """Parameters between the last block and the head."""
    for path in task.teacher.architecture.final:
        owner, _, name = path.rpartition(".")
        module = getattr(student.get_submodule(owner), name, None)
        yield from () if module is None else module.parameters()
