"""The command line: reads options, calls the functions of the same names, shows what they return."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.errors import UsageError
from billhook.face import Face

app = typer.Typer(
    name="billhook",
    help="Prune large language models in depth: score, search, remove, prove, save.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what libraries log, and tracebacks")]
StoreFile = Annotated[Path, typer.Option("--store", help="The run store, one SQLite file")]
DEFAULT_STORE = Path("billhook.db")

# The fields of `Recipe` with their defaults and help texts, so that `--help` needs no pydantic; a test compares them.
RECIPE: dict[str, tuple[Any, str]] = {
    "remove": (None, "What must go: 25% (of the parameters), 15sites, 3blocks, 30%kv, 20%ms …; repeatable"),
    "plan": (None, "No search, remove this: attention.7,mlp.16, a plan file, a drop list of LLM-Drop or EvoPress"),
    "within": (None, "As much as can go within a margin: 3%ppl, or 1pp:FILE (accuracy on a task)"),
    "search": ("swap", "How to search; `billhook methods` lists the searches"),
    "metric": (None, "How to score sites first, for the searches oneshot, solve and span"),
    "loss": ("kl", "What to keep low: kl, js, nll …, or task:FILE for a multiple-choice task"),
    "set": ({}, "An option of the search or the metric, such as front=0.4; repeatable"),
    "fast": (False, "Race a round's candidates instead of proving which is best"),
    "shortlist": (12, "With --fast: candidates a round, by the ranking of the rounds before"),
    "risk": (0.05, "With --fast: risk of dropping the best candidate at one comparison"),
    "audit": (False, "With --fast: measure every round again in full, state the regret"),
    "memory": (None, "Memory for weights and activations, such as 4GB; less streams the model"),
    "protect": ("", "Sites that stay: attention.0,mlp.27-29, or blocks: 0-3,last2"),
    "batch": (1, "With a budget in ms: sequences at a time"),
    "context": (128, "With a budget in ms: tokens before the one that is timed"),
    "data": ("pydoc", "Calibration text: pydoc, a .txt, .jsonl or .parquet file, self, or a data set's name"),
    "eval_data": (None, "Held-out text; left out, it is split off --data"),
    "field": ("text", "The field of a .jsonl row that holds the text"),
    "tokens": (4096, "Calibration tokens"),
    "length": (128, "Tokens a calibration sequence"),
    "eval_tokens": (16384, "Held-out tokens"),
    "eval_length": (512, "Tokens a held-out sequence"),
    "recover": ("", "What gets back what pruning took, in order: fold, or fold,lora; `billhook methods`"),
    "fold_in_search": (False, "Judge the best candidates of a round after a fold of what they leave"),
    "recover_set": ({}, "An option of a recovery, such as minutes=15 or lora.rank=8; repeatable"),
    "recover_data": (None, "Text to recover on; left out, that of --data"),
    "recover_tokens": (32768, "Tokens to recover on, or all that the text has"),
    "recover_length": (256, "Tokens a sequence to recover on"),
    "stock": (False, "Keep the stock shape: removed sites hold zeros, no speed-up"),
    "seed": (0, "Seed of all that is drawn"),
    "device": ("auto", "auto, cpu, cuda, cuda:1, mps"),
    "dtype": ("auto", "Compute dtype: auto (float32 on a CPU), float32, bfloat16, float16"),
    "trust_remote_code": (False, "Run Python code that the checkpoint brings"),
}
REPEATABLE = ("remove", "set", "recover_set")
TEXT_OPTIONS = ("data", "eval_data", "field", "eval_tokens", "eval_length", "memory", "seed", "device", "dtype",
                "trust_remote_code")  # fmt: skip


def _with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named fields of the recipe as options; it gets those that were typed in `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            options = {name: values.pop(name) for name in names}
            command(**values, options={k: v for k, v in options.items() if v is not None and v != []})

        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "options"]
        extra = []
        for name in names:
            default, text = RECIPE[name]
            kind: Any = type(default) if isinstance(default, bool | int | float) else str
            kind = list[str] if name in REPEATABLE else kind
            shown = f" [default: {default}]" if default and not isinstance(default, bool) else ""
            flag = typer.Option("--" + name.replace("_", "-"), help=text + shown, show_default=False)
            annotation = Annotated[kind | None, flag]
            extra.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature(parameters + extra)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters + extra}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


Model = Annotated[str | None, typer.Argument(help="Folder, .gguf file, Hugging Face name, or demo [default: demo]")]


@app.command()
@_with_options(*RECIPE)
def prune(
    *,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: pruned/<run>]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file of options, or one of ours by name; typed ones win")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished run")] = False,
    run: Annotated[str | None, typer.Option(help="With --resume: which run")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be measured, memory and time")
    ] = False,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Remove the sites that a model can lose, prove what that cost and gained, and save the rest."""
    again = f"billhook prune --resume --store {shlex.quote(str(store))}"
    with Face(as_json, quiet, verbose, again) as face:
        from billhook import api, pipeline
        from billhook.recipe import combined, recipe_from

        given = combined(recipe, **({"model": model} if model else {}), **options)
        if run and not resume:
            raise UsageError(f"--run {run} goes with --resume. Add --resume, or leave --run out.")
        if resume and dry_run:
            raise UsageError("--dry-run is of a new run, and --resume goes on with one. Leave one of them out.")
        if resume:
            if out is not None:
                raise UsageError("--out belongs to a new run; a resumed one keeps its own. Leave --out away.")
            result = api.resume(run, store=_existing(store), watch=face.watch, **given)
        elif dry_run:
            return face.show(pipeline.dry_run(recipe_from(given), face.watch), "plan_of_work")
        else:
            result = api.prune(out=out, store=store, watch=face.watch, **given)
        face.show(result, "result")


@app.command(name="inspect")
@_with_options("device", "dtype", "trust_remote_code")
def inspect_model(
    *, model: Model = None, as_json: Json = False, verbose: Verbose = False, options: dict[str, Any]
) -> None:
    """Show a model's anatomy: every site with its parameters, bytes, KV-cache bytes and FLOPs per token."""
    with Face(as_json, False, verbose) as face:
        from billhook import api

        face.show(api.inspect(model or "demo", watch=face.watch, **options), "anatomy")


@app.command()
@_with_options("set", "loss", "data", "field", "tokens", "length", "memory", "seed", "device", "dtype",
               "trust_remote_code")  # fmt: skip
def score(
    *,
    model: Model = None,
    metric: Annotated[
        str, typer.Option(help="How to score, several as cosine,l2; `billhook methods` lists the metrics")
    ] = "cosine",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Score every site and block, or every span of blocks: how much it seems to matter, without removing it."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        face.show(api.score(model or "demo", metric, watch=face.watch, **options), "scores")


LAB_OPTIONS = ("search", "metric", "loss", "set", "fast", "shortlist", "risk", "memory", "protect", "batch", "context",
               "field", "tokens", "length", "eval_tokens", "eval_length", "seed", "device", "dtype",
               "trust_remote_code")  # fmt: skip
Out = Annotated[Path | None, typer.Option(help="Folder for page and table [default: lab/<run>]")]
Items = Annotated[int, typer.Option(help="Items of each task that are measured", min=2)]


@app.command()
@_with_options(*LAB_OPTIONS)
def sweep(
    *,
    model: Model = None,
    recipes: Annotated[str, typer.Option(help="Recipes by name or file, separated by commas")] = "billhook",
    remove: Annotated[str, typer.Option(help="Sizes, separated by commas")] = "10%,20%,30%",
    data: Annotated[str, typer.Option(help="Calibration texts, separated by commas")] = "pydoc",
    eval_data: Annotated[str, typer.Option(help="Held-out texts; left out, those of --data")] = "",
    tasks: Annotated[str, typer.Option(help="Files of multiple-choice items to measure, separated by commas")] = "",
    items: Items = 200,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Compare recipes at several sizes and on several calibration texts: one table, one page, through one store."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        lists = {"remove": _pieces(remove), "data": _pieces(data), "eval_data": _pieces(eval_data)}
        told = api.sweep(
            model or "demo", _pieces(recipes), tasks=_pieces(tasks), items=items, out=out, store=store,
            watch=face.watch, **lists, **options,
        )  # fmt: skip
        face.show(told, "sweep")


@app.command()
@_with_options("remove", "data", "eval_data", *LAB_OPTIONS)
def trade(
    *,
    model: Model = None,
    tasks: Annotated[str, typer.Option(help="Files of multiple-choice items, separated by commas")],
    items: Items = 200,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Show what adapting to one task costs on others: pruned for each task, measured on each."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        told = api.trade(
            model or "demo", _pieces(tasks), items=items, out=out, store=store, watch=face.watch, **options
        )
        face.show(told, "trade")


@app.command()
@_with_options("remove", "data", *(name for name in LAB_OPTIONS if name not in ("tokens", "metric")))
def stability(
    *,
    model: Model = None,
    metric: Annotated[str, typer.Option(help="Whose scores are compared")] = "loo_kl",
    sizes: Annotated[str, typer.Option(help="Calibration tokens, separated by commas")] = "512,2048",
    draws: Annotated[int, typer.Option(help="Disjoint calibration sets of each size", min=2)] = 4,
    out: Out = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Show how far scores and plans depend on the calibration text: disjoint sets of several sizes."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        if wrong := [piece for piece in _pieces(sizes) if not piece.isdigit()]:
            raise UsageError(f"--sizes {wrong[0]} is no number of tokens. Write for example 512,2048.")
        told = api.stability(
            model or "demo", metric, sizes=[int(piece) for piece in _pieces(sizes)], draws=draws, out=out,
            store=store, watch=face.watch, **options,
        )  # fmt: skip
        face.show(told, "stability")


def _pieces(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


@app.command(name="eval")
@_with_options(*TEXT_OPTIONS)
def eval_model(
    *, model: Model = None, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Measure perplexity on held-out text: the text on which `prune` with the same options proves its student."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        face.show(api.evaluate_model(model or "demo", watch=face.watch, **options), "evaluation")


@app.command()
@_with_options("device", "dtype")
def speed(
    *,
    model: Model = None,
    other: Annotated[str | None, typer.Argument(help="A second model, timed in turn with the first")] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens a prompt", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Counted runs of each", min=2)] = 9,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Measure prefill and decode speed and peak memory of one model, or of two in turn (A B A B)."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api
        from billhook.speed import Protocol

        protocol = Protocol(prompt_tokens, new_tokens, batch, repeats)
        told = api.measure_speed(model or "demo", other, protocol=protocol, watch=face.watch, **options)
        face.show(told, "speed")


ModelName = Annotated[str, typer.Option(help="The model to ask for [default: the first that the server lists]")]
KeyEnv = Annotated[str, typer.Option(metavar="NAME", help="The environment variable that holds the key of this server")]


@app.command()
@_with_options("seed")
def abtest(
    *,
    a: Annotated[str, typer.Option(metavar="URL", help="The first server, such as http://127.0.0.1:8000/v1")],
    b: Annotated[str, typer.Option(metavar="URL", help="The second server, which is compared with the first")],
    prompts: Annotated[
        Path, typer.Option(help="A .txt, one prompt a line; a .jsonl with prompt or messages; a task's items")
    ],
    limit: Annotated[int | None, typer.Option(help="Prompts, drawn from the file [default: all]", min=1)] = None,
    kind: Annotated[str, typer.Option(help="chat (chat/completions) or text (completions)")] = "chat",
    model_a: ModelName = "",
    model_b: ModelName = "",
    api_key_env_a: KeyEnv = "",
    api_key_env_b: KeyEnv = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token", min=0)] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole answer")] = 60.0,
    retries: Annotated[int, typer.Option(help="Further attempts after 429, 5xx or a broken connection", min=0)] = 2,
    concurrency: Annotated[int, typer.Option(help="Pairs of requests at a time", min=1)] = 1,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: dict[str, Any],
) -> None:
    """Compare two OpenAI-compatible servers on the same prompts: times, errors, agreement and task scores."""
    with Face(as_json, quiet, verbose) as face:
        from billhook import api

        told = api.compare_endpoints(
            a, b, prompts, model_a=model_a, model_b=model_b, api_key_env_a=api_key_env_a, api_key_env_b=api_key_env_b,
            limit=limit, kind=kind, max_tokens=max_tokens, temperature=temperature, timeout=timeout, retries=retries,
            concurrency=concurrency, store=store, watch=face.watch, **options,
        )  # fmt: skip
        face.show(told, "abtest")


@app.command()
def runs(*, store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False) -> None:
    """List the runs of a store, the newest first."""
    with Face(as_json, True, verbose) as face:
        from billhook import api

        face.show({"runs": api.runs(_existing(store))}, "runs")


@app.command()
def show(
    *, run: Annotated[str, typer.Argument(help="The run's id, as `billhook runs` lists it")],
    store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show all that the store holds of one run."""
    with Face(as_json, True, verbose) as face:
        from billhook import api

        face.show(api.show(run, _existing(store)), "run")


@app.command()
def methods(*, as_json: Json = False, verbose: Verbose = False) -> None:
    """List every registered metric, loss, search and evaluation with its source."""
    with Face(as_json, True, verbose) as face:
        from billhook import api

        face.show({"methods": api.methods()}, "methods")


def _existing(store: Path) -> Path:
    """Reading commands make no new store."""
    if not store.is_file():
        raise UsageError(f"There is no store {store}. Give the file that `billhook prune` wrote with --store.")
    return store


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
