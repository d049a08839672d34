"""The table of architectures. Only this file knows module names; a new architecture is one row, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook import width
from billhook.errors import ModelError, PlanError, nearest
from billhook.modeling_billhook import PatchModule
from billhook.plan import PARTS, Anatomy, Part, SharedNorms, Site, SiteSize, Unassigned, parse_ranges

Config = Any  # a transformers config; its classes share no useful static type


def _never(config: Config) -> bool:
    return False


def _nothing(config: Config) -> str | None:
    return None


def _kv_heads(config: Config) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _all_heads(config: Config) -> int:
    return int(config.num_attention_heads)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where an architecture keeps its parts.

    `mlp` names the modules whose parameters are the site: the last one gives the output, the others feed it. Norms
    belong to a site if nothing else reads them; names that a block does not have are passed over. `parallel`: both
    parts of a block read the same residual stream. `shared_norm`: they also share its norm, which then stays.
    `attention_output`, `mlp_output`: the linear module inside each part whose output is added to the residual stream;
    "" where it is the part itself, None where a norm stands between. `final`: what stands between the last block and
    the head, in order.
    The head is the output embedding (its bias counts), times `config.<head_scale>`, then soft-capped by
    `config.<head_softcap>`. `refuse` gives a reason why a config of this type cannot be pruned.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    attention_output: str | None = "o_proj"
    mlp_output: str | None = "down_proj"
    mlp_outputs: int = 1  # 2: the MLP returns a pair, as attention does everywhere
    block_outputs: int = 1  # 2: the block returns a pair
    final: tuple[str, ...] = ("model.norm",)
    parallel: Callable[[Config], bool] = _never
    shared_norm: Callable[[Config], bool] = _never
    kv_heads: Callable[[Config], int] = _kv_heads
    head_scale: str | None = None
    head_softcap: str | None = None
    refuse: Callable[[Config], str | None] = _nothing

    def path(self, part: Part) -> str:
        """Where the modules of a part lie in its block: "" in the block itself."""
        return self.attention if part == "attention" else self.mlp[0] if len(self.mlp) == 1 else ""

    def parts(self, block: nn.Module, config: Config) -> dict[str, dict[str, Any]]:
        """What removing a part of `block` takes: module names to `zero`, to `drop`, and how many `outputs` to give."""
        own = not self.shared_norm(config)

        def norms(names: tuple[str, ...]) -> list[str]:
            return [name for name in names if own and getattr(block, name, None) is not None]

        return {
            "attention": {"zero": [self.attention], "drop": norms(self.attention_norms), "outputs": 2},
            "mlp": {
                "zero": [self.mlp[-1]],
                "drop": [*self.mlp[:-1], *norms(self.mlp_norms)],
                "outputs": self.mlp_outputs,
            },
        }


def _refuse_gpt2(config: Config) -> str | None:
    if config.scale_attn_by_inverse_layer_idx:
        return "scale_attn_by_inverse_layer_idx makes a block's meaning depend on its position"
    return "add_cross_attention is set" if config.add_cross_attention else None


def _refuse_opt(config: Config) -> str | None:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=false normalises the residual stream itself, so no site can be taken out of it"
    return None


_LLAMA = Architecture()
_SANDWICH = replace(
    _LLAMA,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    attention_output=None,
    mlp_output=None,
    head_softcap="final_logit_softcapping",
)


def _always(config: Config) -> bool:
    return True


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "phi": replace(
        _LLAMA,
        attention_output="dense",
        mlp_output="fc2",
        parallel=_always,
        shared_norm=_always,
        final=("model.final_layernorm",),
    ),
    "phi3": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": replace(
        _LLAMA,
        attention_norms=("post_attention_layernorm",),
        mlp_norms=("post_feedforward_layernorm",),
        attention_output=None,
        mlp_output=None,
    ),
    "stablelm": replace(
        _LLAMA,
        parallel=lambda config: bool(config.use_parallel_residual),
        shared_norm=lambda config: bool(config.use_parallel_residual),
    ),
    "cohere": replace(_LLAMA, parallel=_always, shared_norm=_always, head_scale="logit_scale"),
    "gpt_oss": replace(_LLAMA, mlp_outputs=2),
    "nemotron": _LLAMA,
    "gpt2": Architecture(
        blocks="transformer.h",
        attention="attn",
        attention_norms=("ln_1",),
        mlp_norms=("ln_2",),
        attention_output="c_proj",
        mlp_output="c_proj",
        kv_heads=_all_heads,
        final=("transformer.ln_f",),
        refuse=_refuse_gpt2,
    ),
    "opt": Architecture(
        blocks="model.decoder.layers",
        mlp=("fc1", "fc2"),
        attention_norms=("self_attn_layer_norm",),
        mlp_norms=("final_layer_norm",),
        attention_output="out_proj",
        mlp_output="",
        kv_heads=_all_heads,
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        refuse=_refuse_opt,
    ),
    "falcon": Architecture(
        blocks="transformer.h",
        attention="self_attention",
        attention_norms=("ln_attn", "input_layernorm"),
        mlp_norms=("ln_mlp", "post_attention_layernorm"),
        attention_output="dense",
        mlp_output="dense_4h_to_h",
        block_outputs=2,
        final=("transformer.ln_f",),
        parallel=lambda config: bool(config.new_decoder_architecture or config.parallel_attn),
        shared_norm=lambda config: bool(
            (config.new_decoder_architecture and config.num_ln_in_parallel_attn == 1)
            or (config.parallel_attn and not config.new_decoder_architecture)
        ),
        # The new decoder repeats its groups before they are cached.
        kv_heads=lambda config: int(
            1 if config.multi_query and not config.new_decoder_architecture else config.num_attention_heads
        ),
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        attention="attention",
        attention_output="dense",
        mlp_output="dense_4h_to_h",
        kv_heads=_all_heads,
        final=("gpt_neox.final_layer_norm",),
        parallel=lambda config: bool(config.use_parallel_residual),
    ),
}


def architecture_of(config: Config) -> Architecture:
    """The row of a config's model type; a type `billhook-llama` has the row of `llama`.

    Raises ModelError for a type without a row, or for a config of a known type that cannot be pruned.
    """
    model_type = base_type(config.model_type)
    if model_type not in ARCHITECTURES and (reason := unsupported_reason(config)):
        raise ModelError(reason)
    if model_type not in ARCHITECTURES:
        near = nearest(model_type, ARCHITECTURES)
        guess = f" (the nearest known type is {near})" if near else ""
        raise ModelError(
            f"There is no row for the architecture {model_type!r}{guess}. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    reason = ARCHITECTURES[model_type].refuse(config)
    if reason:
        raise ModelError(f"This {model_type} model cannot be pruned: {reason}.")
    return ARCHITECTURES[model_type]


def unsupported_reason(config: Config) -> str | None:
    """Why no row would help a type that has none: it is not a stack of blocks with an attention and an MLP each."""
    text = getattr(getattr(config, "text_config", None), "model_type", "")
    if text in ARCHITECTURES:
        return f"{config.model_type} is multimodal and not supported. Save its text model alone, as type {text}."
    if text:
        kind = "multimodal"
    elif getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif not _has_heads(config) or any(k.startswith(("mamba_", "ssm_")) for k in config.to_dict()):
        kind = "a state-space or recurrent model"
    else:
        return None
    guide = "Billhook prunes decoder-only language models of attention and MLP blocks, of these types"
    return f"{config.model_type} is {kind}. {guide}: {', '.join(sorted(ARCHITECTURES))}."


def _has_heads(config: Config) -> bool:
    """Whether a config tells of attention heads, one number or one a layer."""
    try:
        return hasattr(config, "num_attention_heads")
    except RuntimeError:  # transformers' own, where layers differ
        return True


def base_type(model_type: str) -> str:
    """The stock type behind one of ours: `llama` for `billhook-llama`."""
    return model_type.removeprefix("billhook-")


def blocks_of(model: nn.Module, row: Architecture) -> nn.ModuleList:
    """The list of decoder blocks. Raises ModelError if the model does not have what its row says."""
    try:
        blocks = model.get_submodule(row.blocks)
    except AttributeError as error:
        raise ModelError(f"The model has no {row.blocks}, where its architecture keeps the blocks: {error}.") from error
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{row.blocks} is a {type(blocks).__name__} and not a list of blocks, where its architecture keeps the "
            "blocks. Correct its row in billhook/arch.py."
        )
    return blocks


def site_modules(block: nn.Module, part: Part, row: Architecture, config: Config) -> list[nn.Module]:
    """The modules whose parameters are the site, norms of its own included. Raises ModelError for a row that names
    others than the block has."""
    names = row.parts(block, config)[part]
    wanted = (*names["zero"], *names["drop"])
    if missing := [name for name in wanted if not hasattr(block, name)]:
        raise ModelError(
            f"A block of this model has no {', '.join(missing)}, which its architecture names as its {part}: it has "
            f"{', '.join(name for name, _ in block.named_children())}. Correct its row in billhook/arch.py."
        )
    return [getattr(block, name) for name in wanted]


def output_projection(block: nn.Module, part: Part, row: Architecture, config: Config) -> str | None:
    """The name inside `block` of the linear module whose output a part adds to the residual stream; None without one.

    Mixtures of experts have none: each token has its own.
    """
    inside = {"attention": row.attention_output, "mlp": row.mlp_output}[part]
    if inside is None:
        return None
    whole = row.parts(block, config)[part]["zero"][0]
    name = f"{whole}.{inside}" if inside else whole
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    return name if isinstance(module, nn.Linear | Conv1D) else None


def parameter_owners(block: nn.Module, row: Architecture, config: Config) -> dict[str, Part | None]:
    """{parameter of a block: the part that it belongs to, or None where both parts share it}."""
    of = {
        id(p): part for part in PARTS for module in site_modules(block, part, row, config) for p in module.parameters()
    }
    return {name: of.get(id(p)) for name, p in block.named_parameters()}


def as_outputs_by_inputs(block: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A view of `value`, shaped like the parameter `name` of a block, as [..., outputs, inputs].

    A bias, and the weight of a norm, have one input an output.
    """
    module = block.get_submodule(name.rpartition(".")[0])
    if value.dim() < 2 or name.endswith("bias"):
        return value[..., None]
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)  # of GPT-2; experts of GPT-OSS
    return value.transpose(-1, -2) if transposed else value


def channel_layout(block: nn.Module, part: Part, row: Architecture, config: Config) -> width.ChannelLayout:
    """The channel groups of a part of a block. Raises PlanError where it has none, and says why."""
    of = width.find_layout(block, part, row.path(part), config)
    if isinstance(of, str):
        raise PlanError(f"This {part} cannot be narrowed: {of}. Remove it whole, or leave it.")
    return of


def channel_group_ids(config: Config, site: Site, there: int) -> tuple[tuple[int, ...], int]:
    """The numbers of the channel groups that a site still has, of which `there` are there; how many it had once."""
    told = (getattr(config, "billhook", None) or {}).get("groups", {}).get(str(site))
    return (parse_ranges(told["kept"]), int(told["of"])) if told else (tuple(range(there)), there)


def anatomy(
    model: nn.Module, config: Config, *, positions: Iterable[int], removed: Iterable[Site], blocks: int, item_bytes: int
) -> Anatomy:
    """The sites of a loaded model and their sizes.

    `positions`: where the model's blocks stood in the unpruned model of `blocks` blocks; `removed`: sites that it
    already lacks; `item_bytes`: bytes of one parameter or cache entry in the checkpoint's dtype.
    """
    row, gone = architecture_of(config), set(removed)
    kv_bytes = 2 * row.kv_heads(config) * width.head_dim(config) * item_bytes
    sizes: list[SiteSize] = []
    shared: list[SharedNorms] = []
    owned: set[int] = set()
    for position, block in zip(positions, blocks_of(model, row), strict=True):
        for part in PARTS:
            site = Site(position, part)
            if site in gone:
                continue
            modules = site_modules(block, part, row, config)
            parameters = _parameters(modules)
            owned |= {id(p) for p in parameters}
            count = sum(p.numel() for p in parameters)
            of = width.find_layout(block, part, row.path(part), config)
            kv, group = (kv_bytes if part == "attention" else 0), None
            mine: tuple[int, ...] = ()
            experts = channels = 1
            if not isinstance(of, str):
                experts, channels = of.experts, int(of.output.index.shape[1]) // max(1, of.heads)
                mine, whole = channel_group_ids(config, site, of.groups)
                kv = kv * of.groups // whole if of.own_kv else kv
                picked = getattr(config, "num_experts_per_tok", None) or 1
                group = width.group_size(block, of, item_bytes, kv, picked)
            flops = _flops(modules, config)
            step = 1 if experts == 1 else width.OF_EXPERTS
            sizes.append(SiteSize(site, count, count * item_bytes, kv, flops, 0, mine, group, experts, channels, step))
        common = [p for p in _parameters([block]) if id(p) not in owned]
        patched = any(isinstance(module, PatchModule) for module in block.modules())  # then the block never goes
        owned |= set() if patched else {id(p) for p in common}
        if common and not patched:
            count = sum(p.numel() for p in common)
            shared.append(SharedNorms(position, count, count * item_bytes))
    rest = [p for p in _parameters([model]) if id(p) not in owned]
    count = sum(p.numel() for p in rest)
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_flops = 2 * int(head.weight.numel()) if head is not None else 0
    others = Unassigned(count, count * item_bytes, head_flops)
    return Anatomy(base_type(config.model_type), blocks, tuple(sizes), others, tuple(shared))


def _parameters(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Every parameter once, tied ones too."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _flops(modules: Iterable[nn.Module], config: Config) -> int:
    """2 per weight that one token meets; of the experts (3-d weights) only those that the router picks."""
    picked = getattr(config, "num_experts_per_tok", None) or 1
    flops = 0
    for module in modules:
        for name, p in module.named_parameters():
            if p.dim() == 3:
                flops += 2 * p.numel() * picked // p.shape[0]
            elif p.dim() == 2 and not name.endswith("bias"):
                flops += 2 * p.numel()
    return flops
