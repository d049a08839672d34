"""What a run proves: held-out perplexity in pairs, answers side by side, speed in turn. The store is asked first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import GenerationConfig

from billhook.core.errors import DataError, cannot_write
from billhook.core.events import Event, EventListener, scaled_events
from billhook.core.files.cache_keys import BandwidthKey, ChoicesKey, EvaluationKey, TimingKey
from billhook.core.files.foreign_files import read_json_object, validated
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult, Timing, TimingProtocol
from billhook.core.results.run import Answer, PerplexityChange, SkillChange, SpeedChange, TaskChange
from billhook.core.significance import compare_pair, holm
from billhook.core.statistics import exp_capped, paired_difference
from billhook.data.chat_templates import render_chat
from billhook.data.choice_tasks import load_items
from billhook.data.generated import end_tokens, generating_by
from billhook.data.skills import SkillName
from billhook.data.skills.tokens import skill_tokens
from billhook.data.splits import chunks, halves
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import parse_loss
from billhook.engine.probe import Probe
from billhook.methods.evaluate import speed
from billhook.methods.evaluate.multiple_choice import log_probabilities, right_logprobs, score_choices
from billhook.methods.evaluate.perplexity import Student, measure_perplexity
from billhook.models.device import bandwidth, environment
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply, effective_plan
from billhook.runs.job import EvalContext, RunContext
from billhook.runs.recipe import Recipe

T = TypeVar("T")

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a gardener who finds an old tool.",
    "Explain in two sentences why the sky is blue.",
)
SAMPLE_TOKENS = 64
BATCH_ITEMS = 200  # of a task, filed together


def compare_perplexity(
    job: RunContext, teacher: Teacher, plan: Plan, tokens: TokenSet, repair: Repair = NO_REPAIR
) -> PerplexityChange:
    """Held-out perplexity of teacher and student, and their ratio with its interval over texts."""
    results = perplexity_results(job, teacher, [(Plan(), NO_REPAIR), (plan, repair)], tokens)
    change = paired_difference(results[0], results[1], job.recipe.seed)
    return PerplexityChange(math.exp(results[0].mean), exp_capped(results[1].mean), change.mapped(exp_capped))


def perplexity_results(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet
) -> list[EvalResult]:
    """Perplexity of students, by `measure_perplexity`; stored."""
    keys = [evaluation_key(teacher, plan, "perplexity", tokens, repair) for plan, repair in students]

    def compute(missing: list[int]) -> Iterator[EvalResult]:
        some, memory = [students[i] for i in missing], job.recipe.memory_bytes
        return measure_perplexity(teacher, some, tokens, memory=memory, team=job.team, watch=job.watch)

    return job.store.remember_each(keys, compute, job.run)


def evaluation_key(
    teacher: Teacher, plan: Plan, name: str, tokens: TokenSet, repair: Repair = NO_REPAIR
) -> EvaluationKey:
    """The key of an evaluation of what a plan leaves of a teacher, repaired."""
    return EvaluationKey(teacher.fingerprint, plan, name, tokens.hash, teacher.compute_key, repair_key(repair))


def repair_key(repair: Repair) -> str:
    """The key of a repair; empty for none."""
    return "" if repair == NO_REPAIR else repair.key()


def evaluate_plans(
    job: EvalContext, teacher: Teacher, plans: Sequence[Plan], tokens: TokenSet, kind: str
) -> list[EvalResult]:
    """Perplexity (`ppl`) or accuracy (`pp`) of what each plan leaves of a teacher, by the engine; stored."""
    if kind == "ppl":
        return perplexity_results(job, teacher, [(plan, NO_REPAIR) for plan in plans], tokens)

    def compute(missing: list[int]) -> list[EvalResult]:
        left = [plans[i] for i in missing]
        sums = choice_logprobs(job, teacher, [(plan, NO_REPAIR) for plan in left], tokens)
        return [score_choices(tokens, of_one)["acc"] for of_one in sums]

    keys = [evaluation_key(teacher, plan, "acc", tokens) for plan in plans]
    return job.store.remember_each(keys, compute, job.run)


def seen_digests(folder: Path) -> list[str]:
    """Digests of documents that the prunings that made the checkpoint in `folder` have looked at."""
    report = folder / "report.json"
    if not report.is_file():
        return []
    seen = read_json_object(report, DataError).get("seen", [])
    return validated(list[str], seen, f"The key seen of {report}", DataError)


def task_files(recipe: Recipe) -> list[str]:
    """The tasks that a recipe is about."""
    files = [parse_loss(recipe.loss).file, recipe.margin.file if recipe.margin else None]
    return sorted({file for file in files if file is not None})


def task_accuracy(
    job: RunContext, pair: tuple[Teacher, Teacher], plan: Plan, file: str, repair: Repair = NO_REPAIR
) -> TaskChange:
    """Accuracy before and after on those items of a task that no search or choice looks at, and what was lost.

    `pair`: the model as it was given, and the teacher of the student; the same, or one of other tokens. Raises
    DataError where the two have no positions for the same items.
    """
    given, teacher = pair
    tokens, others = (load_items(file, each, "evaluation", seed=job.recipe.seed) for each in (teacher, given))
    if job.recipe.margin is not None and job.recipe.margin.file == file:
        tokens = halves(tokens)[1]  # the choice was made on the others
    if given is teacher and repair == NO_REPAIR:
        before, after = evaluate_plans(job, teacher, [Plan(), plan], tokens, "pp")
    else:
        sums = _paired_logprobs(job, pair, (plan, repair), (tokens if given is teacher else others, tokens))
        if sums is None:
            raise DataError(f"Some items of {file} have more tokens now than the model has positions.")
        before, after = (score_choices(tokens, of_one)["acc"] for of_one in sums)
    return TaskChange(file, before.mean, after.mean, paired_difference(before, after, job.recipe.seed))


def skills_of(
    job: RunContext, pair: tuple[Teacher, Teacher], plan: Plan, repair: Repair = NO_REPAIR
) -> tuple[SkillChange, ...]:
    """What both models get of `skill_sets`; `pair`: as for `task_accuracy`. Left out are skills of other items."""
    given, teacher = pair
    sets, others = skill_sets(job.recipe, teacher), skill_sets(job.recipe, given)
    found = []
    for skill in [name for name in sets if name in others]:
        sums = _paired_logprobs(job, pair, (plan, repair), (others[skill], sets[skill]))
        found += [(skill, sets[skill], sums)] if sums is not None else []
    return skill_changes(found, job.recipe.seed)


def _paired_logprobs(
    job: RunContext, pair: tuple[Teacher, Teacher], student: Student, items: tuple[TokenSet, TokenSet]
) -> list[list[float]] | None:
    """Log-probabilities of choices by the model as given and by a student of the teacher, each in its own tokens.

    None where their items are not the same.
    """
    (given, teacher), (others, tokens) = pair, items
    if given is teacher:
        return choice_logprobs(job, teacher, [(Plan(), NO_REPAIR), student], tokens)
    numbers = [(each.choices.numbers, each.documents) for each in items if each.choices is not None]
    if numbers[0] != numbers[1]:
        return None
    before = choice_logprobs(replace(job, team=None), given, [(Plan(), NO_REPAIR)], others)  # no worker has it
    return before + choice_logprobs(job, teacher, [student], tokens)


def skill_sets(recipe: Recipe, teacher: Teacher) -> dict[SkillName, TokenSet]:
    """The questions of every skill that a recipe tests, and tokenizer and positions of the model allow."""
    positions = getattr(teacher.model.config, "max_position_embeddings", None)
    made = {
        skill: skill_tokens(skill, teacher.tokenizer, positions=positions, seed=recipe.seed)
        for skill in recipe.tested_skills
    }
    return {skill: tokens for skill, tokens in made.items() if tokens is not None}


def skill_changes(
    tested: Sequence[tuple[SkillName, TokenSet, Sequence[Sequence[float]]]], seed: int
) -> tuple[SkillChange, ...]:  # fmt: skip
    """Skills of two models: each with its items, and the log-probabilities of their choices by both."""
    changes = []
    for skill, tokens, sums in tested:
        before, after = (score_choices(tokens, of_one)["acc"] for of_one in sums)
        nats = [right_logprobs(tokens, of_one) for of_one in sums]
        pair, chance = compare_pair(before, after, seed), len(tokens.clusters) / len(tokens.lengths)
        accuracy = before.mean, after.mean, pair.change, pair.p
        change = paired_difference(nats[0], nats[1], seed)
        changes.append(SkillChange(skill, chance, *accuracy, nats[0].mean, nats[1].mean, change))
    adjusted = holm([each.p for each in changes])
    return tuple(replace(each, p=p) for each, p in zip(changes, adjusted, strict=True))


def choice_logprobs(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet, batch_items: int = BATCH_ITEMS
) -> list[list[float]]:
    """Log-probability in nats of the choice in every row, of each student; `batch_items` items at a time.

    Each batch is stored as soon as it is known, so that an interrupted evaluation resumes after it. A streamed teacher
    takes all items at once: every batch would read its file again.
    """
    sums: list[list[float]] = [[] for _ in students]
    done = 0
    for batch in chunks(tokens, batch_items if teacher.weights is None else len(tokens.clusters)):
        part = replace(job, watch=scaled_events(job.watch, done, tokens.tokens))
        done += batch.tokens
        for whole, values in zip(sums, _stored_logprobs(part, teacher, students, batch), strict=True):
            whole += values
    return sums


def _stored_logprobs(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet
) -> list[list[float]]:
    def compute(missing: list[int]) -> Iterator[list[float]]:
        for values in _batch_logprobs(job, teacher, [students[i] for i in missing], tokens):
            score_choices(tokens, values)  # refuses what is not finite
            yield values

    keys = [
        ChoicesKey(teacher.fingerprint, plan, teacher.compute_key, tokens.hash, repair_key(repair))
        for plan, repair in students
    ]
    return job.store.remember_each(keys, compute, job.run)


def _batch_logprobs(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet
) -> list[list[float]]:
    """In memory student by student, whose choices share their beginnings; streamed, all bare plans in one walk."""
    if teacher.weights is None:
        name = Path(tokens.source).name
        models = [apply(teacher, p, repair=r) if p else teacher.model for p, r in students]
        with teacher.lock:
            return [log_probabilities(model, tokens, watch=job.watch, who=name) for model in models]
    memory = job.recipe.memory_bytes
    bare = [plan for plan, repair in students if repair == NO_REPAIR]
    told = Probe(teacher, tokens, "task", memory=memory).row_sums(bare) if bare else []
    fresh = []
    for plan, repair in students:
        if repair == NO_REPAIR:
            fresh.append(told[bare.index(plan)])
        else:
            fresh += Probe(teacher, tokens, "task", memory=memory, repaired=(plan, repair)).row_sums([plan])
    return fresh


def _padded(lines: Sequence[torch.Tensor], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens [lines, time] of prompts, padded on the left, and the mask of what is no padding."""
    longest = max(map(len, lines))
    ids = torch.stack([F.pad(line, (longest - len(line), 0), value=fill) for line in lines])
    mask = torch.stack([F.pad(torch.ones_like(line), (longest - len(line), 0)) for line in lines])
    return ids, mask


@undisturbed
@torch.inference_mode()
def sample_answers(teacher: Teacher, student: Teacher, watch: EventListener) -> tuple[Answer, ...]:
    """What both models make of `PROMPTS`, greedily, each with its own tokenizer."""
    answers: dict[str, list[str]] = {}
    done, total = 0, 2 * len(PROMPTS)
    for who, side in (("teacher", teacher), ("student", student)):
        model, tokenizer = side.model, side.tokenizer
        assert tokenizer is not None, "token_sets refuses a model without one"
        fill = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        end = end_tokens(model, tokenizer)
        plain = GenerationConfig(max_new_tokens=SAMPLE_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=fill)
        ids, mask = _padded([_chat_prompt(tokenizer, prompt)["input_ids"][0] for prompt in PROMPTS], fill)
        watch(Event("answer", done, total, {"of": who}))
        with generating_by(model, plain):
            written = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
        texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        answers[who] = [text.strip() for text in texts]
        done += len(texts)
        watch(Event("answer", done, total, {"of": who}))
    return tuple(Answer(*each) for each in zip(PROMPTS, answers["teacher"], answers["student"], strict=True))


def _chat_prompt(tokenizer: Any, prompt: str) -> Any:
    """A prompt as the chat template puts it, which writes BOS by itself; bare where there is none, or it fails."""
    text, chatty = prompt, bool(getattr(tokenizer, "chat_template", None))
    if chatty:
        chat = [{"role": "user", "content": prompt}]
        try:
            text = render_chat(tokenizer, chat, add_generation_prompt=True)
        except Exception:  # a template is a program of whoever wrote the checkpoint
            chatty = False
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chatty)


def courtesy(job: RunContext, stage: str, make: Callable[[], T], otherwise: T) -> T:
    """What `make` returns; where it fails, `otherwise` and a note, so that what was found before is not lost."""
    try:
        return make()
    except Exception as error:
        if cannot_write(error):
            raise
        job.watch(
            Event(stage, 1, 1, {"note": f"left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        )
        return otherwise


def compare_speed(
    job: RunContext, pair: tuple[Teacher, Teacher], student: Any, variant: Student, aside: Path
) -> SpeedChange:
    """Speed before and after, timed in turn; a pair that the store holds for this environment is not timed again.

    `pair`: as for `task_accuracy`; `variant`: what the student is of its teacher.
    """
    (given, teacher), (plan, repair) = pair, variant
    protocol = TimingProtocol()
    most = speed.max_positions((teacher.model,))
    if most is not None:  # a model of few positions gets a shorter prompt, and the report says how short
        new = min(protocol.new_tokens, most // 2)
        protocol = replace(protocol, new_tokens=new, prompt_tokens=min(protocol.prompt_tokens, most - new))
    patches = tuple(patch.spec() for _, patch in sorted(repair.patches.items()))
    prints = given.fingerprint, teacher.fingerprint
    models = prints if given is teacher else ("/".join(prints), "/".join(reversed(prints)))
    keys = [
        TimingKey(
            *(name, kept, rival, environment(teacher.place), teacher.compute_key),
            protocol=protocol, patches=patches, stock=job.recipe.stock,
        )
        for name, kept, rival in zip(models, (Plan(), plan), (plan, Plan()), strict=True)
    ]  # fmt: skip

    def measure() -> Sequence[Timing]:
        with given.lock, teacher.lock:
            return speed.time_interleaved((given.model, student), (given.folder, aside), protocol, watch=job.watch)

    timings = job.store.remember_together(keys, measure, job.run)
    promised = speed.predicted_speed(teacher.anatomy, effective_plan(teacher, plan, job.recipe.stock), given.anatomy)
    timed, model = (timings[0], timings[1]), given.model
    reads = partial(_stored_bandwidth, job, given)
    gap = speed.explain_gap(timed, given.anatomy, promised, model.dtype.itemsize, reads)
    rates = speed.rates(timed[0]), speed.rates(timed[1])
    return SpeedChange(*rates, speed.speed_ratio(*timed), promised, protocol, gap)


def _stored_bandwidth(job: RunContext, teacher: Teacher) -> float:
    """Bytes per second that the device reads, measured once in an environment."""
    key = BandwidthKey(teacher.fingerprint, environment(teacher.place))
    return job.store.remember(key, partial(bandwidth, teacher.model.device), job.run)
