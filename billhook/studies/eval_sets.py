"""Evaluation sets, and what models get on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from billhook.core import statistics
from billhook.core.errors import DataError, ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events, scaled_events
from billhook.core.files.cache_keys import AnswersKey, EvaluationKey
from billhook.core.margin import Margins
from billhook.core.options import TaskOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.registry import OptionValues
from billhook.core.results.comparisons import (
    EvalSetInfo,
    ItemResponse,
    SeenSets,
    SetKind,
    TaskScore,
    TaskScores,
)
from billhook.core.results.measured import EvalResult
from billhook.core.results.specs import EvalItems, EvalSpec, plain_options
from billhook.data.choice_tasks import FewShot, Item, Split, load_items, read_items, requests
from billhook.data.generation_tasks import GenerationPrompts, build_prompts, is_generation_task, read_questions
from billhook.data.skills import TASK, with_skills
from billhook.data.skills.tokens import load_skill
from billhook.data.splits import chunks
from billhook.data.token_sets import TokenSet
from billhook.methods.evaluate import evaluate_by_name
from billhook.methods.evaluate.generation import generate_answers, score_answers
from billhook.methods.evaluate.multiple_choice import score_choices
from billhook.methods.evaluate.served import require_here
from billhook.models.device import environment
from billhook.models.load import Model, Teacher, loaded_by_name, name_of
from billhook.models.repair import NO_REPAIR
from billhook.runs import RUN_ID, evaluation
from billhook.runs.job import EvalContext
from billhook.runs.prepare import open_model, read_held_out_half
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE, Store
from billhook.studies import lm_harness
from billhook.studies.run_study import NO_FOLDER, open_run, several

SCORES = ("acc", "acc_norm", "strict_match", "flexible_match")


@dataclass(frozen=True)
class ComparisonSpec:
    """What to compare on. `items`: of each task, all if None; `margins`: what may be lost on each set.

    `scores`: those that the verdicts are about, by preference; `shots`: solved items before each one of a task, from
    `shots_from`, or from the task itself; `timed`: speed and memory too; `seen`: also on data that a search has seen,
    which is marked. `evaluations`: by name, instead of the scores of the tasks, of one model `evaluate_on_tasks`.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    items: int | None = None
    scores: tuple[str, ...] = ("acc",)
    margins: Margins = Margins()  # noqa: RUF009 - an immutable value
    timed: bool = True
    seen: bool = False
    shots: int = 0
    shots_from: str = ""
    evaluations: tuple[str, ...] = ()

    def check(self) -> ComparisonSpec:
        """The spec itself. Raises UsageError where it asks for nothing, or for what there is not."""
        if not self.texts and not self.tasks:
            raise UsageError(
                f"There is nothing to compare on. Give {option('data')}, or {option('tasks', ['a.jsonl', 'b.jsonl'])}."
            )
        if self.shots_from and not self.shots:
            raise UsageError(
                f"{option('shots_from')} says where solved items come from, and {option('shots')} how many. Add "
                f"{option('shots', 5)}."
            )
        if not any(task.startswith(HARNESS) for task in self.tasks):  # whose scores are known once it has run
            for name in self.scores:
                if name not in SCORES:
                    raise UsageError(
                        f"{option('score', name)} is no score of a task. Write one of {', '.join(SCORES)}."
                    )
        if other := [margin for margin in self.margins.files if margin.file not in self.tasks]:
            raise UsageError(
                f"The margin {other[0]} is of a task that is not measured. Measured: {', '.join(self.tasks) or 'none'}."
            )
        return self


@dataclass
class ModelResults:
    """One model and what it got on every set; `results`: the scores that verdicts are about."""

    teacher: Teacher
    sets: dict[str, EvalSet]
    tested: dict[str, SetResult]
    results: dict[str, EvalResult]
    seen: tuple[str, ...]  # sets that a search has seen some of


def resolve_model(name: str, store: Store) -> str:
    """The model that a name means: a stored run stands for its folder."""
    return store.run(name).out if RUN_ID.fullmatch(name) and find_path(name) is None else name


def load_compared(job: EvalContext, name: str) -> Teacher:
    """Load the model that a name means, as the recipe of the run says."""
    model = name if name in job.loaded else resolve_model(name, job.store)
    return open_model(job.options.model_copy(update={"model": model}), job.watch, job.loaded)


def load_eval_sets(
    job: EvalContext, teacher: Teacher, spec: ComparisonSpec, part: Split | None = "evaluation"
) -> dict[str, EvalSet]:
    """Evaluation sets by name: the held-out half of every text, and of every task the half that no search looks at."""
    given: OptionValues = {"items": spec.items, "seed": job.options.seed, "shots": spec.shots}
    given |= {"part": part, "shots_from": spec.shots_from, "watch": job.watch}
    tasks = {task: read_task(teacher, task, **given) for task in spec.tasks}
    return {text: read_text(job, teacher, text) for text in spec.texts} | tasks


def evaluate_on_sets(job: EvalContext, name: str, spec: ComparisonSpec) -> ModelResults:
    """Load one model and evaluate it on everything that is asked for."""
    teacher = load_compared(job, name)
    sets = load_eval_sets(job, teacher, spec)
    seen = contaminated_sets(teacher, sets)
    if seen and not spec.seen:
        raise DataError(
            f"{teacher.name} was pruned, or recovered, on text that is in {' and '.join(seen)} too, so what it is "
            f"compared on would flatter it. Give other text, or add {option('seen', True)}: then every output says so."
        )
    tested = {source: evaluate_set(job, teacher, each) for source, each in sets.items()}
    results = {source: each.primary_score(spec.scores) for source, each in tested.items()}
    return ModelResults(teacher, sets, tested, results, seen)


def evaluate_on_tasks(job: EvalContext, name: str, spec: ComparisonSpec) -> TaskScores:
    """One model on all items of its tasks: every score with its interval over items."""
    teacher = load_compared(job, name)
    sets, scores = load_eval_sets(job, teacher, spec, part=None), []
    for source, eval_set in sets.items():
        names = spec.evaluations
        results = named(job, teacher, eval_set, names) if names else evaluate_set(job, teacher, eval_set).scores
        for score, result in results.items():
            scores.append(TaskScore(source, score, statistics.mean_interval(result, job.options.seed)))
    return TaskScores(
        teacher.name,
        teacher.fingerprint,
        tuple(scores),
        tuple(eval_set.info() for eval_set in sets.values()),
        seen_sets(teacher, contaminated_sets(teacher, sets)),
        environment(teacher.place),
    )


def seen_sets(teacher: Teacher, names: tuple[str, ...]) -> tuple[SeenSets, ...]:
    """The sets of which the pruning of a model has seen some, as a result holds them."""
    return (SeenSets(teacher.name, names),) if names else ()


def contaminated_sets(teacher: Teacher, sets: Mapping[str, EvalSet]) -> tuple[str, ...]:
    """The sets that share a document with what a pruning of this model has looked at."""
    seen = set(evaluation.seen_digests(teacher.folder))
    return tuple(name for name, each in sets.items() if seen & set(each.digests))


@shows_options(TaskOptions, EvalOptions.model_fields)
def evaluate_tasks(
    model: Model = "demo",
    tasks: str | Sequence[str] = (),
    *,
    items: int | None = None,
    shots: int = 0,
    shots_from: str = "",
    evaluations: str | Sequence[str] = (),
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[TaskOptions],
) -> TaskScores:
    """Every score of one model on all items of tasks, or on `items` of each, with 95% intervals over items.

    `tasks`, `shots`: as for `compare`. Answers are stored in batches in `store`: an evaluation that was interrupted
    resumes after the last one. `evaluations`: names of `billhook methods`, instead of all scores. `options`: fields of
    `Recipe` on model, memory and seed, and `set` for the evaluations.
    """
    recipe = parse_options(EvalOptions, {"model": name_of(model), **options})
    asked = comparison_spec(
        data=(), tasks=tasks, items=items, shots=shots, shots_from=shots_from, evaluations=several(evaluations)
    ).check()
    on = EvalItems((), asked.tasks, items, shots, shots_from)
    spec = EvalSpec(name_of(model), on, asked.evaluations, plain_options(options))
    with open_run(spec, recipe, Path(store), NO_FOLDER, watch, loaded=loaded_by_name(model)) as job:
        scores = evaluate_on_tasks(job, name_of(model), asked)
        job.store.update(job.run, result=scores.to_json())
        return scores


def comparison_spec(
    *, data: str | Sequence[str], tasks: str | Sequence[str], score: str | Sequence[str] = "acc",
    margins: str | Sequence[str] = (), **same: Any,
) -> ComparisonSpec:  # fmt: skip
    """What to compare on, from the arguments of a public function. Raises UsageError for a margin."""
    return ComparisonSpec(
        several(data),
        with_skills(several(tasks)),
        scores=several(score),
        margins=Margins.parse(several(margins)),
        **same,
    )


HARNESS = "lmeval:"  # before a task of lm-evaluation-harness
BATCH_QUESTIONS = 50  # answered in writing, stored together
GENERATION_TOKENS = 256  # at most, and no more than half of a model's positions


@dataclass(frozen=True)
class EvalSet:
    """One set: of text and choices their `tokens`, of questions their `prompts`, of the harness a name.

    `items`: those of a skill, which no file holds. `limit`, `shots`: at most so many items, and how many solved ones
    stand before each; of the harness None is its own.
    """

    source: str
    kind: SetKind
    tokens: TokenSet | None = None
    prompts: GenerationPrompts | None = None
    limit: int | None = None
    shots: int | None = None
    items: Sequence[Item] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its documents; none of a task of the harness, which reads them itself."""
        rows = self.tokens if self.prompts is None else self.prompts.tokens
        return () if rows is None else rows.digests

    def info(self) -> EvalSetInfo:
        """Where it comes from and how much there is."""
        if self.prompts is not None:
            tokens = replace(self.prompts.tokens.info(), items=len(self.prompts.targets))
            return EvalSetInfo(self.source, self.kind, self.shots, tokens)
        return EvalSetInfo(self.source, self.kind, self.shots, None if self.tokens is None else self.tokens.info())


@dataclass(frozen=True)
class SetResult:
    """What one model got on one set: `scores` by name, over the same items, and its response to each item of a task."""

    scores: dict[str, EvalResult]
    responses: Sequence[ItemResponse] = field(default=(), repr=False)

    def primary_score(self, names: Sequence[str]) -> EvalResult:
        """The score that verdicts are about: the first of `names` that there is, else the set's first."""
        return self.scores[next((name for name in names if name in self.scores), next(iter(self.scores)))]


def read_text(job: EvalContext, teacher: Teacher, source: str) -> EvalSet:
    """The held-out half of a text."""
    return EvalSet(source, "text", read_held_out_half(job.options, source, teacher, job.watch, seed=job.options.seed))


def read_task(
    teacher: Teacher, source: str, *, part: Split | None, items: int | None = None, seed: int = 0, shots: int = 0,
    shots_from: str = "", watch: EventListener = ignore_events,
) -> EvalSet:  # fmt: skip
    """A task by its name: a file of choices, of which `part` is taken, a file of questions, a skill, or `lmeval:NAME`.

    `shots`: so many solved items before each, from the file `shots_from`, or from the task's own. Raises DataError for
    a file that is no task, UsageError for shots of a task of the harness from a file.
    """
    if source.startswith(TASK):
        tokens, asked = load_skill(source, teacher, items=items, seed=seed)
        return EvalSet(source, "choices", tokens, shots=0, items=asked)
    if source.startswith(HARNESS):
        require_here(teacher, source)
        if shots_from:
            raise UsageError(
                f"{source} brings its own examples. Leave {option('shots_from')} out; {option('shots')} says how many."
            )
        return EvalSet(source, "harness", limit=items, shots=shots or None)
    given: FewShot | None = (shots_from or source, shots) if shots else None
    if is_generation_task(source):
        require_here(teacher, source)
        most = getattr(teacher.model.config, "max_position_embeddings", None)
        new = GENERATION_TOKENS if most is None else min(GENERATION_TOKENS, most // 2)
        asking: OptionValues = {"limit_items": items, "seed": seed, "positions": most, "new_tokens": new}
        prompts = build_prompts(source, teacher.tokenizer, shots=given, watch=watch, **asking)
        return EvalSet(source, "written", prompts=prompts, shots=shots)
    tokens = load_items(source, teacher, part, items=items, seed=seed, shots=given, watch=watch)
    return EvalSet(source, "choices", tokens, shots=shots)


def evaluate_set(job: EvalContext, teacher: Teacher, eval_set: EvalSet) -> SetResult:
    """A model on a set. What the store holds is not measured again, and what is new is stored in batches.

    Raises ResourceError where a streamed model would have to write, which takes its whole file a token.
    """
    if eval_set.kind == "text":
        assert eval_set.tokens is not None
        return SetResult(
            {"perplexity": evaluation.perplexity_results(job, teacher, [(Plan(), NO_REPAIR)], eval_set.tokens)[0]}
        )
    if eval_set.kind == "choices":
        assert eval_set.tokens is not None
        sums = evaluation.choice_logprobs(job, teacher, [(Plan(), NO_REPAIR)], eval_set.tokens)[0]
        found = _choice_result(eval_set, sums)
    elif teacher.weights is not None:
        raise ResourceError(
            f"{teacher.name} is larger than the memory that is free, so it cannot be tested on {eval_set.source}."
        )
    elif eval_set.kind == "written":
        found = _generation_result(job, teacher, eval_set)
    else:
        task = eval_set.source.removeprefix(HARNESS)
        with teacher.lock:
            found = SetResult(*lm_harness.run_task(job, teacher, task, eval_set.limit, eval_set.shots))
    for result in found.scores.values():
        key = EvaluationKey(teacher.fingerprint, Plan(), result.name, result.tokens, teacher.compute_key)
        job.store.add(key, result, job.run)
    return found


def named(job: EvalContext, teacher: Teacher, eval_set: EvalSet, names: Sequence[str]) -> dict[str, EvalResult]:
    """Evaluations by their names on one set. Raises UsageError for a task of the harness, which has its own scores."""
    items = eval_set.tokens if eval_set.prompts is None else eval_set.prompts
    if items is None:
        raise UsageError(f"{eval_set.source} brings its own scores. Leave {option('evaluations')} out.")
    return evaluate_by_name(teacher, items, names, job.options.set, watch=job.watch, who=eval_set.source)


def _choice_result(eval_set: EvalSet, sums: Sequence[float]) -> SetResult:
    """Scores and log-probabilities of choices, from those of the rows."""
    assert eval_set.tokens is not None
    assert eval_set.tokens.choices is not None
    items = {item.number: item for item in eval_set.items or read_items(eval_set.source)}
    values: list[list[float]] = [[] for _ in eval_set.tokens.clusters]
    for document, value in zip(eval_set.tokens.documents, sums, strict=True):
        values[document].append(value)
    responses = []
    for number, nats in zip(eval_set.tokens.choices.numbers, values, strict=True):
        item = items[number]
        asked = requests(item)
        query, sizes = item.query or asked[0].context, tuple(request.characters for request in asked)
        responses.append(ItemResponse(number, query, item.choices, item.gold, tuple(nats), sizes))
    return SetResult(score_choices(eval_set.tokens, sums), responses)


def _generate(teacher: Teacher, prompts: GenerationPrompts, watch: EventListener, source: str) -> list[str]:
    with teacher.lock:
        return generate_answers(teacher.model, prompts, watch=watch, who=source)


def _generation_result(job: EvalContext, teacher: Teacher, eval_set: EvalSet) -> SetResult:
    """Scores and answers of questions; answers are stored in batches of `BATCH_QUESTIONS`."""
    assert eval_set.prompts is not None
    answers: list[str] = []
    whole = eval_set.prompts
    for batch in chunks(whole.tokens, BATCH_QUESTIONS):
        start = len(answers)
        some = slice(start, start + len(batch.clusters))
        part = replace(whole, tokens=batch, targets=whole.targets[some], numbers=whole.numbers[some])
        watch = scaled_events(job.watch, start, len(whole.targets))
        key = AnswersKey(teacher.fingerprint, Plan(), teacher.compute_key, part.hash)
        written = job.store.remember(key, partial(_generate, teacher, part, watch, eval_set.source), job.run)
        answers += written
    questions = {question.number: question for question in read_questions(eval_set.source)}
    responses = [
        ItemResponse(number, questions[number].query, target=target, answer=answer)
        for number, target, answer in zip(whole.numbers, whole.targets, answers, strict=True)
    ]
    return SetResult(score_answers(whole, answers), responses)
