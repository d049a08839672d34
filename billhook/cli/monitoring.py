"""The commands that watch: a model over time, and the alerts of a store."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli.options import (
    DEFAULT_STORE,
    Json,
    Quiet,
    RulesFile,
    StoreFile,
    Tasks,
    Track,
    Verbose,
    check_options,
    check_places,
    check_rules,
    command_line,
    split_commas,
    with_options,
)
from billhook.cli.session import CommandSession
from billhook.core.registry import OptionValues


@with_options("memory", "device", "dtype", "trust_remote_code")
def watch_command(
    *,
    target: Annotated[str, typer.Argument(help="Address of a server, such as http://127.0.0.1:8000/v1, or a folder")],
    baseline: Annotated[str, typer.Option(help="Name of a stored baseline")],
    tasks: Tasks = "",
    every: Annotated[str, typer.Option(help="Time between two rounds: 1h, 30min, 10s")] = "1h",
    rounds: Annotated[int | None, typer.Option(help="Number of rounds [default: without end]", min=1)] = None,
    rules: RulesFile = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Address that alerts are sent to")] = None,
    model: Annotated[str, typer.Option(help="Model to request [default: the first of the server]")] = "",
    api_key_env: Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the server's key")] = "",
    kind: Annotated[str, typer.Option(help="API: chat (chat/completions) or text (completions)")] = "text",
    max_tokens: Annotated[int, typer.Option(help="Most tokens per timed answer", min=1)] = 32,
    probes: Annotated[int, typer.Option(help="Prompts asked for their time per round", min=0)] = 48,
    timeout: Annotated[float, typer.Option(help="Most seconds per answer")] = 60.0,
    retries: Annotated[int, typer.Option(help="Attempts after 429, 5xx or a broken connection", min=0)] = 2,
    concurrency: Annotated[int, typer.Option(help="Requests at a time", min=1)] = 1,
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
        check_rules(rules)
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


WATCH_COMMANDS = (watch_command, alerts_command)
