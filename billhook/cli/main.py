"""The command line: reads options, calls the functions of the same names, shows what they return."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from billhook import __version__
from billhook.cli.monitoring import WATCH_COMMANDS
from billhook.cli.options import (
    DEFAULT_STORE,
    RECIPE,
    TEXT_OPTIONS,
    ItemLimit,
    Json,
    Model,
    NumberOfShots,
    Quiet,
    RulesFile,
    ShotsFrom,
    StoreFile,
    Tasks,
    Track,
    Verbose,
    WebhookUrl,
    check_options,
    check_places,
    check_rules,
    command_line,
    split_commas,
    with_options,
)
from billhook.cli.outlook import COMMANDS as OUTLOOK_COMMANDS
from billhook.cli.session import CommandSession
from billhook.cli.smaller.commands import SMALLER_COMMANDS
from billhook.cli.studies import COMMANDS
from billhook.core.errors import UsageError
from billhook.core.plan_files import find_path
from billhook.core.registry import OptionValues

# Threads that wait for others let go of their core, almost at once: torch reads this when it is imported (LOG.md, 38).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
# Stacks of streams have many sizes: a GPU's allocator grows its segments instead of leaving gaps between them.
ALLOCATING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}

app = typer.Typer(
    name="billhook",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"billhook {__version__}")
        raise typer.Exit()


@app.callback()
def billhook_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune large language models in depth and in width: score, search, remove, prove, save."""


@app.command(name="prune")
@with_options(*RECIPE)
def prune_command(
    *,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: pruned/<run>]")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe: a YAML file, or the name of a built-in one")] = None,
    effort: Annotated[str | None, typer.Option(help="quick, standard (the default) or thorough, for a size")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the newest unfinished run")] = False,
    run: Annotated[str | None, typer.Option(help="Run to resume, with --resume")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate losses, memory and time, and stop")] = False,
    rules: RulesFile = None,
    webhook: WebhookUrl = None,
    track: Track = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Prune a model: search, remove, measure what that cost and gained, and save the rest."""
    again = command_line("prune", "--resume", store=store)
    with CommandSession(as_json, quiet, verbose, again) as face:
        from billhook.runs import check_inputs, require_resumable
        from billhook.runs.recipe import parse_recipe, require_effect, with_overrides
        from billhook.runs.recipes.effort import recipe_of

        own: OptionValues = {**({"model": model} if model else {}), **options}
        chosen, overruled = (recipe, {}) if resume else recipe_of(options, recipe, effort)
        given = with_overrides(chosen, **{**overruled, **own})
        if resume and effort:
            raise UsageError("--resume goes on with what the run was begun with. Leave --effort out.")
        if run and not resume:
            raise UsageError(f"--run {run} goes with --resume. Add --resume, or leave --run out.")
        if track and dry_run:
            raise UsageError("--track follows a run, and --dry-run is none. Leave one of them out.")
        if resume and dry_run:
            raise UsageError("--dry-run is of a new run, and --resume continues one. Leave one of them out.")
        if resume:
            store = _existing(store)
            require_resumable(run, store, out)
        else:
            asked = parse_recipe(given, "The call")
            require_effect(options, asked)
            check_inputs(asked, store=store)
            check_places(asked.model, out=out)
            own = {**options, "model": asked.model}
        check_rules(rules, webhook)
        face.track(track, "prune", given if resume else asked.model_dump())
        from billhook import api  # torch, which a mistake needs not

        if resume:
            result = api.resume(run, out=out, rules=rules, webhook=webhook, store=store, watch=face.watch, **given)
        elif dry_run:
            return face.show(api.dry_run(recipe=recipe, effort=effort, watch=face.watch, **own))
        else:
            result = api.prune(
                recipe=recipe, effort=effort, out=out, rules=rules, webhook=webhook, store=store, watch=face.watch,
                **own,
            )  # fmt: skip
        face.show(result)


@app.command(name="inspect")
@with_options("device", "dtype", "trust_remote_code")
def inspect_command(
    *, model: Model = None, as_json: Json = False, verbose: Verbose = False, options: OptionValues
) -> None:
    """Show a model's anatomy: every site with its parameters, bytes, KV-cache bytes and FLOPs per token."""
    with CommandSession(as_json, False, verbose) as face:
        check_options(options)
        check_places(model)
        from billhook import api

        face.show(api.inspect(model or "demo", watch=face.watch, **options))


@app.command(name="score")
@with_options("set", "loss", "data", "field", "tokens", "length", "memory", "seed", "device", "dtype",
               "trust_remote_code")  # fmt: skip
def score_command(
    *,
    model: Model = None,
    metric: Annotated[str, typer.Option(help="Metric, or several: cosine,l2")] = "cosine",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Score sites, blocks, spans or channel groups: how much their removal would hurt."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options, metrics=metric)
        check_places(model)
        from billhook import api

        face.show(api.score(model or "demo", metric, watch=face.watch, **options))


@app.command(name="eval")
@with_options("set", *TEXT_OPTIONS)
def eval_command(
    *,
    model: Model = None,
    protocol: Annotated[str | None, typer.Option(help="Windows over all of the text: gptq or shortened-llama")] = None,
    tasks: Tasks = "",
    items: ItemLimit = None,
    shots: NumberOfShots = 0,
    shots_from: ShotsFrom = "",
    evaluations: Annotated[str, typer.Option(help="Registered evaluations by name, separated by commas")] = "",
    store: Annotated[Path, typer.Option(help="Run store for answers to --tasks")] = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Measure the perplexity of a model on held-out text, or its scores on --tasks."""
    own = {"tasks": tasks, "items": items, "shots": shots, "shots_from": shots_from, "store": store}
    again = command_line("eval", model or "demo", **own, **options) if tasks else ""
    with CommandSession(as_json, quiet, verbose, resume=again) as face:
        check_options(options, tasks=tasks)
        if tasks and (protocol is not None or {"data", "eval_data"} & set(options)):
            raise UsageError("--tasks are measured in the place of text. Leave --data and --protocol out.")
        check_places(model, store=store if tasks else None, served=True)
        from billhook import api
        from billhook.studies import eval_sets

        if tasks:
            scores = eval_sets.evaluate_tasks(
                model or "demo", split_commas(tasks), items=items, shots=shots, shots_from=shots_from, store=store,
                evaluations=split_commas(evaluations), watch=face.watch, **options,
            )  # fmt: skip
            return face.show(scores)
        names = split_commas(evaluations)
        found = api.evaluate(model or "demo", protocol=protocol, evaluations=names, watch=face.watch, **options)
        face.show(found)


@app.command(name="export")
@with_options("device", "trust_remote_code")
def export_command(
    *,
    model: Model = None,
    to: Annotated[str, typer.Option(help="Form of the checkpoint, as `billhook methods` lists them")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: MODEL-TO]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of its weights, such as f16 or q8_0")] = None,
    verify: Annotated[
        bool | None, typer.Option(help="Demand the runtime that serves it, or leave it out", show_default=False)
    ] = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Write a checkpoint in the form that llama.cpp, MLX, vLLM or an ONNX runtime loads, and verify it there."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options)
        check_places(model, out=out)
        from billhook.studies.exporting import export

        told = export(
            model or "demo", to, out=out, dtype=dtype, verify=verify, store=store, watch=face.watch, **options
        )
        face.show(told)


for command in SMALLER_COMMANDS:
    app.command(name=command.__name__.removesuffix("_command"))(command)


@app.command(name="targets")
@with_options("trust_remote_code")
def targets_command(
    *, model: Model = None, as_json: Json = False, verbose: Verbose = False, options: OptionValues
) -> None:
    """List the software that serves models, with what a plan for it may contain."""
    with CommandSession(as_json, True, verbose) as face:
        check_options(options)
        from billhook.runs.exporting import targets

        face.show(targets(model or "demo", watch=face.watch, **options))


@app.command(name="push")
def push_command(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder that `billhook prune` or `billhook export` wrote")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub: OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="A new repository that only its owner sees")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made from main if missing [default: main]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Change files that the branch holds, without asking")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes, and stop")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint with its card and exports to the Hugging Face Hub, in one commit."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.cli.tables import push_question
        from billhook.core.files import hub

        told = hub.push(
            folder, repo, private=private, revision=revision, yes=yes, dry_run=dry_run,
            ask=face.asking(push_question), watch=face.watch,
        )  # fmt: skip
        face.show(told)


for command in (*COMMANDS, *OUTLOOK_COMMANDS, *WATCH_COMMANDS):
    app.command(name=command.__name__.removesuffix("_command"))(command)


@app.command(name="runs")
def runs_command(*, store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False) -> None:
    """List the runs of a store, the newest first."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import runs

        face.show({"runs": runs.list_runs(store)})


@app.command(name="tag")
def tag_command(
    *, run: Annotated[str, typer.Argument(help="Id of the run, as `billhook runs` lists it")],
    tags: Annotated[list[str], typer.Argument(help="Words to find it by, such as good")],
    remove: Annotated[bool, typer.Option("--remove", help="Take these tags away")] = False,
    store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Put tags to a run, by which the dashboard finds it."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import runs

        face.show({"tags": runs.tag(run, tags, remove=remove, store=store), "run": run})


@app.command(name="dashboard")
def dashboard_command(
    *, store: StoreFile = DEFAULT_STORE,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 for any that is free", min=0, max=65535)] = 8765,
    as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show the runs of a store in a browser, live, until Ctrl-C."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook.dashboard import server

        server.serve(store, port, lambda address: face.show({"dashboard": address, "store": str(store)}))


@app.command(name="show")
def show_command(
    *, run: Annotated[str, typer.Argument(help="Id of the run, as `billhook runs` lists it")],
    store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show all that the store holds of one run."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import runs

        face.show(runs.show(run, store))


@app.command(name="report")
def report_command(
    *, run: Annotated[str, typer.Argument(help="The run's id, as `billhook runs` lists it")],
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: reports/<run>]")] = None,
    store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Make the page of a finished run again, from the store alone."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import runs

        runs.show(run, store)
        check_places(out=out or Path("reports") / run)
        from billhook.studies import run_study

        face.show({"page": str(run_study.make_report(run, out=out, store=store))})


@app.command(name="methods")
def methods_command(*, as_json: Json = False, verbose: Verbose = False) -> None:
    """List every registered method with its options, cost and source."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import api

        face.show({"methods": api.list_methods()})


@app.command(name="recipes")
def recipes_command(*, as_json: Json = False, verbose: Verbose = False) -> None:
    """List the built-in recipes: what each does, where it comes from, and what it makes."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook import api

        face.show({"recipes": [recipe.to_json() for recipe in api.list_recipes()]})


def _existing(store: Path) -> Path:
    """Reading commands make no new store."""

    found = find_path(store)
    if found is None or not found.is_file():
        raise UsageError(f"There is no store {store}. Give the file that `billhook prune` wrote with --store.")
    return store


def main() -> None:
    """The console script."""
    for name, value in (WAITING | ALLOCATING).items():
        os.environ.setdefault(name, value)
    app()


if __name__ == "__main__":
    main()
