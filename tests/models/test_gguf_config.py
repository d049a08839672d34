"""What a GGUF file says of its model, beyond what transformers reads: held to transformers' own rope."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from billhook.core.errors import ModelError
from billhook.models.formats.gguf_config import Llama3Rope, llama3_factors, read_gguf_config

THETA, WIDTH = 500_000.0, 64
SETTINGS = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 2.0, 8.0, 4096), (4.0, 1.0, 3.0, 2048)]


def llama_config(factor: float, low: float, high: float, positions: int) -> LlamaConfig:
    rope = {"rope_type": "llama3", "rope_theta": THETA, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": positions}  # fmt: skip
    return LlamaConfig(
        head_dim=WIDTH, num_attention_heads=4, hidden_size=256, max_position_embeddings=131072, rope_parameters=rope
    )


def frequencies(config: LlamaConfig) -> np.ndarray:
    kind = config.rope_parameters["rope_type"]
    return np.asarray(ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0], dtype=np.float64)


def plain() -> np.ndarray:
    return np.array([THETA ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])


def written(path: Path, factors: np.ndarray | None, **keys: float | str) -> Path:
    """The header of a llama, with rope factors and keys; without weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_key_length(WIDTH)
    for key, value in keys.items():
        name = f"llama.rope.scaling.{key}"
        writer.add_string(name, value) if isinstance(value, str) else writer.add_float32(name, value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_factors_are_those_of_transformers(settings: tuple[float, float, float, int]) -> None:
    factors = plain() / frequencies(llama_config(*settings))
    np.testing.assert_allclose(llama3_factors(THETA, WIDTH, Llama3Rope(*settings)), factors, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_scaled_rope_comes_back_from_its_factors(settings: tuple[float, float, float, int], tmp_path: Path) -> None:
    """The settings themselves may differ, where they say the same: the frequencies may not."""
    wanted = frequencies(llama_config(*settings))
    config = read_gguf_config(written(tmp_path / "m.gguf", plain() / wanted))
    assert config.rope_parameters["rope_type"] == "llama3"
    np.testing.assert_allclose(frequencies(config), wanted, rtol=2e-3)


def test_a_rope_that_is_not_scaled_stays_plain(tmp_path: Path) -> None:
    assert read_gguf_config(written(tmp_path / "a.gguf", None)).rope_parameters["rope_type"] == "default"
    assert read_gguf_config(written(tmp_path / "b.gguf", np.ones(32))).rope_parameters["rope_type"] == "default"


def test_a_linear_scale_is_read(tmp_path: Path) -> None:
    rope = read_gguf_config(written(tmp_path / "m.gguf", None, type="linear", factor=4.0)).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, THETA)


def test_a_rope_of_another_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rope_freqs\.weight, follow no rule"):
        read_gguf_config(written(tmp_path / "m.gguf", np.linspace(1, 3, 32) ** 2))
    with pytest.raises(ModelError, match=r"does not read \(longrope"):
        read_gguf_config(written(tmp_path / "n.gguf", None, type="longrope"))
