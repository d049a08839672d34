"""One folder, one set of weights; and what somebody else's pruning left in a config."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from billhook.core.errors import ModelError
from billhook.core.plan import Plan, Site
from billhook.methods.export.checkpoint import save
from billhook.models import checks, find_source, sources
from billhook.models.load import load
from billhook.models.repair import Patch, Repair
from billhook.models.sources import convert_gguf
from billhook.models.surgery import apply

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny llama that may be changed."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def refused(folder: Path, *told: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    assert [words for words in told if words not in str(caught.value)] == [], str(caught.value)


# -- one set of weights ---------------------------------------------------------------------------------------------


def test_shards_are_the_model_that_the_one_file_is(sharded: Path, model: Path) -> None:
    one, other, streamed = load(model), load(sharded), load(sharded, memory=1000)
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert streamed.weights is not None
    assert streamed.fingerprint == other.fingerprint


def test_a_folder_with_an_index_and_a_stray_file_is_refused(sharded: Path, model: Path) -> None:
    shutil.copy(model / WEIGHTS, sharded / WEIGHTS)
    for options in ({}, {"memory": 1000}):
        refused(sharded, "more than one set of weights", WEIGHTS, "model-00001-of-00002", "another folder", **options)
    with pytest.raises(ModelError, match="more than one set of weights"):
        checks.fingerprint(sharded)


def test_shards_without_an_index_are_refused_beside_a_whole_file_and_alone(sharded: Path, model: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "no model.safetensors", INDEX, "model-00001-of-00002.safetensors", "download the index")
    shutil.copy(model / WEIGHTS, sharded / WEIGHTS)
    refused(sharded, "more than one set of weights", WEIGHTS, "model-00001-of-00002.safetensors")


def test_an_index_says_where_the_tensors_are(sharded: Path) -> None:
    wrong = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    change(sharded / INDEX, lambda index: index["weight_map"].update(wrong))
    refused(sharded, INDEX, "says that lm_head.weight is in model-00002", "it is in model-00001")
    change(sharded / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": 7}))
    refused(sharded, INDEX, "lm_head.weight: 7", "valid string")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    both = load_file(second) | {"lm_head.weight": load_file(first)["lm_head.weight"] + 1}
    save_file(both, second, metadata={"format": "pt"})
    refused(sharded, "holds lm_head.weight twice", first.name, second.name)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    refused(folder, f"the adapter {name}", "Merge it", "folder of its own")


def test_a_config_that_names_other_weights_is_refused(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    change(folder / "config.json", lambda config: config.update(transformers_weights="other.safetensors"))
    refused(folder, "config.json", "transformers_weights: 'other.safetensors'", "Delete that key")


def test_a_folder_of_gguf_files_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "has no config.json", f"Give the file itself: {tmp_path / 'small.gguf'}")


def test_a_part_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "big-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"one of 2 parts.*llama-gguf-split"):
        find_source(str(part))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_refused_not_cast(dtype: torch.dtype, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, f"stores {name} as", "casts no others")


# -- shapes and numbers, before memory is taken -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"text_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers=1000000000000"),
        ({"intermediate_size": 10**9}, "mismatched keys"),
        ({"vocab_size": 10**10}, "mismatched keys"),
        ({"head_dim": 10**8}, "mismatched keys"),
        ({"hidden_size": 10**30}, "config.json"),
        ({"to_dict": "own"}, "the key 'to_dict'"),
        ({"rope_parameters": [1, 2]}, "config.json"),
        ({"layer_types": {"a": 1}}, "config.json"),
        ({"eos_token_id": {"a": []}}, "eos_token_id"),
    ],
)
def test_a_config_that_the_headers_do_not_bear_out_is_refused(fields: dict[str, Any], told: str, folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(fields))
    refused(folder, told, "ownload")


# -- somebody else's pruning ----------------------------------------------------------------------------------------

PRUNED: dict[str, Any] = {
    "drop_attn_list": [0],
    "drop_mlp_list": [False, True, False, False],
    "per_layer_config": {"1": {"intermediate_size": 16}},
    "block_configs": [{}],
    "pruned_heads": {"1": [0, 2]},
    "skip_layers": [2],
    "removed_blocks": {"2": True},
    "kept_heads": [[0], [1]],
    "layer_types": ["full_attention", "skip", "full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense", None, "dense"],
    "intermediate_size": [48, 48, 24, 48],
    "num_key_value_heads": [2, 2, 1, 2],
}


@pytest.mark.parametrize("key", PRUNED)
def test_somebody_elses_pruning_is_refused_by_its_key(key: str, folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update({key: PRUNED[key]}))
    refused(folder, "Another tool pruned", f"config.json has {key}: ", "Start from the model")
    change(folder / "config.json", lambda config: config.update({key: PRUNED[key], "model_type": "qwen2"}))
    refused(folder, "Another tool pruned", f"config.json has {key}: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"drop_attn_list": [], "drop_mlp_list": [False] * 4},
        {"pruned_heads": {}, "per_layer_config": None},
        {"hidden_dropout": 0.0, "layerdrop": 0.1, "skip_layers": None, "keys_to_ignore_at_inference": ["past"]},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_a_key_that_says_nothing_is_no_pruning(fields: dict[str, Any], folder: Path, model: Path) -> None:
    change(folder / "config.json", lambda config: config.update(fields))
    assert load(folder).anatomy == load(model).anatomy


def test_a_drop_list_tells_how_to_take_its_plan(folder: Path) -> None:
    change(folder / "config.json", lambda config: config.update(drop_mlp_list=[2]))
    refused(folder, f"plan='{folder / 'config.json'}'")


# -- our own section, as anybody may have changed it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A student with a narrowed, a patched and a missing site."""
    teacher = load(model)
    plan = Plan.parse(["attention.0", "mlp.1", "mlp.2[0-15]"])
    repair = Repair(patches={Site(1, "mlp"): Patch(bias=torch.ones(32))})
    out = tmp_path_factory.mktemp("pruned") / "out"
    save(apply(teacher, plan, repair=repair), teacher.tokenizer, plan, out, teacher=teacher)
    return out


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("billhook", None),
        ("billhook", [1]),
        ("billhook.blocks", 10**12),
        ("billhook.blocks", "4"),
        ("billhook.kept_blocks", [0, 1, 1, 3]),
        ("billhook.kept_blocks", [0, 1, 2]),
        ("billhook.kept_blocks", "0123"),
        ("billhook.groups.mlp.2.kept", "0-99999999999"),
        ("billhook.groups.mlp.2.kept", "0-15 0-15 0-15"),
        ("billhook.groups.mlp.2", []),
        ("billhook.groups", {"head.2": {"kept": "0", "of": 4}}),
        ("billhook.narrow.mlp.2.shapes", {"up_proj.weight": [-1, 3]}),
        ("billhook.narrow.mlp.2.shapes", {"no.such": [1]}),
        ("billhook.narrow", {"mlp.77": {"shapes": {}, "attributes": {}}}),
        ("billhook.patches", {"mlp.1": {"bias": True, "gain": False, "rank": 10**9}}),
        ("billhook.patches", 7),
        ("billhook.parts", {}),
        ("billhook.blocks_path", "nowhere"),
        ("per_layer_config", [1]),
        ("per_layer_config", {"x": {}}),
        ("per_layer_config", {"99": {"skip": ["mlp"]}}),
        ("per_layer_config", {"0": {"skip": "mlp"}}),
        ("per_layer_config", {"0": {"skip": ["head"]}}),
        ("per_layer_config", {"0": {"intermediate_size": [1]}}),
    ],
)
def test_a_section_that_does_not_fit_is_refused(keys: str, value: Any, pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "copy")
    assert load(folder).removed_earlier

    def edit(config: Any) -> None:
        at, names = config, split(keys)
        for name in names[:-1]:
            at = at[name]
        at[names[-1]] = value

    change(folder / "config.json", edit)
    refused(folder)


def split(keys: str) -> list[str]:
    """`billhook.groups.mlp.2.kept` by its keys, of which one is a site."""
    return keys.replace("mlp.2", "mlp:2").replace(".", "/").replace("mlp:2", "mlp.2").split("/")


# -- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of converted files of this test's own."""
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path, **numbers: int) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in numbers.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("numbers", [{"block_count": 2}, {"block_count": 2**31}, {"feed_forward_length": 2**31}])
def test_a_gguf_header_that_counts_too_much_is_refused(numbers: dict[str, int], cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", **numbers)
    with pytest.raises(ModelError, match=rf"small.gguf says llama.{next(iter(numbers))}=.*its 1 tensors"):
        convert_gguf(path)
    assert not list(cache.glob("*"))


def test_a_half_copy_of_a_gguf_file_is_made_anew_and_partial_ones_are_swept(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(sources, "_write_safetensors", lambda _, folder: shutil.copytree(model, folder))
    copy = convert_gguf(path)
    whole = {file.name: file.read_bytes() for file in copy.iterdir()}
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        (cache / "other.99999999.partial").mkdir()
        (copy / name).write_bytes(whole[name][:-2])
        assert convert_gguf(path) == copy
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == whole
        assert list(cache.iterdir()) == [copy]


def test_a_conversion_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_write_safetensors", half)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(write_gguf(tmp_path / "small.gguf"))
    assert not list(cache.iterdir())


# -- nobody let in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_refused_for_every_file(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / f"elsewhere-{name}")
    (folder / name).symlink_to(tmp_path / f"elsewhere-{name}")
    refused(folder, name, "link out of the model's folder", "elsewhere", "Copy the file")


def test_a_link_among_further_templates_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").symlink_to(tmp_path / "elsewhere")
    refused(folder, "tools.jinja", "link out of the model's folder")


def test_the_cache_of_the_hub_may_be_links_into_its_own_files(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load(snapshot).fingerprint == load(folder).fingerprint
    (tmp_path / "hub" / "secret").write_text("{}")
    (snapshot / "more.json").symlink_to(tmp_path / "hub" / "secret")
    refused(snapshot, "more.json", "link out of the model's folder")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_says(umask: int, model: Path, tmp_path: Path) -> None:
    teacher, plan = load(model), Plan.parse(["mlp.1"])
    before = os.umask(umask)
    try:
        save(apply(teacher, plan), teacher.tokenizer, plan, tmp_path / "out", teacher=teacher)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
