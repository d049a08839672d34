"""A server, or a folder, over time: every so often it is held against a baseline, and rules say what is an alert."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Literal, Protocol, Unpack

from billhook.core.errors import FingerprintError, UsageError, either, option
from billhook.core.events import Event, EventListener, EventValue, ignore_events
from billhook.core.files.cache_keys import WatchRoundKey
from billhook.core.monitoring.alerts import Alert, Observation, Rule, evaluate, new_alerts
from billhook.core.monitoring.rules import parse_seconds
from billhook.core.monitoring.sequential import ALPHA
from billhook.core.options import WatchOptions, shows_options
from billhook.core.results.ab_report import RequestOptions
from billhook.core.results.comparisons import Baseline
from billhook.core.results.monitoring import ServedBaseline, WatchResult, WatchRound
from billhook.core.results.specs import ServerSpec, WatchSpec
from billhook.runs import load_baseline
from billhook.runs.job import store_and_watch
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE, Store
from billhook.studies.eval_sets import HARNESS, ComparisonSpec
from billhook.studies.gate import baseline_result, spec_of_baseline
from billhook.studies.monitoring.alerting import Alarm, RulesFile, call_webhook, tell_alerts
from billhook.studies.run_study import NO_FOLDER, begin_run, open_run, several
from billhook.studies.servers.asking import Questions, take_request_options
from billhook.studies.servers.endpoint import Endpoint
from billhook.studies.servers.watch_rounds import EndpointRounds, FolderRounds, WatchTask, read_watch_task

SHOWN_ROUNDS = 500  # whose observations a result holds; the store holds those of all


class Rounds(Protocol):
    """What is evaluated each round. `series`: a digest of what makes two rounds comparable."""

    @property
    def series(self) -> str: ...

    def measure(self, number: int, first: WatchRound | None) -> WatchRound:
        """Return round `number` of a series whose first round is `first`."""
        ...


@shows_options(WatchOptions, EvalOptions.model_fields | {each.name: each for each in fields(RequestOptions)})
def watch(
    target: str,
    baseline: str,
    *,
    tasks: str | Sequence[str] = (),
    every: str = "1h",
    rounds: int | None = None,
    rules: RulesFile = None,
    webhook: str | None = None,
    model: str = "",
    api_key_env: str = "",
    kind: Literal["chat", "text"] = "text",
    max_tokens: int = 32,
    probes: int = 48,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[WatchOptions],
) -> WatchResult:
    """Hold a server or a folder against a stored baseline, again and again: quality, latency, throughput, errors.

    Arguments:
        target: the address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, or a folder.
        baseline: the name under which `save_baseline` stored what a model got.
        tasks: those of the baseline that are asked (default: all; a server is asked tasks alone).
        every: time between the beginnings of two rounds, such as 1h, 30min or 10s.
        rounds: how many; None: until it is interrupted.
        rules: a YAML file of rules (default: those of Billhook for watches).
        webhook: an http or https address to which alerts are sent; its failure never ends a watch.
        model, api_key_env, kind, max_tokens: of a server, as for `ab_test`.
        probes: prompts that are asked each round for their time.

    Every round is stored when it ends; a watch that starts again goes on in the same series. Ends of intervals hold
    over all rounds at once: a series without change raises an alert with a chance of 1% at most. Raises UsageError,
    EndpointError before the first round, FingerprintError where the items are not those of the baseline.
    """
    ask = RequestOptions(kind, max_tokens, **take_request_options(options))
    server = Endpoint.create("target", target, model, api_key_env) if "://" in target else None
    place = target if server is None else server.url
    served = None if server is None else ServerSpec(server.url, model, api_key_env)
    requests = {} if server is None else asdict(ask)
    seconds = parse_seconds(every, "every")
    spec = WatchSpec(place, baseline, several(tasks), seconds, rounds, str(rules or ""), probes, served, requests)
    pace = Pace.read(spec, rules, webhook)
    kept = _stored(baseline, store)
    _require_times(pace.alarm.rules, kept)
    if server is None:
        recipe = parse_options(EvalOptions, {"model": target, **options, **kept.items.text_fields()})
        with open_run(spec, recipe, Path(store), NO_FOLDER, watch) as job:
            found = FolderRounds(job, target, kept, _sets(kept, spec.tasks))
            return _keep_watch(Series(job.store, job.run, watch, spec, found), pace)
    if options:
        raise UsageError(f"A server loads its model itself. Leave {option(next(iter(options)))} out.")
    known = _tasks(kept, spec.tasks, store)
    _require_comparable(kept.served, ask)
    with begin_run(spec, "cpu", Path(store), "") as (opened, run):
        told = store_and_watch(opened, run, watch)
        questions = Questions(server, ask, tuple(task.asked for task in known), probes, told)
        return _keep_watch(Series(opened, run, watch, spec, EndpointRounds(questions, known, kept.served)), pace)


# -- what is asked ---------------------------------------------------------------------------------------------------


def _stored(name: str, store: str | Path) -> Baseline:
    """The baseline of a name. Raises UsageError with the command that saves one."""
    with closing(Store(Path(store), read_only=True)) as opened:
        found = load_baseline(opened, name)
    if found is None:
        example = either(f"billhook.save_baseline({name!r}, MODEL, tasks=…)", f"billhook baseline save {name} MODEL")
        raise UsageError(f"The store {store} holds no baseline {name!r}. Save one first: {example}")
    return found


def _chosen(baseline: Baseline, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks that are watched. Raises UsageError for one that the baseline was not measured on."""
    for task in tasks:
        if task not in baseline.items.tasks:
            raise UsageError(
                f"The baseline {baseline.name} was not measured on {task}. Measured: "
                f"{', '.join(baseline.items.tasks) or 'no task'}."
            )
    return tuple(tasks) or baseline.items.tasks


def _sets(baseline: Baseline, tasks: Sequence[str]) -> ComparisonSpec:
    """The sets on which a folder is evaluated: those of the baseline, or the named tasks alone."""
    whole = spec_of_baseline(baseline, ComparisonSpec(()))
    return replace(whole, texts=() if tasks else whole.texts, tasks=_chosen(baseline, tasks)).check()


def _tasks(baseline: Baseline, tasks: Sequence[str], store: str | Path) -> tuple[WatchTask, ...]:
    """The tasks on which a server is evaluated, with what the baseline got on each item."""
    chosen, sets = _chosen(baseline, tasks), {each.source: each for each in baseline.sets}
    if not chosen:
        raise UsageError(
            f"The baseline {baseline.name} has texts alone, and a server is asked tasks. Save one with "
            f"{option('tasks', ['FILE'])}."
        )
    found = []
    with closing(Store(Path(store), read_only=True)) as opened:
        for source in chosen:
            if source.startswith(HARNESS):
                raise UsageError(f"{source} is run by its harness, which a watch of a server has not. Leave it out.")
            about = sets[source]
            result = baseline_result(opened, baseline, about.score, about.tokens)
            if result is None:
                raise FingerprintError(f"The store {store} does not hold what {baseline.name} got. Save it again.")
            found.append(read_watch_task(baseline, source, result))
    return tuple(found)


def _require_comparable(served: ServedBaseline | None, ask: RequestOptions) -> None:
    """Raise UsageError where a server is asked otherwise than that of the baseline, whose times then say nothing."""
    for name in ("kind", "max_tokens", "concurrency") if served is not None else ():
        if (was := getattr(served, name)) != getattr(ask, name):
            raise UsageError(
                f"The baseline's server was asked with {option(name, was)}, and its times hold for that alone. Write "
                f"{option(name, was)}, or save another baseline."
            )


def _require_times(rules: Sequence[Rule], baseline: Baseline) -> None:
    """Raise UsageError for a rule about times against the baseline, where this is none of a server."""
    if baseline.served is None and (about := [rule.name for rule in rules if rule.against == "baseline"]):
        example = either(
            f"billhook.save_baseline({f'{baseline.name}-served'!r}, 'http://127.0.0.1:8000/v1', tasks=…)",
            f"billhook baseline save {baseline.name}-served http://127.0.0.1:8000/v1 --tasks FILE",
        )
        raise UsageError(
            f"The rule {about[0]!r} is about the baseline's times, and {baseline.name} is not of a server. Save one of "
            f"the server: {example}"
        )


# -- rounds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How often, how many times, and what is an alert to whom."""

    every_s: float
    rounds: int | None
    alarm: Alarm

    @staticmethod
    def read(spec: WatchSpec, rules: RulesFile, webhook: str | None) -> Pace:
        """Read the rules and the address. Raises UsageError, RecipeError."""
        if spec.rounds is not None and spec.rounds < 1:
            raise UsageError(f"{option('rounds', spec.rounds)} is too few. Give at least 1, or leave it out.")
        if spec.probes < 0:
            raise UsageError(f"{option('probes', spec.probes)} is too few. Give 0 or more.")
        return Pace(spec.every_s, spec.rounds, Alarm.read(rules, webhook, "watch"))


@dataclass(frozen=True)
class Series:
    """The rounds of one target, of which the store holds all that were ever measured."""

    store: Store
    run: str
    watch: EventListener
    spec: WatchSpec
    rounds: Rounds

    def key(self, number: int) -> WatchRoundKey:
        return WatchRoundKey(self.spec.model, self.rounds.series, number)

    def known(self) -> int:
        """How many rounds are stored; they have no gaps."""
        most = 1
        while self.store.lookup(self.key(most)) is not None:
            most *= 2
        return bisect.bisect_left(range(1, most), True, key=lambda n: self.store.lookup(self.key(n)) is None)

    def load(self, numbers: Iterable[int]) -> list[WatchRound]:
        """Stored rounds by their numbers."""
        return [found for n in numbers if (found := self.store.lookup(self.key(n))) is not None]


def _keep_watch(series: Series, pace: Pace) -> WatchResult:
    """Measure round after round; each is stored, held against the rules, and told, before the next one begins."""
    name = f"watch-{series.rounds.series}"
    with series.store.lock(name):
        before = series.known()
        first, recent = series.load([1]), series.load(range(max(1, before - SHOWN_ROUNDS + 1), before + 1))
        told: list[Alert] = []
        for number in count(before + 1):
            begun, done = time.monotonic(), number - before
            measured = series.rounds.measure(number, first[0] if first else None)
            series.store.add(series.key(number), measured, series.run)
            first, recent = first or [measured], [*recent, measured][-SHOWN_ROUNDS:]
            series.store.add_event(series.run, _event(measured, done, pace.rounds), at_once=True)
            series.watch(_event(measured, done, pace.rounds))
            fresh = new_alerts(evaluate(pace.alarm.rules, _observations(recent)), told)
            told += fresh
            tell_alerts(series.store, series.run, series.watch, fresh)
            call_webhook(
                series.store, series.run, series.watch, pace.alarm.webhook, target=series.spec.model, alerts=fresh
            )
            result = _result(series, number, recent, told)
            series.store.update(series.run, result=result.to_json())
            if done == pace.rounds:
                return result
            time.sleep(max(0.0, pace.every_s - (time.monotonic() - begun)))
    raise AssertionError("count has no end")


def _observations(rounds: Sequence[WatchRound]) -> tuple[Observation, ...]:
    return tuple(each for measured in rounds for each in measured.observations)


def _event(measured: WatchRound, done: int, total: int | None) -> Event:
    """What a round found, as an event; `round` is its number in the series."""
    values: dict[str, EventValue] = {"round": measured.number}
    for each in measured.observations:
        name = f"{each.kind}, {each.what}, {each.unit}" + (f" {each.against}" if each.against else "")
        values[name] = each.value.value
    return Event("watch", done, total, values)


def _result(series: Series, number: int, rounds: Sequence[WatchRound], alerts: Sequence[Alert]) -> WatchResult:
    spec, served = series.spec, series.spec.served
    model = spec.model if served is None else served.model
    return WatchResult(
        spec.model, model, spec.baseline, series.rounds.series, number, spec.every_s, _observations(rounds),
        tuple(alerts), ALPHA, series.run,
    )  # fmt: skip
