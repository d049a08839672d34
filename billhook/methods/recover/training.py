"""One training loop for all recoveries that train: from teacher to student, early stopped, resumable after a kill.

It trains what it is given, on rows of a token set, and keeps the state that was best on validation rows. Nothing is
random but the order of the rows and dropout, both drawn from the seed and the step.
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

AT_A_TIME = 1024  # tokens in a forward pass; more in a step are accumulated
CHECKS = 12  # of the validation rows, in a training; fewer where they would take more than
CHECKING = 0.2  # of the minutes
WARM_UP = 0.05  # of the steps
PATIENCE = 4  # checks without a better one
SAVE_EVERY = 30.0  # seconds between two checkpoints


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How to train. `loss`: nll, kl or mse; `minutes`: no more steps than fit into them, 0 for no limit.

    `checkpointing`: blocks forget what they computed and compute it again for the gradients: a third more time, and
    memory for one block's activations in the place of all blocks'.
    """

    loss: str = "kl"
    rate: float = 1e-3
    epochs: int = 1
    minutes: float = 0.0
    batch: int = 8  # rows a step
    checkpointing: bool = False
    seed: int = 0

    def check(self) -> TrainingOptions:
        """Itself. Raises UsageError."""
        if self.loss not in ("nll", "kl", "mse"):
            raise UsageError(f"loss={self.loss!r} is none of nll, kl and mse.")
        if self.rate <= 0 or self.epochs < 1 or self.batch < 1 or self.minutes < 0:
            raise UsageError("A training needs a rate above 0, 1 epoch and a batch of 1 row at least.")
        return self


@dataclass(slots=True)
class TrainingRows:
    """Rows of a token set, and what the loss has to know of the teacher about them, which may be mapped from files."""

    ids: torch.Tensor  # [rows, time]
    counted: torch.Tensor  # [rows, time], bool
    top: torch.Tensor | None = None  # the teacher's likeliest words: [rows, time, k], int32
    likely: torch.Tensor | None = None  # log-probabilities of these and of all others: [rows, time, k + 1]
    hidden: torch.Tensor | None = None  # what the teacher's head reads: [rows, time, width]
    streams: torch.Tensor | None = None  # before the first block that is trained: [rows, time, width]

    def picked(self, rows: torch.Tensor) -> TrainingRows:
        """Some of them."""
        parts = (self.top, self.likely, self.hidden, self.streams)
        some = (None if part is None else part[rows.to(part.device)].to(self.ids.device) for part in parts)
        longest = int(self.counted[rows].sum(1).max())
        return TrainingRows(self.ids[rows], self.counted[rows], *some).cut(longest)

    def cut(self, time: int) -> TrainingRows:
        """Without what is padding in all of them."""
        parts = (self.top, self.likely, self.hidden, self.streams)
        return TrainingRows(*(None if part is None else part[:, :time] for part in (self.ids, self.counted, *parts)))  # type: ignore[arg-type]

    def slices(self) -> Iterator[slice]:
        """All of them, in order, as many at a time as go through a model together."""
        step = max(1, AT_A_TIME // self.ids.shape[1])
        return (slice(start, min(start + step, len(self.ids))) for start in range(0, len(self.ids), step))

    def portions(self) -> Iterator[TrainingRows]:
        """All of them, as `slices` cuts them."""
        every = torch.arange(len(self.ids), device=self.ids.device)
        return (self.picked(every[some]) for some in self.slices())

    def digest(self) -> str:
        """Which tokens they are, and which of them count."""
        told = (part.cpu().numpy().tobytes() for part in (self.ids, self.counted))
        return hashlib.sha256(b"".join(told)).hexdigest()[:16]


def rows_of(tokens: TokenSet, device: torch.device) -> TrainingRows:
    """All rows of a token set."""
    places = torch.arange(tokens.rows.shape[1])
    return TrainingRows(tokens.rows.to(device), (places < torch.tensor(tokens.lengths)[:, None]).to(device))


def loss_of(student: Any, rows: TrainingRows, loss: str) -> torch.Tensor:
    """Sum of the loss over the counted tokens of some rows: nats; for mse, the squared error over that of the mean."""
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
    mine = topk_and_rest(logits[rows.counted].float(), rows.top[rows.counted].long())
    return kl(rows.likely[rows.counted], mine, rows.ids[rows.counted]).sum()


def token_count(rows: TrainingRows, loss: str) -> int:
    """How many tokens count."""
    return int(rows.counted.sum()) - (len(rows.ids) if loss == "nll" else 0)


# -- blocks that stay as they are -----------------------------------------------------------------------------------


@contextmanager
def skip_frozen_blocks(
    student: Any, blocks: nn.ModuleList, first: int, outputs: int
) -> Iterator[Callable[[TrainingRows], None]]:
    """Inside, blocks before `first` are not computed: what is given before a call is the stream that they give.

    `outputs`: 2 where a block returns a pair.
    """
    held: list[torch.Tensor] = []

    def passing(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = held[0] if held else hidden_states
        return (x, None) if outputs == 2 else x

    def give(rows: TrainingRows) -> None:
        held[:] = [rows.streams] if rows.streams is not None else []

    for block in blocks[:first]:
        block.forward = passing
    try:
        yield give
    finally:
        for block in blocks[:first]:
            del block.forward


@contextmanager
def gradient_checkpointing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, blocks keep their inputs only, and compute the rest again when gradients are asked for."""
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
def cache_frozen_streams(student: Any, blocks: nn.ModuleList, first: int, rows: TrainingRows) -> None:
    """Note the streams of all rows before block `first`."""
    if first == 0:
        return
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForward

    handle = blocks[first].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for some in rows.slices():
            with suppress(_StopForward):
                student.base_model(rows.ids[some], attention_mask=rows.counted[some].long(), use_cache=False)
    finally:
        handle.remove()
    rows.streams = torch.cat(found)


# -- the loop -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _State:
    """What a checkpoint holds."""

    step: int
    steps: int
    checks: int
    best: float
    waited: int
    kept: dict[str, torch.Tensor]  # of the best check


class Trainer:
    """Trains some parameters of one student, and can be called again after a kill."""

    def __init__(
        self,
        student: Any,
        parameters: dict[str, nn.Parameter],
        options: TrainingOptions,
        work: Path | None,
        watch: EventListener,
        *,
        compute: torch.dtype,
    ) -> None:
        """`parameters`: those that are trained, by name, leaves of the student's graph; `work`: for checkpoints.

        `compute`: float32 or bfloat16, for the passes; what learns is in float32 all the same.
        """
        self.student, self.parameters, self.course, self.watch = student, parameters, options, watch
        self._rows: list[str] = []  # digests of what it learns from and of what it is checked on
        self._file = None if work is None else work / "training.pt"
        self._optimizer = torch.optim.AdamW(parameters.values(), lr=options.rate, weight_decay=0.0)
        self._compute = compute
        self._dropouts = [m for name, m in student.named_modules() if "lora_dropout" in name]  # of what peft added
        self._set_dropout(False)

    def _loss(self, rows: TrainingRows) -> torch.Tensor:
        """Sum of the loss over some rows, in the compute dtype of the model."""
        with torch.autocast(self.student.device.type, self._compute, enabled=self._compute != torch.float32):
            return loss_of(self.student, rows, self.course.loss)

    def run(self, train: TrainingRows, valid: TrainingRows, set_inputs: Callable[[TrainingRows], None]) -> float:
        """Train, and leave the parameters as they were when validation was best; returns that loss per token."""
        self._rows = [rows.digest() for rows in (train, valid)]
        order, told = self._order(len(train.ids)), self._begun()
        state = _State(**told["state"]) if told else self._begin(train, valid, set_inputs, order)
        schedule = transformers.get_cosine_schedule_with_warmup(
            self._optimizer, max(1, int(WARM_UP * state.steps)), state.steps
        )
        if told:
            self._optimizer.load_state_dict(told["optimizer"])
            schedule.load_state_dict(told["schedule"])
        every = max(1, state.steps // state.checks)
        saved = time.perf_counter()
        while state.step < state.steps and state.waited < PATIENCE:
            loss = self._step(train, order, state.step, set_inputs)
            schedule.step()
            state.step += 1
            if state.step % every == 0 or state.step == state.steps:
                self._check(state, valid, set_inputs)
            values: dict[str, EventValue] = {
                "objective": self.course.loss,
                "loss": float(loss),
                "best": float(state.best),
            }
            self.watch(Event("recover", state.step, state.steps, values))
            if time.perf_counter() - saved > SAVE_EVERY:
                self._save(state, schedule)
                saved = time.perf_counter()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.kept[name])
        return state.best

    def _order(self, rows: int) -> Callable[[int], torch.Tensor]:
        """The rows of a step: every epoch takes every row once, in an order of its own."""
        batch = min(self.course.batch, rows)

        def of(step: int) -> torch.Tensor:
            epoch, place = divmod(step, rows // batch)
            draw = torch.Generator().manual_seed(self.course.seed + epoch)
            return torch.randperm(rows, generator=draw)[place * batch : (place + 1) * batch]

        return of

    def _begin(
        self,
        train: TrainingRows,
        valid: TrainingRows,
        set_inputs: Callable[[TrainingRows], None],
        order: Callable[[int], torch.Tensor],
    ) -> _State:
        """A first check, and how many steps there are: those of all epochs, or as many as the minutes allow."""
        steps = self.course.epochs * (len(train.ids) // min(self.course.batch, len(train.ids)))
        start = time.perf_counter()
        first = self._validate(valid, set_inputs)
        seconds, checks = 60 * self.course.minutes, CHECKS
        if seconds:
            check = time.perf_counter() - start
            checks = min(CHECKS, max(1, int(CHECKING * seconds / check)))
            stood = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            optimizer = copy.deepcopy(self._optimizer.state_dict())
            start = time.perf_counter()
            for step in range(2):
                self._step(train, order, step, set_inputs)
            one = (time.perf_counter() - start) / 2
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(stood[name])
            self._optimizer.load_state_dict(optimizer)
            steps = min(steps, max(1, int((seconds - (checks + 1) * check) / one)))
        return _State(0, steps, checks, first, 0, self._copy())

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _step(
        self,
        train: TrainingRows,
        order: Callable[[int], torch.Tensor],
        step: int,
        set_inputs: Callable[[TrainingRows], None],
    ) -> float:
        """One step; its loss per token."""
        batch = train.picked(order(step).to(train.ids.device))
        total, weight = 0.0, max(1, token_count(batch, self.course.loss))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.course.seed + step)
            self._set_dropout(True)
            for some in batch.portions():
                set_inputs(some)
                loss = self._loss(some) / weight
                loss.backward()
                total += float(loss.detach())
        self._set_dropout(False)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _set_dropout(self, on: bool) -> None:
        """Let the dropout of what peft added work, or not; that of the model itself rests, as in the teacher."""
        for module in self._dropouts:
            module.train(on)

    def _check(self, state: _State, valid: TrainingRows, set_inputs: Callable[[TrainingRows], None]) -> None:
        found = self._validate(valid, set_inputs)
        state.waited = 0 if found < state.best else state.waited + 1
        if found < state.best:
            state.best, state.kept = found, self._copy()

    @torch.no_grad()
    def _validate(self, valid: TrainingRows, set_inputs: Callable[[TrainingRows], None]) -> float:
        """Loss per token of the validation rows."""
        total = 0.0
        for some in valid.portions():
            set_inputs(some)
            total += float(self._loss(some))
        return total / token_count(valid, self.course.loss)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, state: _State, schedule: Any) -> None:
        """Everything that a killed training needs, aside and then under its name."""
        if self._file is None:
            return
        aside = self._file.with_suffix(".partial")
        told = {
            "course": asdict(self.course),
            "rows": self._rows,
            "state": {name: getattr(state, name) for name in _State.__slots__},
            "now": self._copy(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(told, aside)
        aside.rename(self._file)

    def _begun(self) -> dict[str, Any] | None:
        """What a killed training left, if it was this one; its parameters are put back."""
        if self._file is None or not self._file.is_file():
            return None
        told: dict[str, Any] = torch.load(self._file, map_location="cpu", weights_only=True)
        same = told["course"] == asdict(self.course) and told.get("rows") == self._rows
        if not same or set(told["now"]) != set(self.parameters):
            return None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(told["now"][name])
        return told
