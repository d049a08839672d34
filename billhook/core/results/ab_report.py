"""Two servers on the same prompts: how they were asked, every answer, and what differs. Plain values; no sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from billhook.core.errors import UsageError
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.measured import Estimate, estimate_columns

Measure = Literal["latency_s", "total_s", "first_token_s", "tokens_per_s"]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How every prompt is asked, of both endpoints alike. `timeout`: seconds for a whole answer, and for each wait."""

    kind: str = "chat"  # or text
    max_tokens: int = 128
    temperature: float = 0.0
    timeout: float = 60.0
    retries: int = 2
    concurrency: int = 1  # pairs at a time
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be asked."""
        if self.kind not in ("chat", "text"):
            raise UsageError(f"There is no kind {self.kind!r}. Use chat (chat/completions) or text (completions).")
        for name, least in (("max_tokens", 1), ("retries", 0), ("concurrency", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} is too small. Give at least {least}.")
        if not 0 < self.timeout < math.inf:
            raise UsageError(
                f"A timeout of {self.timeout} s would never end, or end at once. Give seconds, such as 60."
            )
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"A temperature of {self.temperature} makes no sense. Give 0, or say 0.7.")

    @property
    def longest_s(self) -> float:
        """Seconds that one answer takes at most, all attempts and the waits between them."""
        return (2 * self.retries + 1) * self.timeout


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of one prompt: the text, or what went wrong. Times are those of the last attempt, in seconds."""

    text: str | None = None
    error: str | None = None  # timeout, status, connection or malformed
    detail: str = ""
    code: int = 0  # the HTTP status, where that is the error
    attempts: int = 1
    seconds: float | None = None  # from sending to the end of the answer
    first_s: float | None = None  # from sending to the first piece
    pieces: int = 0
    tokens: int | None = None  # by the server's own count
    total_s: float = 0.0  # with failed attempts and waits


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One server. `answered`: the share of prompts; `errors`: how many of each kind, and what the first of each said.

    `tokens`: of all answers by the server's own count; None where it does not count them.
    """

    url: str
    model: str
    answered: Estimate
    errors: dict[str, int]
    first_errors: dict[str, str]
    retries: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class PairedMeasure:
    """The means of A and of B over the prompts that both answered, and the ratio of B to A, in pairs."""

    name: Measure
    a: Estimate
    b: Estimate
    ratio: Estimate


@dataclass(frozen=True, slots=True)
class Answered:
    """How many prompts both servers answered, only one, and neither; `p`: McNemar's mid-p that they fail alike."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float


@dataclass(frozen=True, slots=True)
class TextAgreement:
    """How alike the answers are: the share of equal ones, and words and characters that are equal at the beginning."""

    same: Estimate
    prefix_words: Estimate
    prefix_characters: Estimate


@dataclass(frozen=True, slots=True)
class PairedAccuracy:
    """Accuracies of A and of B over the items that both scored, and the change from A to B, in pairs."""

    a: Estimate
    b: Estimate
    change: Estimate


@dataclass(frozen=True, slots=True)
class AbTask:
    """Scores by log-probabilities. `not_offered`: what each side that offers none said; `errors`: items it failed."""

    not_offered: dict[str, str]
    items: int
    errors: dict[str, int]
    acc: PairedAccuracy | None
    acc_norm: PairedAccuracy | None


@dataclass(frozen=True, slots=True)
class ItemScores:
    """One side on one item: nats of every choice, or what went wrong."""

    values: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class PromptOutcome:
    """One prompt: which side was asked `first`, both answers, and of an item of a task the scores and the right choice.

    `same`: whether the texts are equal; None where one side failed.
    """

    prompt: int
    first: Literal["a", "b"]
    a: Completion
    b: Completion
    same: bool | None
    scores_a: ItemScores | None = None
    scores_b: ItemScores | None = None
    gold: int | None = None


@dataclass(frozen=True, repr=False)
class AbReport(Result):
    """Two servers on the same prompts. `pairs`: prompts that both answered; `measures`: those that were measured.

    `at_most_seconds`: how long it could have taken, whatever the servers did. `run`: its id in the store; `prompts`:
    the file; empty where there is none.
    """

    kind: ClassVar[str] = "abtest"

    a: EndpointReport
    b: EndpointReport
    measures: tuple[PairedMeasure, ...]
    pairs: int
    tokens_counted_by: Literal["server", "pieces"]
    answered: Answered
    agreement: TextAgreement | None
    task: AbTask | None
    asking: RequestOptions
    at_most_seconds: float
    seconds: float
    outcomes: tuple[PromptOutcome, ...]
    run: str = ""
    prompts: str = ""

    def measure(self, name: Measure) -> PairedMeasure | None:
        """One measure by its name; None where it was not measured."""
        return next((each for each in self.measures if each.name == name), None)

    def __repr__(self) -> str:
        return f"AbReport({self.a.model} against {self.b.model}, {self.pairs} pairs)"

    def rows(self) -> list[JsonObject]:
        """A row for each measure."""
        return [
            {"measure": each.name, **estimate_columns("a", each.a), **estimate_columns("b", each.b),
             **estimate_columns("ratio", each.ratio)}
            for each in self.measures
        ]  # fmt: skip
