"""The commands about what follows from measured numbers: forecasts, costs, suggestions."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli.options import DEFAULT_STORE, Json, Quiet, StoreFile, Verbose, with_options
from billhook.cli.session import CommandSession
from billhook.core.registry import OptionValues

Of = Annotated[str, typer.Argument(help="Run or model [default: the newest pruning of the store]")]
Machines = Annotated[str, typer.Option(help="Machines by name, separated by commas [default: some common ones]")]
Context = Annotated[int, typer.Option(help="Tokens of a full context", min=1)]
Batch = Annotated[int, typer.Option(help="Sequences at a time", min=1)]
PromptTokens = Annotated[int, typer.Option(help="Tokens per prompt", min=1)]
Bits = Annotated[float | None, typer.Option(help="Bits per weight as served [default: as in the checkpoint]")]


@with_options("remove", "device")
def forecast_command(
    *,
    of: Of = "",
    machine: Machines = "",
    here: Annotated[bool, typer.Option("--here", help="Measure this machine first, in about 10 s")] = False,
    context: Context = 2048,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 512,
    bits: Bits = None,
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    options: OptionValues,
) -> None:
    """Forecast perplexity at other sizes, the end of a search, and speed and memory on other machines."""
    with CommandSession(as_json, quiet, verbose) as face:
        from billhook.studies.outlook import forecasting

        if here:
            measured = forecasting.measure_here(device=options.get("device", "auto"), store=store, watch=face.watch)
            if not as_json:
                face.show(measured)
        remove = options.get("remove", ())
        names = f"here,{machine}" if here and machine else machine
        told = forecasting.forecast(
            of, remove=remove, machine=names, context=context, batch=batch, prompt_tokens=prompt_tokens, bits=bits,
            store=store,
        )  # fmt: skip
        face.show(told)


def cost_command(
    *,
    run: Annotated[str, typer.Argument(help="Pruning of the store [default: the newest]")] = "",
    tokens_per_day: Annotated[float | None, typer.Option(help="Tokens decoded each day [default: all day]")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of an hour of the machine")] = None,
    price_per_kwh: Annotated[float | None, typer.Option(help="Price of a kWh, instead of an hour")] = None,
    watts: Annotated[float | None, typer.Option(help="Power of the machine [default: measured, or as stated]")] = None,
    machine: Annotated[str, typer.Option(help="Machine by name [default: the rates that the run measured]")] = "",
    context: Context = 2048,
    batch: Batch = 1,
    bits: Bits = None,
    against: Annotated[str, typer.Option(help="Run, folder, file or ENGINE:FILE of another model, quantised")] = "",
    store: StoreFile = DEFAULT_STORE,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Work out what a student saves: cost per million tokens, payback, and the quality lost for it."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook.studies.outlook import costing

        told = costing.cost(
            run, tokens_per_day=tokens_per_day, price_per_hour=price_per_hour, price_per_kwh=price_per_kwh,
            watts=watts, machine=machine, context=context, batch=batch, bits=bits, against=against, store=store,
        )  # fmt: skip
        face.show(told)


def suggest_command(
    *, of: Of = "", store: StoreFile = DEFAULT_STORE, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Suggest what to try next, by expected gain, and show what earlier suggestions brought."""
    with CommandSession(as_json, True, verbose) as face:
        from billhook.studies.outlook import suggesting

        face.show(suggesting.suggest(of, store=store))


COMMANDS = (forecast_command, cost_command, suggest_command)
