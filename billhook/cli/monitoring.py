"""The commands that watch: baselines, a model over time, and the alerts of a store."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli.options import (
    DEFAULT_STORE,
    NO_TEXT,
    Concurrency,
    ItemLimit,
    Json,
    NumberOfShots,
    Quiet,
    Retries,
    RulesFile,
    ScoreNames,
    ServerKey,
    ServerKind,
    ShotsFrom,
    StoreFile,
    Tasks,
    TimedTokens,
    Timeout,
    Track,
    Verbose,
    WebhookUrl,
    check_options,
    check_places,
    check_rules,
    check_texts,
    command_line,
    named,
    split_commas,
    with_options,
)
from billhook.cli.session import CommandSession
from billhook.core.errors import UsageError
from billhook.core.registry import OptionValues


@with_options(*NO_TEXT)
def baseline_command(
    *,
    action: Annotated[str, typer.Argument(help="save, or list")],
    name: Annotated[str | None, typer.Argument(help="Name of the baseline, for save")] = None,
    model: Annotated[
        str | None,
        typer.Argument(help="Model, folder, run, or address of a server, for save [default: demo]", callback=named),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Texts, separated by commas [default: pydoc]")] = None,
    tasks: Tasks = "",
    items: ItemLimit = None,
    score: ScoreNames = "acc",
    shots: NumberOfShots = 0,
    shots_from: ShotsFrom = "",
    served_model: Annotated[str, typer.Option(help="Model to request of a server [default: its first]")] = "",
    api_key_env: ServerKey = "",
    kind: ServerKind = "text",
    max_tokens: TimedTokens = 32,
    probes: Annotated[int, typer.Option(help="Prompts of a server whose times are kept", min=0)] = 48,
    timeout: Annotated[float | None, typer.Option(help="Most seconds per answer of a server [default: 60]")] = None,
    retries: Annotated[int | None, typer.Option(help="Attempts of a request to a server [default: 2]", min=0)] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests to a server at a time [default: 1]", min=1)] = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Measure a model or a server, and store the result under a name for `gate` and `watch`; or list the names."""
    with CommandSession(as_json, quiet, verbose) as face:
        if action not in ("save", "list") or (action == "save") != (name is not None):
            raise UsageError("Write `billhook baseline save NAME MODEL`, or `billhook baseline list`.")
        check_texts(options, data, tasks)
        if name is not None and "://" not in (model or ""):
            check_places(model, store=store, served=True)
        if name is None:
            from billhook.studies import gate

            face.show({"baselines": gate.baselines(store)})
            return
        from billhook.studies.servers import baselines

        asking = {"timeout": timeout, "retries": retries, "concurrency": concurrency}
        kept = baselines.save_baseline(
            name, model or "demo", data=None if data is None else split_commas(data), tasks=split_commas(tasks),
            items=items, score=split_commas(score), shots=shots, shots_from=shots_from, served_model=served_model,
            api_key_env=api_key_env, max_tokens=max_tokens, probes=probes, store=store, watch=face.watch,
            **(options | {n: v for n, v in asking.items() if v is not None} | {"kind": kind}),
        )  # fmt: skip
        face.show({"baselines": [kept]})


@with_options("memory", "device", "dtype", "trust_remote_code")
def watch_command(
    *,
    target: Annotated[str, typer.Argument(help="Address of a server, such as http://127.0.0.1:8000/v1, or a folder")],
    baseline: Annotated[str, typer.Option(help="Name of a stored baseline")],
    tasks: Tasks = "",
    every: Annotated[str, typer.Option(help="Time between two rounds: 1h, 30min, 10s")] = "1h",
    rounds: Annotated[int | None, typer.Option(help="Number of rounds [default: without end]", min=1)] = None,
    rules: RulesFile = None,
    webhook: WebhookUrl = None,
    model: Annotated[str, typer.Option(help="Model to request [default: the first of the server]")] = "",
    api_key_env: ServerKey = "",
    kind: ServerKind = "text",
    max_tokens: TimedTokens = 32,
    probes: Annotated[int, typer.Option(help="Prompts asked for their time per round", min=0)] = 48,
    timeout: Timeout = 60.0,
    retries: Retries = 2,
    concurrency: Concurrency = 1,
    track: Track = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Watch a server or a folder against a baseline: quality, latency, throughput and errors over time."""
    own = {"baseline": baseline, "tasks": tasks, "every": every, "rounds": rounds, "rules": rules, "store": store}
    with CommandSession(as_json, quiet, verbose, command_line("watch", target, **own, **options)) as face:
        served = "://" in target
        check_options(options, tasks=tasks)
        check_rules(rules, webhook)
        if not served:
            check_places(target, store=store, served=True)
        face.track(track, "watch", {"target": target, **{n: str(v) for n, v in own.items() if v}, **options})
        from billhook.studies.servers import watch

        asking = {"timeout": timeout, "retries": retries, "concurrency": concurrency} if served else {}
        told = watch.watch(
            target, baseline, tasks=split_commas(tasks), every=every, rounds=rounds, rules=rules, webhook=webhook,
            model=model, api_key_env=api_key_env, max_tokens=max_tokens, probes=probes, store=store,
            watch=face.watch, **(options | asking | {"kind": kind}),
        )  # fmt: skip
        face.show(told)


def alerts_command(
    *,
    rules: RulesFile = None,
    between: Annotated[str, typer.Option(help="Baselines to compare in order, with commas, for drift")] = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the alerts of a store: told by runs, runs that stopped or stall, and drift between baselines."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook.studies.monitoring import alert_list

        found = alert_list.alerts(rules=rules, between=split_commas(between), store=store)
        face.show(found)
        face.alert(found.now)


WATCH_COMMANDS = (baseline_command, watch_command, alerts_command)
