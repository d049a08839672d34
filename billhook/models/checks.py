"""What is refused before a checkpoint is loaded: damaged, foreign, quantised, unknown or dangerous ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from billhook.core.errors import ModelError, option
from billhook.core.files.foreign_files import read_json_object, reading, shown, validated
from billhook.core.results.json_form import JsonObject
from billhook.models import architectures, require_config
from billhook.models.device import SAFETENSORS_DTYPES
from billhook.models.modeling_billhook import stock_fields
from billhook.models.pruned_config import check_section

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CANDIDATES = ("model.safetensors", "model-*-of-*.safetensors")  # what readers take for the weights of a folder
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")  # transformers would load these on top
_OTHER_WEIGHTS = "transformers_weights"  # a key of config.json that makes transformers read another file
HASHED_AT_A_TIME = 8  # shards
_COUNTS = ("layer", "labels")  # in keys of configs whose numbers make lists of that length
_LARGEST = 2**53  # of any number in a config
_MOST_COUNTED = 1000  # such entries, where there are fewer tensors


def inspect_checkpoint(folder: Path, trust_remote_code: bool = False) -> tuple[JsonObject, dict[str, tuple[str, int]]]:
    """Check a model folder without loading it: its raw config, and {tensor: (dtype, elements)}.

    Raises ModelError for everything that must not be loaded.
    """
    path = require_config(folder)
    _check_links(folder)
    raw = read_json_object(path)
    _check_keys(raw, path, trust_remote_code)
    tensors = _tensors(folder)
    _check_counts(raw, len(tensors))
    config = _check_config(raw)
    _check_depth(raw, config, tensors)
    check_section(raw, config.num_hidden_layers, path)
    return raw, tensors


def _check_links(folder: Path) -> None:
    """Raises ModelError if a file leads out of the model's folder; the Hub's own cache, which is links, may."""
    home = folder.resolve()
    stores = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if not any(path.resolve().is_relative_to(store) for store in stores):
            raise ModelError(f"{path} is a link out of the model's folder, to {path.resolve()}. Copy the file itself.")


def _check_keys(raw: JsonObject, path: Path, trust_remote_code: bool) -> None:
    """Raises ModelError for what a config says that must not be loaded, before transformers sees it."""
    model_type = str(raw.get("model_type") or "")
    ours = model_type.startswith("billhook-")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"The checkpoint is quantised ({method}). Prune the unquantised one, and quantise the result afterwards."
        )
    if pruned := foreign_pruning(raw, path):
        raise ModelError(pruned)
    if raw.get(_OTHER_WEIGHTS):
        raise ModelError(
            f"{path} has {_OTHER_WEIGHTS}: {shown(raw[_OTHER_WEIGHTS])}, which names other weights than those of the "
            "folder. Delete that key, or give a folder that holds these weights alone."
        )
    if raw.get("auto_map") and not ours and not trust_remote_code:
        raise ModelError(
            "The checkpoint brings its own Python code (auto_map in config.json), which is not run unasked. If you "
            f"trust it, add {option('trust_remote_code', True)}; if transformers' own class of the type computes the "
            "same, delete "
            "auto_map from config.json instead."
        )
    if not model_type:
        raise ModelError("config.json names no model_type, so its architecture is unknown. Download the file again.")
    blocks, kinds = raw.get("num_hidden_layers"), raw.get(architectures.BLOCK_KINDS)
    if isinstance(kinds, list) and isinstance(blocks, int) and len(kinds) != blocks:
        raise ModelError(
            f"config.json says num_hidden_layers={blocks} but lists {len(kinds)} {architectures.BLOCK_KINDS}. "
            "One of them is wrong; download config.json again."
        )


def _check_counts(raw: JsonObject, tensors: int) -> None:
    """Raises ModelError for a number that would have transformers make more layers than there are tensors."""
    nested = [value for value in raw.values() if isinstance(value, dict)]
    for name, value in (item for each in (raw, *nested) for item in each.items()):
        if not isinstance(value, int):
            continue
        if value > max(tensors, _MOST_COUNTED) and any(word in name for word in _COUNTS):
            raise ModelError(
                f"config.json says {name}={value}, but the weights hold {tensors} tensors. One of them is wrong; "
                "download the checkpoint again."
            )
        if abs(value) > _LARGEST:
            raise ModelError(f"config.json says {name}={shown(value)}, which no model has. Download the file again.")


def _check_config(raw: JsonObject) -> Any:
    """The config as transformers builds it. Raises ModelError where it does not, or where no row fits."""
    model_type = str(raw["model_type"])
    base = architectures.base_type(model_type)
    if base not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"There is no row for the architecture {model_type!r}, and transformers {transformers.__version__} does "
            f"not know it. Known here: {', '.join(sorted(architectures.ARCHITECTURES))}."
        )
    kind = transformers.CONFIG_MAPPING[base]
    if method := next((name for name in raw if callable(getattr(kind, name, None))), None):
        raise ModelError(f"config.json has the key {method!r}, which is none of a {base}. Download the file again.")
    try:
        config = transformers.AutoConfig.for_model(base, **stock_fields(raw))
        config.to_dict()
    except Exception as error:  # a foreign config may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"transformers does not accept this config.json: {reason} Download the file again.") from error
    try:
        with reading("transformers does not accept this config.json"):
            architectures.architecture_of(config)
    except ModelError as error:
        if (
            base in architectures.ARCHITECTURES
            or architectures.unsupported_reason(config)
            or "num_hidden_layers" not in raw
        ):
            raise
        raise ModelError(f"{error} The row that is probably missing: {_suggestion(config)}") from error
    return config


def _suggestion(config: Any) -> str:
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return architectures.suggest_architecture(model, config)
    except Exception as error:  # a foreign architecture may fail in any way; the suggestion is a courtesy
        return f"none suggests itself ({type(error).__name__})"


# -- somebody else's pruning ------------------------------------------------------------------------------------------

_PRUNING = re.compile(r"(^|_)(drop|dropped|prun\w*|skip|skipped|remov\w*|kept|keep|slic\w*|sparsity)(_|$)", re.I)
_PARTS_OF_MODELS = re.compile(
    r"layer|block|head|attn|attention|mlp|ffn|neuron|channel|expert|hidden|intermediate", re.I
)
_TOLD_BY_BLOCK = ("block_configs", "per_layer_config", "mtp_per_layer_config")
_KINDS_OF_BLOCKS = {"attention", "full_attention", "sliding_attention", "chunked_attention", "sparse", "dense"}


def foreign_pruning(raw: JsonObject, path: Path) -> str | None:
    """Why a config of somebody else's pruned model cannot be read, by its key; None if nobody else pruned it.

    transformers passes over such keys, and would load a model that the config does not describe. A model of ours says
    `per_layer_config` itself.
    """
    base = architectures.base_type(str(raw.get("model_type") or ""))
    known = transformers.CONFIG_MAPPING
    fields = getattr(known[base], "__dataclass_fields__", {}) if base in known else {}
    ours = ("per_layer_config",) if str(raw.get("model_type")).startswith("billhook-") else ()
    for where, told in (("", raw), *((f"{name}.", each) for name, each in raw.items() if isinstance(each, dict))):
        for key, value in told.items():
            by_block = key in _TOLD_BY_BLOCK and key not in ours
            named = key not in fields and _PRUNING.search(key) and _PARTS_OF_MODELS.search(key)
            if where != "billhook." and ((by_block and value) or (named and _says_something(value))):
                return _refusal(f"{where}{key}", value, path)
    if base in architectures.ARCHITECTURES:
        for name in architectures.PER_BLOCK_LISTS[:2]:
            kinds = raw.get(name)
            odd = (
                [k for k in kinds if not isinstance(k, str) or k not in _KINDS_OF_BLOCKS]
                if isinstance(kinds, list)
                else []
            )
            if odd:
                return _refusal(name, odd[0], path)
        for width in (
            "hidden_size",
            "head_dim",
            *(w for widths in architectures.CONFIG_FIELDS.values() for w in widths),
        ):
            if isinstance(raw.get(width), list | dict):
                return _refusal(width, raw[width], path)
    return None


def _says_something(value: Any) -> bool:
    """Whether a list or mapping of removed parts names any: an index, a part, or True for one."""
    if isinstance(value, dict):
        return any(each is not None and each is not False and each not in ([], {}) for each in value.values())
    if isinstance(value, list):
        return any(each is not False and each is not None and each not in ([], {}) for each in value)
    return isinstance(value, str) and bool(value)


def _refusal(key: str, value: object, path: Path) -> str:
    drop_lists = key in ("drop_attn_list", "drop_mlp_list")
    how = f", with its plan: {option('plan', str(path))}" if drop_lists else ""
    return (
        f"Another tool pruned this model ({path.name} has {key}: {shown(value)}), in a form that transformers does not "
        f"load faithfully. Start from the model that it was made of{how}."
    )


# -- weights ----------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up a checkpoint: those that its index names, or model.safetensors.

    Whoever reads the folder reads these. Raises ModelError if one is missing or lies elsewhere, if others lie beside
    them that another reader would take, or if there are only pickles.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for shard in names:
            if Path(shard).name != shard:
                raise ModelError(f"{index} names {shard!r}, a path. Shards must lie beside the index.")
            if not (folder / shard).is_file():
                raise ModelError(f"{index} names {shard}, which is missing. Download it again.")
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise _no_weights(folder)
    _check_alone(folder, names)
    return tuple(folder / name for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map. Download the file again.")
    return validated(dict[str, str], weight_map, f"The weight_map of {index}")


def _no_weights(folder: Path) -> ModelError:
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        return ModelError(
            f"{folder} holds no model.safetensors and no {INDEX}, but {_listed(parts)}. Rename the one file to "
            "model.safetensors, or download the index of the shards."
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"{folder} holds pickle weights ({pickles[0]}), which can run code when read. Only safetensors and "
            "GGUF are read. Convert it with transformers: save_pretrained writes safetensors."
        )
    return ModelError(f"{folder} holds no model.safetensors. Only safetensors and GGUF are read.")


def _check_alone(folder: Path, names: list[str]) -> None:
    """Raises ModelError if other weights lie beside a checkpoint's, of which another reader would take some."""
    candidates = [path.name for pattern in _CANDIDATES for path in folder.glob(pattern)]
    strays = sorted(set(candidates) - set(names))
    if strays:
        raise ModelError(
            f"{folder} holds more than one set of weights: {_listed(names)}, and beside that {_listed(strays)}. "
            "Readers differ in which they take. Move those that do not belong to the model into another folder."
        )
    if adapter := next((name for name in _ADAPTERS if (folder / name).is_file()), None):
        raise ModelError(
            f"{folder} holds the adapter {adapter} beside the weights, which some readers add to them. Merge it into "
            "the model, or move it into a folder of its own."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """A shard, for as long as it takes. Raises ModelError if it is damaged."""
    with reading(f"{shard} is damaged", advice="Download it again."), safe_open(shard, framework="pt") as file:
        yield file


def _tensors(folder: Path) -> dict[str, tuple[str, int]]:
    """{name: (dtype, elements)} of the floating-point tensors; masks and counters of old checkpoints do not count."""
    tensors: dict[str, tuple[str, int]] = {}
    found: dict[str, str] = {}
    for shard in shards(folder):
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise ModelError(
                        f"{folder} holds {name} twice, in {found[name]} and in {shard.name}. Download both again."
                    )
                found[name] = shard.name
                piece = file.get_slice(name)
                elements = 1
                for size in piece.get_shape():
                    elements *= size
                if piece.get_dtype()[0] in "FB" and piece.get_dtype() != "BOOL":
                    tensors[name] = (piece.get_dtype(), elements)
    _check_index(folder / INDEX, found)
    return tensors


def _check_index(index: Path, found: dict[str, str]) -> None:
    """Raises ModelError if an index says of a tensor that it is where it is not."""
    told = _weight_map(index) if index.is_file() else {}
    if wrong := next((name for name, shard in told.items() if found.get(name) != shard), None):
        where = f"in {found[wrong]}" if wrong in found else "in no shard"
        raise ModelError(f"{index} says that {wrong} is in {told[wrong]}, and it is {where}. Download both again.")


def _check_depth(raw: JsonObject, config: Any, tensors: dict[str, tuple[str, int]]) -> None:
    row = architectures.ARCHITECTURES[architectures.base_type(str(raw["model_type"]))]
    tail = row.blocks.rsplit(".", 1)[-1]
    found = {int(m[1]) for name in tensors if (m := re.search(rf"(?:^|\.){tail}\.(\d{{1,9}})\.", name))}
    if (found and max(found) + 1 != config.num_hidden_layers) or len(found) != max(found, default=-1) + 1:
        raise ModelError(
            f"config.json says num_hidden_layers={config.num_hidden_layers}, but the weights hold {len(found)} blocks. "
            "One of them is wrong; download the checkpoint again."
        )


def stored_dtype(raw: JsonObject, tensors: dict[str, tuple[str, int]]) -> torch.dtype:
    """The dtype that holds most of the checkpoint's elements."""
    elements: dict[str, int] = {}
    for dtype, count in tensors.values():
        elements[dtype] = elements.get(dtype, 0) + count
    most = max(elements, key=lambda d: elements[d], default="nothing")
    if most not in SAFETENSORS_DTYPES:
        raise ModelError(f"The weights are stored as {most}. Billhook prunes float32, bfloat16 and float16 weights.")
    return SAFETENSORS_DTYPES[most]


def fingerprint(folder: Path) -> str:
    """16 hex digits of a checkpoint: of its config and of every byte of its shards."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with ThreadPoolExecutor(HASHED_AT_A_TIME, "billhook-hash") as pool:  # hashing releases Python's lock
        for part in pool.map(_digest, shards(folder)):
            digest.update(part)
    return digest.hexdigest()[:16]


def _digest(shard: Path) -> bytes:
    """Return the digest of every byte of a shard."""
    with shard.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
