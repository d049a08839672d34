"""Recoveries by training: each selects the trained parameters of the common loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from billhook.core.errors import UnknownName, UsageError, option
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, finetune, recovery
from billhook.methods.recover.training import TrainingOptions
from billhook.models.modeling_billhook import PatchModule
from billhook.models.repair import Repair

LAST_BLOCKS = 3  # blocks that `partial` trains


VECTORS = ("all", "biases", "norms")  # of which `bias` trains some


@recovery(together=True)
def bias(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 2e-3, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False, vectors: str = "all", head: bool = False,
) -> Repair:  # fmt: skip
    """Train all vectors: biases, norms, and the constants of an earlier repair.

    `vectors`: all, biases (with the constants), or norms. `head`: an untied head too.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of the hidden states before the head)
    Cost: a forward and a backward pass of the student per step, a forward pass of the teacher per row; nothing at
    inference.
    Source: Zimmer et al. 2023, PERP (arXiv 2312.15230). Deviation: distilled from the teacher by default.
    """
    if vectors not in VECTORS:
        raise UnknownName("choice of vectors", vectors, VECTORS)

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        one_dimensional = {name: p for name, p in student.named_parameters() if p.dim() == 1}
        biases = vectors == "biases"
        trained = {n: p for n, p in one_dimensional.items() if vectors == "all" or n.endswith("bias") == biases}
        weight = student.get_output_embeddings().weight
        if head and weight is student.get_input_embeddings().weight:
            left_out = option("recover_set", {"head": True})
            raise UsageError(f"The head of this model is its embedding. Leave {left_out} out.")
        return trained | {name: p for name, p in student.named_parameters() if head and p is weight}

    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), training, learn)


@recovery(together=True)
def patches(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train the patches that earlier recoveries put at removed sublayers, as in `lowrank,patches`.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of the hidden states before the head)
    Cost: a forward and a backward pass of the student per step, a forward pass of the teacher per row; nothing more at
    inference.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), its low-rank adapters.
    Deviation: it starts from the closed form.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        inside = {id(p) for module in student.modules() if isinstance(module, PatchModule) for p in module.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in inside}

    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), training, learn)


@recovery(together=True)
def partial(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 2e-4, epochs: int = 3, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train the last three blocks, the final norm, and an untied head.

    The outputs of the earlier blocks are computed once.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of the hidden states before the head)
    Cost: a forward pass of the student and the teacher per row, then passes of three blocks and the head; nothing at
    inference.
    Source: partial-layer tuning, Reassessing Layer Pruning in LLMs (arXiv 2411.15558). Deviations: distilled from the
    teacher by default; a tied head is not trained, because it is the embedding too.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        trained = {id(p) for block in blocks[-LAST_BLOCKS:] for p in block.parameters()}
        trained |= {id(p) for p in _final(task, student)}
        head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
        if head.weight is not embedding.weight:
            trained |= {id(p) for p in head.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in trained}

    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), training, learn)


@recovery(together=True)
def full(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-4, epochs: int = 1, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False,
) -> Repair:  # fmt: skip
    """Train every parameter: continued pretraining with `loss=nll`, distillation with `loss=kl`.

    Formula: AdamW on `loss` (nll, kl against the teacher, mse of the hidden states before the head)
    Cost: a forward and a backward pass of the student a step, a forward pass of the teacher a row, memory for four
    copies of the student; nothing at inference.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), its continued pretraining. Deviation: distilled by
    default.
    """

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        return dict(student.named_parameters())

    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    return finetune(task, (train, valid), training, learn)


def _final(task: RecoveryTask, student: Any) -> Iterable[nn.Parameter]:
    """Yield the parameters between the last block and the head."""
    for path in task.teacher.architecture.final:
        owner, _, name = path.rpartition(".")
        module = getattr(student.get_submodule(owner), name, None)
        yield from () if module is None else module.parameters()
