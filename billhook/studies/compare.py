"""Compare: models held against the first one over the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch

from billhook.core import significance, statistics
from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.files.cache_keys import ComparedWith, EvaluationKey
from billhook.core.options import CompareOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues
from billhook.core.results.comparisons import (
    Agreement,
    ComparedModel,
    ComparedSet,
    Comparison,
    Flip,
    ItemResponse,
    ModelSpeed,
    PairVerdict,
    SetValue,
    SpeedPair,
)
from billhook.core.results.measured import EvalResult, Timing, TimingProtocol
from billhook.core.results.specs import CompareSpec, EvalItems, plain_options
from billhook.data.token_sets import TokenSet, truncate
from billhook.engine.losses import kl
from billhook.methods.evaluate import batches, speed, vocabulary_size
from billhook.methods.evaluate.runtime_speed import time_artefacts
from billhook.methods.evaluate.served import served_model
from billhook.models.device import environment, to_float64
from billhook.models.load import Model, Teacher, loaded_by_name, name_of
from billhook.runs import require_model
from billhook.runs.job import EvalContext
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE
from billhook.studies.eval_sets import ComparisonSpec, ModelResults, comparison_spec, evaluate_on_sets, seen_sets
from billhook.studies.run_study import open_run, several, write_study

AGREEMENT_TOKENS = 4096  # on which two models are held against each other, word by word


def compare_models(job: EvalContext, models: Sequence[str], spec: ComparisonSpec) -> Comparison:
    """Every model on every set, the others paired with the first."""
    first = evaluate_on_sets(job, models[0], spec)
    compared, pairs, alike, speeds = [first], [], [], []
    for name in models[1:]:
        other = evaluate_on_sets(job, name, spec)
        compared.append(other)
        pairs.append(_verdicts(first, other, spec, job.options.seed))
        alike.append(measure_agreement(job, first, other))
        speeds.append(_compare_speed(job, first.teacher, other.teacher) if spec.timed else None)
        other.teacher = replace(other.teacher, model=None, weights=None)  # its memory is for the next
    return Comparison(
        models=tuple(_about(each.teacher) for each in compared),
        sets=tuple(_compared_set(source, compared, pairs, job.options.seed) for source in first.sets),
        margins=spec.margins,
        agreement=tuple(alike),
        speed=tuple(speeds),
        seen=tuple(seen for each in compared for seen in seen_sets(each.teacher, each.seen)),
        environment=environment(first.teacher.place),
    )


def _about(teacher: Teacher) -> ComparedModel:
    return ComparedModel(teacher.name, teacher.fingerprint, teacher.removed_earlier, teacher.anatomy.sizes())


def _pair(first: ModelResults, other: ModelResults, source: str, seed: int) -> significance.Pair | None:
    """Both on one set; None where their items are not the same, as those of text by two tokenizers."""
    a, b = first.results[source], other.results[source]
    if a.tokens != b.tokens and first.sets[source].kind != "text" and (a.name, a.clusters) == (b.name, b.clusters):
        b = replace(b, tokens=a.tokens)  # the same questions, by another tokenizer
    same = first.teacher.fingerprint == other.teacher.fingerprint
    return significance.compare_pair(a, b, seed, same=same) if (a.tokens, a.counts) == (b.tokens, b.counts) else None


def _verdicts(
    first: ModelResults, other: ModelResults, spec: ComparisonSpec, seed: int
) -> dict[str, PairVerdict | None]:
    """What a model is against the first, set by set, with p adjusted for all of them."""
    pairs = {source: _pair(first, other, source, seed) for source in first.sets}
    known = {source: pair for source, pair in pairs.items() if pair is not None}
    adjusted = significance.holm([pair.p for pair in known.values()])
    verdicts: dict[str, PairVerdict | None] = dict.fromkeys(pairs)
    for (source, pair), p in zip(known.items(), adjusted, strict=True):
        margin = spec.margins.on(source, first.results[source].name)
        word = significance.classify_pair(pair, margin.limit, p)
        more = significance.items_needed(pair, margin.limit) if word == "undecided" else None
        own = pair.change, pair.interval90, pair.p, p, pair.gained, pair.lost
        verdicts[source] = PairVerdict(*own, margin, word, more)
    return verdicts


def _compared_set(
    source: str, models: Sequence[ModelResults], pairs: Sequence[Mapping[str, PairVerdict | None]], seed: int
) -> ComparedSet:
    """One set: the value of every model with its interval, the verdict on every one but the first, and the flips."""
    values = []
    for each in models:
        estimate, scores = statistics.mean_interval(each.results[source], seed), {}
        if each.sets[source].kind == "text":
            estimate = estimate.mapped(statistics.exp_capped)
        else:
            scores = {name: result.mean for name, result in each.tested[source].scores.items()}
        values.append(SetValue(estimate, scores))
    info, result = models[0].sets[source].info(), models[0].results[source]
    flipped = find_flips(source, models) if info.kind != "text" else ()
    verdicts = tuple(of_model[source] for of_model in pairs)
    return ComparedSet(info, result.name, len(result.sums), tuple(values), verdicts, flipped)


# -- how alike two models are -----------------------------------------------------------------------------------------


def measure_agreement(job: EvalContext, first: ModelResults, other: ModelResults) -> Agreement | None:
    """KL of B to A per token, and the share of tokens that both would say next, on the first text; with intervals.

    None where that cannot be had: no text, another tokenizer or width of the head, or a model that is streamed.
    """
    a, b = first.teacher, other.teacher
    text = next((source for source, each in first.sets.items() if each.kind == "text"), None)
    if text is None or a.weights is not None or b.weights is not None:
        return None
    tokens, others = first.sets[text].tokens, other.sets[text].tokens
    assert tokens is not None
    assert others is not None
    if tokens.hash != others.hash or vocabulary_size(a.model) != vocabulary_size(b.model):
        return None
    tokens = truncate(tokens, AGREEMENT_TOKENS)
    names = [ComparedWith(name, a.fingerprint, a.compute_key) for name in ("kl", "agreement")]
    keys = [EvaluationKey(b.fingerprint, Plan(), name, tokens.hash, b.compute_key) for name in names]
    results = job.store.remember_together(keys, partial(_side_by_side, job, (a.model, b.model), tokens), job.run)
    kl_to_first, same = (statistics.mean_interval(each, job.options.seed) for each in results)
    return Agreement(kl_to_first, same, text, sum(results[0].counts))


@torch.inference_mode()
def _side_by_side(job: EvalContext, models: tuple[Any, Any], tokens: TokenSet) -> list[EvalResult]:
    """KL and agreement by document; both models read each row."""
    sums, counts = ([0.0] * len(tokens.clusters), [0.0] * len(tokens.clusters)), [0] * len(tokens.clusters)
    done = 0
    for batch in batches(tokens, models[0]):
        p, q = (model(input_ids=batch.ids, use_cache=False).logits for model in models)
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            first, other, document = p[i, :n].float(), q[i, :n].float(), tokens.documents[row]
            sums[0][document] += float(to_float64(kl(first, other, batch.ids[i, :n])).sum())
            sums[1][document] += float((first.argmax(-1) == other.argmax(-1)).sum())
            counts[document] += n
        done += sum(batch.lengths)
        job.watch(Event("compare", done, tokens.tokens, {"step": "side_by_side"}))
    return [EvalResult("", tokens.hash, tuple(each), tuple(counts), tokens.clusters) for each in sums]


def _compare_speed(job: EvalContext, a: Teacher, b: Teacher) -> SpeedPair | None:
    """Speed of both, timed in turn, and peak memory; None where one is streamed, or they run in different software."""
    served = [served_model(each) for each in (a, b)]
    artefacts = [each.artefact for each in served if each is not None]
    if a.weights is not None or b.weights is not None or len({each and each.artefact.engine for each in served}) > 1:
        return None
    protocol = TimingProtocol()
    most = speed.max_positions((a.model, b.model))
    if most is not None and most < protocol.prompt_tokens + protocol.new_tokens:
        protocol = replace(protocol, prompt_tokens=most // 2, new_tokens=most // 2)
    if artefacts:
        timings = [timing for timing, _ in time_artefacts(artefacts, protocol, watch=job.watch)]
    else:
        timings = speed.time_interleaved((a.model, b.model), (a.folder, b.folder), protocol, watch=job.watch)
    ratio, first, other = speed.speed_ratio(*timings), *map(_model_speed, timings)
    return SpeedPair(first, other, ratio.prefill, ratio.decode, **asdict(protocol))


def _model_speed(timing: Timing) -> ModelSpeed:
    rates = speed.rates(timing)
    return ModelSpeed(rates.prefill_tokens_per_s, rates.decode_tokens_per_s, rates.peak_bytes)


# -- items that flipped -----------------------------------------------------------------------------------------------


def find_flips(task: str, models: Sequence[ModelResults]) -> tuple[Flip, ...]:
    """Items that A and some other model do not answer alike: what each gives to every choice, or what each wrote."""
    flips: list[Flip] = []
    results = [each.results[task] for each in models]
    if not {value for result in results for value in result.sums} <= {0.0, 1.0}:
        return ()  # a score between right and wrong flips nothing
    normed = results[0].name == "acc_norm"
    for d, responses in enumerate(zip(*(each.tested[task].responses for each in models), strict=True)):
        rights = tuple(bool(result.sums[d]) for result in results)
        if len(set(rights)) == 1:
            continue
        item = responses[0]
        if item.choices:
            given = tuple(choice_probabilities(response, normed) for response in responses)
            flips.append(Flip(item.number, item.query, rights, item.choices, item.gold, given))
        else:
            answers = tuple(response.answer for response in responses)
            flips.append(Flip(item.number, item.query, rights, target=item.target, answers=answers))
    return tuple(flips)


def choice_probabilities(response: ItemResponse, normed: bool) -> tuple[float, ...]:
    """What a model gives to the choices of an item, of 1 together; `normed`: by acc_norm, as that counts them."""
    per = response.characters if normed else (1,) * len(response.values)
    values = [value / count for value, count in zip(response.values, per, strict=True)]
    weights = [math.exp(value - max(values)) for value in values]
    return tuple(weight / math.fsum(weights) for weight in weights)


# -- against each other ----------------------------------------------------------------------------------------------


@shows_options(CompareOptions, EvalOptions.model_fields)
def compare(
    *models: Model,
    data: str | Sequence[str] = ("pydoc",),
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    margins: str | Sequence[str] = ("1pp", "3%ppl"),
    timed: bool = True,
    seen: bool = False,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """The first of `models` against each other one, over the same items: verdicts with intervals, and a page.

    `models`: as for `load`, or runs of `store`. `data`: texts, of which the held-out half counts; `tasks`: files of
    multiple-choice items, of which the half counts that no search looks at, files of questions that are answered in
    writing, or lmeval:NAME; `items` of each if given; `score`: that verdicts are about, where a task has it. `shots`:
    solved items before each, from the file `shots_from` if not from the task's own. `margins`: what may be lost and
    still be as good: 1pp of accuracy, 3%ppl of perplexity, 1pp:FILE on one task. `timed`: speed and memory, in turn.
    `seen`: also where a search has seen some of the data. `options`: fields of `Recipe` on text and seed.
    """
    if len(models) < 2:
        raise UsageError("Name two models at least, the one that the others are held against first: compare A B.")
    sets: OptionValues = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen, "timed": timed}
    asked = comparison_spec(data=data, tasks=tasks, score=score, margins=margins, **sets).check()
    recipe = parse_options(EvalOptions, {"model": name_of(models[0]), **options})
    names = [name_of(model) for model in models]
    on = EvalItems(several(data), several(tasks), items, shots, shots_from)
    spec = CompareSpec(
        *(names[0], tuple(names[1:]), on, several(score), several(margins)), timed=timed, seen=seen,
        options=plain_options(options),
    )  # fmt: skip
    for each in set(names[1:]) - loaded_by_name(*models).keys():
        require_model(each, store, served=True)
    with open_run(spec, recipe, Path(store), out, watch, loaded=loaded_by_name(*models)) as job:
        comparison = compare_models(job, names, asked)
        return write_study(comparison, job.out, job.store, job.run)
