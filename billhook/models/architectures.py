"""The architectures that Billhook knows, a row each. Nothing else knows the names of modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from billhook.core.errors import ModelError, nearest
from billhook.core.plan import Part

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
