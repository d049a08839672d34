"""The architectures that Billhook knows, a row each. Nothing else knows the names of modules.

Other packages add rows by an entry point of the group `billhook.architecture`, named by the model type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from billhook.core.errors import ModelError, nearest
from billhook.core.plan import Part
from billhook.core.registry import Entries
from billhook.core.results.json_form import JsonObject
from billhook.models.transformers_internals import forget_layer_pattern

Config = Any  # a transformers config; its classes share no useful static type

# What configs call the widths of a part; the first that one has counts.
CONFIG_FIELDS: dict[Part, tuple[str, ...]] = {
    "attention": ("num_attention_heads", "num_key_value_heads", "num_kv_heads"),
    "mlp": ("moe_intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "intermediate_size"),
}
OF_EXPERTS_ONLY = "moe_intermediate_size"  # which of them is no width of a dense MLP
EXPERT_FIELDS = ("num_local_experts", "num_experts")  # what configs call the number of experts
MODULE_EXPERTS = ("num_experts",)  # what a router and a module of experts call it
MODULE_WIDTHS = ("intermediate_size", "intermediate_dim")  # what modules of an MLP call their width
BLOCK_KINDS = "layer_types"  # a list in configs: what kind of attention each block has
PER_BLOCK_LISTS = (BLOCK_KINDS, "mlp_layer_types", "no_rope_layers", "kv_sharing_modes")  # of configs, one entry each
EXPERT_MULTIPLE = 8  # neurons of an expert come in so many: grouped products want 16 bytes between rows


def _never(config: Config) -> bool:
    return False


def _no_reason(*_: object) -> str | None:
    return None


def _kv_heads(config: Config) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _all_heads(config: Config) -> int:
    return int(config.num_attention_heads)


def _one_kv_head(config: Config) -> bool:
    return getattr(config, "num_key_value_heads", None) == 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where an architecture keeps its parts.

    `mlp` names the modules whose parameters are the site: the last one gives the output, the others feed it. Norms
    belong to a site if nothing else reads them; names that a block does not have are passed over. `parallel`: both
    parts of a block read the same residual stream. `shared_norm`: they also share its norm, which then stays.
    `final`: what stands between the last block and the head, in order. The head is the output embedding (its bias
    counts), times `config.<head_scale>`, then soft-capped by `config.<head_softcap>`. `refuse` gives a reason why a
    config of this type cannot be pruned.

    Inside a part, for channel groups: `attention_inputs` and `mlp_inputs` are the linear modules that read the
    residual stream, `attention_output` and `mlp_output` those whose output is added to it; `norm_before_sum`: a norm
    stands between. `fused_attention`: one module gives queries, keys and values, all of each in turn, or `by group` the
    queries, the key and the value of each KV group; `fused_mlp`: one module gives gate and up. `head_norms`,
    `head_sinks`: a norm of queries and one of keys, and a number for each head. `kv_heads`: heads in the KV cache;
    `shared_kv`: all heads share one key and value; `queries_per_group`: of a KV group, where they are fused by group.
    `no_groups` gives a reason why an attention has no channel groups. `heads_from_config`: it asks its config how many
    heads it has. `experts`: the module of a mixture of experts, `expert_input` and `expert_output` its stacked weights;
    `gate_and_up_in_turn`: they are [experts, inputs, outputs], and gate and up alternate. `router`: the module beside
    the experts that chooses among them, whose parameters have a row for each.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    mlp_outputs: int = 1  # 2: the MLP returns a pair, as attention does everywhere
    block_outputs: int = 1  # 2: the block returns a pair
    final: tuple[str, ...] = ("model.norm",)
    parallel: Callable[[Config], bool] = _never
    shared_norm: Callable[[Config], bool] = _never
    head_scale: str | None = None
    head_softcap: str | None = None
    refuse: Callable[[Config], str | None] = _no_reason

    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"
    norm_before_sum: bool = False
    fused_attention: Literal["", "in turn", "by group"] = ""
    fused_mlp: bool = False
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    head_sinks: str = "sinks"
    kv_heads: Callable[[Config], int] = _kv_heads
    shared_kv: Callable[[Config], bool] = _one_kv_head
    queries_per_group: Callable[[Config], int] = lambda config: 1
    no_groups: Callable[[nn.Module, Config], str | None] = _no_reason
    heads_from_config: bool = False
    experts: str = "experts"
    expert_input: str = "gate_up_proj"
    expert_output: str = "down_proj"
    gate_and_up_in_turn: bool = False
    router: str = "gate"

    def path(self, part: Part) -> str:
        """Where the modules of a part lie in its block: "" in the block itself."""
        return self.attention if part == "attention" else self.mlp[0] if len(self.mlp) == 1 else ""

    def parts(self, block: nn.Module, config: Config) -> dict[str, JsonObject]:
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


def _alibi(attention: nn.Module, config: Config) -> str | None:
    return "its ALiBi slopes are made for all heads at once" if config.alibi else None


def _norms_of_single_heads(attention: nn.Module, config: Config) -> str | None:
    return "each head has a norm module of its own" if config.qk_layernorm else None


_LLAMA = Architecture()
_SANDWICH = replace(
    _LLAMA,
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_before_sum=True,
    head_softcap="final_logit_softcapping",
)


def _always(config: Config) -> bool:
    return True


_ROWS: dict[str, Architecture] = {
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
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        parallel=_always,
        shared_norm=_always,
        final=("model.final_layernorm",),
    ),
    "phi3": replace(
        _LLAMA, attention_inputs=("qkv_proj",), fused_attention="in turn", heads_from_config=True,
        mlp_inputs=("gate_up_proj",), fused_mlp=True,
    ),
    "mixtral": _LLAMA,
    "olmo2": replace(
        _LLAMA, attention_norms=("post_attention_layernorm",), mlp_norms=("post_feedforward_layernorm",),
        norm_before_sum=True,
    ),
    "stablelm": replace(
        _LLAMA,
        parallel=lambda config: bool(config.use_parallel_residual),
        shared_norm=lambda config: bool(config.use_parallel_residual),
        no_groups=_norms_of_single_heads,
    ),
    "cohere": replace(_LLAMA, parallel=_always, shared_norm=_always, head_scale="logit_scale"),
    "gpt_oss": replace(_LLAMA, mlp_outputs=2, gate_and_up_in_turn=True, router="router"),
    "nemotron": replace(_LLAMA, mlp_inputs=("up_proj",)),
    "gpt2": Architecture(
        blocks="transformer.h",
        attention="attn",
        attention_norms=("ln_1",),
        mlp_norms=("ln_2",),
        attention_inputs=("c_attn",),
        fused_attention="in turn",
        attention_output="c_proj",
        mlp_inputs=("c_fc",),
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
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        kv_heads=_all_heads,
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        refuse=_refuse_opt,
    ),
    "falcon": Architecture(
        blocks="transformer.h",
        attention="self_attention",
        attention_norms=("ln_attn", "input_layernorm"),
        mlp_norms=("ln_mlp", "post_attention_layernorm"),
        attention_inputs=("query_key_value",),
        fused_attention="by group",
        attention_output="dense",
        mlp_inputs=("dense_h_to_4h",),
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
        shared_kv=lambda config: bool(config.multi_query and not config.new_decoder_architecture),
        queries_per_group=lambda config: (
            max(1, int(config.num_attention_heads) // int(config.num_kv_heads or 1))
            if config.new_decoder_architecture
            else 1
        ),
        no_groups=_alibi,
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        attention="attention",
        attention_inputs=("query_key_value",),
        fused_attention="by group",
        attention_output="dense",
        mlp_inputs=("dense_h_to_4h",),
        mlp_output="dense_4h_to_h",
        kv_heads=_all_heads,
        final=("gpt_neox.final_layer_norm",),
        parallel=lambda config: bool(config.use_parallel_residual),
    ),
}  # fmt: skip


ARCHITECTURES = Entries("architecture", _ROWS, fits=lambda row: isinstance(row, Architecture))


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


# -- configs ----------------------------------------------------------------------------------------------------------


def keep_blocks(config: Config, indices: Sequence[int], blocks: int) -> None:
    """Make everything in a config of `blocks` blocks that speaks of single blocks speak of those at `indices` alone."""
    lists = {name: getattr(config, name, None) for name in PER_BLOCK_LISTS}
    trimmed: JsonObject = {name: [old[i] for i in indices] for name, old in lists.items() if old}
    if getattr(config, "mlp_only_layers", None) is not None:  # qwen3_moe: say which blocks are dense, one by one
        step = config.decoder_sparse_step
        experts = getattr(config, "num_experts", 0)
        dense = [i in config.mlp_only_layers or not (experts > 0 and (i + 1) % step == 0) for i in range(blocks)]
        trimmed |= {"mlp_only_layers": [new for new, old in enumerate(indices) if dense[old]], "decoder_sparse_step": 1}
    if (first := getattr(config, "max_window_layers", None) or blocks) < blocks:  # the first so many see everything
        trimmed["max_window_layers"] = sum(i < first for i in indices)
    forget_layer_pattern(config)  # layer_types says it block by block
    config.num_hidden_layers = len(indices)
    for key, value in trimmed.items():
        setattr(config, key, value)


def experts_per_token(config: Config) -> int:
    """Return how many experts a token meets: 1 without a mixture."""
    return getattr(config, "num_experts_per_tok", None) or 1


def widest(config: Config) -> int:
    """Return the most channels that a token has inside a block, for estimates of memory."""
    return max(int(getattr(config, "intermediate_size", None) or 0), 4 * int(config.hidden_size))


def head_dim(config: Config) -> int:
    """Return the channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_numbers(attention: nn.Module, row: Architecture, heads: int, kv: int, dim: int) -> JsonObject:
    """Return what an attention module must know of its heads, under the names by which it keeps that."""
    values = {
        "num_heads": heads, "num_key_value_heads": kv, "num_key_value_groups": heads // kv, "num_kv_heads": kv,
        "split_size": heads * dim,
    }  # fmt: skip
    found: JsonObject = {name: value for name, value in values.items() if hasattr(attention, name)}
    if row.heads_from_config:
        found["config"] = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return found


# -- a row that is missing --------------------------------------------------------------------------------------------


def suggest_architecture(model: nn.Module, config: Config) -> str:
    """The row that is probably missing for an unknown model, as text: only a suggestion, never used."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if len(found) != 1:
        return f"it has {len(found)} lists of {config.num_hidden_layers} blocks, so no row suggests itself"
    path, blocks = found[0]
    names = [name for name, _ in blocks[0].named_children()]
    attention = next((n for n in names if "att" in n and "norm" not in n), "?")
    mlp = [n for n in names if n in ("mlp", "ffn", "feed_forward") or ("mlp" in n and "norm" not in n)][:1]
    matrices = {n for n, module in blocks[0].named_children() if any(p.dim() > 1 for p in module.parameters())}
    mlp = mlp or [n for n in names if n in matrices and n != attention] or ["?"]
    given = ", ".join(f'"{n}"' for n in mlp) + "," * (len(mlp) == 1)
    norms = [n for n in names if "norm" in n or n.startswith("ln")]
    return (
        f'"{config.model_type}": Architecture(blocks="{path}", attention="{attention}", mlp=({given}), '
        f"attention_norms=…, mlp_norms=…)   # norms of a block: {', '.join(norms) or 'none'}"
    )
