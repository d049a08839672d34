"""The blocks of a student in the format of DeciLM: the same tensors, and zeros where the format has no other word.

A block has KV heads, shared evenly by the query heads of the config, and an MLP of a multiple of 256 neurons; or it
lacks either. Tensors have the names of Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from billhook.core.plan import PARTS, Part
from billhook.core.results.json_form import JsonObject
from billhook.models.architectures import ARCHITECTURES, BLOCK_KINDS, CONFIG_FIELDS, head_dim

Tensors = dict[str, torch.Tensor]
ROW = ARCHITECTURES["llama"]  # the names of the tensors
NEURONS = 256  # the readers round the width of an MLP up to a multiple


def kv_heads(heads: int, groups: int, each: int) -> int | None:
    """Return the fewest KV heads, evenly shared by `heads`, with room for `groups` KV groups of `each` query heads."""
    return next((n for n in range(groups, heads + 1) if heads % n == 0 and heads // n >= each), None)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all blocks of a folder have in common. `bias`: whether its attentions, its MLPs, have biases."""

    width: int
    heads: int
    head_dim: int
    bias: Mapping[Part, bool]
    dtype: torch.dtype

    def kinds(self, part: Part) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the kinds of tensors of a projection, and what follows the axis of its outputs in their shapes."""
        return (("weight", (self.width,)), *((("bias", ()),) if self.bias[part] else ()))


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a folder: its tensors by their names in it, with the zeros. 0 KV heads or neurons: it has none."""

    tensors: Tensors
    kv_heads: int
    neurons: int

    def config(self, sizes: Sizes) -> JsonObject:
        """Return its entry of `block_configs`."""
        common: JsonObject = {"replace_with_linear": False, "sparsify": None}
        group = sizes.heads // self.kv_heads if self.kv_heads else None
        mult = 1.5 * self.neurons / sizes.width if self.neurons else None
        return {
            "attention": {"no_op": not self.kv_heads, **common, "n_heads_in_group": group},
            "ffn": {"no_op": not self.neurons, **common, "ffn_mult": mult},
        }


def blocks_of(stored: Tensors, config: Any) -> tuple[list[Block], Sizes]:
    """Return the blocks of a student as the folder holds them, from its stored tensors, and what they share."""
    width, dim, before = int(config.hidden_size), head_dim(config), f"{ROW.blocks}."
    own: list[Tensors] = [{} for _ in range(int(config.num_hidden_layers))]
    for name, tensor in stored.items():
        index, _, rest = name.removeprefix(before).partition(".")
        if name.startswith(before):
            own[int(index)][rest] = tensor
    names = {name for each in own for name in each if name.endswith(".bias")}
    bias = {part: any(name.startswith(f"{ROW.path(part)}.") for name in names) for part in PARTS}
    sizes = Sizes(width, width // dim, dim, bias, next(iter(stored.values())).dtype)
    return [_block(tensors, sizes, first=index == 0) for index, tensors in enumerate(own)], sizes


def _block(tensors: Tensors, sizes: Sizes, *, first: bool) -> Block:
    attention, kv = _attention(tensors, sizes, needed=first)
    mlp, neurons = _mlp(tensors, sizes)
    needed = (*(ROW.attention_norms if kv else ()), *(ROW.mlp_norms if neurons else ()))
    ones = torch.ones(sizes.width, dtype=sizes.dtype)
    norms = {f"{name}.weight": tensors.get(f"{name}.weight", ones) for name in needed}
    return Block(norms | attention | mlp, kv, neurons)


def _attention(tensors: Tensors, sizes: Sizes, *, needed: bool) -> tuple[Tensors, int]:
    """Return the attention of a block with whole groups of heads, and how many KV heads it has; none without one.

    Every KV head serves as many query heads as the config implies, the missing ones zeros. `needed`: a missing
    attention is one KV head and zeros, since vLLM starts the residual stream in the attention of block 0.
    """
    dim, heads, before = sizes.head_dim, sizes.heads, f"{ROW.attention}."
    query, key, value = (f"{before}{name}" for name in ROW.attention_inputs)
    there = tensors.get(f"{query}.weight")
    if there is None and not needed:
        return {}, 0
    groups = tensors[f"{key}.weight"].shape[0] // dim if there is not None else 1
    each = there.shape[0] // dim // groups if there is not None else 0
    kv = kv_heads(heads, groups, each)
    assert kv is not None, "misfit refuses it"
    places = [g * (heads // kv) + h for g in range(groups) for h in range(each)]
    found: Tensors = {}
    for name, rows, at in ((query, heads, places), (key, kv, range(groups)), (value, kv, range(groups))):
        for kind, inner in sizes.kinds("attention"):
            old = tensors.get(f"{name}.{kind}")
            new = torch.zeros((rows, dim, *inner), dtype=sizes.dtype if old is None else old.dtype)
            if old is not None:
                new[list(at)] = old.reshape(-1, dim, *inner)
            found[f"{name}.{kind}"] = new.flatten(0, 1)
    output = torch.zeros((sizes.width, heads, dim), dtype=sizes.dtype if there is None else there.dtype)
    if there is not None:
        output[:, places] = tensors[f"{before}{ROW.attention_output}.weight"].reshape(sizes.width, -1, dim)
    return found | _output(tensors, f"{before}{ROW.attention_output}", output.flatten(1), sizes, "attention"), kv


def _mlp(tensors: Tensors, sizes: Sizes) -> tuple[Tensors, int]:
    """Return the MLP of a block with a whole multiple of neurons, and how many they are; none without one."""
    before = f"{ROW.path('mlp')}."
    down = tensors.get(f"{before}{ROW.mlp_output}.weight")
    if down is None:
        return {}, 0
    has = down.shape[1]
    neurons = -(-has // NEURONS) * NEURONS
    found: Tensors = {}
    for name in ROW.mlp_inputs:
        for kind, inner in sizes.kinds("mlp"):
            new = torch.zeros((neurons, *inner), dtype=down.dtype)
            if (old := tensors.get(f"{before}{name}.{kind}")) is not None:
                new[:has] = old
            found[f"{before}{name}.{kind}"] = new
    output = torch.zeros((sizes.width, neurons), dtype=down.dtype)
    output[:, :has] = down
    return found | _output(tensors, f"{before}{ROW.mlp_output}", output, sizes, "mlp"), neurons


def _output(tensors: Tensors, name: str, weight: torch.Tensor, sizes: Sizes, part: Part) -> Tensors:
    """Return the tensors of a projection to the residual stream, with a bias where all have one."""
    zeros = torch.zeros(sizes.width, dtype=sizes.dtype)
    bias = {f"{name}.bias": tensors.get(f"{name}.bias", zeros)} if sizes.bias[part] else {}
    return {f"{name}.weight": weight, **bias}


# -- what else may read a folder --------------------------------------------------------------------------------------


def sidecars(config: JsonObject, blocks: list[Block]) -> dict[str, JsonObject]:
    """Return files that tell two other readers of the tensors in a folder what its `config` says, by their names.

    `config.anymodel.json`: for the AnyModel that is proposed for vLLM (pull request 36512). `executorch.params.json`:
    the ModelArgs of ExecuTorch's Llama export, for blocks of one width without biases. Neither was run.
    """
    layers: JsonObject = {}
    for index, block in enumerate(blocks):
        own: JsonObject = {
            "skip": [part for part, has in zip(PARTS, (block.kv_heads, block.neurons), strict=True) if not has]
        }
        own |= {CONFIG_FIELDS["attention"][1]: block.kv_heads} if block.kv_heads else {}
        own |= {CONFIG_FIELDS["mlp"][-1]: block.neurons} if block.neurons else {}
        layers[f"{index:0{len(str(len(blocks) - 1))}}"] = own
    plain = {name: value for name, value in config.items() if name not in ("auto_map", "block_configs")}
    told = {"config.anymodel.json": plain | {
        "architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM", "model_type": "llama",
        "per_layer_config": layers,
    }}  # fmt: skip
    widths, kv = ({getattr(block, name) for block in blocks} - {0} for name in ("neurons", "kv_heads"))
    scaled = config["rope_scaling"] is not None
    if len(widths) < 2 and len(kv) == 1 and not (scaled or config["attention_bias"] or config["mlp_bias"]):
        told["executorch.params.json"] = {
            "dim": config["hidden_size"], "n_layers": len(blocks), "n_heads": config["num_attention_heads"],
            "n_kv_heads": max(kv), "head_dim": config["head_dim"], "hidden_dim": max(widths, default=NEURONS),
            "vocab_size": config["vocab_size"], "norm_eps": config["rms_norm_eps"], "rope_theta": config["rope_theta"],
            "use_hf_rope": True,
            BLOCK_KINDS: ["attention" if block.kv_heads else "skip_attention" for block in blocks],
            "mlp_type": ["default" if block.neurons else "skip" for block in blocks],
        }  # fmt: skip
    return told
