"""What forecasts and costs find. Plain values; no sentences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from billhook.core.outlook.costs import ModelCost, Prices
from billhook.core.outlook.loss_curve import LossForecast
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import Resources
from billhook.core.outlook.search_end import SearchForecast
from billhook.core.results.json_form import Result, Row
from billhook.core.results.measured import Environment


@dataclass(frozen=True, repr=False)
class MachineReport(Result):
    """The machine that Billhook runs on, as it was measured."""

    kind: ClassVar[str] = "machine"

    machine: Machine
    environment: Environment

    def rows(self) -> list[Row]:
        """One row."""
        return [asdict(self.machine)]


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A size that was measured: the share of the parameters removed, the perplexity, and the run."""

    share: float
    nats: float
    se: float
    perplexity: float
    run: str


@dataclass(frozen=True, slots=True)
class CurveForecast:
    """One recipe's losses: the sizes that were measured on a text, and forecasts for others. `teacher`: perplexity."""

    recipe: str
    text: str
    teacher: float
    measured: tuple[MeasuredPoint, ...]
    forecasts: tuple[LossForecast, ...]


@dataclass(frozen=True, slots=True)
class ModelOnMachine:
    """One model on a machine. `share`: of the parameters removed; `even`: by assumption evenly from all sites."""

    label: str
    share: float
    even: bool
    resources: Resources


@dataclass(frozen=True, repr=False)
class ForecastReport(Result):
    """What is to be expected of a model, or of a run: perplexity at other sizes, the end of a search, resources.

    `run`: empty where a model was asked about; `search`: of one that goes on; `curve`: None where no size is measured.
    """

    kind: ClassVar[str] = "forecast"

    model: str
    run: str
    search: SearchForecast | None
    curve: CurveForecast | None
    resources: tuple[ModelOnMachine, ...]

    def rows(self) -> list[Row]:
        """A row for each size: measured, forecast, or on a machine."""
        found: list[Row] = []
        if self.curve is not None:
            told = {"model": self.model, "recipe": self.curve.recipe}
            for m in self.curve.measured:
                found.append({**told, "share": m.share, "perplexity": m.perplexity, "low": None, "high": None,
                              "measured": m.run, "machine": None, "decode_tokens_per_s": None})  # fmt: skip
            for f in self.curve.forecasts:
                value, low, high = (self.curve.teacher * math.exp(x) for x in (f.value, f.low, f.high))
                found.append({**told, "share": f.share, "perplexity": value, "low": low, "high": high,
                              "measured": None, "machine": None, "decode_tokens_per_s": None})  # fmt: skip
        return found + [
            {"model": self.model, "recipe": each.label, "share": each.share, "perplexity": None, "low": None,
             "high": None, "measured": None, "machine": each.resources.machine.name,
             "decode_tokens_per_s": each.resources.decode_tokens_per_s}
            for each in self.resources
        ]  # fmt: skip


@dataclass(frozen=True, repr=False)
class CostReport(Result):
    """What a teacher and its student cost, and other models against them.

    `machine`: by whose figures the rates were worked out; empty where the rates were measured. `batch`: sequences at a
    time; `making_seconds`: of search and recovery; `costs`: of the teacher first.
    """

    kind: ClassVar[str] = "cost"

    model: str
    run: str
    machine: str
    batch: int
    prices: Prices
    making_seconds: float
    costs: tuple[ModelCost, ...]

    def rows(self) -> list[Row]:
        """A row a model."""
        found: list[Row] = []
        for each in self.costs:
            row: Row = {"model": each.label, "bytes": each.bytes, "machines": each.machines}
            for name in ("rate", "per_million", "saved", "per_day", "saved_per_day", "payback_hours", "ratio",
                         "lost_per_saved"):  # fmt: skip
                figure = getattr(each, name)
                row |= {name: figure and figure.value, f"{name}_low": figure and figure.low,
                        f"{name}_high": figure and figure.high, f"{name}_source": figure and figure.source}  # fmt: skip
            found.append(row)
        return found
