"""Baselines of models, and of servers, which are asked once what a watch asks them in every round."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, Unpack

from billhook.core.errors import EndpointError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.cache_keys import BaselineKey, EvaluationKey
from billhook.core.options import BaselineOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.registry import OptionValues
from billhook.core.results.ab_report import RequestOptions
from billhook.core.results.comparisons import BASELINE_TEXT, Baseline, BaselineItems, BaselineSet
from billhook.core.results.measured import EvalResult
from billhook.core.results.monitoring import ServedBaseline, TimedPrompt, prompt_digest
from billhook.core.results.specs import BaselineSpec, EvalItems, plain_options
from billhook.models.load import Model
from billhook.report.numbers import printable
from billhook.runs.job import store_and_watch
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE, Store
from billhook.studies.eval_sets import HARNESS, ComparisonSpec, comparison_spec
from billhook.studies.gate import keep_baseline, save_model_baseline
from billhook.studies.run_study import NO_FOLDER, begin_run
from billhook.studies.servers.asking import Questions, read_asked_task, take_request_options
from billhook.studies.servers.endpoint import Endpoint

COMPUTE = "served"  # in the place of a dtype and a device, which a server does not say


@shows_options(BaselineOptions, EvalOptions.model_fields | {each.name: each for each in fields(RequestOptions)})
def save_baseline(
    name: str,
    model: Model = "demo",
    *,
    data: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    served_model: str = "",
    api_key_env: str = "",
    kind: Literal["chat", "text"] = "text",
    max_tokens: int = 32,
    probes: int = 48,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[BaselineOptions],
) -> Baseline:
    """Measure a model and keep what it got under a name, for `gate` and `watch`. A name never changes what it is.

    Arguments:
        name: of the baseline.
        model: a model, or the address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.
        data: texts (default: pydoc); a server is asked tasks alone.
        tasks, items, score, shots, shots_from: as for `compare`.
        served_model, api_key_env, kind, max_tokens: of a server, as for `watch`.
        probes: prompts of a server whose times are kept.

    A server has to answer every request. Raises UsageError before anything is asked, EndpointError where a server does
    not answer; then nothing is stored under the name.
    """
    sets: OptionValues = {"items": items, "shots": shots, "shots_from": shots_from}
    asking = take_request_options(options)
    model_options: Any = options
    if not isinstance(model, str) or "://" not in model:
        if given := [*asking, *(n for n, v in (("served_model", served_model), ("api_key_env", api_key_env)) if v)]:
            raise UsageError(f"{option(given[0])} is about a server. Give its address, or leave it out.")
        sets |= {"data": ("pydoc",) if data is None else data, "tasks": tasks, "score": score}
        return save_model_baseline(name, model, store=store, watch=watch, **sets, **model_options)
    if data:
        raise UsageError(f"A server is asked tasks, and gives no perplexity of a text. Leave {option('data')} out.")
    if probes < 0:
        raise UsageError(f"{option('probes', probes)} is too few. Give 0 or more.")
    ask = RequestOptions(kind, max_tokens, **asking)
    server = Endpoint.create("target", model, served_model, api_key_env)
    own = _items(comparison_spec(data=(), tasks=tasks, score=score, **sets), options)
    _require_free(name, store)
    asked = tuple(read_asked_task(own, source) for source in own.tasks)
    on = EvalItems((), own.tasks, items, shots, shots_from)
    how: OptionValues = {**options, **asdict(ask), "probes": probes, "served_model": served_model}
    spec = BaselineSpec(name, server.url, on, own.scores, plain_options(how | {"api_key_env": api_key_env}))
    with begin_run(spec, "cpu", Path(store), NO_FOLDER) as (opened, run):
        questions = Questions(server, ask, asked, probes, store_and_watch(opened, run, watch))
        kept = _keep(opened, run, _measured(name, own, questions))
        opened.update(run, result=kept.to_json())
        return kept


def _items(spec: ComparisonSpec, options: Mapping[str, object]) -> BaselineItems:
    """The items that a server is asked. Raises UsageError for what it is not asked."""
    if not spec.tasks:
        raise UsageError(f"A server is asked tasks, and none is named. Give {option('tasks', ['a.jsonl'])}.")
    if harness := [task for task in spec.tasks if task.startswith(HARNESS)]:
        raise UsageError(f"{harness[0]} is run by its harness, which asks no server here. Leave it out.")
    if other := [each for each in options if each != "seed"]:
        raise UsageError(f"A server loads its model itself. Leave {option(other[0])} out.")
    spec.check()
    recipe = parse_options(EvalOptions, {"model": "demo", **options})
    text = {field: getattr(recipe, field) for field in BASELINE_TEXT}
    return BaselineItems((), spec.tasks, spec.items, spec.scores, spec.shots, spec.shots_from, **text)


def _require_free(name: str, store: str | Path) -> None:
    """Raise UsageError for a name that stands for something: a server never answers as fast twice."""
    found = find_path(store)
    if found is None:
        return
    with closing(Store(found, read_only=True)) as opened:
        if opened.lookup(BaselineKey("", name)) is not None:
            raise UsageError(
                f"The baseline {name} is stored already, and a baseline does not change. Take another name, such as "
                f"{name}-2."
            )


def _measured(name: str, own: BaselineItems, questions: Questions) -> tuple[Baseline, list[EvalResult]]:
    """Ask a server everything once. Raises EndpointError where a request fails."""
    end, ask, found = questions.endpoint, questions.options, questions.ask()
    if found.errors:
        failed, (kind, detail) = sum(found.errors.values()), next(iter(found.first_errors.items()))
        raise EndpointError(
            f"{failed} of {found.requests} requests to {end.url} failed ({kind}: {printable(detail)}). A baseline "
            f"needs an answer to each, so nothing is stored. Try again, with a longer {option('timeout')} or more "
            f"{option('retries')}."
        )
    results, sets = [], []
    for task in questions.tasks:
        marks = tuple(float(mark) for mark in found.outcomes[task.source])
        results.append(EvalResult(task.score, task.digest, marks, (1,) * len(marks), task.clusters))
        sets.append(BaselineSet(task.source, task.score, task.digest))
    told = json.dumps([end.url, end.model, found.outcomes])
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    pairs = zip(questions.prompts(), found.probes, strict=True)
    times = tuple(TimedPrompt(prompt_digest(text), probe) for text, probe in pairs)
    served = ServedBaseline(end.url, end.model, ask.kind, ask.max_tokens, ask.concurrency, times)
    return Baseline(name, end.url, fingerprint, COMPUTE, own, tuple(sets), served), results


def _keep(store: Store, run: str, measured: tuple[Baseline, list[EvalResult]]) -> Baseline:
    baseline, results = measured
    for result in results:
        key = EvaluationKey(baseline.fingerprint, Plan(), result.name, result.tokens, baseline.compute)
        store.add(key, result, run)
    return keep_baseline(store, run, baseline)
