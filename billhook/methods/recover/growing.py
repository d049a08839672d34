"""A recovery by low-rank updates that prunes and trains in turn, and whose ranks grow where they matter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from billhook.core.errors import UsageError
from billhook.core.plan import Plan
from billhook.data.token_sets import TokenSet
from billhook.methods.recover import RecoveryTask, Round, finetune, recovery
from billhook.methods.recover.training import (
    TrainingOptions,
    TrainingRows,
    gradient_checkpointing,
    loss_of,
    token_count,
)
from billhook.methods.recover.updates import (
    LowRank,
    Updates,
    cut_to,
    first_updates,
    grown,
    kept_entries,
    maps_of,
    merged,
    put_back,
    read_updates,
    save_updates,
    with_updates,
)
from billhook.models import structure
from billhook.models.accelerator.bfloat16 import computing_in
from billhook.models.repair import Repair

MOST = 8  # times the first rank


@recovery(in_rounds=True)
def apt(
    task: RecoveryTask, train: TokenSet, valid: TokenSet, *,
    loss: str = "kl", rate: float = 1e-3, epochs: int = 1, minutes: float = 0.0, batch: int = 2,
    checkpointing: bool = False, rounds: int = 4, beta: float = 0.85, rank: int = 8, alpha: int = 16,
) -> Repair:  # fmt: skip
    """Prune and train low-rank updates of every linear map in turn, then merge them.

    Each of the `rounds` removes channel groups of what the last one left, by their scores in the model as it is trained
    so far; then the updates train for `epochs`. Between rounds the half of the maps that matters more doubles its rank,
    to at most 8 times the first: new rows of A are random and new columns of B zero, so that no output changes. The
    model is pruned so with the search rank_channels and a size. With any other plan all rounds train that plan.
    `minutes`: of all rounds together. `beta`: share of the earlier rounds in the average of the scores; 0: the last
    round's count alone.

    Formula: W + alpha / rank · B A; in round k of n the removed share of the budget is 1 - (1 - k / n)³; a map matters
    by |Σ A · dL/dA|, the mean over validation batches
    Cost: per round the metric, and a forward and a backward pass of the student per step and per validation row; a
    forward pass of the teacher per row; nothing at inference.
    Source: Zhao et al. 2024, APT (arXiv 2401.12200). Deviations: distilled by default from the unpruned model,
    where the paper distils small models alone, from weights that train too; groups are cut at the beginning of a round,
    where its masks fade by 0.01 a step; scores are averaged over rounds, each on the whole calibration text, instead of
    over steps; hidden dimensions are kept; ranks double, where it grows them as the budget of trained parameters does;
    each round has its own schedule of the rate, and stops early on validation texts.
    """
    if rounds < 1 or rank < 1 or not 0 <= beta < 1:
        raise UsageError(
            f"apt takes rounds and rank from 1 and beta from 0 to below 1, not {rounds}, {rank} and {beta:g}."
        )
    plan, repair, made_from = Plan(), task.repair, ""
    updates = first_updates(task.teacher, rank, task.seed)
    for number in range(1, rounds + 1):
        plan = task.plan if task.replan is None else task.replan(Round(number, rounds, beta, plan, repair))
        training = TrainingOptions(loss, rate, epochs, minutes / rounds, batch, checkpointing, task.seed + number)
        same = replace(training, checkpointing=False)
        said = [made_from, task.teacher.fingerprint, plan.to_list(), rank, alpha, asdict(same), train.hash, valid.hash]
        made_from = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        file = task.work and task.work / f"round-{number}-{made_from}.safetensors"
        if file is None or not file.is_file():
            updates, gains = _trained(replace(task, plan=plan), (train, valid), training, updates, alpha / rank)
            updates = grown(updates, gains, MOST * rank, task.seed + number)
            if file is not None:
                save_updates(updates, file)
        updates = updates if file is None else read_updates(file)
        repair = merged(replace(task, plan=plan), updates, alpha / rank)
    return repair


# -- a round ----------------------------------------------------------------------------------------------------------


def _trained(
    task: RecoveryTask, texts: tuple[TokenSet, TokenSet], training: TrainingOptions, updates: Updates, scale: float
) -> tuple[Updates, dict[str, float]]:
    """Return the updates after a training of the task's student, and how much each of its maps matters."""
    own, later, gains = cut_to(task.teacher, task.plan, updates), dict(updates), dict[str, float]()
    maps: dict[str, str] = {}
    adapted: list[Any] = []

    def learn(student: Any, blocks: nn.ModuleList) -> dict[str, nn.Parameter]:
        maps.update(maps_of(task.teacher, student))
        adapted.append(with_updates(student, {name: own[of] for name, of in maps.items()}, scale))
        return {name: p for name, p in adapted[0].named_parameters() if "lora_" in name}

    def end(student: Any, valid: TrainingRows) -> Any:
        layers = {of: student.get_submodule(name) for name, of in maps.items()}
        downs = {of: layer.lora_A["default"].weight for of, layer in layers.items()}
        blocks = structure.blocks_of(student, task.teacher.architecture)
        with gradient_checkpointing(blocks if training.checkpointing else ()):
            gains.update(update_gains(student, downs, valid, training))
        kept = kept_entries(task.teacher, task.plan)
        for of, layer in layers.items():
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            new = LowRank(*(factor.detach().cpu().clone() for factor in pair))
            later[of] = put_back(updates[of], *kept[of], new) if of in kept else new
        return adapted[0].unload()

    finetune(task, texts, training, learn, end)
    return later, gains


def update_gains(
    student: Any, downs: Mapping[str, nn.Parameter], rows: TrainingRows, options: TrainingOptions
) -> dict[str, float]:
    """Return by map the mean over batches of rows of |Σ A · dL/dA|, A its `down`, L the loss per token.

    It is |Σ B · dL/dB| too: to first order, how much the loss would change without the update.
    """
    count, total = len(rows.ids), torch.zeros(len(downs), device=rows.ids.device)
    batches = torch.arange(count, device=rows.ids.device).split(options.batch)
    for batch in map(rows.select, batches):
        weight = max(1, token_count(batch.counted, options.loss))
        for chunk in batch.chunks():
            with computing_in(student, student.dtype):
                loss = loss_of(student, chunk, options.loss) / weight
            loss.backward()
        sums = [
            down.new_zeros(()) if down.grad is None else (down.detach() * down.grad).sum() for down in downs.values()
        ]
        total += torch.stack([each.to(total.device) for each in sums]).abs() / len(batches)
        student.zero_grad(set_to_none=True)
    return dict(zip(downs, total.tolist(), strict=True))
