"""Tiny random models whose removals matter: one of every architecture, and variants of those with flags."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "mistral": {"sliding_window": 6},
    "qwen3_moe": {"head_dim": 8, **_MOE},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "mixtral": _MOE,
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, "rope_parameters": _ROPE, **_MOE},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 96},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral"),
    *("olmo2", "stablelm", "cohere", "gpt_oss", "nemotron", "gpt2", "opt", "falcon", "gpt_neox"),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TYPES},
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon_serial": ("falcon", {"parallel_attn": False}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {"alibi": True}),
    "qwen3_moe_mixed": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
}


def build(variant: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of 4 blocks, width 32, 64 tokens; biases and norms random, not special."""
    model_type, flags = VARIANTS[variant]
    fields = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    } | _OWN.get(model_type, {}) | flags | overrides  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.generation_config.eos_token_id = None  # so that generation never stops early
    return model.eval()


def saved(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """`build(variant)` as a checkpoint folder."""
    build(variant, **overrides).to(dtype).save_pretrained(folder)
    return folder


def saved_peaked(folder: Path, **config: int) -> Path:
    """Save a llama that uses a quarter of its words, in which some sites matter much less than others."""
    model = build("llama", num_hidden_layers=6, **config)
    with torch.no_grad():
        model.lm_head.weight[:16].mul_(5)
        model.lm_head.weight[16:].mul_(0.02)
        for i, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight.mul_(0.006 * 2**i)
            block.mlp.down_proj.weight.mul_(0.009 * 2**i)
    model.save_pretrained(folder)
    return folder


def change_json(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them special: [rows, length]."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


WORDS = [f"w{i}" for i in range(60)]


def with_tokenizer(folder: Path, variant: str = "llama", **overrides: Any) -> Path:
    """A tiny checkpoint with a word-level tokenizer over `WORDS`, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    saved(folder, variant, **overrides)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int, words: int = 40, seed: int = 0, field: str = "text") -> Path:
    """A .jsonl file of `count` random texts."""
    draw = random.Random(seed)
    rows = [json.dumps({field: " ".join(draw.choices(WORDS, k=words))}) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path
