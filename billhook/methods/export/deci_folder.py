"""The folder of model type `nemotron-nas`: what MLX, vLLM, SGLang and TensorRT-LLM read of Llamas with unlike blocks.

It says of each block whether it has an attention and an MLP, how many query heads share a KV head, and how wide the MLP
is. All else that a student may be is made of that by zeros, exactly: heads and neurons that add nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from billhook.core.errors import BillhookError, ModelError, ResourceError
from billhook.core.results.json_form import JsonObject
from billhook.methods.export import Exported, Student, export, modeling_decilm
from billhook.methods.export.beside_weights import CONFIG, write_companions
from billhook.methods.export.checkpoint import SHARD_BYTES, stored_tensors
from billhook.methods.export.deci_blocks import NEURONS, ROW, Block, Sizes, blocks_of, kv_heads, sidecars
from billhook.methods.export.shards import check_written
from billhook.methods.export.targets import Form
from billhook.methods.export.verification import verify
from billhook.models import checks
from billhook.models.accelerator.spreading import devices_of
from billhook.models.architectures import BLOCK_KINDS, CONFIG_FIELDS, head_dim
from billhook.models.device import dtype_name
from billhook.models.pruned_config import write_manifest

RUNTIMES = ("mlx", "vllm")
ROPE_TYPES = ("default", "linear", "llama3")  # which all readers compute alike


def misfit(config: Any) -> str | None:
    """Return why no model with this config has a place in such a folder; None where some have."""
    dim, width = head_dim(config), int(config.hidden_size)
    rope: JsonObject = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    heads = int(config.num_attention_heads)
    groups = ROW.kv_heads(config)
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
    kinds = getattr(config, BLOCK_KINDS, None) or ("sliding_attention",)
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if window is not None and window < config.max_position_embeddings:
        return f"a window of {window:,} tokens over texts of up to {config.max_position_embeddings:,}"
    return None


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
    rest = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{ROW.blocks}.")}
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight", None)
    state = rest | {
        f"{ROW.blocks}.{i}.{name}": tensor for i, block in enumerate(blocks) for name, tensor in block.tensors.items()
    }
    folder.mkdir(parents=True)
    save_torch_state_dict(state, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    for shard in checks.shards(folder):
        check_written(shard, state)
    told = config_text(config, blocks, sizes)
    beside = sidecars(told, blocks)
    for name, value in {CONFIG: told, **beside}.items():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    write_companions(teacher.tokenizer, teacher, folder)
    code = Path(modeling_decilm.__file__)
    shutil.copyfile(code, folder / code.name)
    write_manifest(folder, teacher.fingerprint, teacher.anatomy.blocks, student.plan, teacher.removed_earlier)
    difference = read_back(student, folder)
    verified = verify(RUNTIMES[0], folder, student)
    kinds = {block.kv_heads for block in blocks} - {0}
    notes = [f"{' and '.join(beside)}: for readers that Billhook did not run."]
    notes += ["Blocks have different numbers of KV heads, which SGLang refuses."] if len(kinds) > 1 else []
    return Exported(folder, tuple(sorted(folder.iterdir())), "nemotron-nas", difference, verified, tuple(notes))


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
        CONFIG_FIELDS["attention"][1]: max(block.kv_heads for block in blocks),
        "head_dim": sizes.head_dim,
        CONFIG_FIELDS["mlp"][-1]: max(block.neurons for block in blocks),
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
    model = student.model
    place = model.device if len(devices_of(model)) == 1 else torch.device("cpu")  # where a second model has room
    again: Any = modeling_decilm.DeciLMForCausalLM.from_pretrained(
        str(folder), dtype=model.dtype, local_files_only=True
    )
    mine, theirs = (
        each(input_ids=student.tokens.to(each.device), use_cache=False).logits.float().to(place)
        for each in (model, again.eval().to(place))
    )
    gap = float((mine - theirs).abs().max())
    if not gap <= float(mine.abs().max()) * torch.finfo(model.dtype).eps ** 0.5:
        raise BillhookError(f"The folder does not load back equal (logits differ by {gap:g}); it was deleted.")
    return gap
