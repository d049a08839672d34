"""Loading a model as a teacher: whole, or streamed block by block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import transformers

from billhook.core.anatomy import Anatomy
from billhook.core.errors import ModelError, ResourceError, UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.files.foreign_files import reading
from billhook.core.plan import Plan
from billhook.models import architectures, checks, structure
from billhook.models.accelerator.spreading import devices_of, division_of, spread_out
from billhook.models.device import (
    SAFETENSORS_DTYPES,
    SHARE_OF_FREE,
    SHARE_OF_WEIGHTS,
    devices_name,
    dtype_name,
    free_memory,
    pick_devices,
    pick_dtype,
    release_freed_memory,
)
from billhook.models.pruned_config import PrunedConfig, read_config, register
from billhook.models.sources import locate
from billhook.models.streaming import (
    StreamedWeights,
    build_on_meta,
    check_finite,
    check_fit,
    make_buffers,
)
from billhook.models.transformers_internals import config_of, generation_config_of, runs_own_code

UNREADABLE_GENERATION = (  # a note
    "generation_config.json cannot be read. Nothing is measured by it. A student gets it as it is, unless it is no JSON"
)
LOADING_ISSUES = ("missing_keys", "unexpected_keys", "mismatched_keys")


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
    halved_by: Any | None = None  # the tokenizer by whose tokens texts are halved, where it is not its own

    def __iter__(self) -> Iterator[Any]:
        """`model, tokenizer = billhook.load(folder)`."""
        return iter((self.model, self.tokenizer))

    @property
    def compute_key(self) -> str:
        """What losses are filed under: the compute dtype and the kind of device."""
        return f"{dtype_name(self.model.dtype)} on {self.device.type}"

    @property
    def device(self) -> torch.device:
        """Where it computes; of several devices the one that holds the embedding."""
        return self.weights.device if self.weights is not None else torch.device(self.model.device)

    @property
    def head_device(self) -> torch.device:
        """Where its head is, and so the losses."""
        return (
            self.device if self.weights is not None else torch.device(self.model.get_output_embeddings().weight.device)
        )

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that hold it, the embedding's first."""
        whole = self.weights is None and isinstance(self.model, torch.nn.Module)  # not in a runtime
        return devices_of(self.model) if whole else (self.device,)

    @property
    def place(self) -> str:
        """What its devices are called: `cpu`, `cuda:0`, `cuda:0-1`."""
        return devices_name(self.devices) if len(self.devices) > 1 else str(self.device)

    def block_device(self, index: int) -> torch.device:
        """Where the model's block `index` computes, counted in the model."""
        block = structure.blocks_of(self.model, self.architecture)[index]
        found = self.device if self.weights is not None else next((p.device for p in block.parameters()), self.device)
        return torch.device(found)

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take while losses are measured."""
        sizes = [int(p.numel() * p.element_size()) for p in self.model.parameters() if p.device.type != "meta"]
        if self.weights is None:
            return sum(sizes)
        blocks = structure.blocks_of(self.model, self.architecture)
        largest = max(sum(int(p.numel() * p.element_size()) for p in block.parameters()) for block in blocks)
        return sum(sizes) + 2 * largest  # one at work, one on its way

    @property
    def architecture(self) -> architectures.Architecture:
        return architectures.architecture_of(self.model.config)

    @property
    def pruned(self) -> PrunedConfig:
        """What its config says of an earlier pruning."""
        return read_config(self.model.config)

    def block(self, position: int) -> torch.nn.Module:
        """The block that stood at `position` in the unpruned model."""
        return structure.blocks_of(self.model, self.architecture)[self.positions.index(position)]


Model = str | Path | Teacher  # a folder, a .gguf file, a Hugging Face name or demo; or one that is loaded


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

    `device`: auto, cpu, cuda[:n] or mps; several GPUs as cuda:0-7 or cuda:0,2, which hold the blocks in turn: then the
    whole model must fit into them. `dtype`: auto (float32 on a CPU, the checkpoint's own elsewhere), float32,
    bfloat16 or float16. A model whose weights do not fit into `memory` bytes (None: most of what the device has free,
    so that activations have room) is not loaded: its `weights` are read from the file when they are needed. Raises
    ModelError if the checkpoint is damaged, foreign or not supported, UsageError for a device or dtype that the
    machine lacks, and ResourceError if several devices do not hold the model.
    """
    places = pick_devices(device)
    place = places[0]
    watch(Event("load", values={"model": str(name)}))
    folder = locate(str(name), watch)
    raw, tensors = checks.inspect_checkpoint(folder, trust_remote_code)
    register()
    if not any(kind in SAFETENSORS_DTYPES for kind, _ in tensors.values()):
        _compared(folder, torch.float32, place)  # names the tensor and its file
    stored = checks.stored_dtype(raw, tensors)
    compute = pick_dtype(dtype, place, stored)
    needed = sum(elements for _, elements in tensors.values()) * compute.itemsize
    own_code = trust_remote_code and bool(raw.get("auto_map")) and not str(raw["model_type"]).startswith("billhook-")
    model: Any
    weights: StreamedWeights | None
    model, weights = (None, None) if own_code else _compared(folder, compute, place)
    room = SHARE_OF_FREE * free_memory(place) if memory is None else SHARE_OF_WEIGHTS * memory
    if len(places) > 1:
        if memory is not None and needed > room:
            raise _no_budget(str(name), needed, memory, places)
        if weights is None:
            model = _build(folder, compute, torch.device("cpu"), trust_remote_code)
        _spread(model, weights, places)
        weights = None
    elif weights is not None and needed > room:
        release_freed_memory()
        make_buffers(model, place)
        weights.load_outside_blocks()
    elif weights is not None and place.type != "cpu":  # from the file to the device, tensor by tensor
        make_buffers(model, place)
        weights.load_all()
        weights = None
    else:
        model, weights = _build(folder, compute, place, trust_remote_code), None
        for key, tensor in model.named_parameters():
            check_finite(key, tensor)
    tokenizer = _tokenizer(folder, model, trust_remote_code)
    print_ = checks.fingerprint(folder)
    if unreadable := generation_config_of(folder)[1]:
        watch(Event("load", values={"note": f"{UNREADABLE_GENERATION} ({unreadable})"}))
    watch(Event("load", 1, 1, values={"model": str(name)}))
    return Teacher(model, tokenizer, str(name), folder, stored, *_anatomy(model, stored), print_, weights)


def _spread(model: Any, weights: StreamedWeights | None, places: tuple[torch.device, ...]) -> None:
    """Put a model's blocks on several devices, its weights from the file if they are not in memory."""
    row = architectures.architecture_of(model.config)
    division = division_of(model, row, places)
    if weights is not None:
        make_buffers(model, places[0], division)
        weights.load_all(division)
    spread_out(model, row, division)


def _no_budget(name: str, needed: int, memory: int, places: tuple[torch.device, ...]) -> ResourceError:
    """The refusal of a memory limit below a model on several devices, which hold all of it."""
    return ResourceError(
        f"{name} takes {needed / 1e9:,.1f} GB, and {option('memory')} of {memory / 1e9:,.1f} GB leaves "
        f"{SHARE_OF_WEIGHTS * memory / 1e9:,.1f} GB for weights. Several devices hold the whole model. Leave "
        f"{option('memory')} out, or read the blocks from disk with {option('device', str(places[0]))}."
    )


def _anatomy(model: Any, stored: torch.dtype) -> tuple[Anatomy, tuple[int, ...], Plan]:
    """The anatomy of a model, where its blocks stood, and what an earlier pruning took."""
    pruned = read_config(model.config)
    sizes = structure.anatomy(model, model.config, pruned, item_bytes=stored.itemsize)
    return sizes, pruned.kept_blocks, pruned.removed


def student_as_teacher(teacher: Teacher, student: Any) -> Teacher:
    """What `load` would make of a student's checkpoint: a teacher of its own, with the student's model."""
    anatomy, positions, removed = _anatomy(student, teacher.dtype)
    return replace(
        teacher, model=student, anatomy=anatomy, positions=positions, removed_earlier=removed, lock=threading.RLock()
    )


def model_config(model: Model, *, trust_remote_code: bool = False, watch: EventListener = ignore_events) -> Any:
    """Return the config of a model that can be pruned; no weights are read. Raises ModelError as `load`."""
    if isinstance(model, Teacher):
        return model.model.config
    folder = locate(str(model), watch)
    checks.inspect_checkpoint(folder, trust_remote_code)
    register()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    architectures.architecture_of(config)
    return config


def as_teacher(
    model: Model,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
    watch: EventListener = ignore_events,
) -> Teacher:
    """The teacher of a model: a loaded one itself, another as `load` reads it.

    Raises UsageError for a loaded one that `load` with these options would not have returned.
    """
    if not isinstance(model, Teacher):
        return load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, memory=memory, watch=watch)
    places, compute = pick_devices(device), dtype_name(model.model.dtype)
    again = "Load it so, or leave the option out."
    asked, has = ({(each.type, each.index or 0) for each in devices} for devices in (places, model.devices))
    if device != "auto" and asked != has:
        raise UsageError(f"{model.name} is loaded on {model.place}, not by {option('device', device)}. {again}")
    if dtype not in ("auto", compute):
        raise UsageError(f"{model.name} is loaded in {compute}, not by {option('dtype', dtype)}. {again}")
    if memory is not None and model.weights is None and model.weight_bytes > SHARE_OF_WEIGHTS * memory:
        raise UsageError(
            f"{model.name} is loaded whole and takes {model.weight_bytes / 1e6:,.1f} MB, which {option('memory')} of "
            f"{memory / 1e6:,.1f} MB has no room for. {again}"
        )
    return model


def name_of(model: Model) -> str:
    """What a model is called in results and runs."""
    return model.name if isinstance(model, Teacher) else str(model)


def loaded_by_name(*models: Model) -> dict[str, Teacher]:
    """The loaded ones among models. Raises UsageError if two of them have one name."""
    loaded: dict[str, Teacher] = {}
    for model in models:
        if isinstance(model, Teacher) and loaded.setdefault(model.name, model) is not model:
            raise UsageError(f"Two loaded models are called {model.name}. Load one of them from another path.")
    return loaded


def _compared(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, StreamedWeights]:
    """The model of `folder` on the meta device, and its weights: every name and shape is that of the files' headers."""
    model = build_on_meta(folder, dtype)
    blocks = architectures.architecture_of(model.config).blocks
    with reading(f"The weights in {folder} do not fit the architecture", advice="Download the checkpoint again."):
        return model, StreamedWeights(folder, model, blocks, dtype, device)


def _build(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    generation, unreadable = generation_config_of(folder)
    with reading(f"transformers cannot load {folder}"):
        model, told = auto.from_pretrained(
            str(folder),
            config=config_of(folder, trust_remote_code),
            generation_config=generation if unreadable else None,  # None: transformers reads the file
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told, and refused below
        )
    fit = {kind: [k[0] if isinstance(k, tuple) else str(k) for k in told.get(kind) or ()] for kind in LOADING_ISSUES}
    check_fit(**fit)
    if runs_own_code(model):
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
    with reading(f"transformers cannot read the tokenizer in {folder}", advice="Download its files again."):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
            numbers = list(tokenizer.get_vocab().values())
        except ImportError as error:
            raise ModelError(
                f"The tokenizer in {folder} needs a package that is not installed. Try: pip install sentencepiece "
                "protobuf"
            ) from error
    rows = model.get_input_embeddings().weight.shape[0]
    if any(index >= rows and index not in special for index in numbers):
        raise ModelError(
            f"The tokenizer has {len(tokenizer):,} entries, the embedding only {rows:,} rows. They belong to different "
            "models; bring the right tokenizer."
        )
    return tokenizer
