"""Recoveries by training: each says which parameters learn; the loop is the same."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook import arch
from billhook.data import TokenSet
from billhook.errors import MissingExtra, UsageError
from billhook.modeling_billhook import Patch
from billhook.recover import Subject, recovery
from billhook.repair import Repair
from billhook.surgery import apply, difference, exchange
from billhook.training import Course, Trainer, from_streams, hear, recomputed, remember, rows_of

LAST = 3  # blocks that `partial` trains
ADAPTER = "adapter"  # the folder, inside the work of a recovery, of one that is not merged


@recovery
def bias(
    subject: Subject, train: TokenSet, valid: TokenSet, *,
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

    course = Course(loss, rate, epochs, minutes, batch, checkpointing, subject.seed)
    return _trained(subject, (train, valid), course, learn)


@recovery
def patches(
    subject: Subject, train: TokenSet, valid: TokenSet, *,
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
        inside = {id(p) for module in student.modules() if isinstance(module, Patch) for p in module.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in inside}

    course = Course(loss, rate, epochs, minutes, batch, checkpointing, subject.seed)
    return _trained(subject, (train, valid), course, learn)


@recovery
def partial(
    subject: Subject, train: TokenSet, valid: TokenSet, *,
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
        chosen = {id(p) for block in blocks[-LAST:] for p in block.parameters()}
        chosen |= {id(p) for p in _final(subject, student)}
        head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
        if head.weight is not embedding.weight:
            chosen |= {id(p) for p in head.parameters()}
        return {name: p for name, p in student.named_parameters() if id(p) in chosen}

    course = Course(loss, rate, epochs, minutes, batch, checkpointing, subject.seed)
    return _trained(subject, (train, valid), course, learn)


@recovery
def full(
    subject: Subject, train: TokenSet, valid: TokenSet, *,
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

    course = Course(loss, rate, epochs, minutes, batch, checkpointing, subject.seed)
    return _trained(subject, (train, valid), course, learn)


@recovery
def lora(
    subject: Subject, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 1, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False, rank: int = 16, alpha: int = 32, dropout: float = 0.0, merge: bool = True,
) -> Repair:  # fmt: skip
    """Train low-rank updates of every linear map in the blocks, then merge them.

    `merge=False`: the checkpoint stays without them, and they come beside it, as an adapter for peft; the recovery must
    be the last one then, and what is measured is both together.

    Formula: W + alpha / rank · B A, B and A by AdamW on `loss` (nll, kl against the teacher, mse of what the heads
    read)
    Cost: a forward and a backward pass of the student a step, a forward pass of the teacher a row; nothing at
    inference.
    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), by peft; after pruning Kim et al. 2024, Shortened LLaMA (arXiv
    2402.02834). Deviation: distilled from the teacher by default.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("The recovery lora", "heal")
    import peft

    course = Course(loss, rate, epochs, minutes, batch, checkpointing, subject.seed)
    if not merge and subject.work is None:
        raise UsageError("An adapter that is not merged needs a folder: give the subject its `work`.")
    adapted: list[Any] = []

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        path = subject.teacher.row.blocks
        names = [f"{path}.{i}.{name}" for i, block in enumerate(blocks) for name in _linear(block)]
        _own(student, [f"{name}.weight" for name in names])  # merging writes to what stands there
        turned = any(isinstance(module, Conv1D) for module in blocks.modules())  # GPT-2's weights are [inputs, outputs]
        settings = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=turned
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            torch.manual_seed(subject.seed)
            adapted.append(peft.get_peft_model(student, settings))
        return {name: p for name, p in adapted[0].named_parameters() if "lora_" in name}

    def end(student: Any) -> Any:
        if not merge and subject.work is not None:
            adapted[0].peft_config["default"].base_model_name_or_path = ""  # no path of this machine
            adapted[0].save_pretrained(subject.work / ADAPTER)
        return adapted[0].merge_and_unload()

    return _trained(subject, (train, valid), course, learn, end)


def _linear(block: nn.Module) -> Iterator[str]:
    """The names of the linear maps inside a block; not those of a repair."""
    patches = [name for name, module in block.named_modules() if isinstance(module, Patch)]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(name.startswith(f"{patch}.") for patch in patches):
            yield name


def _final(subject: Subject, student: Any) -> Iterable[nn.Parameter]:
    """Parameters between the last block and the head."""
    for path in subject.teacher.row.final:
        owner, _, name = path.rpartition(".")
        module = getattr(student.get_submodule(owner), name, None)
        yield from () if module is None else module.parameters()


def _own(student: Any, names: Iterable[str]) -> None:
    """Give the student parameters of its own, which can learn, in the place of those that it shares; ties stay."""
    old = dict(student.named_parameters())
    exchange(student, {old[name]: nn.Parameter(old[name].detach().float().clone()) for name in names})


@torch.inference_mode(False)
def _trained(
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
    _own(student, mine)
    parameters = {name: p for name, p in student.named_parameters() if name in set(mine)} or chosen
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    first = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), 0)
    if any(p.requires_grad for p in student.get_input_embeddings().parameters()):
        first = 0
    learnt_from, checked = (rows_of(each, teacher.device) for each in tokens)
    for rows in (learnt_from, checked):
        hear(teacher.model, rows, course.loss, subject.watch)
        remember(student, blocks, first, rows)
    compute = teacher.model.dtype
    trainer = Trainer(student, parameters, course, subject.work, subject.watch, compute=compute)
    again: Iterable[nn.Module] = blocks[first:] if course.checkpointing else []
    with from_streams(student, blocks, first, teacher.row.block_outputs) as give, recomputed(again):
        trainer.run(learnt_from, checked, give)
    return difference(teacher, subject.plan, end(student))
