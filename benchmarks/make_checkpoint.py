"""Write a random llama checkpoint of any size, a block at a time: what a model larger than memory is measured on.

    python benchmarks/make_checkpoint.py FOLDER --blocks 32 --width 512 --vocabulary 4096

Weights are normal with a standard deviation of 1/sqrt(inputs), so that every block matters and nothing overflows; the
tokenizer reads bytes. Prints one JSON object: parameters, bytes and shards.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--intermediate", type=int, help="default: 8/3 of the width, in steps of 64")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already. Name a new folder.")
    print(json.dumps(write(given)))


def write(given: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint: a shard for each block, one for the rest, the index, config and tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=given.vocabulary, hidden_size=given.width, num_hidden_layers=given.blocks,
        intermediate_size=given.intermediate or 64 * round(given.width * 8 / 3 / 64),
        num_attention_heads=given.heads, num_key_value_heads=given.kv_heads or given.heads,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, dtype=given.dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    given.folder.mkdir(parents=True)
    files = [(f"block-{i:03d}.safetensors", f"model.layers.{i}.") for i in range(given.blocks)]
    draw = torch.Generator(given.device).manual_seed(given.seed)
    where, total = {}, 0
    for file, prefix in [("rest.safetensors", ""), *files]:
        names = [n for n in shapes if (n.startswith(prefix) if prefix else not n.startswith("model.layers."))]
        tensors = {name: _random(shapes[name], draw).to("cpu", DTYPES[given.dtype]) for name in names}
        save_file(tensors, given.folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (given.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(given.folder)
    _tokenizer().save_pretrained(given.folder)
    parameters = sum(shape.numel() for shape in shapes.values())
    return {"folder": str(given.folder), "parameters": parameters, "bytes": total, "shards": len(files) + 1}


def _random(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.3 * torch.randn(shape, generator=draw, device=draw.device)
    return torch.randn(shape, generator=draw, device=draw.device) / shape[1] ** 0.5


def _tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<end>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    main()
