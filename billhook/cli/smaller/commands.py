"""The commands `vocabulary`, `slice` and `factor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.options import (
    DEFAULT_STORE,
    Json,
    Model,
    Quiet,
    StoreFile,
    Verbose,
    check_options,
    check_places,
    check_texts,
    split_commas,
    with_options,
)
from billhook.cli.session import CommandSession
from billhook.core.registry import OptionValues

EvalTexts = Annotated[str, typer.Option(help="Held-out texts, with commas [default: split off --data]")]


@with_options("field", "eval_tokens", "eval_length", "seed", "device", "dtype", "trust_remote_code")
def vocabulary_command(
    *,
    model: Model = None,
    data: Annotated[str, typer.Option(help="Text that the model is for: a file, a data set's name or pydoc")],
    remove: Annotated[str | None, typer.Option(help="Share to remove: 60% [default: what --data lacks]")] = None,
    eval_data: EvalTexts = "",
    tokens: Annotated[int, typer.Option(help="Tokens of --data to count at most", min=64)] = 1 << 22,
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: MODEL-vocabulary]")] = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Remove tokens that a text does not need, from embedding, head and tokenizer, and measure what that costs."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.core.budget import parse_vocabulary_share
        from billhook.data.texts import require_given

        require_given(data)
        if remove is not None:
            parse_vocabulary_share(remove)
        check_texts({**options, "data": data}, eval_data, name="eval_data")
        check_places(model, out=out)
        from billhook.studies.vocabulary.cutting import cut_vocabulary

        face.show(cut_vocabulary(
            model or "demo", data=data, remove=remove, eval_data=split_commas(eval_data), tokens=tokens, out=out,
            store=store, watch=face.watch, **options,
        ))  # fmt: skip


@with_options("data", "field", "tokens", "length", "eval_tokens", "eval_length", "seed", "device", "dtype",
              "trust_remote_code")  # fmt: skip
def slice_command(
    *,
    model: Model = None,
    width: Annotated[str, typer.Option(help="Channels of the residual stream that are left: 448, or 75%")],
    bases: Annotated[str, typer.Option(help="Bases of the stream: one of all boundaries, or boundary (each)")] = "one",
    eval_data: EvalTexts = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: MODEL-slice]")] = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Rotate the residual stream and cut it to fewer channels (SliceGPT), and measure what that costs."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.core.budget import parse_basis_rule, parse_width

        parse_width(width)
        rule = parse_basis_rule(bases)
        check_texts(options, eval_data, name="eval_data")
        check_places(model, out=out)
        from billhook.studies.slicing.slicing import slice_model

        face.show(slice_model(
            model or "demo", width=width, bases=rule, eval_data=split_commas(eval_data), out=out, store=store,
            watch=face.watch, **options,
        ))  # fmt: skip


@with_options("data", "eval_data", "field", "tokens", "length", "eval_tokens", "eval_length", "seed", "device", "dtype",
              "trust_remote_code")  # fmt: skip
def factor_command(
    *,
    model: Model = None,
    remove: Annotated[str, typer.Option(help="Parameters to save: 10% or 20Mparams")],
    ranks: Annotated[str, typer.Option(help="What ranks are chosen by: loss, or energy (of outputs)")] = "loss",
    out: Annotated[Path | None, typer.Option(help="Folder to write [default: MODEL-factors]")] = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Replace linear maps by two smaller ones each, the best for a text, and measure what that costs."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.core.budget import parse_parameter_budget, parse_rank_rule

        parse_parameter_budget(remove)
        rule = parse_rank_rule(ranks)
        check_options(options)
        check_places(model, out=out)
        from billhook.studies.factors.factoring import factor

        face.show(factor(
            model or "demo", remove=remove, ranks=rule, out=out, store=store, watch=face.watch, **options,
        ))  # fmt: skip


SMALLER_COMMANDS = (vocabulary_command, slice_command, factor_command)
