"""The commands that compare several models or recipes, or reduce a model in another way than by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.options import (
    DEFAULT_STORE,
    NO_TEXT,
    STUDY_OPTIONS,
    ItemLimit,
    Items,
    Json,
    Model,
    NumberOfShots,
    Out,
    Quiet,
    Retries,
    RulesFile,
    ScoreNames,
    ServerKind,
    ShotsFrom,
    StoreFile,
    Tasks,
    Timeout,
    Track,
    Verbose,
    WebhookUrl,
    check_options,
    check_places,
    check_rules,
    check_texts,
    named,
    split_commas,
    with_options,
)
from billhook.cli.session import CommandSession
from billhook.core.errors import GateFailed, UsageError
from billhook.core.registry import OptionValues


@with_options(*STUDY_OPTIONS)
def sweep_command(
    *,
    model: Model = None,
    recipes: Annotated[str, typer.Option(help="Recipes by name or file, separated by commas")] = "billhook",
    remove: Annotated[str, typer.Option(help="Sizes, separated by commas")] = "10%,20%,30%",
    data: Annotated[str, typer.Option(help="Calibration texts, separated by commas")] = "pydoc",
    eval_data: Annotated[str, typer.Option(help="Held-out texts; left out, those of --data")] = "",
    tasks: Annotated[str, typer.Option(help="Files of multiple-choice items to measure, separated by commas")] = "",
    items: Items = 200,
    out: Out = None,
    rules: RulesFile = None,
    webhook: WebhookUrl = None,
    track: Track = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Compare recipes at several sizes and on several calibration texts: one table, one page, through one store."""
    with CommandSession(as_json, quiet, verbose) as face:
        for size in split_commas(remove) or [""]:
            for text in split_commas(data) or [""]:
                check_options(options, remove=size, data=text, tasks=tasks, recipes=split_commas(recipes))
        for text in split_commas(eval_data):
            check_options(options, eval_data=text)
        check_places(model, out=out)
        check_rules(rules, webhook)
        face.track(
            track, "sweep", {"model": model or "demo", "recipes": recipes, "remove": remove, "data": data, **options}
        )
        from billhook.studies import sweep

        lists: OptionValues = {
            "remove": split_commas(remove),
            "data": split_commas(data),
            "eval_data": split_commas(eval_data),
        }
        told = sweep.sweep(
            model or "demo", split_commas(recipes), tasks=split_commas(tasks), items=items, out=out, rules=rules,
            webhook=webhook, store=store, watch=face.watch, **lists, **options,
        )  # fmt: skip
        face.show(told)


@with_options("remove", "data", "eval_data", *STUDY_OPTIONS)
def transfer_command(
    *,
    model: Model = None,
    tasks: Annotated[str, typer.Option(help="Files of multiple-choice items, separated by commas")],
    items: Items = 200,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Prune for each task and measure on each: what adapting to one task costs on the others."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options, tasks=tasks)
        check_places(model, out=out)
        from billhook.studies import transfer

        told = transfer.transfer(
            model or "demo", split_commas(tasks), items=items, out=out, store=store, watch=face.watch, **options
        )
        face.show(told)


@with_options("remove", "data", *(name for name in STUDY_OPTIONS if name not in ("tokens", "metric")))
def stability_command(
    *,
    model: Model = None,
    metric: Annotated[str, typer.Option(help="Metric whose scores are compared")] = "loo_kl",
    sizes: Annotated[str, typer.Option(help="Calibration tokens, separated by commas")] = "512,2048",
    draws: Annotated[int, typer.Option(help="Disjoint calibration sets of each size", min=2)] = 4,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Compare scores and plans of disjoint calibration sets: how far they depend on the text."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options, metrics=metric)
        if wrong := [piece for piece in split_commas(sizes) if not piece.isdigit()]:
            raise UsageError(f"--sizes {wrong[0]} is no number of tokens. Write for example 512,2048.")
        check_places(model, out=out)
        from billhook.studies import stability

        told = stability.stability(
            model or "demo", metric, sizes=[int(piece) for piece in split_commas(sizes)], draws=draws, out=out,
            store=store, watch=face.watch, **options,
        )  # fmt: skip
        face.show(told)


MarginTexts = Annotated[
    list[str] | None,
    typer.Option("--margin", help="Margin: 1pp, 1pp:FILE, 3%ppl; repeatable [default: 1pp, 3%ppl]"),
]
Percent = Annotated[str | None, typer.Option("--ppl-margin", help="The same as --margin 3%ppl for 3%")]
AllowSeen = Annotated[bool, typer.Option("--seen", help="Allow data that a search has seen, and mark it")]


def typed_margins(margin: list[str] | None, ppl_margin: str | None) -> list[str]:
    """The margins of `--margin` and `--ppl-margin` as one list. Raises UsageError with what to type."""
    from billhook.core.margin import Margin, Margins

    texts = list(margin or ())
    try:
        if ppl_margin is not None:
            text = ppl_margin.strip()
            texts.append(str(Margin.parse(text if text.endswith("ppl") else f"{text.removesuffix('%')}%ppl")))
    except UsageError as error:
        raise UsageError(f"{ppl_margin!r} is not a margin of perplexity. Type for example: --ppl-margin 3%") from error
    try:
        Margins.parse(texts)
    except UsageError as error:
        raise UsageError(f"{error.message} Type for example: --margin 1pp --margin 3%ppl") from error
    return texts


@with_options(*NO_TEXT)
def compare_command(
    *,
    models: Annotated[
        list[str], typer.Argument(help="Models, folders or runs; the first is the reference", callback=named)
    ],
    data: Annotated[str, typer.Option(help="Texts to compare on, separated by commas")] = "pydoc",
    tasks: Tasks = "",
    items: ItemLimit = None,
    score: ScoreNames = "acc",
    shots: NumberOfShots = 0,
    shots_from: ShotsFrom = "",
    margin: MarginTexts = None,
    ppl_margin: Percent = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="No measurement of speed")] = False,
    seen: AllowSeen = False,
    out: Out = None,
    track: Track = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Compare models with the first one on the same items: better, equivalent, worse or undecided."""
    with CommandSession(as_json, quiet, verbose) as face:
        margins = typed_margins(margin, ppl_margin)
        check_texts(options, data, tasks)
        check_places(*models, store=store, out=out, served=True)
        face.track(track, "compare", {"models": ",".join(models), "data": data, "tasks": tasks, **options})
        from billhook.studies import compare

        found = compare.compare(
            *models, data=split_commas(data), tasks=split_commas(tasks), items=items, score=split_commas(score),
            shots=shots, shots_from=shots_from, margins=margins,
            timed=not no_speed, seen=seen, out=out, store=store, watch=face.watch, **options,
        )  # fmt: skip
        face.show(found)


@with_options(*NO_TEXT)
def gate_command(
    *,
    student: Annotated[str, typer.Argument(help="Model, folder or run to test", callback=named)],
    baseline: Annotated[str, typer.Option(help="Model to compare with, or a stored baseline")],
    data: Annotated[str | None, typer.Option(help="Texts, separated by commas [default: pydoc]")] = None,
    tasks: Tasks = "",
    items: ItemLimit = None,
    score: ScoreNames = "acc",
    shots: NumberOfShots = 0,
    shots_from: ShotsFrom = "",
    margin: MarginTexts = None,
    ppl_margin: Percent = None,
    seen: AllowSeen = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file too")] = None,
    rules: RulesFile = None,
    webhook: WebhookUrl = None,
    track: Track = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Exit with 0 if a student loses no more than the margins against a baseline, with 4 if it does or may."""
    with CommandSession(as_json, quiet, verbose) as face:
        margins = typed_margins(margin, ppl_margin)
        check_texts(options, data, tasks)
        check_places(student, store=store, served=True)
        from billhook.runs import require_model

        require_model(baseline, store, baseline=True, served=True)
        check_rules(rules, webhook)
        face.track(track, "gate", {"student": student, "baseline": baseline, "tasks": tasks, **options})
        from billhook.studies import gate

        report = gate.gate(
            student, baseline, data=None if data is None else split_commas(data), tasks=split_commas(tasks),
            items=items, score=split_commas(score), shots=shots, shots_from=shots_from,
            margins=margins, seen=seen, junit=junit, rules=rules, webhook=webhook, store=store, watch=face.watch,
            **options,
        )  # fmt: skip
        face.show(report)
        if report.verdict != "PASS":
            failed = [check.source for check in report.checks if check.verdict != "PASS"]
            raise GateFailed(f"The gate is not passed on {' and '.join(failed)}.")


@with_options("remove", "data", "eval_data", *STUDY_OPTIONS)
def threshold_command(
    *,
    model: Model = None,
    margin: Annotated[
        list[str] | None, typer.Option(help="Margin: 3%ppl or 1pp:FILE; repeatable [default: 3%ppl]")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Stored run whose steps are used instead of a search")] = None,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Find how much can be removed within a margin: chosen on validation items, confirmed once on test items."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options)
        check_places(model, out=out)
        from billhook.studies import threshold

        told = threshold.threshold(
            model or "demo", margins=margin or ["3%ppl"], run=run, out=out, store=store, watch=face.watch, **options
        )
        face.show(told)


ModelName = Annotated[str, typer.Option(help="Model to request [default: the first of the server]")]
KeyEnv = Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the key of this server")]


@with_options("seed")
def abtest_command(
    *,
    a: Annotated[str, typer.Option(metavar="URL", help="First server, such as http://127.0.0.1:8000/v1")],
    b: Annotated[str, typer.Option(metavar="URL", help="Second server, compared with the first")],
    prompts: Annotated[Path, typer.Option(help="Prompts: a .txt of lines, a .jsonl, or a task's items")],
    limit: Annotated[
        int | None, typer.Option(help="Number of prompts, drawn from the file [default: all]", min=1)
    ] = None,
    kind: ServerKind = "chat",
    model_a: ModelName = "",
    model_b: ModelName = "",
    api_key_env_a: KeyEnv = "",
    api_key_env_b: KeyEnv = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Temperature; 0 takes the likeliest token", min=0)] = 0.0,
    timeout: Timeout = 60.0,
    retries: Retries = 2,
    concurrency: Annotated[int, typer.Option(help="Pairs of requests at a time", min=1)] = 1,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Compare two OpenAI-compatible servers on the same prompts: times, errors, agreement and task scores."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.studies.servers import ab_test

        told = ab_test.ab_test(
            a, b, prompts, model_a=model_a, model_b=model_b, api_key_env_a=api_key_env_a, api_key_env_b=api_key_env_b,
            limit=limit, max_tokens=max_tokens, temperature=temperature, timeout=timeout, retries=retries,
            concurrency=concurrency, store=store, watch=face.watch, **(options | {"kind": kind}),
        )  # fmt: skip
        face.show(told)


@with_options("device", "dtype")
def speed_command(
    *,
    model: Model = None,
    other: Annotated[
        str | None, typer.Argument(help="Second model, timed in turn with the first", callback=named)
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decoded tokens per prompt", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted runs per model", min=2)] = 9,
    engine: Annotated[
        str | None, typer.Option(help="Runtime that serves both, such as llama.cpp; models are its files")
    ] = None,
    rules: RulesFile = None,
    webhook: WebhookUrl = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Measure prefill and decode speed and peak memory of one model, or of two in turn (A B A B)."""
    with CommandSession(as_json, quiet, verbose) as face:
        check_options(options)
        models = [f"{engine}:{name}" if engine else name for name in (model or "demo", other) if name is not None]
        check_places(*models, served=engine is not None)
        check_rules(rules, webhook)
        from billhook.core.results.measured import TimingProtocol
        from billhook.studies.timing import measure_speed

        protocol = TimingProtocol(prompt_tokens, new_tokens, batch, repeats)
        told = measure_speed(
            model or "demo", other, engine=engine, protocol=protocol, rules=rules, webhook=webhook, store=store,
            watch=face.watch, **options,
        )  # fmt: skip
        face.show(told)


COMMANDS = (
    speed_command,
    sweep_command,
    transfer_command,
    stability_command,
    compare_command,
    gate_command,
    threshold_command,
    abtest_command,
)
