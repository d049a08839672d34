"""What the config of a pruned checkpoint says, and the classes that read it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from billhook.core.errors import ModelError
from billhook.core.plan import Site
from billhook.models import architectures
from billhook.models.modeling_billhook import pruned_classes
from billhook.models.transformers_internals import stock_classes


def register() -> None:
    """Teach transformers the model types that Billhook writes, so that they load without trust_remote_code."""
    for model_type in architectures.ARCHITECTURES:
        try:
            config_class, model_class = pruned_classes(*stock_classes(model_type))
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"There is a row for the architecture {model_type}, and transformers {transformers.__version__} knows "
                "no causal language model of that type. Upgrade transformers, or uninstall the package that adds it."
            ) from error
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def write_config(
    config: Any, fields: dict[str, Any], kept: list[int], lacking: list[Site], narrow: dict[Site, dict[str, Any]]
) -> None:
    """Say in a config which parts blocks lack, and how wide narrower ones are."""
    own: dict[int, dict[str, Any]] = {}
    for site in lacking:
        own.setdefault(kept.index(site.block), {}).setdefault("skip", []).append(site.part)
    for site, entry in narrow.items():
        own.setdefault(kept.index(site.block), {}).update(entry["fields"])
    config.per_layer_config = {index: own[index] for index in sorted(own)}
    modules = {f"{s.part}.{kept.index(s.block)}": e["module"] for s, e in sorted(narrow.items()) if "module" in e}
    if modules:
        fields["narrow"] = modules


def fits_stock_shape(student: Any, narrow: dict[Site, dict[str, Any]], base: str) -> bool:
    """Whether a stock config can say how narrow a student is, since all blocks are alike; then its own one does."""
    widths: dict[str, int] = {}
    for entry in narrow.values():
        if any(widths.setdefault(name, number) != number for name, number in entry["fields"].items()):
            return False
    if any(site.part == "attention" for site in narrow):
        widths["head_dim"] = architectures.head_dim(student.config)
    config = copy.deepcopy(student.config)
    config.__class__, model = stock_classes(base)
    config.__dict__.pop("model_type", None)
    config.per_layer_config = config.billhook = None
    try:
        for name, number in widths.items():
            setattr(config, name, number)
        with torch.device("meta"):
            built = model(config)
    except (AttributeError, ValueError):  # Falcon's and GPT-2's heads share out the width
        return False
    if shape_signature(built) != shape_signature(student):
        return False
    for name, number in widths.items():
        setattr(student.config, name, number)
    return True


def shape_signature(model: nn.Module) -> dict[str, Any]:
    """What a model is but for its values: shapes, and the numbers that its modules know of themselves."""
    told: dict[str, Any] = {
        name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, module in list(model.named_modules())[1:]:
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        told[f"{name}."] = type(module).__name__, {**numbers, "layer_idx": None}
    return told
