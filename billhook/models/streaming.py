"""A checkpoint that is never in memory as a whole: a model without weights, and its tensors read when asked for.

Everything that transformers decides on loading stays its decision: the names (a checkpoint's may be older, shorter, or
one an expert), which parameters keep float32, and what is passed over. This file only decides when a tensor is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from billhook.core.errors import ModelError
from billhook.core.files.foreign_files import reading
from billhook.models import checks
from billhook.models.accelerator.copies import SideCopies
from billhook.models.device import SAFETENSORS_DTYPES, dtype_bytes
from billhook.models.transformers_internals import (
    Conversion,
    config_of,
    conversions,
    fill_buffers,
    generation_config_of,
    names_in_float32,
    tied_parameters,
)

PlaceOf = Callable[[str], torch.device]  # from the name of a parameter or buffer
_Arriving = tuple[dict[str, torch.Tensor], Any]  # parameters by name, and the event that their copies precede
COMPARED_ROWS = 4096  # of two embeddings at a time, where a checkpoint has both and its config says that they are one


@torch.inference_mode(False)  # here and below: what stays in the model must serve outside that mode too
def build_on_meta(folder: Path, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """The *ForCausalLM of `folder` as from_pretrained makes it, in eval mode, without its weights.

    Its parameters are on the meta device, in `dtype` (or in float32, where transformers keeps them so), without
    gradients; its buffers are real, on `device`; without one they are on the meta device too. Types of our own must be
    registered. Raises ModelError if transformers does not build it.
    """
    auto: Any = transformers.AutoModelForCausalLM
    with reading(f"transformers cannot load {folder}"):
        config = config_of(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        model.generation_config, _ = generation_config_of(folder)
    wide = set(names_in_float32(model, dtype))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name in wide:
            parameter.data = parameter.data.to(torch.float32)
    if device is not None:
        make_buffers(model, device)
    return model.eval()


@torch.inference_mode(False)
def make_buffers(model: Any, device: torch.device, place_of: PlaceOf | None = None) -> None:
    """Give a model that is all on the meta device its buffers, with their values, on `device`, or each at its place."""
    for name, buffer in list(model.named_buffers()):
        set_tensor(model, name, torch.empty_like(buffer, device="cpu"))
    fill_buffers(model)
    for name, buffer in list(model.named_buffers()):
        set_tensor(model, name, buffer.to(place_of(name) if place_of is not None else device))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ModelError, naming the tensor, if a weight is NaN or infinite. Makes no copy of it."""
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        raise ModelError(f"{name} holds NaN or infinite weights. Download the checkpoint again, or train it anew.")


def check_fit(**issues: Iterable[str]) -> None:
    """Raises ModelError if any of the lists, such as `missing_keys`, names a tensor."""
    for kind, found in issues.items():
        if names := sorted(found):
            raise ModelError(
                f"The weights do not fit the architecture: {len(names)} {kind.replace('_', ' ')}, such as {names[0]}. "
                "Nothing is filled with random numbers; download the checkpoint again."
            )


class StreamedWeights:
    """The tensors of a checkpoint, read from its shards when asked for, under transformers' own names.

    No shard stays open between two calls. `dtype` and `device`: of what is given out; `bytes_read`: of the tensors read
    so far, as the file stores them.
    """

    @torch.inference_mode(False)
    def __init__(self, folder: Path, model: Any, blocks: str, dtype: torch.dtype, device: torch.device) -> None:
        """`model`: its `build_on_meta` in `dtype` on `device`; `blocks`: where its blocks are, such as `model.layers`.

        Only the headers are read (and both embeddings, if the config ties them and the file has two).
        Raises ModelError if a tensor is missing, left over, of another shape or no float of a model's.
        """
        self.bytes_read = 0
        self._lock, self._copies = threading.Lock(), SideCopies(device)
        self._model, self._blocks, self.dtype, self.device = model, blocks, dtype, device
        self._wanted: dict[str, torch.Tensor] = model.state_dict()  # all of it on the meta device
        self._shards: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self._checked: set[str] = set()
        shapes: dict[str, torch.Tensor] = {}
        dtypes: dict[str, str] = {}
        for shard in checks.shards(folder):
            with checks.opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._shards[name] = shard
                    piece = file.get_slice(name)
                    shapes[name] = torch.empty(piece.get_shape(), device="meta")
                    dtypes[name] = piece.get_dtype()
                    self._bytes[name] = shapes[name].numel() * dtype_bytes(dtypes[name])
        self._recipes, unexpected = conversions(model, list(self._shards))
        self._source, mismatched = self._fit(shapes)
        self._input, self._output = (
            next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        missing = [name for name in self._wanted if self._alias(name) not in self._source]
        check_fit(missing_keys=missing, unexpected_keys=unexpected, mismatched_keys=mismatched)
        self._check_dtypes(dtypes)
        self._untie()

    def _fit(self, shapes: dict[str, torch.Tensor]) -> tuple[dict[str, Conversion], list[str]]:
        """{parameter: its recipe}, and the parameters whose shape is not the model's, by cooking on the meta device."""
        source: dict[str, Conversion] = {}
        wrong: list[str] = []
        for recipe in self._recipes:
            try:
                made = recipe.convert(shapes, self._model)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                # experts of different shapes do not merge; older torch asserts where newer raises RuntimeError
                source[recipe.first] = recipe
                wrong.append(recipe.first)
                continue
            recipe.targets.extend(made)
            source |= dict.fromkeys(made, recipe)
            wrong += [name for name, value in made.items() if value.shape != self._wanted[name].shape]
        return source, wrong

    def _check_dtypes(self, dtypes: dict[str, str]) -> None:
        """Raises ModelError for a weight that is no float of a model's; masks and counters become none."""
        for recipe in self._recipes:
            for _, name in recipe.parts:
                if dtypes[name] not in SAFETENSORS_DTYPES and self._wanted[recipe.first].is_floating_point():
                    raise ModelError(
                        f"{self._shards[name]} stores {name} as {dtypes[name]}. Billhook prunes float32, bfloat16 and "
                        "float16 weights, and casts no others. Start from the checkpoint that was not quantised or "
                        "converted."
                    )

    def _alias(self, name: str) -> str:
        """The parameter of the checkpoint that `name` is tied to, or itself."""
        if name in self._source:
            return name
        for target, source in tied_parameters(self._model).items():
            if name in (target, source):
                return str(source if name == target else target)
        return name

    def _untie(self) -> None:
        """As transformers does: what the config ties but the file holds twice, with different values, is not tied."""
        for target, source in list(tied_parameters(self._model).items()):
            if {target, source} <= self._source.keys() and not self._same(target, source):
                stood = self._model.get_parameter(target)
                set_tensor(self._model, target, nn.Parameter(torch.empty_like(stood), requires_grad=False))
                tied_parameters(self._model).pop(target)

    def _same(self, one: str, other: str) -> bool:
        a, b = (self._mapped([self._file_name(name)])[self._file_name(name)] for name in (one, other))
        pairs = zip(a.split(COMPARED_ROWS), b.split(COMPARED_ROWS), strict=True)
        return all(torch.equal(x.to(self.dtype), y.to(self.dtype)) for x, y in pairs)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _mapped(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors of the file as stored, still in its memory map: pages are read when used, and go with them."""
        groups: dict[Path, list[str]] = {}
        for name in names:
            groups.setdefault(self._shards[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for shard, group in groups.items():
            with checks.opened(shard) as file:
                found |= {name: file.get_tensor(name) for name in group}
        return found

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

    @torch.inference_mode(False)
    def _cooked(self, recipe: Conversion, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """The parameters of a recipe, out of the map, in the model's dtypes and on `device`, or on its own."""
        mapped = self._mapped([name for _, name in recipe.parts])
        self._count(sum(tensor.nbytes for tensor in mapped.values()))
        made: dict[str, torch.Tensor] = {}
        pieces = recipe.split()
        for turn, piece in enumerate(pieces):
            for name, value in piece.convert(mapped, self._model).items():
                if name not in made:
                    made[name] = torch.empty_like(self._wanted[name], device=device or self.device)
                self._copies.copy(made[name] if len(pieces) == 1 else made[name][turn : turn + 1], value)
        for name, value in made.items():
            if name not in self._checked:
                check_finite(name, value)
                self._checked.add(name)
        return made

    def _read(self, index: int) -> _Arriving:
        """The parameters of a block under their names in the model, and when they have arrived: see SideCopies."""
        inside = f"{self._blocks}.{index}."
        recipes = [recipe for recipe in self._recipes if recipe.first.startswith(inside)]
        with self._copies.aside():
            made = {name: value for recipe in recipes for name, value in self._cooked(recipe).items()}
            return made, self._copies.mark()

    def blocks(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """The blocks at `indices` with real parameters, ready to be called.

        When the next one is asked for, or the generator closed, the parameters of the last one go back to meta. One
        thread reads the next block meanwhile: at most two are in memory. Raises ModelError, naming the tensor, where
        the first reading of a block finds NaN or infinite weights.
        """
        order = list(indices)
        with ThreadPoolExecutor(1, "billhook-read") as reader:
            ahead: Future[_Arriving] | None = reader.submit(self._read, order[0]) if order else None
            for turn, index in enumerate(order):
                assert ahead is not None
                made, arrived = ahead.result()
                self._copies.receive(arrived, made.values())
                ahead = reader.submit(self._read, order[turn + 1]) if turn + 1 < len(order) else None
                stood = {}
                try:
                    for name in list(made):
                        stood[name] = set_tensor(self._model, name, made.pop(name))
                    yield self._model.get_submodule(f"{self._blocks}.{index}")
                finally:
                    for name, parameter in stood.items():
                        set_tensor(self._model, name, parameter)

    def load_outside_blocks(self) -> None:
        """Give every parameter outside the blocks and the two embeddings its value, for good."""
        embeddings = {self._alias(self._input), self._alias(self._output)}
        for recipe in self._recipes:
            if not recipe.first.startswith(f"{self._blocks}.") and recipe.first not in embeddings:
                for name, value in self._cooked(recipe).items():
                    set_tensor(self._model, name, value)

    def load_all(self, place_of: PlaceOf | None = None) -> None:
        """Give every parameter its value on the device or at its place, for good; host memory holds one at a time."""
        for recipe in self._recipes:
            for name, value in self._cooked(recipe, place_of and place_of(recipe.first)).items():
                set_tensor(self._model, name, nn.Parameter(value))
        for name in [name for name in self._wanted if name not in self._source]:
            set_tensor(self._model, name, self._model.get_parameter(self._alias(name)))

    # -- the two embeddings -----------------------------------------------------------------------------------------

    def _file_name(self, parameter: str) -> str:
        """The one tensor of the file that is `parameter`."""
        ((_, name),) = self._source[self._alias(parameter)].parts
        return name

    def _taken(self, parameter: str, index: torch.Tensor | slice) -> torch.Tensor:
        """Rows of an embedding: [rows, width], out of the map. Only the pages that hold them are read."""
        name = self._file_name(parameter)
        picked = self._mapped([name])[name][index]
        self._count(picked.nbytes)
        picked = picked.to(self.device, self.dtype, copy=isinstance(index, slice))
        check_finite(parameter, picked)
        return picked

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the input embedding for the token `ids` [count]: [count, width], without any scale of its module.

        Reads these rows only. Raises ModelError if one holds NaN or infinite weights.
        """
        return self._taken(self._input, ids.cpu())

    def head_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the output embedding for the token `ids` [count]: [count, width]. As `rows`."""
        return self._taken(self._output, ids.cpu())

    def head(self, rows_at_a_time: int) -> Iterator[torch.Tensor]:
        """The output embedding, tied or not, in pieces of at most `rows_at_a_time` rows: [rows, width], in order.

        Raises ModelError if a piece holds NaN or infinite weights.
        """
        for start in range(0, self._model.get_output_embeddings().weight.shape[0], rows_at_a_time):
            yield self._taken(self._output, slice(start, start + rows_at_a_time))

    # -- file to file -----------------------------------------------------------------------------------------------

    def targets(self) -> dict[str, tuple[str, ...]]:
        """{tensor of the file: the parameters that it becomes or is part of}, tied ones too; none that is ignored."""
        tied: dict[str, list[str]] = {}
        for name in self._wanted:
            if name not in self._source:
                tied.setdefault(self._alias(name), []).append(name)
        return {
            name: tuple(target for made in recipe.targets for target in (made, *tied.get(made, ())))
            for recipe in self._recipes
            for _, name in recipe.parts
        }

    def source_bytes(self, name: str) -> int:
        """Bytes of a tensor of the file, by its name there."""
        return self._bytes[name]

    def source(self, name: str) -> torch.Tensor:
        """A tensor of the file as it is stored, in its memory map, by its name in the file. Not to be written to."""
        tensor = self._mapped([name])[name]
        self._count(tensor.nbytes)
        return tensor


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Set a parameter or buffer of `model`; returns what stood there."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    stood: torch.Tensor = getattr(module, leaf)
    if isinstance(stood, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)
    return stood
