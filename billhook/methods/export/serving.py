"""Software that serves pruned models, by name: through which exports, and what a plan for it may contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from billhook.core.errors import ModelError, PlanError
from billhook.core.plan import Plan
from billhook.core.registry import Entries
from billhook.core.results.exports import TargetFit, TargetLimits
from billhook.methods.export import EXPORTS
from billhook.methods.export.deci_folder import FORM as DECI
from billhook.methods.export.targets import Fault, Form, StudentShape, limits, nearest_fault, student_shape
from billhook.models.architectures import base_type
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR, Repair

# A Hugging Face checkpoint of a stock type, which this software loads by its own code for the type.
STOCK_TYPE = Form("stock", "none", "alike", "alike", inserts=False, biases=False)
MLX_TYPES = (  # of which mlx-lm 0.32 has a model
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral"),
    *("olmo2", "stablelm", "cohere", "gpt_oss", "nemotron", "gpt2", "gpt_neox"),
)


@dataclass(frozen=True, slots=True)
class Route:
    """One way into a target: an export, and the forms that the target loads of it (none: all of them)."""

    export: str
    forms: tuple[Form, ...] = ()

    def loaded(self) -> tuple[Form, ...]:
        return self.forms or EXPORTS.facts(self.export)


@dataclass(frozen=True, slots=True)
class Target:
    """Software that serves models. `routes`: the plainest first. `verified`: whether Billhook runs exports in it."""

    routes: tuple[Route, ...]
    verified: bool = True

    def forms(self) -> list[Form]:
        return [form for route in self.routes for form in route.loaded()]


_MLX = (Route("transformers", (replace(STOCK_TYPE, architectures=MLX_TYPES),)), Route("deci"))
# SGLang asks for one number of KV heads, and the stand-in for the attention of a first block has one head.
_SGLANG = replace(DECI, attention_widths="none", first_attention=True)
TARGETS = Entries(
    "target",
    {
        "transformers": Target((Route("transformers"),)),
        "llama.cpp": Target((Route("gguf"),)),
        "ollama": Target((Route("gguf"),), verified=False),
        "lmstudio": Target((Route("gguf"),), verified=False),
        "mlx": Target(_MLX),
        "vllm": Target((Route("transformers", (STOCK_TYPE,)), Route("deci"))),
        "sglang": Target((Route("transformers", (STOCK_TYPE,)), Route("deci", (_SGLANG,))), verified=False),
        "onnx": Target((Route("onnx"),)),
        "openvino": Target((Route("openvino"),)),
        "stock": Target((Route("stock"),)),
    },
    fits=lambda value: isinstance(value, Target),
)


def limits_of(names: Sequence[str], config: Any) -> Form:
    """Return what all of the targets can express of a model. Raises UnknownName, ModelError where one takes none."""
    model_type = base_type(config.model_type)
    found = limits([TARGETS[name].forms() for name in names], model_type, config)
    if found is None:
        reasons = {name: _reason(TARGETS[name], model_type, config) for name in names}
        name, reason = next((name, reason) for name, reason in reasons.items() if reason)
        others = ", ".join(other for other in TARGETS if not _reason(TARGETS[other], model_type, config))
        raise ModelError(f"{name} has no place for {reason}. Targets that take this model: {others}.")
    return found


def table(config: Any) -> tuple[TargetLimits, ...]:
    """Return of every target what it can express of a model."""
    model_type = base_type(config.model_type)
    rows = []
    for name in TARGETS:
        target = TARGETS[name]
        exports = tuple(
            route.export for route in target.routes if any(f.takes(model_type, config) is None for f in route.loaded())
        )
        found = limits([target.forms()], model_type, config)
        if found is None:
            rows.append(TargetLimits(name, exports, target.verified, _reason(target, model_type, config)))
        else:
            rows.append(TargetLimits(
                name, exports, target.verified, None, found.sites, found.mlp_widths, found.attention_widths,
                found.inserts, found.biases, found.mlp_step, found.attention_counts(config),
                found.first_attention,
            ))  # fmt: skip
    return tuple(rows)


def fit(name: str, shape: StudentShape) -> tuple[str, Fault | None]:
    """Return by which export a target loads a student, or what keeps it from that."""
    target = TARGETS[name]
    for route in target.routes:
        if any(form.fault(shape) is None for form in route.loaded()):
            return route.export, None
    return target.routes[-1].export, nearest_fault(target.forms(), shape)


def fits(teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> tuple[TargetFit, ...]:
    """Return of every target how it takes a student."""
    shape = student_shape(teacher, plan, repair)
    found = {name: fit(name, shape) for name in TARGETS}
    return tuple(
        TargetFit(name, by, fault.reason if fault else None, TARGETS[name].verified)
        for name, (by, fault) in found.items()
    )


def require_fit(names: Sequence[str], teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> None:
    """Raise PlanError where one of the targets cannot express a plan and its repair, with what would be allowed."""
    shape = student_shape(teacher, plan, repair)
    for name in names:
        if (fault := fit(name, shape)[1]) is not None:
            raise PlanError(f"The target {name} has no place for {fault}.")


def _reason(target: Target, model_type: str, config: Any) -> str | None:
    """Return why a target takes no student of a model; None where it takes some."""
    forms = target.forms()
    if any(form.takes(model_type, config) is None for form in forms):
        return None
    knowing = [form for form in forms if form.architectures is None or model_type in form.architectures]
    if knowing:
        return knowing[0].takes(model_type, config)
    every = dict.fromkeys(name for form in forms for name in form.architectures or ())
    return Form(architectures=tuple(every)).takes(model_type, config)
