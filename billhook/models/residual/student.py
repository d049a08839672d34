"""The same model on a part of its residual stream: every weight in the coordinates of a basis, in the stock shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from billhook.core.errors import BudgetError, ModelError, option
from billhook.core.plan import PARTS, Plan
from billhook.models import structure
from billhook.models.architectures import head_dim
from billhook.models.device import to_float64
from billhook.models.load import Teacher, undisturbed
from billhook.models.pruned_config import stock_shape
from billhook.models.residual.layout import BlockLayout, block_layouts, rms_offset
from billhook.models.streaming import make_buffers, set_tensor
from billhook.models.surgery import apply
from billhook.models.transformers_internals import inputs_first

STEP = 8  # of widths: products of matrices want it


# -- widths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Widths:
    """Residual widths that the stock type of a model has: multiples of `step`, below `whole`.

    `fixed`: parameters that do not depend on the width; `per_channel`: those that each channel has, its columns of the
    embedding and of a head of its own among them. `parameters`: of the model as it is, whose head may be tied.
    """

    whole: int
    step: int
    fixed: int
    per_channel: int
    parameters: int
    tied: bool

    def parameters_at(self, width: int) -> int:
        """Return how many parameters the model has with a width, and a head of its own."""
        return self.fixed + self.per_channel * width

    @property
    def most(self) -> int:
        """The largest width with fewer parameters than the model has; 0 without one."""
        saving = (self.parameters - self.fixed - 1) // self.per_channel
        return min(saving, self.whole - 1) // self.step * self.step

    def nearest(self, asked: int | Fraction) -> int:
        """Return the largest width up to the one that is `asked`: channels, or a share of them.

        Raises BudgetError where there is none, or where it saves nothing.
        """
        wanted = asked if isinstance(asked, int) else math.floor(asked * self.whole)
        width, most = wanted // self.step * self.step, self.most
        if 0 < width <= most:
            return width
        have = f"The model has the residual width {self.whole:,} and {self.parameters:,} parameters"
        if most < self.step:
            raise BudgetError(f"{have}; no smaller multiple of {self.step} saves any. Use billhook prune.")
        would = ""
        if most < width <= self.whole:
            tied = " and, since the head is tied, a head of its own," if self.tied else ""
            would = f"; with the width {width:,}{tied} it would have {self.parameters_at(width):,}"
        raise BudgetError(f"{have}{would}. Give a multiple of {self.step}, at most {option('width', most)}.")


def widths_of(teacher: Teacher) -> Widths:
    """Return which residual widths a model can have. Raises ModelError for one without a stock form of any other."""
    layouts, model = block_layouts(teacher), teacher.model
    whole, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    step = next((each for each in (STEP, math.lcm(STEP, heads)) if _built(teacher, each) is not None), None)
    if step is None:
        raise ModelError(
            f"transformers has no {teacher.anatomy.model_type} of another residual width with the same heads. Cut "
            "heads, neurons or blocks with billhook prune."
        )
    blocks = structure.blocks_of(model, teacher.architecture)
    own = sum(
        parameter.numel()
        for block, layout in zip(blocks, layouts, strict=True)
        for name, parameter in block.named_parameters()
        if name in layout.reads or name in layout.writes or name.removesuffix(".weight") in layout.norms
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters, tied = teacher.anatomy.total("parameters"), embedding is head
    own += embedding.numel() + whole  # and the norm before the head
    own += 0 if tied else head.numel()
    per_channel = own // whole + (int(head.shape[0]) if tied else 0)
    return Widths(whole, step, parameters - own, per_channel, parameters, tied)


def _built(teacher: Teacher, width: int) -> Any | None:
    """Return the empty stock model with a residual stream of `width` channels; None where the type has none."""
    config = teacher.model.config
    numbers = {
        "hidden_size": width,
        "head_dim": head_dim(config),
        "rms_norm_eps": float(config.rms_norm_eps) * int(config.hidden_size) / width,
        "tie_word_embeddings": False,
    }
    return stock_shape(config, teacher.anatomy.model_type, numbers)


# -- the model --------------------------------------------------------------------------------------------------------


@undisturbed
@torch.inference_mode(False)
@torch.no_grad()
def sliced(teacher: Teacher, basis: torch.Tensor) -> Any:
    """Return the model whose residual stream h is Qᵀh, in the stock class; `basis`: Q, [width, fewer] with QᵀQ = 1.

    It computes what the teacher does where the stream is replaced by QQᵀh after the embedding and after every site.
    Norms divide by the root of the old width: their weights are all the root of old by new, and epsilon is times that.
    Weights are multiplied in float32. Raises ModelError for a model without such a form.
    """
    width, fewer = basis.shape
    whole, built = apply(teacher, Plan()), _built(teacher, fewer)
    layouts, weights = block_layouts(teacher), dict[str, torch.Tensor]()
    assert built is not None
    turn = _Turn(basis.float().to(teacher.device), math.sqrt(width / fewer), float(whole.config.rms_norm_eps))
    path, final = teacher.architecture.blocks, whole.get_submodule(teacher.architecture.final[0])
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    for index, (block, layout) in enumerate(
        zip(structure.blocks_of(whole, teacher.architecture), layouts, strict=True)
    ):
        weights |= {f"{path}.{index}.{name}": value for name, value in turn.block(block, layout)}
    names = {id(module): name for name, module in whole.named_modules()}
    weights[f"{names[id(final)]}.weight"] = turn.norm(final)
    weights[f"{names[id(head)]}.weight"] = turn.read(head.weight.float(), turn.gain(final))
    if getattr(head, "bias", None) is not None:
        weights[f"{names[id(head)]}.bias"] = head.bias.float()
    weights[f"{names[id(embedding)]}.weight"] = turn.read(embedding.weight.float())
    make_buffers(built, teacher.device)
    for name, parameter in list(built.named_parameters()):
        assert parameter.shape == weights[name].shape, name
        set_tensor(built, name, weights.pop(name).to(whole.get_parameter(name).dtype))
    table = built.get_input_embeddings()
    table.weight.mul_(_scale(embedding) / _scale(table))
    built.config.billhook, built.generation_config = whole.config.billhook, whole.generation_config
    return built.eval()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A change of basis: `basis` [width, fewer], the weight of every new norm, and the epsilon of the old ones."""

    basis: torch.Tensor
    weight: float
    eps: float

    def read(self, weight: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return [..., outputs, fewer] of a weight [..., outputs, width] that reads the stream times `gain`."""
        return (weight * gain) @ self.basis

    def gain(self, norm: nn.Module) -> torch.Tensor:
        """Return by what a norm multiplies every channel."""
        weight: torch.Tensor = norm.get_parameter("weight").float()
        return weight + self._offset(norm)

    def norm(self, norm: nn.Module) -> torch.Tensor:
        """Return the weight of the norm that stands in the place of `norm`."""
        return torch.full((self.basis.shape[1],), self.weight - self._offset(norm), device=self.basis.device)

    def _offset(self, norm: nn.Module) -> int:
        offset = rms_offset(norm, self.eps)
        assert offset is not None
        return offset

    def block(self, block: nn.Module, layout: BlockLayout) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every parameter of a block in the new basis.

        What a norm of heads reads is times the weight of the norms, so that its epsilon, which is that of the stream's
        norms in the config, is the old one beside it.
        """
        for name, parameter in block.named_parameters():
            value, turned = parameter.float(), inputs_first(block.get_submodule(name.rpartition(".")[0]))
            flat = value.dim() < 2 or name.endswith("bias")
            shaped = structure.as_outputs_by_inputs(block, name, value)
            if name.removesuffix(".weight") in layout.norms:
                yield name, self.norm(block.get_submodule(name.removesuffix(".weight")))
                continue
            if name in layout.reads:
                shaped = self.read(shaped, self.gain(block.get_submodule(layout.reads[name])))
            elif name in layout.writes:
                shaped = self.basis.T @ shaped
            shaped = shaped * self.weight if name in layout.normed else shaped
            yield name, (shaped[..., 0] if flat else shaped.transpose(-1, -2) if turned else shaped).contiguous()


def _scale(embedding: nn.Module) -> float:
    """Return by what an embedding multiplies its rows: in Gemma by the root of the width, elsewhere by 1."""
    table = embedding.get_parameter("weight")
    row = table.float().square().sum(-1).argmax()
    before, after = to_float64(table[row]), to_float64(embedding(row[None])[0])
    return float(after @ before / (before @ before))


# -- what it equals ---------------------------------------------------------------------------------------------------


@undisturbed
@torch.no_grad()
def projected_logits(teacher: Teacher, basis: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the teacher's logits [rows, time, vocabulary] where the stream is QQᵀh after embedding and sites."""
    model, basis = teacher.model, basis.to(teacher.model.dtype).to(teacher.device)

    def project(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first @ basis @ basis.T
        return (first, *output[1:]) if isinstance(output, tuple) else first

    with ExitStack() as hooks:
        for module in (model.get_input_embeddings(), *_sites(teacher)):
            hooks.callback(module.register_forward_hook(project).remove)
        logits: torch.Tensor = model(input_ids=rows.to(teacher.device), use_cache=False).logits
    return logits


def _sites(teacher: Teacher) -> Iterator[nn.Module]:
    """Yield the modules whose outputs are added to the stream."""
    row = teacher.architecture
    for block in structure.blocks_of(teacher.model, row):
        for part in PARTS:
            yield block.get_submodule(row.parts(block, teacher.model.config)[part]["zero"][0])


def require_equal(teacher: Teacher, basis: torch.Tensor, student: Any, rows: torch.Tensor) -> None:
    """Compare a sliced model with the projected teacher on `rows` [rows, time].

    Raises ModelError where they differ by more than the fourth root of the dtype's epsilon, of the length of the
    logits: then the model does with its stream what its architecture does not say. Rounding stays far below that, and
    in experts that are chosen otherwise by it too.
    """
    whole = projected_logits(teacher, basis, rows).float()
    with torch.no_grad():
        logits = student(input_ids=rows.to(teacher.device), use_cache=False).logits.float()
    gap = float((logits - whole).norm() / whole.norm())
    if not gap <= torch.finfo(teacher.model.dtype).eps ** 0.25:
        raise ModelError(
            f"The residual width of this {teacher.anatomy.model_type} cannot be cut: its logits would be {gap:.1%} off "
            "those of the same model with its stream projected. Cut heads, neurons or blocks with billhook prune."
        )
