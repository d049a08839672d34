"""What a run proves: held-out perplexity in pairs, answers side by side, speed in turn. The store is asked first."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import billhook
from billhook import speed
from billhook.data import TokenSet
from billhook.evaluate import EVALUATIONS
from billhook.evaluate.choices import outcomes
from billhook.loading import Teacher
from billhook.plan import Plan
from billhook.portions import halves
from billhook.probe import Probe
from billhook.recipe import Recipe
from billhook.records import Environment, EvalResult, Event, Watch
from billhook.speed import Protocol
from billhook.stats import exp, paired_difference
from billhook.store import Store
from billhook.surgery import leaves
from billhook.tasks import items_of

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a gardener who finds an old tool.",
    "Explain in two sentences why the sky is blue.",
)
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Job:
    """What every stage of one run shares."""

    recipe: Recipe
    store: Store
    run: str
    out: Path
    watch: Watch
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage, and tell and file that it began."""
        self.store.add_event(self.run, Event(name))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.store.add_event(self.run, Event(name, 1, 1, f"{self.seconds[name]:.1f} s"))


def environment(device: str) -> Environment:
    """Where numbers of this process are measured."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    return Environment(
        billhook.__version__,
        platform.python_version(),
        torch.__version__,
        transformers.__version__,
        device,
        machine,
        torch.get_num_threads(),
    )


def perplexity(job: Job, teacher: Teacher, student: Any, plan: Plan, tokens: TokenSet) -> dict[str, Any]:
    """Held-out perplexity of teacher and student, and their ratio with its interval over texts.

    Of a streamed teacher both come from one pass over its file, the student as what the plan leaves of it.
    """
    dtype = teacher.compute
    which = (Plan(), plan)
    stored = [job.store.evaluation(teacher.fingerprint, p, "perplexity", tokens.hash, dtype) for p in which]
    missing = [p for p, found in zip(which, stored, strict=True) if found is None]
    if teacher.weights is not None:
        fresh = streamed_perplexity(teacher, missing, tokens, job.recipe.memory_bytes)
    else:
        sides = {Plan(): ("teacher", teacher.model), plan: ("student", student)}
        fresh = [EVALUATIONS["perplexity"](sides[p][1], tokens, watch=job.watch, who=sides[p][0]) for p in missing]
    for p, found in zip(missing, fresh, strict=True):
        job.store.add_evaluation(teacher.fingerprint, p, dtype, found, job.run)
    results = [fresh.pop(0) if found is None else found for found in stored]
    change = paired_difference(results[0], results[1], job.recipe.seed)
    return {
        "teacher": math.exp(results[0].mean),
        "student": exp(results[1].mean),
        "ratio": exp(change.value),
        "ci95": [exp(change.low), exp(change.high)],
        "n": change.n,
        "clusters": change.clusters,
        "reliable": change.reliable,
        "note": change.note,
    }


_NAMES = {"ppl": "perplexity", "pp": "acc"}


def evaluated(job: Job, teacher: Teacher, plans: Sequence[Plan], tokens: TokenSet, kind: str) -> list[EvalResult]:
    """Perplexity (`ppl`) or accuracy (`pp`) of what each plan leaves of a teacher, by the engine; stored."""
    name, dtype = _NAMES[kind], teacher.compute
    known = [job.store.evaluation(teacher.fingerprint, p, name, tokens.hash, dtype) for p in plans]
    missing = [p for p, found in zip(plans, known, strict=True) if found is None]
    if missing and kind == "ppl":
        fresh = streamed_perplexity(teacher, missing, tokens, job.recipe.memory_bytes)
    elif missing:
        sums = Probe(teacher, tokens, "task", memory=job.recipe.memory_bytes).row_sums(missing)
        fresh = [outcomes(tokens, of_one)[name] for of_one in sums]
    else:
        fresh = []
    for p, result in zip(missing, fresh, strict=True):
        job.store.add_evaluation(teacher.fingerprint, p, dtype, result, job.run)
    return [fresh.pop(0) if found is None else found for found in known]


def task(job: Job, teacher: Teacher, plan: Plan, file: str) -> dict[str, Any]:
    """Accuracy of teacher and student on those items of a task that no search or choice looks at, and what it lost."""
    tokens = items_of(file, teacher, "evaluation", seed=job.recipe.seed)
    if job.recipe.margin is not None and job.recipe.margin.file == file:
        tokens = halves(tokens)[1]  # the choice was made on the others
    before, after = evaluated(job, teacher, [Plan(), plan], tokens, "pp")
    change = paired_difference(before, after, job.recipe.seed)
    return {
        "file": file,
        "teacher": before.mean,
        "student": after.mean,
        "change": change.value,
        "ci95": [change.low, change.high],
        "n": change.n,
        "reliable": change.reliable,
        "note": change.note,
    }


def streamed_perplexity(
    teacher: Teacher, plans: Sequence[Plan], tokens: TokenSet, memory: int | None
) -> list[EvalResult]:
    """Perplexity of what each plan leaves of the teacher, by the measuring engine."""
    losses = Probe(teacher, tokens, "nll", memory=memory).losses(plans)
    return [EvalResult("perplexity", tokens.hash, loss.sums, loss.counts, tokens.clusters) for loss in losses]


@torch.inference_mode()
def answers(teacher: Teacher, student: Any, watch: Watch) -> list[dict[str, str]]:
    """What both models make of `PROMPTS`, greedily."""
    tokenizer = teacher.tokenizer
    assert tokenizer is not None, "token_sets refuses a model without one"
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    told = [{"prompt": prompt} for prompt in PROMPTS]
    done = 0
    for who, model in (("teacher", teacher.model), ("student", student)):
        for row in told:
            watch(Event("answer", done, 2 * len(told), who))
            text = row["prompt"]
            chatty = bool(getattr(tokenizer, "chat_template", None))  # the template writes BOS by itself
            if chatty:
                chat = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(
                text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chatty
            ).to(model.device)
            written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=fill)
            row[who] = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            done += 1
            watch(Event("answer", done, 2 * len(told), who))
    return told


def measured_speed(job: Job, teacher: Teacher, student: Any, plan: Plan, aside: Path) -> dict[str, Any]:
    """Speed of both models, timed in turn; a pair that the store holds for this environment is not timed again."""
    protocol = Protocol()
    most = speed.room((teacher.model,))
    if most is not None:  # a model of few positions gets a shorter prompt, and the report says how short
        new = min(protocol.new_tokens, most // 2)
        protocol = replace(protocol, new_tokens=new, prompt_tokens=min(protocol.prompt_tokens, most - new))
    where = json.dumps(asdict(environment(str(teacher.device))), sort_keys=True)
    dtype = teacher.compute
    shape = "stock" if job.recipe.stock else ""
    keys = [
        (teacher.fingerprint, mine.key(), other.key(), where, dtype, json.dumps(asdict(protocol)) + shape)
        for mine, other in ((Plan(), plan), (plan, Plan()))
    ]
    timings = [found for key in keys if (found := job.store.timing(key)) is not None]
    if len(timings) != 2:
        timings = speed.time_in_turn((teacher.model, student), (teacher.folder, aside), protocol, watch=job.watch)
        for key, timing in zip(keys, timings, strict=True):
            job.store.add_timing(key, timing, job.run)
    promised = speed.predicted(teacher.anatomy, leaves(teacher, plan, job.recipe.stock))
    told: dict[str, Any] = {"teacher": speed.rates(timings[0]), "student": speed.rates(timings[1])}
    told |= {"ratio": speed.ratio(*timings), "predicted": promised, "protocol": asdict(protocol)}
    model = teacher.model
    note = speed.what_dominates(timings[0], teacher.anatomy, told, model.device, model.dtype.itemsize)
    return told | {"note": note}
