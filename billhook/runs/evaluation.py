"""What a run proves: held-out perplexity in pairs, answers side by side, speed in turn. The store is asked first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from billhook.core.events import Event, EventListener, scaled_events
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult, TimingProtocol
from billhook.core.results.run import Answer, PerplexityChange, SpeedChange, TaskChange
from billhook.core.statistics import exp_capped, paired_difference
from billhook.data.choice_tasks import load_items
from billhook.data.splits import chunks, halves
from billhook.data.token_sets import TokenSet
from billhook.engine.probe import Probe
from billhook.methods.evaluate import EVALUATIONS, speed
from billhook.methods.evaluate.multiple_choice import log_probabilities, score_choices
from billhook.models.device import bandwidth, environment
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply, effective_plan
from billhook.runs.job import EvalContext, RunContext

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


Student = tuple[Plan, Repair]  # a student: what a plan leaves of the teacher, repaired


def perplexity_results(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet
) -> list[EvalResult]:
    """Perplexity of students by a plain forward pass; of a streamed teacher by passes over its file. Stored."""
    of = (teacher.fingerprint, tokens.hash)
    found = [job.store.evaluation(of[0], p, "perplexity", of[1], cache_dtype(teacher, r)) for p, r in students]
    missing = [side for side, known in zip(students, found, strict=True) if known is None]
    if teacher.weights is not None:
        bare = [plan for plan, repair in missing if repair == NO_REPAIR]
        one_pass = dict(zip(bare, streamed_perplexity(teacher, bare, tokens, job.recipe.memory_bytes), strict=True))
    fresh: list[EvalResult] = []
    for plan, repair in missing:
        if teacher.weights is None:
            model = apply(teacher, plan, repair=repair) if plan else teacher.model
            who = "student" if plan else "teacher"
            with nullcontext() if plan else teacher.lock:
                fresh.append(EVALUATIONS["perplexity"](model, tokens, watch=job.watch, who=who))
        elif plan in one_pass and repair == NO_REPAIR:
            fresh.append(one_pass[plan])
        else:
            fresh += streamed_perplexity(teacher, [plan], tokens, job.recipe.memory_bytes, repair)
    for (plan, repair), result in zip(missing, fresh, strict=True):
        job.store.add_evaluation(of[0], plan, cache_dtype(teacher, repair), result, job.run)
    return [fresh.pop(0) if known is None else known for known in found]


def cache_dtype(teacher: Teacher, repair: Repair) -> str:
    """Compute dtype, kind of device, and what a repair changed."""
    return teacher.compute_key if repair == NO_REPAIR else f"{teacher.compute_key}, repaired {repair.key()}"


_NAMES = {"ppl": "perplexity", "pp": "acc"}


def evaluate_plans(
    job: EvalContext, teacher: Teacher, plans: Sequence[Plan], tokens: TokenSet, kind: str
) -> list[EvalResult]:
    """Perplexity (`ppl`) or accuracy (`pp`) of what each plan leaves of a teacher, by the engine; stored."""
    name, dtype = _NAMES[kind], teacher.compute_key
    known = [job.store.evaluation(teacher.fingerprint, p, name, tokens.hash, dtype) for p in plans]
    missing = [p for p, found in zip(plans, known, strict=True) if found is None]
    if missing and kind == "ppl":
        fresh = streamed_perplexity(teacher, missing, tokens, job.recipe.memory_bytes)
    elif missing:
        sums = choice_logprobs(job, teacher, [(plan, NO_REPAIR) for plan in missing], tokens)
        fresh = [score_choices(tokens, of_one)[name] for of_one in sums]
    else:
        fresh = []
    for p, result in zip(missing, fresh, strict=True):
        job.store.add_evaluation(teacher.fingerprint, p, dtype, result, job.run)
    return [fresh.pop(0) if found is None else found for found in known]


def seen_digests(folder: Path) -> list[str]:
    """Digests of documents that the prunings that made the checkpoint in `folder` have looked at."""
    report = folder / "report.json"
    return list(json.loads(report.read_text(encoding="utf-8")).get("seen", ())) if report.is_file() else []


def task_accuracy(job: RunContext, teacher: Teacher, plan: Plan, file: str, repair: Repair = NO_REPAIR) -> TaskChange:
    """Accuracy of teacher and student on those items of a task that no search or choice looks at, and what it lost."""
    tokens = load_items(file, teacher, "evaluation", seed=job.recipe.seed)
    if job.recipe.margin is not None and job.recipe.margin.file == file:
        tokens = halves(tokens)[1]  # the choice was made on the others
    if repair == NO_REPAIR:
        before, after = evaluate_plans(job, teacher, [Plan(), plan], tokens, "pp")
    else:
        (before,) = evaluate_plans(job, teacher, [Plan()], tokens, "pp")
        after = score_choices(tokens, choice_logprobs(job, teacher, [(plan, repair)], tokens)[0])["acc"]
    return TaskChange(file, before.mean, after.mean, paired_difference(before, after, job.recipe.seed))


def choice_logprobs(
    job: EvalContext, teacher: Teacher, students: Sequence[Student], tokens: TokenSet, batch_items: int = BATCH_ITEMS
) -> list[list[float]]:
    """Log-probability in nats of the choice in every row, of each student; `batch_items` items at a time.

    Each portion is filed as soon as it is known, so that an evaluation that was killed goes on behind it. A streamed
    teacher takes all items at once: every portion would read its file again.
    """
    sums: list[list[float]] = [[] for _ in students]
    done = 0
    for portion in chunks(tokens, batch_items if teacher.weights is None else len(tokens.clusters)):
        keys = [{"plan": p.key(), "dtype": cache_dtype(teacher, r), "tokens": portion.hash} for p, r in students]
        known: list[Any] = [job.store.cached(teacher.fingerprint, "choices", key) for key in keys]
        missing = [i for i, found in enumerate(known) if found is None]
        part = replace(job, watch=scaled_events(job.watch, done, tokens.tokens))
        done += portion.tokens
        for i, fresh in zip(
            missing, _batch_logprobs(part, teacher, [students[i] for i in missing], portion), strict=True
        ):
            score_choices(portion, fresh)  # refuses what is not finite
            job.store.remember(teacher.fingerprint, "choices", keys[i], fresh, job.run)
            known[i] = fresh
        for whole, part in zip(sums, known, strict=True):
            whole += part
    return sums


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
            fresh += Probe(teacher, tokens, "task", memory=memory, repaired=(plan, repair)).row_sums(
                [Plan(plan.removed)]
            )
    return fresh


def streamed_perplexity(
    teacher: Teacher, plans: Sequence[Plan], tokens: TokenSet, memory: int | None, repair: Repair | None = None
) -> list[EvalResult]:
    """Perplexity of what each plan leaves of the teacher, by the measuring engine; of one plan under a `repair`."""
    mended = None if repair is None else (plans[0], repair)
    losses = Probe(teacher, tokens, "nll", memory=memory, repaired=mended).losses(plans)
    return [EvalResult("perplexity", tokens.hash, loss.sums, loss.counts, tokens.clusters) for loss in losses]


@undisturbed
@torch.inference_mode()
def sample_answers(teacher: Teacher, student: Any, watch: EventListener) -> tuple[Answer, ...]:
    """What both models make of `PROMPTS`, greedily."""
    tokenizer = teacher.tokenizer
    assert tokenizer is not None, "token_sets refuses a model without one"
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers: dict[str, list[str]] = {"teacher": [], "student": []}
    done, total = 0, 2 * len(PROMPTS)
    for who, model in (("teacher", teacher.model), ("student", student)):
        for prompt in PROMPTS:
            watch(Event("answer", done, total, {"of": who}))
            text = prompt
            chatty = bool(getattr(tokenizer, "chat_template", None))  # the template writes BOS by itself
            if chatty:
                chat = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(
                text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chatty
            ).to(model.device)
            written = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=fill)
            text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers[who].append(text.strip())
            done += 1
            watch(Event("answer", done, total, {"of": who}))
    return tuple(Answer(*each) for each in zip(PROMPTS, answers["teacher"], answers["student"], strict=True))


def compare_speed(job: RunContext, teacher: Teacher, student: Any, variant: Student, aside: Path) -> SpeedChange:
    """Speed of both models, timed in turn; a pair that the store holds for this environment is not timed again."""
    plan, repair = variant
    protocol = TimingProtocol()
    most = speed.max_positions((teacher.model,))
    if most is not None:  # a model of few positions gets a shorter prompt, and the report says how short
        new = min(protocol.new_tokens, most // 2)
        protocol = replace(protocol, new_tokens=new, prompt_tokens=min(protocol.prompt_tokens, most - new))
    where = json.dumps(asdict(environment(str(teacher.device))), sort_keys=True)
    dtype = teacher.compute_key
    shape = "stock" if job.recipe.stock else json.dumps([patch.spec() for _, patch in sorted(repair.patches.items())])
    shape = "" if shape == "[]" else shape
    keys = [
        (teacher.fingerprint, mine.key(), other.key(), where, dtype, json.dumps(asdict(protocol)) + shape)
        for mine, other in ((Plan(), plan), (plan, Plan()))
    ]
    timings = [found for key in keys if (found := job.store.timing(key)) is not None]
    if len(timings) != 2:
        with teacher.lock:
            timings = speed.time_interleaved(
                (teacher.model, student), (teacher.folder, aside), protocol, watch=job.watch
            )
        for key, timing in zip(keys, timings, strict=True):
            job.store.add_timing(key, timing, job.run)
    promised = speed.predicted_speed(teacher.anatomy, effective_plan(teacher, plan, job.recipe.stock))
    pair, model = (timings[0], timings[1]), teacher.model
    reads = partial(_stored_bandwidth, job, teacher)
    gap = speed.explain_gap(pair, teacher.anatomy, promised, model.dtype.itemsize, reads)
    rates = speed.rates(pair[0]), speed.rates(pair[1])
    return SpeedChange(*rates, speed.speed_ratio(*pair), promised, protocol, gap)


def _stored_bandwidth(job: RunContext, teacher: Teacher) -> float:
    """Bytes per second that the device reads, measured once in an environment."""
    where = asdict(environment(str(teacher.device)))
    known = job.store.cached(teacher.fingerprint, "bandwidth", where)
    if known is None:
        known = bandwidth(teacher.model.device)
        job.store.remember(teacher.fingerprint, "bandwidth", where, known, job.run)
    return float(known)
