"""What reads and what writes the residual stream, parameter by parameter, and which models have a narrower form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from billhook.core.errors import ModelError, option
from billhook.core.plan import PARTS, Part
from billhook.models import structure
from billhook.models.architectures import Architecture
from billhook.models.load import Teacher
from billhook.models.pruned_config import require_prunable

WB = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Parameters of a block by what they have to do with the residual stream, by their names inside the block.

    `reads`: weights whose inputs are the normed stream, each with the part that it belongs to. `writes`: weights and
    biases whose outputs are added to the stream, likewise. `normed`: weights and biases of what a norm of heads reads.
    `norms`: the norms of the stream by part. Nothing else in the block has the width of the stream.
    """

    reads: dict[str, Part]
    writes: dict[str, Part]
    normed: frozenset[str]
    norms: dict[Part, str]


def block_layouts(teacher: Teacher) -> list[BlockLayout]:
    """Return the layout of every block. Raises ModelError for a model without a stock form of another width.

    Norms must be RMS norms of the stream, before attention and MLP: an orthogonal change of its basis passes through
    no others. Those inside of heads are let be.
    """
    kind, config, row = teacher.anatomy.model_type, teacher.model.config, teacher.architecture
    require_prunable(teacher.pruned, teacher.name)
    if str(config.model_type).startswith("billhook-"):
        raise _unfit(kind, "a pruning gave its blocks shapes of their own. Slice the unpruned model, then prune it")
    if row.norm_before_sum:
        raise _unfit(kind, "its norms stand behind attention and MLP, and need every channel of what they norm")
    if not hasattr(config, "hidden_size") or not hasattr(config, "rms_norm_eps") or len(row.final) != 1:
        raise _unfit(kind, "its norms are no RMS norms, whose config has hidden_size and rms_norm_eps")
    norms = dict(stream_norms(teacher))
    for name, norm in norms.items():
        if rms_offset(norm, float(config.rms_norm_eps)) is None:
            raise _unfit(kind, f"{name} is no RMS norm with a weight for each channel")
    head, embedding = teacher.model.get_output_embeddings(), teacher.model.get_input_embeddings()
    known = {id(each) for each in (*head.parameters(), embedding.weight, *norms[row.final[0]].parameters())}
    for name, parameter in teacher.model.named_parameters():
        if id(parameter) not in known and not name.startswith(f"{row.blocks}."):
            raise _unfit(kind, f"nothing says whether {name} reads the residual stream or writes it")
    return [_block_layout(block, row, config, kind) for block in structure.blocks_of(teacher.model, row)]


def require_in_turn(teacher: Teacher) -> None:
    """Raise ModelError for a model whose blocks have no boundary between their attention and their MLP."""
    row = teacher.architecture
    if row.parallel(teacher.model.config) or len(row.mlp) > 1 or row.block_outputs > 1:
        raise ModelError(
            f"This {teacher.anatomy.model_type} cannot have a basis for each boundary: its blocks are not an attention "
            f"and then an MLP, one module each. Leave {option('bases')} out for one basis of all boundaries."
        )


def stream_norms(teacher: Teacher) -> Iterator[tuple[str, nn.Module]]:
    """Yield the norms of the residual stream with their names in the model: of every block, and of the head."""
    row, config = teacher.architecture, teacher.model.config
    for index, block in enumerate(structure.blocks_of(teacher.model, row)):
        for part in PARTS:
            name = _norm(block, part, row, config, teacher.anatomy.model_type)
            yield f"{row.blocks}.{index}.{name}", block.get_submodule(name)
    yield row.final[0], teacher.model.get_submodule(row.final[0])


@torch.no_grad()
def rms_offset(norm: nn.Module, eps: float) -> int | None:
    """Return what a norm adds to its weight before it multiplies by that, by what it does to two vectors: 0, or 1 in
    Gemma. None where it is no RMS norm with this epsilon."""
    weight = dict(norm.named_parameters()).get("weight")
    if weight is None or len(list(norm.parameters())) > 1:
        return None
    x = 0.5 + torch.arange(2 * weight.numel(), device=weight.device, dtype=torch.float32).cos().view(2, -1)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for offset in (0, 1):
        if torch.allclose(norm(x).float(), (offset + weight.float()) * unit, rtol=1e-3, atol=1e-4):
            return offset
    return None


def _norm(block: nn.Module, part: Part, row: Architecture, config: Any, kind: str) -> str:
    """Return the name of the norm that a part of a block reads the stream through."""
    names = row.attention_norms if part == "attention" else row.mlp_norms
    found = [name for name in names if getattr(block, name, None) is not None]
    if row.shared_norm(config) or len(found) != 1:
        raise _unfit(kind, f"its {part} has no single norm of its own")
    return found[0]


def _block_layout(block: nn.Module, row: Architecture, config: Any, kind: str) -> BlockLayout:
    """Return the layout of a block. Raises ModelError where a parameter has no place in it."""
    present = dict(block.named_parameters())
    norms: dict[Part, str] = {part: _norm(block, part, row, config, kind) for part in PARTS}
    attention, mlp = (f"{row.path(part)}.".removeprefix(".") for part in PARTS)
    experts, router = f"{mlp}{row.experts}.", f"{mlp}{row.router}."
    into: dict[Part, list[str]] = {
        "attention": [f"{attention}{name}." for name in row.attention_inputs],
        "mlp": [f"{mlp}{name}." for name in row.mlp_inputs] + [router],
    }
    out_of: dict[Part, list[str]] = {
        "attention": [f"{attention}{row.attention_output}.{each}" for each in WB],
        "mlp": [f"{mlp}{row.mlp_output}.{each}" for each in WB],
    }
    out_of["mlp"] += [experts + row.expert_output, f"{experts}{row.expert_output}_bias"]
    reads: dict[str, Part] = {f"{name}weight": part for part in PARTS for name in into[part]}
    reads[experts + row.expert_input] = "mlp"
    writes = {name: part for part in PARTS for name in out_of[part]}
    heads = {name: f"{attention}{norm}.weight" for name, norm in zip(into["attention"], row.head_norms, strict=False)}
    others = {f"{name}bias" for part in PARTS for name in into[part]} | set(heads.values())
    others |= {f"{experts}{row.expert_input}_bias", attention + row.head_sinks}
    others |= {f"{name}.weight" for name in norms.values()}
    if row.fused_attention and present.keys() & set(heads.values()):
        raise _unfit(kind, "one matrix gives normed queries and keys with the values, which no norm reads")
    if unknown := sorted(present.keys() - {*reads, *writes, *others}):
        raise _unfit(kind, f"its architecture does not say whether {unknown[0]} reads the residual stream or writes it")
    return BlockLayout(
        {name: part for name, part in reads.items() if name in present},
        {name: part for name, part in writes.items() if name in present},
        frozenset(f"{name}{each}" for name, norm in heads.items() if norm in present for each in WB) & present.keys(),
        norms,
    )


def _unfit(kind: str, why: str) -> ModelError:
    return ModelError(
        f"The residual width of this {kind} cannot be cut: {why}. Cut heads, neurons or blocks with billhook prune."
    )
