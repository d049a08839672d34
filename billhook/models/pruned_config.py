"""What a pruned checkpoint says of itself, and the classes of transformers that read it.

It stands in the config, under `billhook` and `per_layer_config`, and in the file billhook.json beside it. One function
reads each, and one writes each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from billhook.core.errors import ModelError, PlanError
from billhook.core.files.foreign_files import AGAIN, shown, validated
from billhook.core.plan import PARTS, Part, Plan, Site, format_ranges, parse_ends, parse_ranges
from billhook.core.results.json_form import JsonObject
from billhook.models import architectures
from billhook.models.modeling_billhook import pruned_classes, skipped_parts, stock_fields
from billhook.models.transformers_internals import stock_classes

MANIFEST = "billhook.json"  # beside the weights of every checkpoint that Billhook writes


def register() -> None:
    """Teach transformers the model types that Billhook writes, so that they load without trust_remote_code."""
    for model_type in architectures.ARCHITECTURES:
        try:
            config_class = pruned_classes(stock_classes(model_type)[0])["AutoConfig"]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"There is a row for the architecture {model_type}, and transformers {transformers.__version__} knows "
                "no causal language model of that type. Upgrade transformers, or uninstall the package that adds it."
            ) from error
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


@dataclass(frozen=True, slots=True)
class NarrowedSite:
    """What a config says of a narrowed site.

    `groups`: the numbers of the channel groups that it keeps, `whole`: how many it had once. `widths`: in upstream's
    spelling. `module`: shapes of its parameters and attributes of its modules, as the modelling file builds them; None
    where the stock config says it.
    """

    groups: tuple[int, ...]
    whole: int
    widths: Mapping[str, int] = field(default_factory=dict)
    module: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PrunedConfig:
    """What the config of a checkpoint says of its pruning; every site by its place in the unpruned model.

    `blocks`: of the unpruned model; `kept_blocks`: those that are kept, in order; `lacking`: sites that are missing
    from them. `zeroed`: sites that hold zeros in a stock shape. `narrowed`: kept groups of narrowed sites.
    `patches`: the shape of the patch that a repair put at a site. `factors`: {linear map in its block: rank}, of those
    that are two smaller ones.
    """

    blocks: int
    kept_blocks: tuple[int, ...]
    lacking: tuple[Site, ...] = ()
    zeroed: tuple[Site, ...] = ()
    narrowed: Mapping[Site, NarrowedSite] = field(default_factory=dict)
    patches: Mapping[Site, Mapping[str, Any]] = field(default_factory=dict)
    factors: Mapping[Site, Mapping[str, int]] = field(default_factory=dict)
    shortcuts: bool = False

    @property
    def removed(self) -> Plan:
        """The plan of all that is missing: blocks that are not kept, and sites of those that are."""
        gone = {Site(block, part) for block in set(range(self.blocks)) - set(self.kept_blocks) for part in PARTS}
        return Plan(frozenset(gone | set(self.lacking)))

    def index(self, site: Site) -> int:
        """Return where the block of a site is now."""
        return self.kept_blocks.index(site.block)

    def group_ids(self, site: Site, there: int) -> tuple[tuple[int, ...], int]:
        """Return the numbers of the channel groups that a site has, of which `there` are there, and how many it had."""
        told = self.narrowed.get(site)
        return (told.groups, told.whole) if told is not None else (tuple(range(there)), there)


# -- what a config may say ------------------------------------------------------------------------------------------


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


_Index = Annotated[int, Field(ge=0, le=100_000)]
_Size = Annotated[int, Field(ge=0, le=10**9)]
_SiteName = Annotated[str, Field(pattern=r"^(attention|mlp)\.\d{1,6}$")]


class _Groups(_Closed):
    kept: Annotated[str, Field(pattern=r"^\d{1,9}(-\d{1,9})?( \d{1,9}(-\d{1,9})?)*$")]
    of: Annotated[int, Field(ge=1, le=10_000_000)]


class _Patch(_Closed):
    bias: bool
    gain: bool
    rank: _Size


class _NarrowModule(_Closed):
    shapes: dict[str, Annotated[list[_Size], Field(max_length=4)]]
    attributes: dict[str, JsonObject]


class _PartModules(_Closed):
    zero: list[str]
    drop: list[str]
    outputs: Annotated[int, Field(ge=1, le=2)]


class _Section(_Closed):
    """The key `billhook` of a config."""

    blocks: Annotated[int, Field(ge=1, le=100_000)]
    kept_blocks: Annotated[list[_Index], Field(min_length=1)]
    groups: dict[_SiteName, _Groups] = {}
    zeroed: list[_SiteName] = []
    blocks_path: str = ""
    parts: dict[Part, _PartModules] = {}
    narrow: dict[_SiteName, _NarrowModule] = {}
    patches: dict[_SiteName, _Patch] = {}
    factors: dict[_SiteName, dict[str, Annotated[int, Field(ge=1, le=10**9)]]] = {}
    shortcuts: bool = False


class _Layer(_Closed):
    """An entry of `per_layer_config` in a config of ours."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, _Size]

    skip: list[Part] = []


class _Layers(_Closed):
    per_layer_config: dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], _Layer] = {}


def check_section(raw: JsonObject, blocks: int, path: Path) -> None:
    """Raises ModelError, naming the key, unless what a raw config says of our pruning fits its number of blocks."""
    ours = str(raw["model_type"]).startswith("billhook-")
    if "billhook" not in raw and not ours:
        return
    section = validated(_Section, raw.get("billhook"), f"The section billhook of {path}")
    layers = validated(_Layers, {"per_layer_config": raw.get("per_layer_config") or {}}, str(path)).per_layer_config
    kept = section.kept_blocks
    wrong: tuple[str, object] | None = None
    if kept != sorted(set(kept)) or kept[-1] >= section.blocks or len(kept) != blocks:
        wrong = "kept_blocks", kept
    elif bad := [index for index in layers if int(index) >= blocks]:
        wrong = "per_layer_config", bad
    elif ours and not (section.blocks_path and set(section.parts) == set(PARTS)):
        wrong = "blocks_path or parts", (section.blocks_path, sorted(section.parts))
    elif bad := [name for name in section.groups if Site.parse(name).block not in kept]:
        wrong = "groups", bad
    elif bad := [
        name for name in (*section.narrow, *section.patches, *section.factors) if Site.parse(name).block >= blocks
    ]:
        wrong = "narrow, patches or factors", bad
    elif bad := [name for name, each in section.groups.items() if not _fit(each)]:
        wrong = f"groups.{bad[0]}.kept", section.groups[bad[0]].kept
    if wrong is not None:
        raise ModelError(
            f"The section billhook of {path} has {wrong[0]}: {shown(wrong[1])}, which does not fit its {blocks} "
            f"blocks. {AGAIN}"
        )


def _fit(groups: _Groups) -> bool:
    """Whether ranges of channel groups ascend within their number."""
    try:
        return parse_ends(groups.kept)[-1][1] < groups.of
    except PlanError:
        return False


def read_config(config: Any) -> PrunedConfig:
    """Return what a config says of a pruning; of a model that was never pruned, that all its blocks are kept."""
    told: JsonObject = getattr(config, "billhook", None) or {}
    kept = tuple(told.get("kept_blocks", range(config.num_hidden_layers)))
    layers = {int(i): entry for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    lacking = [Site(kept[i], _part(part)) for i, parts in skipped_parts(config).items() for part in parts]
    narrowed: dict[Site, NarrowedSite] = {}
    for name, groups in told.get("groups", {}).items():
        site = Site.parse(name)
        index = kept.index(site.block) if site.block in kept else None
        own = layers.get(index, {}) if index is not None else {}
        names = (*architectures.CONFIG_FIELDS[site.part], *architectures.EXPERT_FIELDS)
        widths = {name: own[name] for name in names if name in own}
        module = told.get("narrow", {}).get(f"{site.part}.{index}")
        narrowed[site] = NarrowedSite(parse_ranges(groups["kept"]), int(groups["of"]), widths, module)

    def by_site(key: str) -> dict[Site, Mapping[str, Any]]:
        places = ((Site.parse(name), entry) for name, entry in told.get(key, {}).items())
        return {Site(kept[place.block], place.part): entry for place, entry in places}

    return PrunedConfig(
        int(told.get("blocks", config.num_hidden_layers)),
        kept,
        tuple(sorted(lacking)),
        tuple(sorted(map(Site.parse, told.get("zeroed", ())))),
        narrowed,
        by_site("patches"),
        by_site("factors"),
        has_shortcuts(config),
    )


def has_shortcuts(config: Any) -> bool:
    """Return whether the residual stream of a model has a basis of its own at each boundary."""
    return bool((getattr(config, "billhook", None) or {}).get("shortcuts"))


def require_prunable(pruned: PrunedConfig, name: str) -> None:
    """Raise ModelError for a model with matrices in its shortcuts, of which nothing can be removed."""
    if pruned.shortcuts:
        raise ModelError(
            f"{name} has a basis for each boundary of its residual stream, and a matrix in each shortcut: nothing in "
            "it can be removed, narrowed or factored. Prune the model that it was made of, by whole blocks, and slice "
            "what that leaves."
        )


def write_config(config: Any, pruned: PrunedConfig, path: str, parts: Mapping[str, Any]) -> None:
    """Say in a config what `read_config` reads; in a config of a stock class nothing that needs the modelling file.

    `path`: where the blocks are; `parts`: which modules make up a part, for the modelling file.
    """
    told: JsonObject = {"blocks": pruned.blocks, "kept_blocks": list(pruned.kept_blocks)}
    config.billhook = told
    if pruned.narrowed:
        told["groups"] = {
            str(site): {"kept": format_ranges(each.groups), "of": each.whole}
            for site, each in sorted(pruned.narrowed.items())
        }
    if pruned.zeroed:
        told["zeroed"] = list(map(str, pruned.zeroed))
    own: dict[int, JsonObject] = {}
    for site in pruned.lacking:
        own.setdefault(pruned.index(site), {}).setdefault("skip", []).append(site.part)
    modules: JsonObject = {}
    for site, each in sorted(pruned.narrowed.items()):
        if each.widths:
            own.setdefault(pruned.index(site), {}).update(each.widths)
        if each.module is not None:
            modules[f"{site.part}.{pruned.index(site)}"] = each.module
    config.per_layer_config = {index: own[index] for index in sorted(own)} or None
    if not (own or pruned.factors or pruned.shortcuts):
        return
    told |= {"blocks_path": path, "parts": parts} | ({"narrow": modules} if modules else {})
    told |= {"shortcuts": True} if pruned.shortcuts else {}
    for key, entries in (("patches", pruned.patches), ("factors", pruned.factors)):
        if entries:
            told[key] = {f"{site.part}.{pruned.index(site)}": dict(each) for site, each in sorted(entries.items())}


def write_manifest(folder: Path, teacher: str, blocks: int, plan: Plan, earlier: Plan) -> None:
    """Write billhook.json: the plan that was taken out of the model of a fingerprint, and what that lacked before.

    `read_plan` of core/plan_files.py reads it.
    """
    manifest = {
        "model": teacher,
        "blocks": blocks,
        "removed": plan.names(),
        "narrowed": plan.narrowed_names(),
        "already_removed": earlier.names(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _part(name: str) -> Part:
    assert name in PARTS
    return "attention" if name == "attention" else "mlp"


def stock_shape(config: Any, base: str, widths: Mapping[str, float]) -> nn.Module | None:
    """An empty model of the stock type with the config's other numbers and these widths; None if the type refuses them.

    Falcon and GPT-2 share the width out among the heads; that of Llama is a multiple of their number.
    """
    config_class, model_class = stock_classes(base)
    try:
        with torch.device("meta"):
            built: nn.Module = model_class(config_class.from_dict({**stock_fields(config.to_dict()), **widths}))
    except (AttributeError, ValueError, StrictDataclassError):
        return None
    return built


def fits_stock_shape(student: Any, narrow: Mapping[Site, NarrowedSite], base: str) -> bool:
    """Whether a stock config can say how narrow a student is, since all blocks are alike; then its own one does."""
    widths: dict[str, int] = {}
    for entry in narrow.values():
        if any(widths.setdefault(name, number) != number for name, number in entry.widths.items()):
            return False
    if any(site.part == "attention" for site in narrow):
        widths["head_dim"] = architectures.head_dim(student.config)
    built = stock_shape(student.config, base, widths)
    if built is None or shape_signature(built) != shape_signature(student):
        return False
    for name, number in widths.items():
        setattr(student.config, name, number)
    return True


def shape_signature(model: nn.Module) -> JsonObject:
    """What a model is but for its values: shapes, and the numbers that its modules know of themselves."""
    told: JsonObject = {
        name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, module in list(model.named_modules())[1:]:
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        told[f"{name}."] = type(module).__name__, {**numbers, "layer_idx": None}
    return told
