"""Compare: models held against the first one over the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from billhook.core import significance, statistics
from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.core.results.specs import CompareSpec, EvalItems, plain_options
from billhook.core.statistics import reliability_note
from billhook.data.token_sets import TokenSet
from billhook.data.token_sets import truncate as first_of
from billhook.engine.losses import kl
from billhook.methods.evaluate import batches, speed, vocabulary_size
from billhook.methods.evaluate.speed import TimingProtocol
from billhook.models.device import environment, to_float64
from billhook.models.load import Teacher
from billhook.report import compare_page
from billhook.runs.job import RunContext
from billhook.runs.recipe import of_text
from billhook.runs.store import STORE
from billhook.studies.eval_sets import ComparisonSpec, ModelResults, comparison_spec, evaluate_on_sets
from billhook.studies.run_study import open_run, several, write_study

CLOSE_TOKENS = 4096  # on which two models are held against each other, word by word


def compare_models(job: RunContext, models: Sequence[str], spec: ComparisonSpec) -> dict[str, Any]:
    """One table: every model on every set, the others paired with the first."""
    first = evaluate_on_sets(job, models[0], spec)
    sides, pairs, close, times = [first], [], [], []
    for name in models[1:]:
        other = evaluate_on_sets(job, name, spec)
        sides.append(other)
        pairs.append({source: _pair(first, other, source, job.recipe.seed) for source in first.sets})
        close.append(measure_agreement(job, first, other, spec))
        times.append(_compared_speed(job, first.teacher, other.teacher) if spec.timed else None)
        other.teacher = replace(other.teacher, model=None, weights=None)  # its memory is for the next
    verdicts = [_verdicts(first, pair, spec) for pair in pairs]
    return {
        "models": [_about(side) for side in sides],
        "sets": {source: each.describe() for source, each in first.sets.items()},
        "margins": {"points": spec.points, "percent": spec.percent},
        "rows": [_set_row(source, sides, verdicts, job.recipe.seed) for source in first.sets],
        "close": close,
        "speed": times,
        "flips": {task: flips(task, sides) for task in spec.tasks},
        "seen": {side.teacher.name: list(side.seen) for side in sides if side.seen},
        "environment": asdict(environment(str(first.teacher.device))),
    }


def _about(results: ModelResults) -> dict[str, Any]:
    teacher = results.teacher
    sizes = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "removed": teacher.removed_earlier.names(),
        **{size: teacher.anatomy.total(size) for size in sizes},
    }


def _pair(first: ModelResults, other: ModelResults, source: str, seed: int) -> significance.Pair | None:
    """Both on one set; None where their items are not the same, as those of text by two tokenizers."""
    a, b = first.results[source], other.results[source]
    if a.tokens != b.tokens and first.sets[source].kind != "text" and (a.name, a.clusters) == (b.name, b.clusters):
        b = replace(b, tokens=a.tokens)  # the same questions, by another tokenizer
    same = first.teacher.fingerprint == other.teacher.fingerprint
    return significance.compare_pair(a, b, seed, same=same) if (a.tokens, a.counts) == (b.tokens, b.counts) else None


def _verdicts(
    first: ModelResults, pairs: Mapping[str, significance.Pair | None], spec: ComparisonSpec
) -> dict[str, dict[str, Any] | None]:
    """What every pair says, with p adjusted for all of them."""
    known = [source for source, pair in pairs.items() if pair is not None]
    adjusted = dict(zip(known, significance.holm([pairs[s].p for s in known]), strict=True))  # type: ignore[union-attr]
    told: dict[str, dict[str, Any] | None] = dict.fromkeys(pairs)
    for source in known:
        pair = pairs[source]
        assert pair is not None
        limit = spec.limit(first.results[source].name)
        word = significance.classify_pair(pair, limit, adjusted[source])
        told[source] = {
            "change": pair.change.value, "low": pair.change.low, "high": pair.change.high,
            "near_low": pair.interval90.low, "near_high": pair.interval90.high,
            "p": pair.p, "p_holm": adjusted[source], "gained": pair.gained, "lost": pair.lost,
            "limit": limit, "verdict": word, "reliable": pair.change.reliable, "note": reliability_note(pair.change),
            "more": significance.items_needed(pair, limit) if word == "undecided" else None,
        }  # fmt: skip
    return told


def _set_row(
    source: str, models: Sequence[ModelResults], verdicts: Sequence[Mapping[str, dict[str, Any] | None]], seed: int
) -> dict[str, Any]:
    """One set: the value of every model with its interval, and the verdict on every one but the first."""
    values = []
    for side in models:
        spread = statistics.mean_interval(side.results[source], seed)
        text = side.sets[source].kind == "text"
        value, low, high = (statistics.exp_capped(x) if text else x for x in (spread.value, spread.low, spread.high))
        scores = {} if text else {name: result.mean for name, result in side.tested[source].scores.items()}
        values.append({"value": value, "low": low, "high": high, "scores": scores})
    kind = models[0].results[source].name
    n = len(models[0].results[source].sums)
    return {"set": source, "kind": kind, "n": n, "values": values, "pairs": [told[source] for told in verdicts]}


# -- how alike two models are -----------------------------------------------------------------------------------------


def measure_agreement(
    job: RunContext, first: ModelResults, other: ModelResults, spec: ComparisonSpec
) -> dict[str, Any] | None:
    """KL of B to A per token, and the share of tokens that both would say next, on the first text; with intervals.

    None where that cannot be had: no text, another tokenizer or width of the head, or a model that is streamed.
    """
    a, b = first.teacher, other.teacher
    text = next((source for source, each in first.sets.items() if each.kind == "text"), None)
    if text is None or a.weights is not None or b.weights is not None:
        return None
    tokens, theirs = first.sets[text].tokens, other.sets[text].tokens
    assert tokens is not None
    assert theirs is not None
    if tokens.hash != theirs.hash or vocabulary_size(a.model) != vocabulary_size(b.model):
        return None
    tokens = first_of(tokens, CLOSE_TOKENS)
    names = (f"kl to {a.fingerprint} {a.compute_key}", f"agreement with {a.fingerprint} {a.compute_key}")
    found = [job.store.evaluation(b.fingerprint, Plan(), name, tokens.hash, b.compute_key) for name in names]
    if None in found:
        fresh = _side_by_side(job, (a.model, b.model), tokens)
        found = [replace(each, name=name) for each, name in zip(fresh, names, strict=True)]
        for each in found:
            assert each is not None
            job.store.add_evaluation(b.fingerprint, Plan(), b.compute_key, each, job.run)
    told = {}
    for name, each in zip(("kl", "agreement"), found, strict=True):
        assert each is not None
        spread = statistics.mean_interval(each, job.recipe.seed)
        told[name] = {"value": spread.value, "low": spread.low, "high": spread.high}
    return told | {"text": text, "tokens": sum(found[0].counts)}  # type: ignore[union-attr]


@torch.inference_mode()
def _side_by_side(job: RunContext, models: tuple[Any, Any], tokens: TokenSet) -> list[EvalResult]:
    """KL and agreement by document; both models read each row."""
    sums, counts = ([0.0] * len(tokens.clusters), [0.0] * len(tokens.clusters)), [0] * len(tokens.clusters)
    done = 0
    for batch in batches(tokens, vocabulary_size(models[0]), models[0].device):
        p, q = (model(input_ids=batch.ids, use_cache=False).logits for model in models)
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            ours, theirs, document = p[i, :n].float(), q[i, :n].float(), tokens.documents[row]
            sums[0][document] += float(to_float64(kl(ours, theirs, batch.ids[i, :n])).sum())
            sums[1][document] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            counts[document] += n
        done += sum(batch.lengths)
        job.watch(Event("compare", done, tokens.tokens, "side by side"))
    return [EvalResult("", tokens.hash, tuple(each), tuple(counts), tokens.clusters) for each in sums]


def _compared_speed(job: RunContext, a: Teacher, b: Teacher) -> dict[str, Any] | None:
    """Speed of both, timed in turn, and peak memory; None where one is streamed."""
    if a.weights is not None or b.weights is not None:
        return None
    protocol = TimingProtocol()
    most = speed.max_positions((a.model, b.model))
    if most is not None and most < protocol.prompt_tokens + protocol.new_tokens:
        protocol = replace(protocol, prompt_tokens=most // 2, new_tokens=most // 2)
    timings = speed.time_interleaved((a.model, b.model), (a.folder, b.folder), protocol, watch=job.watch)
    rates = [speed.rates(timing) for timing in timings]
    return {"models": rates, "ratio": speed.speed_ratio(*timings), "protocol": asdict(protocol)}


# -- items that flipped -----------------------------------------------------------------------------------------------


def flips(task: str, models: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """Items that A and some other model do not answer alike: what each gives to every choice, or what each wrote."""
    told: list[dict[str, Any]] = []
    results = [side.results[task] for side in models]
    if not {value for result in results for value in result.sums} <= {0.0, 1.0}:
        return told  # a score between right and wrong flips nothing
    for d, of in enumerate(zip(*(side.tested[task].responses for side in models), strict=True)):
        rights = [bool(result.sums[d]) for result in results]
        if len(set(rights)) == 1:
            continue
        item = {key: of[0][key] for key in ("number", "query", "choices", "gold", "target") if key in of[0]}
        if "choices" in item:
            normed = results[0].name == "acc_norm"
            given: dict[str, Any] = {"probabilities": [choice_probabilities(mine, normed) for mine in of]}
        else:
            given = {"answers": [mine["answer"] for mine in of]}
        told.append(item | {"right": rights} | given)
    return told


def choice_probabilities(said: Mapping[str, Any], normed: bool) -> list[float]:
    """What a model gives to the choices of an item, of 1 together; `normed`: by acc_norm, as that counts them."""
    per = said["characters"] if normed else (1,) * len(said["values"])
    values = [value / count for value, count in zip(said["values"], per, strict=True)]
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


# -- against each other ----------------------------------------------------------------------------------------------


def compare(
    *models: str | Path,
    data: str | Sequence[str] = ("pydoc",),
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    margins: tuple[str, str] = ("1pp", "3%"),
    timed: bool = True,
    seen: bool = False,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """The first of `models` against each other one, over the same items: verdicts with intervals, and a page.

    `models`: as for `load`, or runs of `store`. `data`: texts, of which the held-out half counts; `tasks`: files of
    multiple-choice items, of which the half counts that no search looks at, files of questions that are answered in
    writing, or lmeval:NAME; `items` of each if given; `score`: that verdicts are about, where a task has it. `shots`:
    solved items before each, from the file `shots_from` if not from the task's own. `margins`: how much less accuracy,
    and how much more perplexity, is as good. `timed`: speed and memory, in turn. `seen`: also where a search has seen
    some of the data. `options`: fields of `Recipe` on text and seed.
    """
    if len(models) < 2:
        raise UsageError("Name two models at least, the one that the others are held against first: compare A B.")
    sets: dict[str, Any] = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen, "timed": timed}
    asked = comparison_spec(data=data, tasks=tasks, score=score, margins=margins, **sets).check()
    recipe = of_text(str(models[0]), options)
    names = [str(name) for name in models]
    on = EvalItems(several(data), several(tasks), items, shots, shots_from)
    spec = CompareSpec(
        *(names[0], tuple(names[1:]), on, several(score), margins), timed=timed, seen=seen,
        options=plain_options(options),
    )  # fmt: skip
    with open_run(spec, recipe, Path(store), out, watch) as job:
        told = compare_models(job, names, asked)
        return write_study(told, job.out, compare_page.comparison_page, job.store, job.run)
