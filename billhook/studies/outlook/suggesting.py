"""Suggest: what to try next with a run, by expected gain, and what it brought once it was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from billhook.core.errors import RunError, UsageError, option
from billhook.core.outlook.suggestions import SUGGESTIONS, Found, Idea, Situation, lost_nats
from billhook.core.registry import parse_docstring
from billhook.core.results.json_form import JsonObject, decode
from billhook.core.results.measured import Estimate
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run
from billhook.core.results.suggestions import Suggestion, SuggestionReport
from billhook.runs import STORE
from billhook.runs.recipe import Recipe, in_order, parse_recipe, recipe_names, with_overrides
from billhook.runs.store import Store
from billhook.studies.outlook import ideas
from billhook.studies.outlook.reading import Subject, reading_store, require_pruned, subject_of

assert ideas.__doc__  # importing them registers them
FREE = ("about", "device", "memory", "workers", "audit", "trust_remote_code")  # fields that change no number, or hardly


def suggest(of: str = "", *, store: str | Path = STORE) -> SuggestionReport:
    """Suggest what to try next with a run, the largest expected gain first.

    Arguments:
        of: a pruning of the store that is done, or a model; of a model, and left out, the newest.

    Each has its command, the gain and the time that earlier runs of this store make likely, or the figures of the docs,
    or nothing. Where a later run of the store did what is suggested, it is compared with what was expected. Raises
    RunError where there is no pruning.
    """
    with reading_store(store) as opened:
        if opened is None:
            raise RunError(f"There is no store yet. Prune a model first, with {option('remove', '20%')}.")
        subject = _with_run(subject_of(of, opened), opened)
        told = require_pruned(subject)
        run, nats = subject.run, lost_nats(told)
        assert run is not None
        situation = Situation(run, told, max(0.0, nats or 0.0), subject.history, subject.runs)
        found = [_suggested(name, situation, opened) for name in SUGGESTIONS]
    ranked = sorted((each for each in found if each is not None), key=_rank)
    return SuggestionReport(subject.history.model, run.id, nats, tuple(ranked))


def _with_run(subject: Subject, store: Store) -> Subject:
    """Of a model the newest pruning that is done."""
    if subject.run is not None:
        return subject
    done = (r for r in subject.history.runs if r.kind == PRUNE and r.result is not None and r.state == "done")
    newest = next(done, None)
    return subject if newest is None else replace(subject, run=store.run(newest.id))


def _rank(each: Suggestion) -> tuple[int, float, str]:
    """Gains first, the largest ahead; then what nothing is known of; last what is expected to bring nothing."""
    gain = None if each.gain is None else each.gain.value
    return 1 if gain is None else 0 if gain > 0 else 2, -(gain or 0.0), each.name


def _suggested(name: str, situation: Situation, store: Store) -> Suggestion | None:
    idea = SUGGESTIONS[name](situation)
    if idea is None:
        return None
    if not isinstance(idea, Idea) or bool(idea.changes) == bool(idea.command):
        raise UsageError(f"The suggestion {name} must return an Idea with changes or a command, or None.")
    what = parse_docstring(SUGGESTIONS[name])["summary"]
    if not idea.changes:
        return Suggestion(name, what, idea.command, idea.gain, idea.seconds, dict(idea.facts))
    asked = parse_recipe({**situation.recipe, **idea.changes}, f"The suggestion {name}")
    later = _found(situation, asked)
    if later is not None:  # what was expected before it ran, by the runs until then
        tried = next(run for run in situation.everything if run.id == later.run)
        before = tuple(run for run in situation.everything if run.created < tried.created or run.id == situation.run.id)
        idea = SUGGESTIONS[name](replace(situation, everything=before)) or idea
    return Suggestion(name, what, prune_command(asked), idea.gain, idea.seconds, dict(idea.facts), later)


def prune_command(recipe: Recipe) -> tuple[str, ...]:
    """The shortest command that asks for a recipe: one of ours by name, and what differs from it."""
    asked = recipe.model_dump()
    best: tuple[str, ...] | None = None
    for name, start in _recipes().items():
        differs = {n: v for n, v in asked.items() if n not in ("about", "model") and v != start[n]}
        if name is None:
            differs |= {"search": asked["search"]}  # without which the default recipe would be taken
        typed = _typed(name, recipe.model, differs, start)
        if typed is not None and (best is None or len(typed) < len(best)):
            best = typed
    assert best is not None, "the defaults can be overruled"
    return best


@cache
def _recipes() -> Mapping[str | None, JsonObject]:
    """The fields of each recipe of ours; of None the defaults."""
    names = (None, *recipe_names())
    return {name: parse_recipe(with_overrides(name, remove="1sites")).model_dump() for name in names}


def _typed(name: str | None, model: str, differs: Mapping[str, Any], start: JsonObject) -> tuple[str, ...] | None:
    """The words of a command; None where an option cannot be taken back on the command line."""
    words = ["billhook", "prune", model, *(("--recipe", name) if name else ())]
    for field in in_order(differs):
        flag, value = "--" + field.replace("_", "-"), differs[field]
        if isinstance(value, dict):
            if not start[field].items() <= value.items():
                return None
            for key in value:
                words += [flag, f"{key}={value[key]}"]
        elif isinstance(value, bool):
            if not value:
                return None
            words.append(flag)
        elif value is None:
            if field not in ("remove", "within", "plan"):
                return None
        elif value == "" and start[field]:
            return None
        else:
            words += [flag, str(value)]
    return tuple(words)


def _found(situation: Situation, asked: Recipe) -> Found | None:
    """The newest run that asked for a recipe, against the run of the situation, on the same text."""
    wanted, text = _compared(asked.model_dump()), situation.told["data"]["evaluation"]["hash"]
    for run, told in situation.results():
        if run.id == situation.run.id or not _same(run, situation.run) or _compared(run.spec) != wanted:
            continue
        if told["data"]["evaluation"]["hash"] == text and told.get("perplexity") and situation.told.get("perplexity"):
            return _gained(run, situation.told, told)
    return None


def _same(a: Run, b: Run) -> bool:
    return a.fingerprints.get("model") == b.fingerprints.get("model")


def _compared(spec: Mapping[str, Any]) -> JsonObject:
    kept = {name: value for name, value in {**_recipes()[None], **spec}.items() if name not in FREE}
    kept["recover"] = str(kept["recover"]).replace("?", "")
    kept["set"] = {name: str(value) for name, value in dict(kept["set"]).items()}
    return kept


def _gained(run: Run, before: JsonObject, after: JsonObject) -> Found:
    """The nats that the later run loses less, with the interval of a difference of two separate estimates."""
    old, new = (decode(Estimate, told["perplexity"]["ratio"]) for told in (before, after))
    value = math.log(old.value / new.value)
    halves = [math.log(each.high / each.low) / 2 for each in (old, new) if each.low > 0 and math.isfinite(each.high)]
    half = math.hypot(*halves) if len(halves) == 2 else math.inf
    seconds = sum(float(s) for s in after["seconds"].values())
    return Found(run.id, value, value - half, value + half, seconds)
