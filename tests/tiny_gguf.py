"""A tiny llama with a tokenizer of bytes, as a checkpoint folder and as the GGUF file of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

MERGES = (("w", "1"), ("w", "2"), ("Ġ", "w"))
SPECIAL = ("<s>", "</s>")
BOS, EOS = 0, 1


def vocabulary() -> list[str]:
    """Special tokens, all bytes, and pairs of them."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]


def folder(path: Path, seed: int = 0) -> Path:
    """The checkpoint: 2 blocks, width 32, a BOS token before every text."""
    size = len(vocabulary())
    tiny.saved(
        path, "llama", seed=seed, vocab_size=size, num_hidden_layers=2, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=None,
    )  # fmt: skip
    numbers = {token: i for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.BPE(numbers, list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(path)
    return path


def file(checkpoint: Path, path: Path) -> Path:
    """The GGUF file of such a checkpoint, in float32."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL] * len(SPECIAL) + [kinds.NORMAL] * (config.vocab_size - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if part in name:  # its type turns neighbours, transformers turns halves
                value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
