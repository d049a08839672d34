"""What a repair changes of a student, as a value: new weights, and what stands where a sublayer was. Nothing acts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from billhook.core.plan import Site
from billhook.core.results.json_form import JsonObject
from billhook.models import modeling_billhook

PATCH_TENSORS = ("bias", "gain", "down", "up")


@dataclass(frozen=True, slots=True)
class Patch:
    """What is added to the residual stream in the place of a removed sublayer: bias + gain · x + up · down · x.

    x is what the place is given: the stream itself, unless a norm stays there. `bias` [width]; `gain` [1]; `down`
    [rank, width] and `up` [width, rank], both or neither. In float32.
    """

    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Of its matrix; 0 without one."""
        return 0 if self.down is None else int(self.down.shape[0])

    def spec(self) -> JsonObject:
        """Its shape, as a checkpoint's config tells it."""
        return {"bias": self.bias is not None, "gain": self.gain is not None, "rank": self.rank}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What it adds: x [..., width] -> [..., width], in float32."""
        total = torch.zeros_like(x, dtype=torch.float32)
        if self.down is not None and self.up is not None:
            total = x.float() @ self.down.to(x.device).T @ self.up.to(x.device).T
        total = total if self.gain is None else total + self.gain.to(x.device) * x
        return total if self.bias is None else total + self.bias.to(x.device)


@dataclass(frozen=True, slots=True, eq=False)
class Repair:
    """Everything in which a repaired student differs from what its plan leaves of the teacher.

    `weights`: whole new tensors, by the teacher's own parameter names. `patches`: by removed site. `biases`: [width] in
    float32, of the output projections of narrower sites that have none in the teacher.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    patches: Mapping[Site, Patch] = field(default_factory=dict)
    biases: Mapping[Site, torch.Tensor] = field(default_factory=dict)

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> Repair:
        """This repair with some weights newer."""
        return replace(self, weights={**self.weights, **weights})

    def with_patches(self, patches: Mapping[Site, Patch]) -> Repair:
        """This repair with some patches newer."""
        return replace(self, patches={**self.patches, **patches})

    def with_bias(self, site: Site, bias: torch.Tensor) -> Repair:
        """This repair with one bias newer."""
        return replace(self, biases={**self.biases, site: bias})

    def cast_through(self, dtype: torch.dtype) -> Repair:
        """As a checkpoint of `dtype` holds it, so that what is measured is what is saved."""

        def through(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(dtype).to(x.dtype)

        patches = {
            site: Patch(**{name: through(getattr(patch, name)) for name in PATCH_TENSORS})
            for site, patch in self.patches.items()
        }
        weights = {name: value.to(dtype).to(value.dtype) for name, value in self.weights.items()}
        return Repair(weights, patches, {site: bias.to(dtype).to(bias.dtype) for site, bias in self.biases.items()})

    def parameters(self) -> int:
        """How many numbers the patches and biases add to a model."""
        parts = [getattr(patch, name) for patch in self.patches.values() for name in PATCH_TENSORS]
        return sum(int(part.numel()) for part in (*parts, *self.biases.values()) if part is not None)

    def __eq__(self, other: object) -> bool:
        """Whether both change nothing, or are the same object; tensors are not compared."""
        return self is other or (isinstance(other, Repair) and not (self._tensors() or other._tensors()))

    def __hash__(self) -> int:
        return hash(tuple(self.weights))

    def key(self) -> str:
        """16 hex digits of every bit, for what is measured under this repair."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, torch.Tensor]:
        told = {f"weight {name}": tensor for name, tensor in self.weights.items()}
        told |= {f"bias {site}": bias for site, bias in self.biases.items()}
        for site, patch in self.patches.items():
            parts = ((name, getattr(patch, name)) for name in PATCH_TENSORS)
            told |= {f"patch {site} {name}": part for name, part in parts if part is not None}
        return told

    def save(self, path: Path) -> None:
        """Write it aside and give it its name: a safetensors file."""
        aside = path.with_name(f".{path.name}.partial")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self._tensors().items()}
        save_file(tensors, aside)
        aside.rename(path)


NO_REPAIR = Repair()


def patch_module(patch: Patch, outputs: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The module that adds what a patch adds; `outputs` as in an architecture's parts."""
    entry = patch.spec()
    width = next((len(x) for x in (patch.bias, patch.up) if x is not None), 0)
    parts = {"bias": patch.bias, "gain": patch.gain, "down.weight": patch.down, "up.weight": patch.up}
    module: torch.nn.Module = modeling_billhook.PatchModule(outputs, width, **entry)
    module.load_state_dict({name: tensor for name, tensor in parts.items() if tensor is not None})
    return module.to(device=device, dtype=dtype).requires_grad_(False)


def add_bias(module: torch.nn.Module, bias: torch.Tensor) -> None:
    """Give an output projection that has no bias one, on the device and in the dtype of its weight."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    module.bias = torch.nn.Parameter(bias.to(weight.device, weight.dtype), requires_grad=False)


def read_repair(path: Path) -> Repair:
    """What `Repair.save` wrote."""
    weights: dict[str, torch.Tensor] = {}
    biases: dict[Site, torch.Tensor] = {}
    patches: dict[Site, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        kind, of, *part = name.split(" ")
        if kind == "weight":
            weights[of] = tensor
        elif kind == "bias":
            biases[Site.parse(of)] = tensor
        else:
            patches.setdefault(Site.parse(of), {})[part[0]] = tensor
    return Repair(weights, {site: Patch(**parts) for site, parts in sorted(patches.items())}, biases)
