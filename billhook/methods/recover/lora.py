"""Recoveries by low-rank updates of the linear maps in the blocks, merged after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from billhook.core.errors import UsageError
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, finetune, linear_maps, recovery, unshare_parameters
from billhook.methods.recover.training import TrainingOptions, TrainingRows
from billhook.methods.recover.updates import peft_model
from billhook.models import structure
from billhook.models.repair import Repair
from billhook.models.transformers_internals import Conv1D

ADAPTER = "adapter"  # the folder of an unmerged adapter, inside the recovery's work folder


@recovery(together=True)
def lora(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 1, minutes: float = 0.0, batch: int = 2,
    checkpointing: bool = False, rank: int = 16, alpha: int = 32, dropout: float = 0.0, merge: bool = True,
) -> Repair:  # fmt: skip
    """Train low-rank updates of every linear map in the blocks, then merge them.

    `merge=False`: write them beside the checkpoint, as an adapter for peft. The recovery must then be the last one;
    Billhook measures both together.

    Formula: W + alpha / rank · B A, B and A by AdamW on `loss` (nll, kl against the teacher, mse of the hidden states
    before the head)
    Cost: a forward and a backward pass of the student per step, a forward pass of the teacher per row; nothing at
    inference.
    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), by peft; after pruning Kim et al. 2024, Shortened LLaMA (arXiv
    2402.02834). Deviation: distilled from the teacher by default.
    """
    import peft

    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    if not merge and task.work is None:
        raise UsageError("lora with merge=False needs a folder for the adapter. Use RecoveryTask(..., work=FOLDER).")
    adapted: list[Any] = []
    names: list[str] = []

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        path = task.teacher.architecture.blocks
        names[:] = [f"{path}.{i}.{name}" for i, block in enumerate(blocks) for name in linear_maps(block)]
        transposed = any(isinstance(module, Conv1D) for module in blocks.modules())  # GPT-2's are [inputs, outputs]
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=transposed
        )
        adapted.append(peft_model(student, config, task.seed))
        return {name: p for name, p in adapted[0].named_parameters() if "lora_" in name}

    def end(student: Any, valid: TrainingRows) -> Any:
        if not merge and task.work is not None and task.share.rank == 0:
            adapted[0].peft_config["default"].base_model_name_or_path = ""  # no path of this machine
            adapted[0].save_pretrained(task.work / ADAPTER)
        return _merged(adapted[0], names)

    return finetune(task, (train, valid), training, learn, end)


@torch.no_grad()
def _merged(adapted: Any, names: Sequence[str]) -> Any:
    """Return the model under an adapter with W + s B A in the place of each weight; the shared W stays as it is.

    Summed in float32, and held in the dtype of W in host memory, weight by weight: the device holds W and no more.
    """
    student = adapted.get_base_model()
    for name in names:
        layer = student.get_submodule(name)
        base = layer.get_base_layer()
        weight = base.weight.float() + layer.get_delta_weight("default")
        base.weight = nn.Parameter(weight.to(base.weight.dtype).cpu(), requires_grad=False)
    return adapted.unload()


@recovery(together=True)
def qa_lora(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 1, minutes: float = 0.0, batch: int = 8,
    checkpointing: bool = False, rank: int = 16, alpha: int = 32, group: int = 32, bits: int = 4,
) -> Repair:  # fmt: skip
    """Quantise the linear maps in the blocks, and train low-rank updates that are the same for all inputs of a group.

    Each `group` of consecutive inputs of an output shares a scale and a zero point. Training changes the zero points
    alone, so that the weights of a group keep their few values: quantising them again, with the same groups by minimum
    and maximum, loses only the rounding of scales and zero points (llama.cpp's Q4_1 has groups of 32 and 4 bits). The
    checkpoint holds them in its own dtype. `bits=0`: nothing is quantised.

    Formula: W' = Q(W) + alpha / rank · B A P, P the sum over each group of inputs divided by its size; Q(w) = s
    round((w - min) / s) + min, s = (max - min) / (2^bits - 1); B and A by AdamW on `loss`
    Cost: a forward and a backward pass of the student per step, a forward pass of the teacher per row; nothing at
    inference.
    Source: Xu et al. 2023, QA-LoRA (arXiv 2309.14717); after pruning Zheng et al. 2024, SAAP (arXiv 2412.15127), its
    group-wise tuning, which has no public code: group size, bits and rank are those of QA-LoRA. Deviation: distilled
    from the teacher by default.
    """
    if group < 1 or not 0 <= bits <= 8 or rank < 1:
        raise UsageError(f"qa_lora takes group and rank from 1 and bits from 0 to 8, not {group}, {rank} and {bits}.")
    training = TrainingOptions(loss, rate, epochs, minutes, batch, checkpointing, task.seed)
    updates: list[Update] = []

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        path, factors = task.teacher.architecture.blocks, dict[str, nn.Parameter]()
        names = [(i, name) for i, block in enumerate(blocks) for name in linear_maps(block)]
        unshare_parameters(student, [f"{path}.{i}.{name}.weight" for i, name in names], dtype=None)
        draw = torch.Generator().manual_seed(task.seed)
        for i, name in names:
            module = blocks[i].get_submodule(name).requires_grad_(False)
            stored = module.get_parameter("weight").detach()
            weight = structure.as_outputs_by_inputs(blocks[i], f"{name}.weight", stored)
            weight.copy_(quantised(weight.float(), group, bits))
            updates.append(Update(module, weight, group, rank=rank, scale=alpha / rank, draw=draw))
            factors |= {f"{path}.{i}.{name}.down": updates[-1].down, f"{path}.{i}.{name}.up": updates[-1].up}
        return factors

    def end(student: Any, valid: TrainingRows) -> Any:
        for update in updates:
            update.merge()
        return student

    return finetune(task, (train, valid), training, learn, end)


class Update:
    """A low-rank update of a linear map, `scale` · `up` · `down`, the same for all inputs of a group.

    `down` [rank, groups], random; `up` [outputs, rank], zeros; `weight` [outputs, inputs]: a view of the map's weight.
    """

    def __init__(
        self, module: nn.Module, weight: torch.Tensor, group: int, *, rank: int, scale: float, draw: torch.Generator
    ) -> None:
        self.weight, self.group, self.scale = weight, group, scale
        down = torch.randn(rank, -(-weight.shape[1] // group), generator=draw) / weight.shape[1] ** 0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self._hook = module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        """Return the output of the map plus that of the update."""
        x = nn.functional.pad(args[0], (0, -args[0].shape[-1] % self.group))
        means = x.unflatten(-1, (-1, self.group)).sum(-1) / self.group
        update: torch.Tensor = self.scale * (means.to(self.down.dtype) @ self.down.T @ self.up.T)
        return out + update.to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, and remove the hook."""
        self._hook.remove()
        columns = (self.scale / self.group) * (self.up @ self.down)
        update = columns.repeat_interleave(self.group, 1)[:, : self.weight.shape[1]]
        self.weight.copy_(self.weight.float() + update)  # summed in float32


def quantised(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """Round weights [outputs, inputs] to 2^bits values per group of inputs, from its minimum to its maximum."""
    if not bits:
        return weight
    pieces = []
    for piece in weight.split(group, dim=1):
        low, high = piece.amin(1, keepdim=True), piece.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
        pieces.append(((piece - low) / step).round() * step + low)
    return torch.cat(pieces, 1)
