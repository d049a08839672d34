"""Everything that Billhook takes from transformers' private or internal modules: nothing else imports or calls those.

Each name has a test of its own in tests/models/test_transformers_internals.py, which fails where upstream changes.
The modelling file that checkpoints carry is the one exception, since it must stand alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D as Conv1D

Transform = Any  # one of transformers' WeightRenaming and WeightConverter
LAYER_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")  # of configs: how often a kind of block comes
LINEAR_MAPS = (nn.Linear, Conv1D)
REPEATABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a KV cache that `batch_repeat_interleave` can


# -- modules ----------------------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map: torch's, or GPT-2's."""
    return isinstance(module, LINEAR_MAPS)


def inputs_first(module: nn.Module) -> bool:
    """Return whether a module keeps its weight as [inputs, outputs]: GPT-2's linear maps, the experts of GPT-OSS."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


# -- classes and configs ----------------------------------------------------------------------------------------------


def stock_classes(model_type: str) -> tuple[Any, Any]:
    """Return transformers' config class and causal language model of a type. Raises ValueError for an unknown one."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    return config_class, transformers.AutoModelForCausalLM._model_mapping[config_class]


def config_of(folder: Path, trust_remote_code: bool) -> Any:
    """Return the config of a checkpoint, without what it says of kernels: every model runs on transformers' choice.

    A checkpoint that was saved with another kernel for attention or experts would not load elsewhere, or compute
    otherwise than its copies.
    """
    config = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return config


def runs_own_code(model: Any) -> bool:
    """Return whether the class of a loaded model comes from its checkpoint's own code."""
    return type(model).__module__.startswith("transformers_modules")


def forget_quantisation(model: Any) -> None:
    """Make a model whose weights were dequantised on loading one that was never quantised."""
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


def forget_layer_pattern(config: Any) -> None:
    """Take out of a config how often a block of another kind comes, where it says block by block which those are."""
    for name in LAYER_PATTERNS:
        config.__dict__.pop(name, None)


def tied_names(model: Any) -> list[str]:
    """Return the names of the parameters that a model ties to others, and a checkpoint leaves out."""
    return list((model._tied_weights_keys or {}) if model.config.tie_word_embeddings else ())


def generation_config_of(folder: Path) -> tuple[transformers.GenerationConfig, str]:
    """Return the generation config of a checkpoint, and why its own file cannot be read, if so.

    Without a file that can be read it is what the model config says, or else a bare one.
    """
    why = ""
    from_config: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
    for more in ({}, from_config) if (folder / "generation_config.json").is_file() else (from_config,):
        try:
            return transformers.GenerationConfig.from_pretrained(str(folder), **more), why
        except Exception as error:  # a file of others, which transformers hardly checks
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return transformers.GenerationConfig(), why


# -- the KV cache -----------------------------------------------------------------------------------------------------


def new_cache(model: Any) -> Any:
    """Return an empty KV cache for a model."""
    return DynamicCache(config=model.config)


def cache_name(model: Any) -> str:
    """Return what a model calls the KV cache that it takes and returns: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def logits_at(model: Any, ids: torch.Tensor, wanted: torch.Tensor, cache: Any | None) -> torch.Tensor:
    """Return the logits of the `wanted` positions [lines, time] of `ids`, line by line: [wanted, vocabulary].

    The lines continue what is in `cache`, which is extended. Before 5.21 a model knows only positions of all lines.
    """
    given = {"input_ids": ids, cache_name(model): cache, "use_cache": cache is not None}
    if hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
        return model(**given, logits_to_keep=wanted).logits  # type: ignore[no-any-return]
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: (inputs[0][wanted.to(inputs[0].device)],)
    )
    try:
        return model(**given).logits  # type: ignore[no-any-return]
    finally:
        hook.remove()


# -- weights ----------------------------------------------------------------------------------------------------------


def names_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Return the parameters that transformers keeps in float32 in a model of `dtype`."""
    plan = model._get_dtype_plan(dtype)
    wide = build_glob_alternation(list(plan))[0] if plan else None
    return [name for name, _ in model.named_parameters() if wide is not None and wide.search(name)]


def fill_buffers(model: Any) -> None:
    """Give the real buffers of a model their values; parameters on the meta device stay without one."""
    model.initialize_weights()


def tied_parameters(model: Any) -> dict[str, str]:
    """Return {parameter: the parameter that it is tied to}. Taking an entry out of it unties the two."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def names_on_disk(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names of checkpoints on the Hub, experts apart again."""
    with torch.no_grad():
        told: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return told


@dataclass(frozen=True, slots=True)
class Conversion:
    """How transformers makes parameters of tensors in the file: one of one, or one of many experts' …"""

    transform: Transform  # a fresh one; its copies are used up
    first: str  # the parameter that names it
    parts: list[tuple[str, str]] = field(default_factory=list)  # (transformers' pattern, name in the file), in order
    targets: list[str] = field(default_factory=list)  # the parameters that it makes

    def split(self) -> list[Conversion]:
        """Return one conversion an expert, each a slice of the first axis, if it only stacks them: none is in memory
        twice."""
        merge, *rest = getattr(self.transform, "operations", None) or [None]
        stacks = isinstance(merge, MergeModulelist) and merge.dim == 0
        if not stacks or not all(isinstance(step, Concatenate) and step.dim > 0 for step in rest):
            return [self]
        columns: dict[str, list[tuple[str, str]]] = {}
        for pattern, name in self.parts:
            columns.setdefault(pattern, []).append((pattern, name))
        return [replace(self, parts=list(row)) for row in zip(*columns.values(), strict=True)]

    def convert(self, tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Return {parameter: tensor} of the tensors of the file. What is only renamed is not copied."""
        transform = copy.deepcopy(self.transform)
        for pattern, name in self.parts:
            transform.add_tensor(self.first, name, pattern, tensors[name])
        made = transform.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def conversions(model: Any, names: Sequence[str]) -> tuple[list[Conversion], list[str]]:
    """Return how the tensors `names` of a file become parameters of `model`, and those that become nothing.

    The same steps as in transformers' own loader; `model` remembers which conversions were used, as it does there.
    """
    wanted, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    recipes: dict[str, Conversion] = {}
    left: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if new not in wanted and name in wanted:
            new, pattern = rename_source_key(name, [], [], prefix, wanted)
        if new not in wanted or (pattern is None and new in recipes):
            left.add(new if new not in wanted else name)
            continue
        if new not in recipes:
            fresh = WeightRenaming(name, new) if pattern is None else copy.deepcopy(by_pattern[pattern])
            recipes[new] = Conversion(fresh, new)
        recipes[new].parts.append((name if pattern is None else pattern, name))
    unexpected = _without_ignored(model, left)
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return list(recipes.values()), sorted(unexpected)


def _without_ignored(model: Any, unexpected: Iterable[str]) -> Iterator[str]:
    """Give those of the names that a model's class does not say to pass over."""
    issues = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(issues)
    yield from issues.unexpected_keys
