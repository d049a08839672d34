"""What a server is asked in one round: the items of tasks, and prompts for their time; and what came of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from billhook.core.errors import EndpointError
from billhook.core.events import Event, EventListener
from billhook.core.results.ab_report import Completion, RequestOptions
from billhook.core.results.comparisons import BaselineItems
from billhook.core.results.monitoring import AnsweredProbe, WatchRound
from billhook.data.choice_tasks import Request, requests, select_items
from billhook.data.generation_tasks import is_generation_task, select_questions
from billhook.methods.evaluate.generation import flexible_number, plain_number, strict_number, truncate_at_stop
from billhook.studies.servers.endpoint import Connection, Endpoint, RequestFailed, connect
from billhook.studies.servers.openai_client import (
    choose_model,
    complete,
    endpoint_choice_logprobs,
    prompt_logprobs_support,
    warm_up,
)

T = TypeVar("T")
R = TypeVar("R")
REQUEST_OPTIONS = ("timeout", "retries", "concurrency")
ANSWER_TOKENS = 256  # of a task that is answered in writing
CHOICE_SCORES, WRITTEN_SCORES = ("acc", "acc_norm"), ("strict_match", "flexible_match")


def take_request_options(options: Any) -> dict[str, Any]:
    """Take out of `options`, a mapping by name, those of the requests to a server, and return them."""
    return {name: options.pop(name) for name in REQUEST_OPTIONS if name in options}


@dataclass(frozen=True)
class AskedItem:
    """One item of a task: scored `choices` and which is right, or a `prompt` with the right answer."""

    prompt: str
    choices: tuple[Request, ...] = ()
    gold: int = 0
    target: str = ""


@dataclass(frozen=True)
class AskedTask:
    """A task as a server is asked it: its items, the text that each comes from, and how they are scored."""

    source: str
    score: str
    items: tuple[AskedItem, ...]
    clusters: tuple[int, ...]

    @property
    def digest(self) -> str:
        """A digest of all that is asked."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()[:16]


def read_asked_task(own: BaselineItems, source: str) -> AskedTask:
    """Return the items of a task that a baseline is measured on, in its order; no tokenizer is needed.

    Raises DataError for a file that is no task.
    """
    given = (own.shots_from or source, own.shots) if own.shots else None
    if is_generation_task(source):
        questions, texts, before = select_questions(source, limit_items=own.items, seed=own.seed, shots=given)
        items = tuple(AskedItem(before + question.query, target=question.target) for question in questions)
        return AskedTask(source, _preferred(own.scores, WRITTEN_SCORES), items, tuple(texts))
    chosen, texts, solved = select_items(source, part="evaluation", seed=own.seed, shots=given)
    chosen, texts = chosen[: own.items], texts[: own.items]
    asked = [(tuple(requests(item, solved.get(item.subject, ""))), item.gold) for item in chosen]
    items = tuple(AskedItem(choices[0].context, choices, gold) for choices, gold in asked)
    return AskedTask(source, _preferred(own.scores, CHOICE_SCORES), items, tuple(texts))


def _preferred(names: Sequence[str], scores: Sequence[str]) -> str:
    """The first of `names` that there is, else the first score."""
    return next((name for name in names if name in scores), scores[0])


@dataclass(frozen=True)
class Questions:
    """What a server is asked, and how. `probes`: prompts that are asked for their time."""

    endpoint: Endpoint
    options: RequestOptions
    tasks: tuple[AskedTask, ...]
    probes: int
    watch: EventListener

    def prompts(self) -> list[str]:
        """Return the prompts that are asked for their time."""
        return [item.prompt for task in self.tasks for item in task.items][: self.probes]

    def unreachable(self, error: EndpointError) -> WatchRound:
        """Return a round in which every request failed."""
        count = sum(len(task.items) for task in self.tasks) + len(self.prompts())
        outcomes = {task.source: "-" * len(task.items) for task in self.tasks}
        probes = (AnsweredProbe(None, None),) * len(self.prompts())
        told = {"unreachable": str(error)[:300]}
        return WatchRound(0, 0.0, (), outcomes, probes, count, {"unreachable": count}, told)

    def ask(self) -> WatchRound:
        """Return what came of all requests, without observations. Raises EndpointError where none can be made."""
        return asyncio.run(self._ask())

    async def _ask(self) -> WatchRound:
        async with connect(self.endpoint, self.options) as opened:
            line = await warm_up(await choose_model(opened))
            prompts, failed = self.prompts(), list[RequestFailed]()
            answers = await self._each("time", prompts, lambda text: complete(line, text))
            failed += [RequestFailed(a.error, a.detail) for a in answers if a.error is not None]
            outcomes = {}
            for task in self.tasks:
                marks = await self._task(line, task)
                failed += [mark for mark in marks if isinstance(mark, RequestFailed)]
                outcomes[task.source] = "".join("-" if isinstance(m, RequestFailed) else str(int(m)) for m in marks)
        requested = len(prompts) + sum(len(task.items) for task in self.tasks)
        first_errors = {each.kind: each.detail for each in reversed(failed)}
        errors = dict(sorted(Counter(each.kind for each in failed).items()))
        return WatchRound(0, 0.0, (), outcomes, tuple(map(_probe, answers)), requested, errors, first_errors)

    async def _task(self, line: Connection, task: AskedTask) -> list[bool | RequestFailed]:
        """Whether each item is answered rightly, or why it was not answered. Raises EndpointError without echo."""
        if not task.items[0].choices:
            written = replace(line, options=replace(line.options, max_tokens=ANSWER_TOKENS))

            async def answer(item: AskedItem) -> bool | RequestFailed:
                return _is_right(await complete(written, item.prompt), item.target, task.score)

            return await self._each(task.source, task.items, answer)
        support = await prompt_logprobs_support(line, task.items[0].choices[0])
        if isinstance(support, str):
            raise EndpointError(
                f"{line.endpoint.url} gives no log-probabilities of a prompt ({support}), which {task.source} needs. "
                "Serve the model by vLLM, or ask a task of questions with `target`, which is answered in writing."
            )

        async def score(item: AskedItem) -> bool | RequestFailed:
            sums = await endpoint_choice_logprobs(line, item.choices, support)
            if isinstance(sums, RequestFailed):
                return sums
            sizes = [each.characters if task.score == "acc_norm" else 1 for each in item.choices]
            return max(range(len(sums)), key=lambda i: sums[i] / sizes[i]) == item.gold

        return await self._each(task.source, task.items, score)

    async def _each(self, what: str, items: Sequence[T], ask: Callable[[T], Awaitable[R]]) -> list[R]:
        """What `ask` gives of every item, `concurrency` at a time."""
        gate, done = asyncio.Semaphore(self.options.concurrency), 0

        async def one(item: T) -> R:
            nonlocal done
            async with gate:
                answer = await ask(item)
            done += 1
            self.watch(Event("ask", done, len(items), {"of": what}))
            return answer

        return await asyncio.gather(*map(one, items))


def _is_right(answer: Completion, target: str, score: str) -> bool | RequestFailed:
    if answer.error is not None:
        return RequestFailed(answer.error, answer.detail)
    number = strict_number if score == "strict_match" else flexible_number
    return number(truncate_at_stop(answer.text or "")) == plain_number(target)


def _probe(answer: Completion) -> AnsweredProbe:
    if answer.error is not None or not answer.seconds:
        return AnsweredProbe(None, None)
    count = answer.pieces if answer.tokens is None else answer.tokens
    return AnsweredProbe(answer.seconds, count / answer.seconds if count else None)
