"""The measuring engine: losses of plans over a token set.

One forward pass of the model's own code a plan, which starts at the first block where the plan differs from what the
plans asked for together have in common: the outputs of the blocks before it are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.arch import blocks_of
from billhook.data import TokenSet
from billhook.errors import ModelError
from billhook.loading import Teacher
from billhook.losses import COUNTS_TARGETS, LOSSES
from billhook.mask import masked
from billhook.plan import Plan
from billhook.probe.replay import recorded, replayed
from billhook.records import Loss
from billhook.vet import dtype_name

BATCH_LOGITS_BYTES = 2**28  # logits of one batch, in float32
CACHE_BYTES = 2**30  # teacher's logits kept across plans


@dataclass(frozen=True)
class Batch:
    """Some rows of a token set: `ids` [rows, time], `targets` [rows, time] (-100: none), and their row numbers."""

    ids: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


def batches(tokens: TokenSet, vocabulary: int, device: torch.device) -> Iterator[Batch]:
    """The rows of a token set, longest first, as many at a time as keep the logits within bounds."""
    order = sorted(range(len(tokens.lengths)), key=lambda r: (-tokens.lengths[r], r))
    start = 0
    while start < len(order):
        time = tokens.lengths[order[start]]
        count = max(1, BATCH_LOGITS_BYTES // (4 * vocabulary * time))
        rows = tuple(order[start : start + count])
        lengths = tuple(tokens.lengths[r] for r in rows)
        ids = tokens.rows[list(rows), :time].to(device)
        targets = torch.full_like(ids, -100)
        for i, n in enumerate(lengths):
            targets[i, : n - 1] = ids[i, 1:n]
        yield Batch(ids, targets, rows, lengths)
        start += count


def by_document(
    tokens: TokenSet, per_row: list[float], counts_targets: bool
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Sums and token counts of the documents, from the sums of the rows."""
    sums, counts = [0.0] * len(tokens.clusters), [0] * len(tokens.clusters)
    for document, value, length in zip(tokens.documents, per_row, tokens.lengths, strict=True):
        sums[document] += value
        counts[document] += length - int(counts_targets)
    return tuple(sums), tuple(counts)


class Probe:
    """Measures plans of one teacher on one token set under one loss. Keeps what helps the next plan, where it fits."""

    def __init__(self, teacher: Teacher, tokens: TokenSet, loss: str) -> None:
        self.teacher, self.tokens, self.loss = teacher, tokens, loss
        self._token_loss = LOSSES[loss]
        model = teacher.model
        self._blocks = blocks_of(model, teacher.row)
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._batches = list(batches(tokens, self._vocabulary, model.device))
        self._fits = 4 * self._vocabulary * tokens.tokens <= CACHE_BYTES
        self._references: dict[int, torch.Tensor] = {}  # by batch: the teacher's logits
        state_bytes = model.get_input_embeddings().weight.shape[1] * model.dtype.itemsize
        self._states_fit = len(self._blocks) * tokens.rows.numel() * state_bytes <= CACHE_BYTES
        self._base: Plan | None = None
        self._states: list[list[Any]] = []  # by batch, by block: the base plan's outputs

    @torch.inference_mode()
    def losses(self, plans: Sequence[Plan]) -> Iterator[Loss]:
        """The loss of each plan, in full, in the order asked.

        Raises ModelError, naming the block, if activations are not finite.
        """
        if len(plans) > 1 and self._states_fit:
            self._rebase(Plan(frozenset.intersection(*(plan.removed for plan in plans))))
        for plan in plans:
            yield self._measure(plan)

    def kept_bytes(self) -> int:
        """What stays in memory between plans besides the weights: teacher's logits and block outputs."""
        model, tokens = self.teacher.model, self.tokens.tokens
        width = int(model.get_input_embeddings().weight.shape[1])
        logits = self._vocabulary * tokens if self._fits else 0
        return int(model.dtype.itemsize) * (logits + (len(self._blocks) * tokens * width if self._states_fit else 0))

    def _measure(self, plan: Plan) -> Loss:
        per_row = [0.0] * len(self.tokens.lengths)
        for index, batch in enumerate(self._batches):
            reference = self._reference(index)
            logits = self._forward(index, plan).logits
            for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
                values = self._token_loss(reference[i, :n], logits[i, :n], batch.targets[i, :n])
                per_row[row] = float(values.double().sum())
        result = Loss(self.loss, *by_document(self.tokens, per_row, self.loss in COUNTS_TARGETS))
        if not result.mean < float("inf"):
            raise ModelError(self._where_not_finite(plan))
        return result

    def _forward(self, index: int, plan: Plan) -> Any:
        """One batch through the masked model, from the first block that the base plan does not already answer for."""
        known = self._known(plan)
        with masked(self.teacher, plan):
            ids = self._batches[index].ids
            if not known:
                return self.teacher.model(input_ids=ids, use_cache=False)
            with replayed(self._blocks, self._states[index][known - 1], known):
                return self.teacher.model(input_ids=ids, use_cache=False)

    def _known(self, plan: Plan) -> int:
        """How many blocks do under `plan` what they did under the base plan."""
        if self._base is None:
            return 0
        differ = {site.block for site in plan.removed ^ self._base.removed}
        return next((i for i, p in enumerate(self.teacher.positions) if p in differ), len(self._blocks))

    def _rebase(self, plan: Plan) -> None:
        """Keep the outputs of every block under `plan`."""
        if plan == self._base:
            return
        known, states = self._known(plan), []
        for index in range(len(self._batches)):
            with recorded(self._blocks) as outputs:
                self._forward(index, plan)
            states.append(self._states[index][:known] + outputs[known:] if known else outputs)
        self._base, self._states = plan, states

    def _reference(self, index: int) -> torch.Tensor:
        """The teacher's logits for one batch."""
        if index in self._references:
            return self._references[index]
        logits: torch.Tensor = self.teacher.model(input_ids=self._batches[index].ids, use_cache=False).logits
        if self._fits:
            self._references[index] = logits
        return logits

    def _where_not_finite(self, plan: Plan) -> str:
        """Which block first gives NaN or infinity."""
        bad: list[int] = []

        def look(position: int) -> Callable[..., None]:
            def hook(module: object, args: object, output: object) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
                    bad.append(position)

            return hook

        handles = [self.teacher.block(p).register_forward_hook(look(p)) for p in self.teacher.positions]
        try:
            for removed in (plan, Plan()):  # the student's own, or the teacher's that it is compared with
                with masked(self.teacher, removed):
                    for batch in self._batches:
                        self.teacher.model(input_ids=batch.ids, use_cache=False)
                if bad:
                    break
        finally:
            for handle in handles:
                handle.remove()
        dtype = dtype_name(self.teacher.model.dtype)
        where = f"block {min(bad)}" if bad else "the head"
        without = f" with {removed} removed" if removed.removed else ""
        broken = "the checkpoint itself is broken: download it again."
        advice = f"Try --dtype float32; if it stays, {broken}" if dtype != "float32" else broken.capitalize()
        return f"Activations are NaN or infinite from {where} on{without}, in {dtype}. {advice}"
