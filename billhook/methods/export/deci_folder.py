"""The folder of model type `nemotron-nas`: what MLX, vLLM, SGLang and TensorRT-LLM read of Llamas with unlike blocks.

It says of each block whether it has an attention and an MLP, how many query heads share a KV head, and how wide the MLP
is. All else that a student may be is made of that by zeros, exactly: heads and neurons that add nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from billhook.core.errors import BillhookError, ModelError, ResourceError
from billhook.core.plan import Part
from billhook.core.results.json_form import JsonObject
from billhook.methods.export import Exported, Student, export
from billhook.methods.export.beside_weights import CONFIG, write_companions
from billhook.methods.export.checkpoint import SHARD_BYTES, stored_tensors
from billhook.methods.export.shards import check_written
from billhook.methods.export.targets import Form
from billhook.methods.export.verification import verify
from billhook.models import architectures, checks, modeling_decilm
from billhook.models.device import dtype_name
from billhook.models.pruned_config import write_manifest

Tensors = dict[str, torch.Tensor]
RUNTIMES = ("mlx", "vllm")
NEURONS = 256  # the readers round the width of an MLP up to a multiple
ROPE_TYPES = ("default", "linear", "llama3")  # which all readers compute alike
PARTS: dict[Part, str] = {"attention": "self_attn", "mlp": "mlp"}
NORMS: dict[Part, str] = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}


def misfit(config: Any) -> str | None:
    """Return why no model with this config has a place in such a folder; None where some have."""
    dim, width = architectures.head_dim(config), int(config.hidden_size)
    rope: JsonObject = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if width % dim or kv_heads(width // dim, groups, heads // groups) is None:
        return (
            f"{heads} heads of {dim} channels in a model of width {width:,}; its readers share the width out among the "
            "heads"
        )
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation {config.hidden_act}; it takes silu"
    if kind not in ROPE_TYPES:
        return f"positions of type {kind}; it takes {', '.join(ROPE_TYPES)}"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return "rotary positions for a part of each head"
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if window is not None and window < config.max_position_embeddings:
        return f"a window of {window:,} tokens over texts of up to {config.max_position_embeddings:,}"
    return None


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


FORM = Form(
    "nemotron-nas", inserts=False, architectures=("llama", "mistral", "qwen2"), refuse=misfit, runtimes=RUNTIMES,
    mlp_step=NEURONS,
)  # fmt: skip


@export(FORM)
def deci(student: Student, folder: Path) -> Exported:
    """A folder of model type nemotron-nas, which MLX, vLLM, SGLang and TensorRT-LLM load: removed sites are not there.

    Formula: the tensors that are left, and zeros up to whole KV groups and multiples of 256 neurons
    Cost: the size of what is left on disk, with the zeros; memory for a second model while it is read back.
    Source: the DeciLM models of NVIDIA Nemotron, as vLLM's nemotron_nas.py and mlx-lm's nemotron-nas.py read them.
    """
    teacher = student.teacher
    if teacher.weights is not None:
        raise ResourceError(f"{teacher.name} is larger than the memory that is free, so it cannot be exported here.")
    config, stored = student.model.config, stored_tensors(student.model, teacher)
    blocks, sizes = blocks_of(stored, config)
    rest = {name: tensor for name, tensor in stored.items() if not name.startswith("model.layers.")}
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)
    state = rest | {
        f"model.layers.{i}.{name}": tensor for i, block in enumerate(blocks) for name, tensor in block.tensors.items()
    }
    folder.mkdir(parents=True)
    save_torch_state_dict(state, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    for shard in checks.shards(folder):
        check_written(shard, state)
    text = json.dumps(config_text(config, blocks, sizes), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    write_companions(teacher.tokenizer, teacher, folder)
    code = Path(modeling_decilm.__file__)
    shutil.copyfile(code, folder / code.name)
    write_manifest(folder, teacher.fingerprint, teacher.anatomy.blocks, student.plan, teacher.removed_earlier)
    difference = read_back(student, folder)
    verified = verify(RUNTIMES[0], folder, student)
    kinds = {block.kv_heads for block in blocks} - {0}
    notes = ("Blocks have different numbers of KV heads, which SGLang refuses.",) if len(kinds) > 1 else ()
    return Exported(folder, tuple(sorted(folder.iterdir())), "nemotron-nas", difference, verified, notes)


def blocks_of(stored: Tensors, config: Any) -> tuple[list[Block], Sizes]:
    """Return the blocks of a student as the folder holds them, from its stored tensors, and what they share."""
    count, dim = int(config.num_hidden_layers), architectures.head_dim(config)
    own: list[Tensors] = [{} for _ in range(count)]
    for name, tensor in stored.items():
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers."):
            own[int(index)][rest] = tensor
    bias = {
        part: any(f"{PARTS[part]}." in name and name.endswith(".bias") for each in own for name in each)
        for part in PARTS
    }
    width, embedding = int(config.hidden_size), stored["model.embed_tokens.weight"]
    sizes = Sizes(width, width // dim, dim, bias, embedding.dtype)
    blocks = []
    for index, tensors in enumerate(own):
        attention, kv = _attention(tensors, sizes, needed=index == 0)
        mlp, neurons = _mlp(tensors, sizes)
        norms = {
            f"{NORMS[part]}.weight": tensors.get(f"{NORMS[part]}.weight", torch.ones(width, dtype=sizes.dtype))
            for part, there in (("attention", kv), ("mlp", neurons))
            if there
        }
        blocks.append(Block(norms | attention | mlp, kv, neurons))
    return blocks, sizes


def _attention(tensors: Tensors, sizes: Sizes, *, needed: bool) -> tuple[Tensors, int]:
    """Return the attention of a block with whole groups of heads, and how many KV heads it has; none without one.

    Every KV head serves as many query heads as the config implies, the missing ones zeros. `needed`: a missing
    attention is one KV head and zeros, since vLLM starts the residual stream in the attention of block 0.
    """
    dim, heads = sizes.head_dim, sizes.heads
    query = tensors.get("self_attn.q_proj.weight")
    if query is None and not needed:
        return {}, 0
    has = query.shape[0] // dim if query is not None else 0
    groups = tensors["self_attn.k_proj.weight"].shape[0] // dim if query is not None else 1
    each = has // groups
    kv = kv_heads(heads, groups, each)
    assert kv is not None, "misfit refuses it"
    places = [g * (heads // kv) + h for g in range(groups) for h in range(each)]
    found: Tensors = {}
    for name, rows, at in (("q", heads, places), ("k", kv, range(groups)), ("v", kv, range(groups))):
        for kind, inner in _kinds(sizes, "attention"):
            old = tensors.get(f"self_attn.{name}_proj.{kind}")
            new = torch.zeros((rows, dim, *inner), dtype=sizes.dtype if old is None else old.dtype)
            if old is not None:
                new[list(at)] = old.reshape(-1, dim, *inner)
            found[f"self_attn.{name}_proj.{kind}"] = new.flatten(0, 1)
    output = torch.zeros((sizes.width, heads, dim), dtype=sizes.dtype if query is None else query.dtype)
    if query is not None:
        output[:, places] = tensors["self_attn.o_proj.weight"].reshape(sizes.width, -1, dim)
    return found | _output(tensors, "self_attn.o_proj", output.flatten(1), sizes, "attention"), kv


def _mlp(tensors: Tensors, sizes: Sizes) -> tuple[Tensors, int]:
    """Return the MLP of a block with a whole multiple of neurons, and how many they are; none without one."""
    down = tensors.get("mlp.down_proj.weight")
    if down is None:
        return {}, 0
    has = down.shape[1]
    neurons = -(-has // NEURONS) * NEURONS
    found: Tensors = {}
    for name in ("gate_proj", "up_proj"):
        for kind, inner in _kinds(sizes, "mlp"):
            new = torch.zeros((neurons, *inner), dtype=down.dtype)
            if (old := tensors.get(f"mlp.{name}.{kind}")) is not None:
                new[:has] = old
            found[f"mlp.{name}.{kind}"] = new
    output = torch.zeros((sizes.width, neurons), dtype=down.dtype)
    output[:, :has] = down
    return found | _output(tensors, "mlp.down_proj", output, sizes, "mlp"), neurons


def _kinds(sizes: Sizes, part: Part) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the kinds of tensors of a projection, and what follows the axis of its outputs in their shapes."""
    return (("weight", (sizes.width,)), *((("bias", ()),) if sizes.bias[part] else ()))


def _output(tensors: Tensors, name: str, weight: torch.Tensor, sizes: Sizes, part: Part) -> Tensors:
    """Return the tensors of a projection to the residual stream, with a bias where all have one."""
    zeros = torch.zeros(sizes.width, dtype=sizes.dtype)
    bias = {f"{name}.bias": tensors.get(f"{name}.bias", zeros)} if sizes.bias[part] else {}
    return {f"{name}.weight": weight, **bias}


def config_text(config: Any, blocks: list[Block], sizes: Sizes) -> JsonObject:
    """Return the config.json of a folder: only what its readers ask for."""
    rope: JsonObject = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta", None)
    scaled = rope.get("rope_type", "default") != "default"
    module = Path(modeling_decilm.__file__).stem
    if theta is None:
        raise ModelError(f"The config of this {config.model_type} has no rope_theta. Say it in config.json.")
    return {
        "architectures": [modeling_decilm.DeciLMForCausalLM.__name__],
        "model_type": modeling_decilm.DeciLMConfig.model_type,
        "auto_map": {"AutoConfig": f"{module}.DeciLMConfig", "AutoModelForCausalLM": f"{module}.DeciLMForCausalLM"},
        "hidden_size": sizes.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": max(block.kv_heads for block in blocks),
        "head_dim": sizes.head_dim,
        "intermediate_size": max(block.neurons for block in blocks),
        "vocab_size": int(config.vocab_size),
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": sizes.bias["attention"],
        "mlp_bias": sizes.bias["mlp"],
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "max_position_embeddings": int(config.max_position_embeddings),
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
        "torch_dtype": dtype_name(sizes.dtype),
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "block_configs": [block.config(sizes) for block in blocks],
    }


@torch.inference_mode()
def read_back(student: Student, folder: Path) -> float:
    """Return the largest difference of logits between a student and its folder, as transformers reads that.

    Raises BillhookError where it is more than sums that are rounded in another order.
    """
    model, rows = student.model, student.tokens.to(student.model.device)
    again: Any = modeling_decilm.DeciLMForCausalLM.from_pretrained(
        str(folder), dtype=model.dtype, local_files_only=True
    )
    mine, theirs = (
        each(input_ids=rows, use_cache=False).logits.float() for each in (model, again.eval().to(model.device))
    )
    gap = float((mine - theirs).abs().max())
    if not gap <= float(mine.abs().max()) * torch.finfo(model.dtype).eps ** 0.5:
        raise BillhookError(f"The folder does not load back equal (logits differ by {gap:g}); it was deleted.")
    return gap
