"""The tensors of a GGUF file: those of a student under llama.cpp's names, and what stands in for missing sites."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from billhook.core.errors import ModelError, PlanError
from billhook.core.plan import PARTS, Part
from billhook.models import structure
from billhook.models.architectures import architecture_of, head_dim
from billhook.models.formats.gguf_rows import Change, GgufRow, kv_heads, rope_kinds, same
from billhook.models.modeling_billhook import PatchModule, skipped_parts
from billhook.models.transformers_internals import tied_names

MLP_STEP = (
    32  # neurons: llama.cpp reads rows in steps of 32, takes a remainder one by one, and cannot round it to 8 bits
)
EMPTY_WIDTH = 32  # neurons of the zeros that stand for a missing MLP: llama.cpp computes a block without one wrongly
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the file, made when it is asked for. `source`: what it is made of; `shape`: what comes out."""

    source: torch.Tensor
    change: Change
    config: Any
    shape: tuple[int, ...]

    def value(self) -> torch.Tensor:
        """Return it in float32 on the CPU, contiguous."""
        with torch.no_grad():
            return self.change(self.source.detach().to("cpu", torch.float32), self.config).contiguous()


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of a file by name, and the heads, KV heads and MLP width of every block."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    heads: list[int] = field(default_factory=list)
    kv: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


def contents(model: Any, row: GgufRow) -> Contents:
    """Return what the file of a student holds. Raises ModelError for a tensor that llama.cpp has no place for.

    Missing sites have stand-ins, so that only the form `deci` takes a model that has some.
    """
    found = Contents(_named(model, row))
    missing = skipped_parts(model.config)
    constants = _constants(model)
    if len(missing) == model.config.num_hidden_layers and all("attention" in parts for parts in missing.values()):
        raise PlanError("llama.cpp runs no model without any attention. Keep one at least.")
    for block in range(model.config.num_hidden_layers):
        gone = missing.get(block, ())
        if "attention" in gone:
            _without_attention(found, model, block, constants)
        else:
            _count_heads(found, model.config, block)
        if "mlp" in gone:
            _without_mlp(found, model, block)
        _fill_up(found.pieces, block)
        found.widths.append(_width(found.pieces, block))
    for (block, part), constant in constants.items():
        after = block if part == "mlp" else block - 1  # the MLP whose output comes last before the place
        if after >= 0:
            _add(found.pieces, f"blk.{after}.ffn_down.bias", constant, model.config)
    found.pieces.update(_rope_factors(model, row))
    return found


# -- what is there ----------------------------------------------------------------------------------------------------


def _named(model: Any, row: GgufRow) -> dict[str, Piece]:
    """Return the tensors of a student by their names in the file, in their order in the model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == row.name)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    patches = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PatchModule))
    found: dict[str, Piece] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(patches) or (row.output != "there" and name in tied_names(model)):
            continue
        mapped = _own_name(name, row) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or not _may_have(mapped, row):
            raise ModelError(
                f"llama.cpp has no place for {name} in a model of type {row.name}. Take another export, such as "
                "transformers."
            )
        found.update(_changed(mapped, tensor, row, model.config))
    return found


def _own_name(name: str, row: GgufRow) -> str | None:
    """Return the name in the file of a parameter that the row itself names."""
    match = re.fullmatch(r".*\.(\d+)\.(.+)", name)
    for own, mapped in row.names.items():
        if match and match[2] == own:
            return f"blk.{match[1]}.{mapped}"
    return None


def _may_have(mapped: str, row: GgufRow) -> bool:
    return not mapped.endswith(".bias") or _stem(mapped) in row.biases


def _stem(mapped: str) -> str:
    """Return `attn_q` of blk.3.attn_q.weight, `output_norm` of output_norm.weight."""
    return re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", mapped)


def _changed(mapped: str, tensor: torch.Tensor, row: GgufRow, config: Any) -> Iterator[tuple[str, Piece]]:
    """Yield the tensors of the file that come of one tensor of the model."""
    stem, kind = _stem(mapped), "bias" if mapped.endswith(".bias") else "weight"
    alone: tuple[tuple[str, Change], ...] = ((stem, same),)
    changes = alone if kind == "bias" and stem.endswith("norm") else row.changes.get(stem, alone)
    prefix = match[0] if (match := re.match(r"blk\.\d+\.", mapped)) else ""
    for new, change in changes:
        shape = change(tensor.detach().to("meta"), config).shape
        yield f"{prefix}{new}.{kind}", Piece(tensor, change, config, tuple(shape))


def _count_heads(found: Contents, config: Any, block: int) -> None:
    """Note how many heads a block has: by its tensors, or by the config where one tensor holds all of them."""
    query, key = (found.pieces.get(f"blk.{block}.attn_{one}.weight") for one in "qk")
    size = head_dim(config)
    found.heads.append(query.shape[0] // size if query else int(config.num_attention_heads))
    found.kv.append(key.shape[0] // size if key else kv_heads(config))


def _fill_up(pieces: dict[str, Piece], block: int) -> None:
    """Give the MLP of a block a whole multiple of `MLP_STEP` neurons: those that it lacks are zeros, which is exact.

    Experts, and MLPs whose gate and up are one tensor, stay as they are.
    """
    parts = {name: pieces.get(f"blk.{block}.ffn_{name}") for name in (
        "down.weight", "up.weight", "up.bias", "gate.weight", "gate.bias",
    )}  # fmt: skip
    down, up = parts["down.weight"], parts["up.weight"]
    if down is None or up is None or up.shape[0] != down.shape[-1] or not (missing := -down.shape[-1] % MLP_STEP):
        return
    for name, piece in parts.items():
        if piece is not None:
            pieces[f"blk.{block}.ffn_{name}"] = _with_zeros(piece, missing, last=name.startswith("down"))


def _with_zeros(piece: Piece, count: int, *, last: bool) -> Piece:
    """Return a piece with zeros after its last axis, or after its first."""
    grown = list(piece.shape)
    grown[-1 if last else 0] += count
    ends = (0, count) if last else (0, 0) * (len(grown) - 1) + (0, count)

    def change(tensor: torch.Tensor, config: Any) -> torch.Tensor:
        return torch.nn.functional.pad(piece.change(tensor, config), ends)

    return replace(piece, change=change, shape=tuple(grown))


def _width(pieces: Mapping[str, Piece], block: int) -> int:
    down = pieces.get(f"blk.{block}.ffn_down.weight") or pieces[f"blk.{block}.ffn_down_exps.weight"]
    return down.shape[-1]


def _rope_factors(model: Any, row: GgufRow) -> dict[str, Piece]:
    """Return the tensors by which llama.cpp divides frequencies, of the rope types that have some."""
    ropes = rope_kinds(model.config)
    rope = ropes[0] if ropes else {}
    factors: dict[str, torch.Tensor] = {}
    if rope.get("rope_type") == "llama3":
        scaled = next(b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")).float().cpu()
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(scaled)).float() / len(scaled))
        factors["rope_freqs.weight"] = plain / scaled
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            factors[f"rope_factors_{kind}.weight"] = torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
    return {name: _as_it_is(value, model.config) for name, value in factors.items()}


# -- what stands in for missing sites ---------------------------------------------------------------------------------


def _constants(model: Any) -> dict[tuple[int, Part], torch.Tensor]:
    """Return what repairs add at missing sites. The form takes constants alone."""
    config = model.config
    row, blocks = architecture_of(config), structure.blocks_of(model, architecture_of(config))
    found: dict[tuple[int, Part], torch.Tensor] = {}
    for index, block in enumerate(blocks):
        for part in PARTS:
            module = getattr(block, row.parts(block, config)[part]["zero"][0])
            if isinstance(module, PatchModule) and module.bias is not None:
                found[index, part] = module.bias.detach().float().cpu()
    return found


def _without_attention(
    found: Contents, model: Any, block: int, constants: Mapping[tuple[int, Part], torch.Tensor]
) -> None:
    """Write a block without attention: no tensors. The first block must have heads, by which llama.cpp goes.

    There a zero matrix stands, which needs no KV cache; or, for a constant, one head of zeros with a bias.
    """
    config, width, size = model.config, model.config.hidden_size, head_dim(model.config)
    constant = constants.get((block, "attention"))
    found.heads.append(0 if block else 1)
    found.kv.append(1 if not block and constant is not None else 0)
    if block:
        return
    _put(found.pieces, "blk.0.attn_norm.weight", torch.ones(width), config)
    inner = width if constant is None else size
    _put(found.pieces, "blk.0.attn_output.weight", torch.zeros(1).expand(width, inner), config)
    if constant is not None:
        for name in ("attn_q", "attn_k", "attn_v"):
            _put(found.pieces, f"blk.0.{name}.weight", torch.zeros(1).expand(size, width), config)
        _put(found.pieces, "blk.0.attn_output.bias", constant, config)


def _without_mlp(found: Contents, model: Any, block: int) -> None:
    config, width = model.config, model.config.hidden_size
    _put(found.pieces, f"blk.{block}.ffn_norm.weight", torch.ones(width), config)
    for name in ("ffn_gate", "ffn_up"):
        _put(found.pieces, f"blk.{block}.{name}.weight", torch.zeros(1).expand(EMPTY_WIDTH, width), config)
    _put(found.pieces, f"blk.{block}.ffn_down.weight", torch.zeros(1).expand(width, EMPTY_WIDTH), config)


def _as_it_is(tensor: torch.Tensor, config: Any) -> Piece:
    return Piece(tensor, same, config, tuple(tensor.shape))


def _put(pieces: dict[str, Piece], name: str, tensor: torch.Tensor, config: Any) -> None:
    pieces[name] = _as_it_is(tensor, config)


def _add(pieces: dict[str, Piece], name: str, constant: torch.Tensor, config: Any) -> None:
    """Add a constant to a bias, which may not be there yet."""
    total = constant if name not in pieces else pieces[name].value() + constant
    _put(pieces, name, total, config)
