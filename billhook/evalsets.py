"""What models are compared on: texts, multiple-choice tasks, tasks answered in writing, tasks of lm-evaluation-harness.

A set is read first and looked at for what a search has seen; then a model is tested on it: one outcome an item under
every score that the set knows, filed in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from billhook import harness, proof
from billhook.data import TokenSet
from billhook.errors import ResourceError, UsageError
from billhook.evaluate import evaluate_by_name
from billhook.evaluate.choices import score_choices
from billhook.evaluate.generate import generate_answers, score_answers
from billhook.loading import Teacher
from billhook.plan import Plan
from billhook.portions import chunks, mixed_sets
from billhook.proof import RunContext
from billhook.questions import GenerationPrompts, build_prompts, is_generation_task, read_questions
from billhook.records import EvalResult, scaled_events
from billhook.repair import NO_REPAIR
from billhook.searching import text_spec
from billhook.tasks import FewShot, Split, load_items, read_items, requests

HARNESS = "lmeval:"  # before a task of lm-evaluation-harness
BATCH_QUESTIONS = 50  # answered in writing, filed together
GENERATION_TOKENS = 256  # at most, and no more than half of a model's positions
SetKind = Literal["text", "choices", "written", "harness"]


@dataclass(frozen=True)
class EvalSet:
    """One set: of text and choices their `tokens`, of questions their `prompts`, of the harness a name.

    `limit`, `shots`: at most so many items, and how many solved ones stand before each; of the harness None is its own.
    """

    source: str
    kind: SetKind
    tokens: TokenSet | None = None
    prompts: GenerationPrompts | None = None
    limit: int | None = None
    shots: int | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its documents; none of a task of the harness, which reads them itself."""
        rows = self.tokens if self.prompts is None else self.prompts.tokens
        return () if rows is None else rows.digests

    def describe(self) -> dict[str, Any]:
        """Where it comes from and how much there is."""
        told: dict[str, Any] = {"source": self.source, "kind": self.kind, "shots": self.shots}
        if self.prompts is not None:
            return told | self.prompts.tokens.describe() | {"items": len(self.prompts.targets)}
        return told | ({} if self.tokens is None else self.tokens.describe())


@dataclass(frozen=True)
class SetResult:
    """What one model got on one set: `scores` by name, over the same items, and of each item what it `responses`.

    `responses`: number, query and either choices, gold and `values`, a log-probability a choice; or target and `answer`.
    """

    scores: dict[str, EvalResult]
    responses: Sequence[dict[str, Any]] = field(default=(), repr=False)

    def primary_score(self, names: Sequence[str]) -> EvalResult:
        """The score that verdicts are about: the first of `names` that there is, else the set's first."""
        return self.scores[next((name for name in names if name in self.scores), next(iter(self.scores)))]


def read_text(job: RunContext, teacher: Teacher, source: str) -> EvalSet:
    """The held-out half of a text."""
    wanted = replace(text_spec(job.recipe), data=source, eval_data=None, tokens=16, length=16, self_share=0.0)
    return EvalSet(source, "text", mixed_sets(wanted, teacher.model, teacher.tokenizer, job.watch)[1])


def read_task(
    teacher: Teacher, source: str, *, part: Split | None, items: int | None = None, seed: int = 0, shots: int = 0,
    shots_from: str = "",
) -> EvalSet:  # fmt: skip
    """A task by its name: a file of choices, of which `part` is taken, a file of questions, or `lmeval:NAME`.

    `shots`: so many solved items before each, from the file `shots_from`, or from the task's own. Raises DataError for
    a file that is no task, UsageError for shots of a task of the harness from a file.
    """
    if source.startswith(HARNESS):
        if shots_from:
            raise UsageError(f"{source} brings its own examples. Leave --shots-from out; --shots says how many.")
        return EvalSet(source, "harness", limit=items, shots=shots or None)
    given: FewShot | None = (shots_from or source, shots) if shots else None
    if is_generation_task(source):
        most = getattr(teacher.model.config, "max_position_embeddings", None)
        new = GENERATION_TOKENS if most is None else min(GENERATION_TOKENS, most // 2)
        asking: dict[str, Any] = {"limit_items": items, "seed": seed, "positions": most, "new_tokens": new}
        prompts = build_prompts(source, teacher.tokenizer, shots=given, **asking)
        return EvalSet(source, "written", prompts=prompts, shots=shots)
    tokens = load_items(source, teacher, part, items=items, seed=seed, shots=given)
    return EvalSet(source, "choices", tokens, shots=shots)


def evaluate_set(job: RunContext, teacher: Teacher, eval_set: EvalSet) -> SetResult:
    """A model on a set. What the store holds is not measured again, and what is new is filed in portions.

    Raises ResourceError where a streamed model would have to write, which takes its whole file a token.
    """
    if eval_set.kind == "text":
        assert eval_set.tokens is not None
        return SetResult(
            {"perplexity": proof.perplexity_results(job, teacher, [(Plan(), NO_REPAIR)], eval_set.tokens)[0]}
        )
    if eval_set.kind == "choices":
        assert eval_set.tokens is not None
        told = _choice_result(eval_set, proof.choice_logprobs(job, teacher, [(Plan(), NO_REPAIR)], eval_set.tokens)[0])
    elif teacher.weights is not None:
        raise ResourceError(
            f"{teacher.name} is larger than the memory that is free, so it cannot be tested on {eval_set.source}."
        )
    elif eval_set.kind == "written":
        told = _generation_result(job, teacher, eval_set)
    else:
        with teacher.lock:
            told = SetResult(
                *harness.run_task(job, teacher, eval_set.source.removeprefix(HARNESS), eval_set.limit, eval_set.shots)
            )
    for result in told.scores.values():
        job.store.add_evaluation(teacher.fingerprint, Plan(), teacher.compute_key, result, job.run)
    return told


def named(job: RunContext, teacher: Teacher, of: EvalSet, names: Sequence[str]) -> dict[str, EvalResult]:
    """Evaluations by their names on one set. Raises UsageError for a task of the harness, which has its own scores."""
    eval_set = of.tokens if of.prompts is None else of.prompts
    if eval_set is None:
        raise UsageError(f"{of.source} brings its own scores. Leave --evaluations out.")
    return evaluate_by_name(teacher, eval_set, names, job.recipe.set, watch=job.watch, who=of.source)


def _choice_result(eval_set: EvalSet, sums: Sequence[float]) -> SetResult:
    """Scores and log-probabilities of choices, from those of the rows."""
    assert eval_set.tokens is not None
    items = {item.number: item for item in read_items(eval_set.source)}
    values: list[list[float]] = [[] for _ in eval_set.tokens.clusters]
    for document, value in zip(eval_set.tokens.documents, sums, strict=True):
        values[document].append(value)
    said = []
    for number, mine in zip(eval_set.tokens.clusters, values, strict=True):
        item = items[number]
        said.append({
            "number": number, "query": item.query or requests(item)[0].context, "choices": list(item.choices),
            "gold": item.gold, "values": mine, "characters": [request.characters for request in requests(item)],
        })  # fmt: skip
    return SetResult(score_choices(eval_set.tokens, sums), said)


def _generation_result(job: RunContext, teacher: Teacher, eval_set: EvalSet) -> SetResult:
    """Scores and answers of questions; filed as they are written, PORTION_QUESTIONS at a time."""
    assert eval_set.prompts is not None
    answers: list[str] = []
    whole = eval_set.prompts
    for portion in chunks(whole.tokens, BATCH_QUESTIONS):
        start = len(answers)
        part = replace(whole, tokens=portion, targets=whole.targets[start : start + len(portion.clusters)])
        key = {"plan": Plan().key(), "dtype": teacher.compute_key, "prompts": part.hash}
        fresh = job.store.cached(teacher.fingerprint, "written", key)
        if fresh is None:
            watch = scaled_events(job.watch, start, len(whole.targets))
            with teacher.lock:
                fresh = generate_answers(teacher.model, part, watch=watch, who=eval_set.source)
            job.store.remember(teacher.fingerprint, "written", key, fresh, job.run)
        answers += fresh
    questions = {question.number: question for question in read_questions(eval_set.source)}
    said = [
        {"number": number, "query": questions[number].query, "target": target, "answer": answer}
        for number, target, answer in zip(whole.tokens.clusters, whole.targets, answers, strict=True)
    ]
    return SetResult(score_answers(whole, answers), said)
