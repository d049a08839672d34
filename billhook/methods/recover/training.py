"""The training loop of all recoveries that train: early stopping, resumable after a kill.

It keeps the parameters that were best on validation rows. Only the order of rows and dropout are random; both are drawn
from the seed and the step.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, EventValue
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import kl, topk_and_rest
from billhook.models.accelerator.bfloat16 import computing_in
from billhook.models.accelerator.share import ALONE, Share
from billhook.models.accelerator.sizes import work_sizes

CHECKS = 12  # validations per training; fewer where they would take more than CHECKING
CHECKING = 0.2  # share of the minutes, or of the time of all steps
STEP = 3  # times as long as its validation the training of a token takes: forward, and twice as much backward
WARM_UP = 0.05  # share of the steps
PATIENCE = 4  # validations without an improvement
SAVE_EVERY = 30.0  # seconds between checkpoints
OTHER_DROPOUT = 1_000_003  # between the seeds of two processes
SAVING = 20  # times as long as a checkpoint takes passes before the next one


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Options of a training. `loss`: nll, kl or mse; `minutes`: a limit, 0 for none.

    `checkpointing`: recompute activations for the gradients: a third more time, memory for one block instead of all.
    """

    loss: str = "kl"
    rate: float = 1e-3
    epochs: int = 1
    minutes: float = 0.0
    batch: int = 8  # rows per step
    checkpointing: bool = False
    seed: int = 0

    def check(self) -> TrainingOptions:
        """Return the options. Raises UsageError for values out of range."""
        if self.loss not in ("nll", "kl", "mse"):
            raise UsageError(f"loss={self.loss!r} is none of nll, kl and mse. Use one of them.")
        if self.rate <= 0 or self.epochs < 1 or self.batch < 1 or self.minutes < 0:
            raise UsageError(
                "A training needs a rate above 0, at least 1 epoch, a batch of at least 1, minutes from 0."
            )
        return self


@dataclass(slots=True)
class TrainingRows:
    """Rows of a token set, and the teacher's outputs on them that the loss reads, which may be mapped from files."""

    ids: torch.Tensor  # [rows, time]
    counted: torch.Tensor  # [rows, time], bool
    top: torch.Tensor | None = None  # the teacher's likeliest words: [rows, time, k], int32
    likely: torch.Tensor | None = None  # log-probabilities of these and of the rest together: [rows, time, k + 1]
    hidden: torch.Tensor | None = None  # the teacher's hidden states before the head: [rows, time, width]
    streams: torch.Tensor | None = None  # the student's, before the first trained block: [rows, time, width]

    def select(self, rows: torch.Tensor) -> TrainingRows:
        """Return the rows with these numbers, without columns that are padding in all of them."""
        time = int(self.counted[rows].sum(1).max())
        parts = (self.ids, self.counted, self.top, self.likely, self.hidden, self.streams)
        return TrainingRows(*(None if p is None else p[rows.to(p.device), :time].to(self.ids.device) for p in parts))  # type: ignore[arg-type]

    def slices(self, share: Share = ALONE) -> Iterator[slice]:
        """Yield the rows of a share in order, at most as many tokens per slice as the device takes at a time.

        A step accumulates several slices.
        """
        step = max(1, work_sizes(self.ids.device).training_tokens // self.ids.shape[1])
        own = share.part(len(self.ids))
        return (slice(start, min(start + step, own.stop)) for start in range(own.start, own.stop, step))

    def chunks(self, share: Share = ALONE) -> Iterator[TrainingRows]:
        """Yield the rows of each slice."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        return (self.select(rows[some]) for some in self.slices(share))

    def digest(self) -> str:
        """Return a digest of the tokens and of which of them count."""
        parts = (part.cpu().numpy().tobytes() for part in (self.ids, self.counted))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def rows_of(tokens: TokenSet, device: torch.device) -> TrainingRows:
    """Return all rows of a token set."""
    places = torch.arange(tokens.rows.shape[1])
    return TrainingRows(tokens.rows.to(device), (places < torch.tensor(tokens.lengths)[:, None]).to(device))


def loss_of(student: Any, rows: TrainingRows, loss: str) -> torch.Tensor:
    """Sum the loss over the counted tokens of `rows`: nats; for mse, the squared error over the teacher's square."""
    mask = rows.counted.long()
    if loss == "mse":
        assert rows.hidden is not None
        hidden = student.base_model(rows.ids, attention_mask=mask, use_cache=False)[0][rows.counted].float()
        target = rows.hidden[rows.counted].float()
        error: torch.Tensor = (hidden - target).square().sum(-1) / target.square().sum(-1)
        return error.sum()
    logits = student(rows.ids, attention_mask=mask, use_cache=False).logits
    if loss == "nll":
        seen = rows.counted[:, 1:]
        return F.cross_entropy(logits[:, :-1][seen].float(), rows.ids[:, 1:][seen], reduction="sum")
    assert rows.top is not None
    assert rows.likely is not None
    student_logits = topk_and_rest(logits[rows.counted].float(), rows.top[rows.counted].long())
    return kl(rows.likely[rows.counted], student_logits, rows.ids[rows.counted]).sum()


def token_count(counted: torch.Tensor, loss: str) -> int:
    """Count the tokens that the loss is summed over. `counted`: [rows, time], bool."""
    return int(counted.sum()) - (len(counted) if loss == "nll" else 0)


# -- frozen blocks --------------------------------------------------------------------------------------------------


@contextmanager
def skip_frozen_blocks(
    student: Any, blocks: nn.ModuleList, first: int, outputs: int
) -> Iterator[Callable[[TrainingRows], None]]:
    """Inside, blocks before `first` return the cached stream of the rows given to the yielded function.

    `outputs`: 2 where a block returns a pair.
    """
    streams: list[torch.Tensor] = []

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = streams[0] if streams else hidden_states
        return (x, None) if outputs == 2 else x

    def set_inputs(rows: TrainingRows) -> None:
        streams[:] = [rows.streams] if rows.streams is not None else []

    for block in blocks[:first]:
        block.forward = forward
    try:
        yield set_inputs
    finally:
        for block in blocks[:first]:
            del block.forward


@contextmanager
def gradient_checkpointing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, blocks cache their inputs only, and recompute their activations for the gradients."""
    chosen = list(blocks)
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


class _StopForward(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def cache_frozen_streams(student: Any, blocks: nn.ModuleList, first: int, rows: TrainingRows, share: Share) -> None:
    """Store the streams of all rows before block `first` in `rows.streams`; each process computes its share."""
    if first == 0:
        return
    streams: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForward

    handle = blocks[first].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for some in rows.slices(share):
            with suppress(_StopForward):
                student.base_model(rows.ids[some], attention_mask=rows.counted[some].long(), use_cache=False)
    finally:
        handle.remove()
    rows.streams = share.gather(streams, len(rows.ids))


# -- the loop -------------------------------------------------------------------------------------------------------

SetInputs = Callable[[TrainingRows], None]  # called with the rows of the next forward pass


@dataclass(slots=True)
class _State:
    """Progress of a training, as a checkpoint holds it."""

    step: int
    steps: int
    checks: int
    best: float
    waited: int
    kept: dict[str, torch.Tensor]  # the parameters of the best validation


class Trainer:
    """Trains parameters of one student; another call resumes after a kill.

    Each process of a `share` takes its rows of a step. All take the same step, by the gradients of all rows.
    """

    def __init__(
        self, student: Any, parameters: dict[str, nn.Parameter], options: TrainingOptions, work: Path | None,
        watch: EventListener, *, compute: torch.dtype, save_every: float | None = None,
        share: Share = ALONE,
    ) -> None:  # fmt: skip
        """Prepare the optimizer.

        `parameters`: the trained ones by name, leaves of the student's graph, in float32; `work`: the folder for
        checkpoints; `compute`: float32 or bfloat16, for the passes; `save_every`: seconds (None: SAVE_EVERY).
        """
        self.student, self.parameters, self.options, self.watch = student, parameters, options, watch
        self._share = share
        self._digests: list[str] = []  # of the training and the validation rows
        self._file = None if work is None else work / "training.pt"
        fused = True if work_sizes(student.device).launches_count else None  # one kernel for all parameters
        self._optimizer = torch.optim.AdamW(parameters.values(), lr=options.rate, weight_decay=0.0, fused=fused)
        self._compute, self._save_every = compute, SAVE_EVERY if save_every is None else save_every
        self._dropouts = [m for name, m in student.named_modules() if "lora_dropout" in name]  # peft's
        self._set_dropout(False)

    def _loss(self, rows: TrainingRows) -> torch.Tensor:
        """Sum the loss over `rows`, computed in the model's dtype."""
        with computing_in(self.student, self._compute):
            return loss_of(self.student, rows, self.options.loss)

    def run(self, train: TrainingRows, valid: TrainingRows, set_inputs: SetInputs) -> float:
        """Train, restore the parameters of the best validation, and return its loss per token."""
        self._digests = [rows.digest() for rows in (train, valid)]
        order, saved = self._order(len(train.ids)), self._load()
        state = _State(**saved["state"]) if saved else self._begin(train, valid, set_inputs, order)
        warm_up = max(1, int(WARM_UP * state.steps))
        schedule = transformers.get_cosine_schedule_with_warmup(self._optimizer, warm_up, state.steps)
        if saved:
            self._optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
        interval = max(1, state.steps // state.checks)
        saved_at, pause = time.perf_counter(), self._save_every
        while state.step < state.steps and state.waited < PATIENCE:
            loss = self._step(train, order, state.step, set_inputs)
            schedule.step()
            state.step += 1
            if state.step % interval == 0 or state.step == state.steps:
                self._check(state, valid, set_inputs)
            values: dict[str, EventValue] = {"objective": self.options.loss, "loss": loss, "best": state.best}
            self.watch(Event("recover", state.step, state.steps, values))
            if (start := time.perf_counter()) - saved_at > pause:
                self._save(state, schedule)
                saved_at = time.perf_counter()
                pause = max(self._save_every, SAVING * (saved_at - start)) if self._save_every else 0.0
        self._restore(state.kept)
        return state.best

    def _order(self, rows: int) -> Callable[[int], torch.Tensor]:
        """Return the function from a step to its rows; each epoch takes each row once, in an order of its own."""
        batch = min(self.options.batch, rows)

        def rows_at(step: int) -> torch.Tensor:
            epoch, place = divmod(step, rows // batch)
            draw = torch.Generator().manual_seed(self.options.seed + epoch)
            return torch.randperm(rows, generator=draw)[place * batch : (place + 1) * batch]

        return rows_at

    def _begin(
        self, train: TrainingRows, valid: TrainingRows, set_inputs: SetInputs, order: Callable[[int], torch.Tensor]
    ) -> _State:
        """Validate once, and count the steps: all epochs, or as many as the minutes allow."""
        steps = self.options.epochs * (len(train.ids) // min(self.options.batch, len(train.ids)))
        start = time.perf_counter()
        first = self._validate(valid, set_inputs)
        work = STEP * steps * min(self.options.batch, len(train.ids)) / len(valid.ids)
        seconds, checks = 60 * self.options.minutes, min(CHECKS, max(1, int(CHECKING * work)))
        if seconds:
            check = time.perf_counter() - start
            checks = min(checks, max(1, int(CHECKING * seconds / check)))
            parameters, optimizer = self._copy(), copy.deepcopy(self._optimizer.state_dict())
            start = time.perf_counter()
            for step in range(2):
                self._step(train, order, step, set_inputs)
            step_time = (time.perf_counter() - start) / 2
            self._restore(parameters)
            self._optimizer.load_state_dict(optimizer)
            steps = min(steps, max(1, int((seconds - (checks + 1) * check) / step_time)))
            steps, checks = self._share.of_first((steps, checks))  # whose clock counts
        return _State(0, steps, checks, first, 0, self._copy())

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _restore(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def _step(
        self, train: TrainingRows, order: Callable[[int], torch.Tensor], step: int, set_inputs: SetInputs
    ) -> float:
        """Take one step; return its loss per token."""
        rows, share = order(step).to(train.ids.device), self._share
        total, weight = 0.0, max(1, token_count(train.counted[rows], self.options.loss))
        own = rows[share.part(len(rows))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed + step + OTHER_DROPOUT * share.rank)
            self._set_dropout(True)
            for chunk in train.select(own).chunks() if len(own) else ():
                set_inputs(chunk)
                loss = self._loss(chunk) / weight
                loss.backward()
                total += float(loss.detach())
        self._set_dropout(False)
        total = self._sum_gradients(total)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _sum_gradients(self, loss: float) -> float:
        """Give every process the gradients of all; return the sum of their losses."""
        if self._share.processes == 1:
            return loss
        learning = list(self.parameters.values())
        total, *having = self._share.add([loss, *(float(p.grad is not None) for p in learning)])
        learning = [p for p, some in zip(learning, having, strict=True) if some]  # a parameter of no row has none
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self._share.sum([p.grad for p in learning if p.grad is not None])
        return total

    def _set_dropout(self, on: bool) -> None:
        """Switch peft's dropout on or off; the model's own is off, as in the teacher."""
        for module in self._dropouts:
            module.train(on)

    def _check(self, state: _State, valid: TrainingRows, set_inputs: SetInputs) -> None:
        loss = self._validate(valid, set_inputs)
        state.waited = 0 if loss < state.best else state.waited + 1
        if loss < state.best:
            state.best, state.kept = loss, self._copy()

    @torch.no_grad()
    def _validate(self, valid: TrainingRows, set_inputs: SetInputs) -> float:
        """Return the loss per token of the validation rows."""
        total = 0.0
        for chunk in valid.chunks(self._share):
            set_inputs(chunk)
            total += float(self._loss(chunk))
        return self._share.add([total])[0] / token_count(valid.counted, self.options.loss)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, state: _State, schedule: Any) -> None:
        """Write all that a resumed training needs, aside first; of several processes the first one does."""
        if self._file is None or self._share.rank:
            return
        aside = self._file.with_suffix(".partial")
        checkpoint = {
            "options": asdict(self.options), "rows": self._digests, "now": self._copy(),
            "state": {name: getattr(state, name) for name in _State.__slots__},
            "optimizer": self._optimizer.state_dict(), "schedule": schedule.state_dict(),
        }  # fmt: skip
        torch.save(checkpoint, aside)
        aside.rename(self._file)

    def _load(self) -> dict[str, Any] | None:
        """Return the checkpoint of the same training, with its parameters restored; None without one."""
        if self._file is None or not self._file.is_file():
            return None
        saved: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        same = saved.get("options") == asdict(self.options) and saved.get("rows") == self._digests
        if not same or set(saved["now"]) != set(self.parameters):
            return None
        self._restore(saved["now"])
        return saved
