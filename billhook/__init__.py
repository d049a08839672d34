"""Billhook prunes large language models in depth and in width.

The public names; importing any of them is what imports torch, not `import billhook`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from billhook.api import (
        dry_run,
        evaluate,
        inspect,
        list_methods,
        list_recipes,
        prune,
        resume,
        score,
    )
    from billhook.core.anatomy import Anatomy
    from billhook.core.budget import Budget
    from billhook.core.errors import BillhookError
    from billhook.core.events import Event
    from billhook.core.files.hub import push
    from billhook.core.plan import Plan, Site
    from billhook.core.results.measured import TimingProtocol
    from billhook.core.results.run import RunResult
    from billhook.methods.export.adapter import load_with_adapter
    from billhook.methods.export.checkpoint import save
    from billhook.models.load import Teacher, load
    from billhook.models.pruned_config import register
    from billhook.models.surgery import apply, masked
    from billhook.runs import list_runs, show
    from billhook.runs.exporting import targets
    from billhook.runs.recipe import Recipe
    from billhook.runs.trackers import Tracking
    from billhook.studies.compare import compare
    from billhook.studies.eval_sets import evaluate_tasks
    from billhook.studies.exporting import export
    from billhook.studies.factors.factoring import factor
    from billhook.studies.gate import baselines, gate
    from billhook.studies.monitoring.alert_list import alerts
    from billhook.studies.outlook.costing import cost
    from billhook.studies.outlook.forecasting import forecast, measure_here
    from billhook.studies.outlook.suggesting import suggest
    from billhook.studies.run_study import make_report
    from billhook.studies.servers.ab_test import ab_test
    from billhook.studies.servers.baselines import save_baseline
    from billhook.studies.servers.watch import watch
    from billhook.studies.slicing.slicing import slice_model
    from billhook.studies.stability import stability
    from billhook.studies.sweep import sweep
    from billhook.studies.threshold import threshold
    from billhook.studies.timing import measure_speed
    from billhook.studies.transfer import transfer
    from billhook.studies.vocabulary.cutting import cut_vocabulary

__all__ = [
    "Anatomy",
    "BillhookError",
    "Budget",
    "Event",
    "Plan",
    "Recipe",
    "RunResult",
    "Site",
    "Teacher",
    "TimingProtocol",
    "Tracking",
    "ab_test",
    "alerts",
    "apply",
    "baselines",
    "compare",
    "cost",
    "cut_vocabulary",
    "dry_run",
    "evaluate",
    "evaluate_tasks",
    "export",
    "factor",
    "forecast",
    "gate",
    "inspect",
    "list_methods",
    "list_recipes",
    "list_runs",
    "load",
    "load_with_adapter",
    "make_report",
    "masked",
    "measure_here",
    "measure_speed",
    "prune",
    "push",
    "register",
    "resume",
    "save",
    "save_baseline",
    "score",
    "show",
    "slice_model",
    "stability",
    "suggest",
    "sweep",
    "targets",
    "threshold",
    "transfer",
    "watch",
]
_HOMES = {
    "Anatomy": "core.anatomy",
    "BillhookError": "core.errors",
    "Budget": "core.budget",
    "Event": "core.events",
    "Plan": "core.plan",
    "Recipe": "runs.recipe",
    "RunResult": "core.results.run",
    "Site": "core.plan",
    "Teacher": "models.load",
    "TimingProtocol": "core.results.measured",
    "Tracking": "runs.trackers",
    "ab_test": "studies.servers.ab_test",
    "alerts": "studies.monitoring.alert_list",
    "apply": "models.surgery",
    "baselines": "studies.gate",
    "compare": "studies.compare",
    "cost": "studies.outlook.costing",
    "cut_vocabulary": "studies.vocabulary.cutting",
    "dry_run": "api",
    "evaluate": "api",
    "evaluate_tasks": "studies.eval_sets",
    "export": "studies.exporting",
    "factor": "studies.factors.factoring",
    "forecast": "studies.outlook.forecasting",
    "gate": "studies.gate",
    "inspect": "api",
    "list_methods": "api",
    "list_recipes": "api",
    "list_runs": "runs",
    "load": "models.load",
    "load_with_adapter": "methods.export.adapter",
    "make_report": "studies.run_study",
    "masked": "models.surgery",
    "measure_here": "studies.outlook.forecasting",
    "measure_speed": "studies.timing",
    "prune": "api",
    "push": "core.files.hub",
    "register": "models.pruned_config",
    "resume": "api",
    "save": "methods.export.checkpoint",
    "save_baseline": "studies.servers.baselines",
    "score": "api",
    "show": "runs",
    "slice_model": "studies.slicing.slicing",
    "stability": "studies.stability",
    "suggest": "studies.outlook.suggesting",
    "sweep": "studies.sweep",
    "targets": "runs.exporting",
    "threshold": "studies.threshold",
    "transfer": "studies.transfer",
    "watch": "studies.servers.watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"billhook.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
