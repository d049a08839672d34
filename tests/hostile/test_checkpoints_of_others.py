"""Checkpoints of any content: headers, indices, configs, our own section, GGUF. Each is read or refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile import NUMBERS, bounded, damaged, edits, examples, json_bytes, values
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from billhook.core.plan import Plan
from billhook.methods.export.checkpoint import save
from billhook.models.checks import fingerprint, inspect_checkpoint
from billhook.models.load import load
from billhook.models.sources import convert_gguf
from billhook.models.surgery import apply
from billhook.runs.evaluation import seen_digests

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of copies of the tiny llama: whole, in shards, and pruned. The tests write over their files."""
    home = tmp_path_factory.mktemp("hostile")
    shutil.copytree(model, home / "whole")
    shutil.copytree(model, home / "sharded")
    tensors = load_file(home / "sharded" / WEIGHTS)
    (home / "sharded" / WEIGHTS).unlink()
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, held in shards.items():
        save_file({each: tensors[each] for each in held}, home / "sharded" / name, metadata={"format": "pt"})
    weight_map = {each: name for name, held in shards.items() for each in held}
    (home / "sharded" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    teacher, plan = load(model), Plan.parse(["attention.0", "mlp.1", "mlp.2[0-15]"])
    save(apply(teacher, plan), teacher.tokenizer, plan, home / "pruned", teacher=teacher)
    return home


def header(content: bytes) -> tuple[Any, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(value: Any, rest: bytes) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + rest


@contextmanager
def rewritten(path: Path, content: bytes) -> Iterator[None]:
    """Inside, a file of a checkpoint holds something else."""
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


@examples(300)
@given(data=st.data())
def test_headers_of_weights(home: Path, data: st.DataObject) -> None:
    path = home / "whole" / WEIGHTS
    content = path.read_bytes()
    told, rest = header(content)
    kinds = [
        damaged(content, 9000),
        json_bytes.map(lambda raw: with_header(raw, rest)),
        edits(told).map(lambda value: with_header(value, rest)),
        edits(told, st.lists(st.sampled_from([n for n in NUMBERS if isinstance(n, int)]), max_size=5)).map(
            lambda value: with_header(value, rest)
        ),
        st.sampled_from([2**63, 2**40, 0, len(content)]).map(lambda size: struct.pack("<Q", size) + content[8:]),
    ]
    with rewritten(path, data.draw(st.one_of(kinds))):
        with bounded():
            inspect_checkpoint(path.parent)
        with bounded():
            fingerprint(path.parent)


@examples(200)
@given(data=st.data())
def test_indices(home: Path, data: st.DataObject) -> None:
    path = home / "sharded" / INDEX
    content = path.read_bytes()
    changed = edits(json.loads(content)).map(lambda value: json.dumps(value).encode())
    with rewritten(path, data.draw(json_bytes | changed)), bounded():
        inspect_checkpoint(path.parent)


CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "head_dim", "layer_types", "rope_parameters", "rope_scaling",
               "model_type", "num_labels", "text_config", "auto_map", "quantization_config", "architectures", "dtype",
               "torch_dtype",
               "to_dict", "__class__", "attribute_map", "tie_word_embeddings", "pruned_heads", "drop_mlp_list",
               "per_layer_config", "billhook", "sliding_window", "transformers_version", "hidden_act")  # fmt: skip


def configs(raw: dict[str, Any]) -> st.SearchStrategy[bytes]:
    added = st.dictionaries(st.sampled_from(CONFIG_KEYS), values, min_size=1, max_size=3)
    changed = edits(raw) | added.map(lambda more: raw | more)
    return changed.map(lambda value: json.dumps(value).encode())


@examples(300)
@given(data=st.data())
def test_configs(home: Path, data: st.DataObject) -> None:
    path = home / "whole" / "config.json"
    content = path.read_bytes()
    with rewritten(path, data.draw(json_bytes | configs(json.loads(content)))), bounded():
        inspect_checkpoint(path.parent)


@examples(100)
@given(data=st.data())
def test_configs_with_which_a_model_is_loaded(home: Path, data: st.DataObject) -> None:
    path = home / "whole" / "config.json"
    content = path.read_bytes()
    with rewritten(path, data.draw(configs(json.loads(content)))), bounded():
        load(path.parent)


@examples(40)
@given(data=st.data())
def test_files_of_the_tokenizer_and_for_generation(home: Path, data: st.DataObject) -> None:
    path = (
        home
        / "whole"
        / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
    )
    content = path.read_bytes()
    changed = edits(json.loads(content)).map(lambda value: json.dumps(value).encode())
    with rewritten(path, data.draw(json_bytes | changed)), bounded():
        load(path.parent)


@examples(150)
@given(data=st.data())
def test_our_own_section(home: Path, data: st.DataObject) -> None:
    path = home / "pruned" / "config.json"
    content = path.read_bytes()
    raw = json.loads(content)
    ours = {name: raw[name] for name in ("billhook", "per_layer_config", "num_hidden_layers")}
    with rewritten(path, json.dumps(raw | data.draw(edits(ours))).encode()), bounded():
        load(path.parent)


@examples(100)
@given(
    content=json_bytes | edits({"seen": ["0123", "4567"], "run": "r1"}).map(lambda value: json.dumps(value).encode())
)
def test_reports_beside_a_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with bounded():
        seen_digests(tmp_path)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a header of every kind of value, and two tensors."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path_factory.mktemp("gguf") / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(64)])
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # of numpy, over numbers that overflow
@examples(150)
@given(data=st.data())
def test_headers_of_gguf_files(small_gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data.draw(damaged(small_gguf.read_bytes(), 2000)))
    with pytest.MonkeyPatch.context() as patch, bounded():
        patch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
        convert_gguf(path)
    assert not list(tmp_path.glob("cache/*"))
