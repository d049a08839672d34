"""A model in the runtime that serves it, under the name `ENGINE:FILE`: what users get is what is evaluated."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from billhook.core.anatomy import Anatomy, Unassigned
from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.data.token_sets import TokenSet
from billhook.models.load import Teacher
from billhook.runtimes import Served
from billhook.runtimes.artefacts import Artefact, count_parameters, find_artefact, read_positions, run_folder

LEAST_CONTEXT = 512  # tokens that a runtime is opened for


class ServedModel:
    """An artefact as evaluations call a model: token ids in, log-probabilities out.

    The runtime is opened when it is first asked, anew for a row that is longer than it has room for, and ends with this
    object. It chooses device and dtype itself; its answers are float32.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self.config = SimpleNamespace(model_type=artefact.engine, **read_positions(artefact.path))
        self._room = 0
        self._served: Served | None = None
        self._vocabulary = 0

    def opened(self, tokens: int = LEAST_CONTEXT) -> Served:
        """Return the runtime, with room for so many tokens."""
        if self._served is None or tokens > self._room:
            if self._served is not None:
                self._served.close()
            self._room = max(LEAST_CONTEXT, 1 << (tokens - 1).bit_length())
            self._served = open_runtime(self.artefact, self._room)
            weakref.finalize(self, self._served.close)
        return self._served

    @property
    def vocabulary_size(self) -> int:
        """The number of log-probabilities per token."""
        if not self._vocabulary:
            self._vocabulary = count_vocabulary(self.opened())
        return self._vocabulary

    def get_output_embeddings(self) -> nn.Linear:
        """Return a head without weights, of which evaluations read the number of rows."""
        return nn.Linear(1, self.vocabulary_size, bias=False, device="meta")

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return `logits` [rows, time, vocabulary]: log-probabilities, which are logits of the same probabilities."""
        served = self.opened(input_ids.shape[1])
        rows = [torch.from_numpy(served.logprobs(row)) for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(rows).to(input_ids.device))

    def choice_logprobs(self, tokens: TokenSet, watch: EventListener, who: str) -> list[float]:
        """Return the log-probability in nats of each row's choice, given its context; a pass per row."""
        assert tokens.choices is not None
        sums, done = [], 0
        for row, count, first in zip(tokens.rows.tolist(), tokens.lengths, tokens.choices.first, strict=True):
            nats = self.opened(count).logprobs(row[: count - 1])
            sums.append(math.fsum(float(nats[at - 1, row[at]]) for at in range(first, count)))
            done += count
            watch(Event("evaluate", done, tokens.tokens, {"of": who}))
        return sums


class ServedTokenizer:
    """The tokenizer of a model in its runtime, as far as texts and items need one."""

    chat_template = None
    eos_token_id = None

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    @property
    def bos_token_id(self) -> int | None:
        """What begins a text, where the runtime puts anything there."""
        return next(iter(self._prefix()), None)

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, verbose: bool = False
    ) -> Mapping[str, Any]:
        """Return `input_ids` of a text, or of each of several, with what the runtime puts before them or without."""
        skipped = 0 if add_special_tokens else len(self._prefix())
        tokenize = self._model.opened().tokenize
        if isinstance(text, str):
            return {"input_ids": tokenize(text)[skipped:]}
        return {"input_ids": [tokenize(each)[skipped:] for each in text]}

    def _prefix(self) -> list[int]:
        return self._model.opened().tokenize("")


def load_served(name: str, watch: EventListener = ignore_events) -> Teacher:
    """Return an artefact as a teacher that can be evaluated: without blocks, and nothing that looks into them.

    Its sizes are those of the files, as far as these say them; what they do not say is 0. Raises as `find_artefact`,
    and RuntimeFailed where the runtime does not take it.
    """
    watch(Event("load", values={"model": name}))
    artefact = find_artefact(name)
    model = ServedModel(artefact)
    model.opened()
    rest = Unassigned(count_parameters(artefact.path), artefact.bytes, 0)
    watch(Event("load", 1, 1, values={"model": name}))
    return Teacher(
        model, ServedTokenizer(model), name, run_folder(artefact.path), torch.float32,
        Anatomy(artefact.engine, 0, (), rest), (), Plan(), artefact.identity,
    )  # fmt: skip


def served_model(teacher: Teacher) -> ServedModel | None:
    """Return the model of a teacher that runs in a runtime; None for one that runs here."""
    return teacher.model if isinstance(teacher.model, ServedModel) else None


def require_here(teacher: Teacher, what: str) -> None:
    """Raise UsageError where a model runs in a runtime, for what needs it here."""
    if (model := served_model(teacher)) is not None:
        raise UsageError(
            f"{teacher.name} runs in {model.artefact.engine}, where text and items of choices are measured, and {what} "
            "is neither. Leave it out, or name the checkpoint that was exported."
        )


def open_runtime(artefact: Artefact, room: int) -> Served:
    """Return the runtime of an artefact, with room for so many tokens, on as many threads as torch has."""
    return Served(artefact.engine, artefact.path, context=room, threads=torch.get_num_threads())


def count_vocabulary(served: Served) -> int:
    """Return the number of log-probabilities per token."""
    return int(served.logprobs([0]).shape[1])
