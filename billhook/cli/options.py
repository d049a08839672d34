"""The options that commands share: the fields of a recipe with their help texts, and how a command gets them."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also what libraries log, and tracebacks")]
StoreFile = Annotated[Path, typer.Option("--store", help="The run store, one SQLite file")]
DEFAULT_STORE = Path("billhook.db")

# The fields of `Recipe` with their defaults and help texts, so that `--help` needs no pydantic; a test compares them.
RECIPE: dict[str, tuple[Any, str]] = {
    "remove": (None, "How much to remove: 25%, 15sites, 30%kv, 60%vocabulary …; repeatable"),
    "plan": (None, "Plan instead of a search: attention.7,mlp.16, or its file"),
    "within": (None, "Margin instead of a size: 3%ppl, or 1pp:FILE"),
    "search": ("swap", "Search method, as `billhook methods` lists them"),
    "metric": (None, "Metric for oneshot, ilp, contiguous, rank_channels, joint"),
    "loss": ("kl", "Objective to minimise: kl, js, nll, … or task:FILE"),
    "set": ({}, "Option of search or metric, such as front=0.4; repeatable"),
    "uniform": (False, "Equal widths in all blocks, which keep the stock shape"),
    "multiple": (1, "Widths in multiples of this: 8, 32, 256"),
    "fast": (False, "Race the candidates of a round: faster, not exact"),
    "shortlist": (12, "Candidates in each round of --fast"),
    "risk": (0.05, "Risk of --fast to drop the best, per comparison"),
    "finalists": (8, "Plans judged again on unseen text"),
    "audit": (False, "Exact check of every round of --fast, with its regret"),
    "memory": (None, "Memory limit such as 4GB; a larger model is streamed"),
    "protect": ("", "Sites or blocks to keep: attention.0,mlp.27-29,0-3,last2"),
    "batch": (1, "Sequences at a time, for a budget in ms"),
    "context": (128, "Tokens before the timed one, for a budget in ms"),
    "data": ("pydoc", "Calibration text: a file, a data set's name, pydoc or self"),
    "self_share": (0.5, "Share of calibration tokens that the model writes"),
    "eval_data": (None, "Held-out text [default: split off --data]"),
    "field": ("text", "Field of a .jsonl row that holds the text"),
    "tokens": (4096, "Calibration tokens"),
    "length": (128, "Tokens per calibration sequence"),
    "eval_tokens": (16384, "Held-out tokens"),
    "eval_length": (512, "Tokens per held-out sequence"),
    "recover": ("", "Recovery methods after pruning, in order: fold,lora, or none"),
    "fold_in_search": (False, "Judge the best candidates of a round after a fold"),
    "recover_set": ({}, "Option of a recovery: minutes=15, lora.rank=8; repeatable"),
    "recover_data": (None, "Text for the recovery [default: that of --data]"),
    "recover_tokens": (32768, "Tokens for the recovery at most"),
    "recover_length": (256, "Tokens per sequence for the recovery"),
    "proof": ("full", "full, or loss: no skills, answers and speed"),
    "skills": ("all", "Skills to test: arithmetic,brackets,copying,recall, or none"),
    "stock": (False, "Stock shape: zeros in removed sites, no speed-up"),
    "export": ("transformers", "Forms of the checkpoint, as `billhook methods` lists them"),
    "target": ("", "What serves the model: llama.cpp,mlx … as `billhook targets` lists"),
    "seed": (0, "Seed of every random choice"),
    "device": ("auto", "Device: auto, cpu, mps, cuda:1; several: cuda:0-7"),
    "dtype": ("auto", "Compute dtype: auto (float32 on a CPU), float32, bfloat16, float16"),
    "workers": (1, "Workers that share the work: 4, ray:n=8, slurm:n=8"),
    "trust_remote_code": (False, "Run Python code of the checkpoint"),
}
REPEATABLE_OPTIONS = ("remove", "set", "recover_set")
TEXT_OR_NUMBER = ("workers",)
TEXT_OPTIONS = ("data", "eval_data", "field", "eval_tokens", "eval_length", "memory", "seed", "device", "dtype",
                "trust_remote_code")  # fmt: skip


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named fields of the recipe as options; it gets those that were typed in `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            options = {name: values.pop(name) for name in names}
            for name, value in options.items():
                if RECIPE[name][0] != "" and (value == "" or (isinstance(value, list) and "" in value)):
                    raise typer.BadParameter(f"--{name.replace('_', '-')} is empty. Give a value, or leave it out.")
            command(**values, options={k: v for k, v in options.items() if v is not None and v != []})

        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "options"]
        extra = []
        for name in names:
            default, text = RECIPE[name]
            number = isinstance(default, bool | int | float) and name not in TEXT_OR_NUMBER
            kind: Any = type(default) if number else str
            kind = list[str] if name in REPEATABLE_OPTIONS else kind
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


def check_options(
    options: Mapping[str, Any], *, metrics: str = "", tasks: str = "", recipes: Sequence[str] = (), **more: Any
) -> None:
    """Raise for options of any command that are seen to be wrong before torch is imported. `more`: further ones.

    `recipes`: those that the options of a sweep overrule; it times sites whatever its budget.
    """
    from billhook.runs import check_inputs
    from billhook.runs.recipe import SITE_TIMES, TARGETS, parse_recipe, require_effect, with_overrides
    from billhook.runs.vocabulary import refuse_vocabulary

    given = {name: value for name, value in {**options, **more}.items() if value}
    target = {} if any(name in given for name in TARGETS) else {"remove": "1sites"}
    asked = [parse_recipe(with_overrides(name, **target, **given), "The call") for name in recipes or (None,)]
    require_effect({n: value for n, value in options.items() if not recipes or n not in SITE_TIMES}, *asked)
    for recipe in asked:
        refuse_vocabulary(recipe)
        check_inputs(recipe, metrics=split_commas(metrics), tasks=split_commas(tasks))


def check_places(*models: str | None, store: Path | None = None, out: Path | None = None, served: bool = False) -> None:
    """Raise for a model that is not there, or a folder that cannot be written, before torch is imported.

    `models`: as typed, of which None is the demo. `store`: where runs of the store are models too. `served`: where
    those in a runtime are.
    """
    from billhook.core.files.target_folder import check_target, named_folder
    from billhook.core.plan_files import find_path
    from billhook.runs import require_model

    if out is not None:
        check_target(named_folder(out), find_path(models[0] or "demo") if models else None)
    for model in models:
        require_model(model or "demo", store, served=served)


def check_rules(rules: Path | None, webhook: str | None = None) -> None:
    """Raise for rules that cannot be read, and an address that must not be called, before torch is imported."""
    if rules is not None:
        from billhook.core.monitoring.rules import read_rules

        read_rules(rules)
    if webhook is not None:
        from billhook.studies.servers.webhook import Webhook

        Webhook.parse(webhook)


def command_line(command: str, *words: str, **options: Any) -> str:
    """A command to copy: quoted for a shell, with those of `options` that are neither empty, 0 nor False."""
    line = ["billhook", command, *words]
    for name, value in options.items():
        if value:
            line += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(line)


def check_texts(options: Mapping[str, Any], texts: str | None, tasks: str = "", *, name: str = "data") -> None:
    """`check_options` of each of several texts, which commas separate; `name`: of the option that they are."""
    for text in split_commas(texts or "") or [""]:
        check_options(options, tasks=tasks, **{name: text})


Names = TypeVar("Names", str, list[str], None)


def named(models: Names) -> Names:
    """Names of models, none of them empty: a variable of a shell that is not set is not the demo."""
    names: list[str] = [models] if isinstance(models, str) else list(models or ())
    if not all(name.strip() for name in names):
        raise typer.BadParameter("The model's name is empty. Give a folder, a Hugging Face name, or demo.")
    return models


Model = Annotated[
    str | None,
    typer.Argument(help="Folder, .gguf file, Hugging Face name, or demo [default: demo]", callback=named),
]
STUDY_OPTIONS = ("search", "metric", "loss", "set", "uniform", "multiple", "fast", "shortlist", "risk", "finalists",
               "memory", "protect", "batch", "context", "self_share", "field", "tokens", "length", "eval_tokens",
               "eval_length", "seed", "device", "dtype", "workers", "trust_remote_code")  # fmt: skip
Out = Annotated[Path | None, typer.Option(help="Folder for page and table [default: studies/<run>]")]
Items = Annotated[int, typer.Option(help="Items per task", min=2)]
ItemLimit = Annotated[int | None, typer.Option(help="Items per task [default: all]", min=2)]
Tasks = Annotated[str, typer.Option(help="Tasks, with commas: files of items or questions, skill:all, lmeval:NAME")]
ScoreNames = Annotated[str, typer.Option(help="Score for the verdict, where a task has it: acc_norm")]
RulesFile = Annotated[Path | None, typer.Option("--rules", help="YAML file of rules for alerts")]
NO_TEXT = tuple(name for name in TEXT_OPTIONS if name not in ("data", "eval_data"))
ServerKey = Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the server's key")]
ServerKind = Annotated[str, typer.Option(help="API: chat (chat/completions) or text (completions)")]
TimedTokens = Annotated[int, typer.Option(help="Most tokens per timed answer", min=1)]
Timeout = Annotated[float, typer.Option(help="Most seconds per answer")]
Retries = Annotated[int, typer.Option(help="Attempts after 429, 5xx or a broken connection", min=0)]
Concurrency = Annotated[int, typer.Option(help="Requests at a time", min=1)]
WebhookUrl = Annotated[str | None, typer.Option("--webhook", metavar="URL", help="Address that alerts are sent to")]
Track = Annotated[str, typer.Option(help="Trackers, with commas: mlflow, wandb, trackio, tensorboard")]
NumberOfShots = Annotated[int, typer.Option("--shots", help="Solved items before each item", min=0)]
ShotsFrom = Annotated[str, typer.Option(help="File of the solved items [default: the task itself]")]


def split_commas(text: str) -> list[str]:
    """What stands between commas."""
    return [piece.strip() for piece in text.split(",") if piece.strip()]
