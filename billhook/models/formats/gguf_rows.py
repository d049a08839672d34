"""How llama.cpp wants the weights of each model type: a row each, with the reasons why a config has no place there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from billhook.models.architectures import BLOCK_KINDS, architecture_of, base_type, head_dim

Config = Any  # a transformers config
Key = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]
Change = Callable[[torch.Tensor, Config], torch.Tensor]
LEAST_CONTEXT = 512  # tokens: a model whose window is shorter is not written as one without a window
SLIDING = "sliding_attention"  # what layer_types call a block with a window


def no_keys(config: Config) -> dict[str, Key]:
    """Return no key: of types that have none of their own."""
    return {}


def no_reason(config: Config) -> str | None:
    """Return None: of types that are refused by nothing else."""
    return None


@dataclass(frozen=True, slots=True)
class GgufRow:
    """What llama.cpp calls a model type, and how it keeps its weights.

    `changes`: by the name of a tensor in its block, without `.weight`, the names that it has in the file and what
    is done to it for each. `biases`: tensors of a block that may have one. `output`: the head is read `if there`, is
    `tied` to the embedding always, or must be `there`. `activations`: of its MLP. `ropes`: rope types; `partial_rope`:
    part of a head may stay unrotated. `heads_fill_width`: all heads together are as wide as the stream. `windows`: it
    reads which blocks see a sliding window only. `keys`: those that other types do not have.
    """

    name: str
    changes: Mapping[str, tuple[tuple[str, Change], ...]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # of parameters that the package gguf does not map
    biases: frozenset[str] = frozenset({"attn_q", "attn_k", "attn_v"})
    output: Literal["if there", "tied", "there"] = "if there"
    layer_norm: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    heads_fill_width: bool = True
    windows: bool = False
    keys: Callable[[Config], dict[str, Key]] = no_keys
    refuse: Callable[[Config], str | None] = no_reason

    def fault(self, config: Config) -> str | None:
        """Return why llama.cpp's code for this type does not compute a model of this config; None if it does."""
        what = f"a {base_type(config.model_type)} model with"
        ropes = rope_kinds(config)
        unknown = [str(rope.get("rope_type")) for rope in ropes if rope.get("rope_type", "default") not in self.ropes]
        window = window_of(config)
        if (activation := activation_of(config)) not in self.activations:
            return f"{what} the activation {activation}; llama.cpp computes {self.activations[0]} there"
        if unknown:
            return f"{what} the rope type {unknown[0]}; llama.cpp takes {', '.join(self.ropes)} there"
        if any(rope.get("mscale") is not None or rope.get("truncate") is False for rope in ropes):
            return f"{what} a rope of type yarn with mscale or truncate, which llama.cpp does not know there"
        if not self.partial_rope and any(rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in ropes):
            return f"{what} heads of which a part is not rotated; llama.cpp rotates all of a head there"
        if not self.windows and window is not None and window < min(LEAST_CONTEXT, config.max_position_embeddings):
            return f"{what} a sliding window of {window} tokens, which llama.cpp does not have there"
        if self.heads_fill_width and head_dim(config) * config.num_attention_heads != config.hidden_size:
            return f"{what} heads that are not as wide together as the stream; llama.cpp takes no others there"
        if self.output == "tied" and not config.tie_word_embeddings:
            return f"{what} a head of its own; llama.cpp takes the embedding there"
        return self.refuse(config)


# -- what configs say -------------------------------------------------------------------------------------------------


def activation_of(config: Config) -> str:
    """Return the name of the function in the MLPs."""
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return str(next((value for name in names if (value := getattr(config, name, None)) is not None), "none"))


def rope_kinds(config: Config) -> list[dict[str, Any]]:
    """Return the rope parameters of a config, the global ones first; none where positions are embedded."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in found:
        return [found["full_attention"], *([found[SLIDING]] if SLIDING in found else [])]
    return [found] if found else []


def window_of(config: Config) -> int | None:
    """Return how many tokens the blocks with the shortest view see; None where all see everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, BLOCK_KINDS, None)
    if not window or not getattr(config, "use_sliding_window", True) or (kinds and SLIDING not in kinds):
        return None
    return int(window) if window < config.max_position_embeddings else None


def kv_heads(config: Config) -> int:
    """Return the number of KV heads, each with its group of queries: those of Falcon before they are repeated."""
    if base_type(config.model_type) == "falcon" and config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return architecture_of(config).kv_heads(config)


# -- what is done to tensors ------------------------------------------------------------------------------------------


def same(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Return a tensor as it is."""
    return tensor


def interleaved(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Put the two halves of each head, which transformers rotates together, in turn: llama.cpp rotates neighbours."""
    size = head_dim(config)
    heads = tensor.shape[0] // size
    return tensor.reshape(heads, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def plus_one(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Return the scale of a norm whose weight is the scale minus one."""
    return tensor + 1


def transposed(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Return [outputs, inputs] of a weight that is [inputs, outputs]."""
    return tensor.t()


def in_turn(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Put all queries first, then all keys, then all values, of a tensor that has them group by group."""
    size, groups = head_dim(config), kv_heads(config)
    grouped = tensor.reshape(groups, -1, size, *tensor.shape[1:])
    parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
    return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])


def _heads(first: int, last: int) -> Change:
    """Return the queries (0, 1), keys (1, 2) or values (2, 3) of a projection that has all of each in turn."""

    def cut(tensor: torch.Tensor, config: Config) -> torch.Tensor:
        groups = kv_heads(config)
        rows = tensor.shape[0] // (config.num_attention_heads // groups + 2)  # of the keys: a block may have fewer
        edges = (0, tensor.shape[0] - 2 * rows, tensor.shape[0] - rows, tensor.shape[0])
        return tensor[edges[first] : edges[last]]

    return cut


def _half(which: int, dim: int = 0) -> Change:
    return lambda tensor, config: tensor.chunk(2, dim)[which]


def _then(first: Change, second: Change) -> Change:
    return lambda tensor, config: second(first(tensor, config), config)


def attention_scale(blocks_of_27b: int) -> Callable[[Config], float]:
    """Return the factor by which a Gemma's queries grow so that llama.cpp's own scale makes them what they were.

    It takes the width of a head for the scale, and that of the stream per head in models of so many blocks.
    """

    def factor(config: Config) -> float:
        fixed = config.hidden_size // config.num_attention_heads
        theirs = fixed if config.num_hidden_layers == blocks_of_27b else head_dim(config)
        return math.sqrt(theirs / config.query_pre_attn_scalar)

    return factor


def _scaled(blocks_of_27b: int) -> Change:
    return lambda tensor, config: tensor * attention_scale(blocks_of_27b)(config)


def _each(change: Change, *names: str) -> dict[str, tuple[tuple[str, Change], ...]]:
    return {name: ((name, change),) for name in names}


# -- keys and refusals of single types --------------------------------------------------------------------------------


def _gemma_windows(config: Config) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    if window_of(config) is not None:
        pattern = [kind == SLIDING for kind in config.layer_types]
        keys |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": pattern}
    ropes = rope_kinds(config)
    if len(ropes) == 2:
        keys["rope.freq_base_swa"] = float(ropes[1]["rope_theta"])
    for key, name in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
        if (cap := getattr(config, name, None)) is not None:
            keys[f"{key}_logit_softcapping"] = float(cap)
    return keys


def _no_gemma2(config: Config) -> str | None:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        return "a gemma2 model whose logits are not capped; llama.cpp caps them there"
    return None


def _no_gemma3(config: Config) -> str | None:
    local = rope_kinds(config)[1:]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "a gemma3_text model with capped attention logits; llama.cpp does not cap them there"
    if any(rope.get("rope_type", "default") != "default" for rope in local):
        return "a gemma3_text model with scaled rope in blocks with a window; llama.cpp does not scale it there"
    return None


def _no_moe(config: Config) -> str | None:
    if config.model_type == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        return "a qwen3_moe model with dense blocks; llama.cpp has experts in every block there"
    if config.model_type == "qwen3_moe" and not config.norm_topk_prob:
        return "a qwen3_moe model with norm_topk_prob=false; llama.cpp normalises the weights of experts there"
    return None


def _expert_keys(config: Config) -> dict[str, Key]:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    keys: dict[str, Key] = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if (width := getattr(config, "moe_intermediate_size", None)) is not None:
        keys["expert_feed_forward_length"] = width
    return keys


def _phi3_keys(config: Config) -> dict[str, Key]:
    rope = rope_kinds(config)[0]
    if rope.get("rope_type") != "longrope":
        return {}
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = rope.get("factor") or config.max_position_embeddings / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(rope.get("attention_factor") or usual),
    }


def _parallel(config: Config) -> dict[str, Key]:
    return {"use_parallel_residual": bool(config.use_parallel_residual)}


def _no_head_norms(config: Config) -> str | None:
    found = getattr(config, "qk_layernorm", False) or getattr(config, "use_qk_norm", False)
    return f"a {config.model_type} model with norms of single heads" if found else None


def _no_falcon(config: Config) -> str | None:
    if config.alibi:
        return "a falcon model with ALiBi; llama.cpp rotates queries and keys there"
    if not config.new_decoder_architecture and not config.parallel_attn:
        return "a falcon model with serial residual; llama.cpp has the parallel kind there"
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 1:
        return "a falcon model with new_decoder_architecture and one norm in a block"
    return None


# -- the rows ---------------------------------------------------------------------------------------------------------

_ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_NORMED = (*_NORMS, "attn_norm_2")
_SANDWICH = (*_NORMS, "post_attention_norm", "post_ffw_norm")
_TURNED = _each(interleaved, "attn_q", "attn_k")
_EXPERTS = {"ffn_gate_up_exps": (("ffn_gate_exps", _half(0, 1)), ("ffn_up_exps", _half(1, 1)))}
_EXPERT_NAMES = {"mlp.experts.gate_up_proj": "ffn_gate_up_exps"}
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")  # llama.cpp computes the first for all of them

_LLAMA = GgufRow(
    "llama", _TURNED, biases=frozenset(_ALL), ropes=("default", "linear", "yarn", "llama3"), heads_fill_width=False
)
_QWEN2 = GgufRow("qwen2")
_QWEN3 = GgufRow("qwen3", heads_fill_width=False)
_GEMMA = GgufRow(
    "gemma", _each(plus_one, *_NORMS), output="tied", activations=("gelu_pytorch_tanh", "gelu_new"),
    ropes=("default",), heads_fill_width=False,
)  # fmt: skip
_GPT = GgufRow(
    "gptneox", _each(in_turn, "attn_qkv"), biases=frozenset((*_FUSED, *_NORMED)), output="there", layer_norm=True,
    activations=_GELU, ropes=("default",), partial_rope=True, keys=_parallel,
)  # fmt: skip

ROWS: dict[str, GgufRow] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(
        _LLAMA, changes={**_TURNED, **_EXPERTS}, names=_EXPERT_NAMES, keys=_expert_keys,
    ),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3, name="qwen3moe", changes=_EXPERTS, names=_EXPERT_NAMES, keys=_expert_keys, refuse=_no_moe,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA, name="gemma2", changes={**_each(plus_one, *_SANDWICH), **_each(_scaled(46), "attn_q")},
        windows=True, keys=_gemma_windows, refuse=_no_gemma2,
    ),
    "gemma3_text": replace(
        _GEMMA, name="gemma3", output="if there", ropes=("default", "linear"),
        changes={
            **_each(plus_one, *_SANDWICH, "attn_k_norm"),
            **_each(_then(plus_one, _scaled(62)), "attn_q_norm"),
        },
        windows=True, keys=_gemma_windows, refuse=_no_gemma3,
    ),
    "phi": GgufRow(
        "phi2", biases=frozenset((*_ALL, *_NORMED, "output")), output="there", layer_norm=True,
        activations=_GELU, ropes=("default",), partial_rope=True, refuse=_no_head_norms,
    ),
    "phi3": GgufRow("phi3", ropes=("default", "longrope"), partial_rope=True, keys=_phi3_keys),
    "stablelm": GgufRow(
        "stablelm", biases=frozenset(("attn_q", "attn_k", "attn_v", *_NORMED)), output="there", layer_norm=True,
        ropes=("default",), partial_rope=True, keys=_parallel, refuse=_no_head_norms,
    ),
    "olmo2": GgufRow("olmo2", biases=frozenset(), output="there"),
    "cohere": GgufRow(
        "command-r", biases=frozenset(), output="tied", layer_norm=True, ropes=("default",),
        keys=lambda config: {"logit_scale": float(config.logit_scale), "rope.scaling.type": "none"},
        refuse=_no_head_norms,
    ),
    "nemotron": GgufRow(
        "nemotron", _each(plus_one, *_NORMS), biases=frozenset((*_ALL, *_NORMED)), output="there", layer_norm=True,
        activations=("relu2",), ropes=("default",), partial_rope=True,
    ),
    "gpt2": GgufRow(
        "gpt2", _each(transposed, *_FUSED), biases=frozenset((*_FUSED, *_NORMED)), layer_norm=True,
        activations=_GELU, ropes=(),
    ),
    "falcon": replace(_GPT, name="falcon", output="if there", partial_rope=False, keys=no_keys, refuse=_no_falcon),
    "gpt_neox": _GPT,
}  # fmt: skip

# The form for single sites and uneven widths: what llama.cpp calls deci. Only types that compute as a Llama does.
_DECI = replace(_LLAMA, name="deci")
DECI_ROWS: dict[str, GgufRow] = {
    "llama": _DECI,
    "mistral": _DECI,
    "qwen2": _DECI,
    "phi3": replace(
        _DECI, ropes=("default",), names={"self_attn.qkv_proj.weight": "attn_qkv"},
        changes={
            "attn_qkv": (
                ("attn_q", _then(_heads(0, 1), interleaved)),
                ("attn_k", _then(_heads(1, 2), interleaved)),
                ("attn_v", _heads(2, 3)),
            ),
            "ffn_up": (("ffn_gate", _half(0)), ("ffn_up", _half(1))),
        },
    ),
}  # fmt: skip
