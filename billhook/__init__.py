"""Billhook prunes large language models in depth and in width.

The public names; importing any of them is what imports torch, not `import billhook`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from billhook.api import (
        dry_run,
        evaluate_model,
        inspect,
        measure_speed,
        methods,
        prune,
        resume,
        runs,
        score,
        show,
    )
    from billhook.budget import Budget
    from billhook.contests import (
        ab_test,
        baselines,
        compare,
        evaluate_tasks,
        gate,
        save_baseline,
        stability,
        sweep,
        threshold,
        transfer,
    )
    from billhook.errors import BillhookError
    from billhook.export.adapter import load_with_adapter
    from billhook.export.checkpoint import save
    from billhook.loading import Teacher, load, register
    from billhook.mask import masked
    from billhook.plan import Anatomy, Plan, Site
    from billhook.recipe import Recipe
    from billhook.records import Event
    from billhook.surgery import apply

__all__ = [
    "Anatomy",
    "BillhookError",
    "Budget",
    "Event",
    "Plan",
    "Recipe",
    "Site",
    "Teacher",
    "ab_test",
    "apply",
    "baselines",
    "compare",
    "dry_run",
    "evaluate_model",
    "evaluate_tasks",
    "gate",
    "inspect",
    "load",
    "load_with_adapter",
    "masked",
    "measure_speed",
    "methods",
    "prune",
    "register",
    "resume",
    "runs",
    "save",
    "save_baseline",
    "score",
    "show",
    "stability",
    "sweep",
    "threshold",
    "transfer",
]
_API = ("dry_run", "evaluate_model", "inspect", "measure_speed", "methods", "prune", "resume", "runs", "score", "show")
_CONTESTS = (
    "baselines",
    "compare",
    "ab_test",
    "evaluate_tasks",
    "gate",
    "save_baseline",
    "stability",
    "sweep",
    "threshold",
    "transfer",
)
_HOMES = {
    **dict.fromkeys(_API, "api"),
    **dict.fromkeys(_CONTESTS, "contests"),
    **dict.fromkeys(("Teacher", "load", "register"), "loading"),
    **dict.fromkeys(("Anatomy", "Plan", "Site"), "plan"),
    "BillhookError": "errors",
    "Budget": "budget",
    "Event": "records",
    "Recipe": "recipe",
    "apply": "surgery",
    "masked": "mask",
    "save": "export.checkpoint",
    "load_with_adapter": "export.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'billhook' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"billhook.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
