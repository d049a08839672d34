"""A model whose blocks lie on several devices: every module fetches what it is given to its own device.

The hooks are torch's own, beside `forward`, so that a block whose `forward` is replaced for a moment keeps them. A copy
of a model has them too, and one that moves to a single device is as any other there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from billhook.core.devices.division import ModelBytes, divide_blocks
from billhook.models.architectures import Architecture
from billhook.models.device import SHARE_OF_FREE, free_memory

# {tensor: {device: its copy there}}, for as long as the tensor lives
_copies: Any = WeakTensorKeyDictionary()


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor that is never written to, on a device: copied there once, however often it is asked for."""
    if tensor.device == device:
        return tensor
    if tensor.requires_grad:
        return tensor.to(device)
    there: dict[torch.device, torch.Tensor] = _copies.setdefault(tensor, {})
    if device not in there:
        with torch.inference_mode(False):  # a copy outlives the mode in which it was made
            there[device] = tensor.to(device)
    return there[device]


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return arguments or outputs of a module with their tensors changed; a model's own class of output in place."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_each(x, change) for x in value)
    if type(value) is dict:
        return {key: _each(x, change) for key, x in value.items()}
    if isinstance(value, dict):  # transformers' outputs
        for key in list(value):
            value[key] = _each(value[key], change)
    return value


def _device_of(module: nn.Module) -> torch.device | None:
    """Return where the weights of a module are now; None without any."""
    return next((x.device for tensors in (module.parameters(), module.buffers()) for x in tensors), None)


def _fetch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move the first argument of a module to where the module is, and copy the others there once: a hook before it."""
    device = _device_of(module)
    if device is None:
        return args, kwargs

    def move(x: torch.Tensor) -> torch.Tensor:
        return x.to(device)

    def copy(x: torch.Tensor) -> torch.Tensor:
        return copied(x, device)

    named = {key: _each(value, move if key == "hidden_states" else copy) for key, value in kwargs.items()}
    return _each(args[:1], move) + _each(args[1:], copy), named


@dataclass(frozen=True)
class _Return:
    """A hook after a module: what it returns moves to where the embedding is."""

    embedding: nn.Module  # of a copy of the model its own

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        device = _device_of(self.embedding)
        return _each(output, lambda x: x.to(device))


PlaceOf = Callable[[str], torch.device]  # from the name of a parameter or buffer


def division_of(model: Any, row: Architecture, devices: Sequence[torch.device]) -> PlaceOf:
    """Return on which of `devices` each parameter and buffer of a model belongs, by what they have free now.

    `model`: its shapes are read, no values. A tied head is where the embedding is. Raises as `divide_blocks`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [model.get_submodule(row.blocks), *(_found(model, path) for path in row.final)]
    tied = head.weight is embedding.weight
    after = {id(p) for module in (head, *ends[1:]) if module is not None for p in module.parameters()}
    owned = {id(p) for p in ends[0].parameters()} | after
    sizes = ModelBytes(
        tuple(_bytes(block.parameters()) for block in ends[0]),
        _bytes(p for p in model.parameters() if id(p) not in owned or (tied and id(p) in after)),
        0 if tied else _bytes(p for p in model.parameters() if id(p) in after),
    )
    room = [int(SHARE_OF_FREE * free_memory(device)) for device in devices]
    of_block = divide_blocks(sizes, room, [str(device) for device in devices])
    last = devices[0] if tied else devices[-1]
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in after}
    prefix = f"{row.blocks}."

    def place_of(name: str) -> torch.device:
        if name.startswith(prefix):
            return devices[of_block[int(name.removeprefix(prefix).partition(".")[0])]]
        return last if name in names else devices[0]

    return place_of


def _found(model: Any, path: str) -> nn.Module | None:
    owner, _, name = path.rpartition(".")
    found: nn.Module | None = getattr(model.get_submodule(owner), name, None)
    return found


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@torch.inference_mode(False)
@torch.no_grad()
def spread_out(model: Any, row: Architecture, place_of: PlaceOf) -> None:
    """Put the weights of a model at their places, if they are not there. Have every module fetch its inputs, and the
    model return its outputs to where the embedding is."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != place_of(name):
            tensor.data = tensor.data.to(place_of(name))
    blocks = model.get_submodule(row.blocks)
    inside = {id(module) for module in blocks.modules()}
    outside = [each for each in model.modules() if id(each) not in inside and not any(True for _ in each.children())]
    for module in (*blocks, *outside):
        module.register_forward_pre_hook(_fetch, with_kwargs=True)
    for module in (model.base_model, model.get_output_embeddings()):
        module.register_forward_hook(_Return(model.get_input_embeddings()))


def devices_of(model: Any) -> tuple[torch.device, ...]:
    """Return the devices of a model's weights, each once, in the order of its modules; without that of no weights."""
    return tuple(dict.fromkeys(p.device for p in model.parameters() if p.device.type != "meta"))


def summed_free(devices: Sequence[torch.device]) -> int:
    """Return the bytes that devices have free together, counted by the fullest: what they hold is spread evenly."""
    return len(devices) * min(map(free_memory, devices))
