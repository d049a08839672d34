"""The options that commands share: the fields of a recipe with their help texts, and how a command gets them."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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
    "metric": (None, "How to score sites first, for the searches oneshot, solve, span, narrow and joint"),
    "loss": ("kl", "What to keep low: kl, js, nll …, or task:FILE for a multiple-choice task"),
    "set": ({}, "An option of the search or the metric, such as front=0.4; repeatable"),
    "uniform": (False, "Where sites become narrower: all blocks alike, in the stock shape"),
    "multiple": (1, "Where sites become narrower: channels that stay are a multiple of it: 8, 32, 256"),
    "fast": (False, "Race a round's candidates instead of proving which is best"),
    "shortlist": (12, "With --fast: candidates a round, by the ranking of the rounds before"),
    "risk": (0.05, "With --fast: risk of dropping the best candidate at one comparison"),
    "audit": (False, "With --fast: measure every round again in full, state the regret"),
    "memory": (None, "Memory for weights and activations, such as 4GB; less streams the model"),
    "protect": ("", "Sites that stay: attention.0,mlp.27-29, or blocks: 0-3,last2"),
    "batch": (1, "With a budget in ms: sequences at a time"),
    "context": (128, "With a budget in ms: tokens before the one that is timed"),
    "data": ("pydoc", "Calibration text: pydoc, a .txt, .jsonl or .parquet file, self, or a data set's name"),
    "self_share": (0.5, "Of the calibration tokens, those that the model writes itself; 0: none"),
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
REPEATABLE_OPTIONS = ("remove", "set", "recover_set")
TEXT_OPTIONS = ("data", "eval_data", "field", "eval_tokens", "eval_length", "memory", "seed", "device", "dtype",
                "trust_remote_code")  # fmt: skip


def with_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
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


def command_line(command: str, *words: str, **options: Any) -> str:
    """A command to copy: quoted for a shell, with those of `options` that are neither empty, 0 nor False."""
    line = ["billhook", command, *words]
    for name, value in options.items():
        if value:
            line += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(line)


Model = Annotated[str | None, typer.Argument(help="Folder, .gguf file, Hugging Face name, or demo [default: demo]")]
STUDY_OPTIONS = ("search", "metric", "loss", "set", "uniform", "multiple", "fast", "shortlist", "risk", "memory",
               "protect", "batch", "context", "self_share", "field", "tokens", "length", "eval_tokens", "eval_length",
               "seed", "device", "dtype", "trust_remote_code")  # fmt: skip
Out = Annotated[Path | None, typer.Option(help="Folder for page and table [default: studies/<run>]")]
Items = Annotated[int, typer.Option(help="Items of each task that are measured", min=2)]
ItemLimit = Annotated[int | None, typer.Option(help="Items of each task [default: all]", min=2)]
Tasks = Annotated[str, typer.Option(help="Tasks, separated by commas: files of items or questions, lmeval:NAME")]
ScoreNames = Annotated[str, typer.Option(help="The score that counts, where a task has it, such as acc_norm")]
NumberOfShots = Annotated[int, typer.Option("--shots", help="Solved items before each item of a task", min=0)]
ShotsFrom = Annotated[str, typer.Option(help="Where they come from; left out, from the task itself")]


def split_commas(text: str) -> list[str]:
    """What stands between commas."""
    return [piece.strip() for piece in text.split(",") if piece.strip()]
