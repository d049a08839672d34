"""The same model on a part of its residual stream: every weight in the coordinates of a basis.

With one basis for all boundaries in the stock shape; with one for each in a type of its own, with matrices in the
shortcuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from billhook.core.errors import BudgetError, ModelError, option
from billhook.core.options import BasisRule
from billhook.core.plan import PARTS, Part, Plan
from billhook.models import structure
from billhook.models.architectures import head_dim
from billhook.models.device import to_float64
from billhook.models.load import Teacher, undisturbed
from billhook.models.modeling_billhook import pruned_classes, stock_fields
from billhook.models.pruned_config import stock_shape, write_config
from billhook.models.residual.layout import BlockLayout, block_layouts, require_in_turn, rms_offset
from billhook.models.streaming import make_buffers, set_tensor
from billhook.models.surgery import apply
from billhook.models.transformers_internals import inputs_first, stock_classes

STEP = 8  # of widths: products of matrices want it


# -- widths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Widths:
    """Residual widths that a model can have: multiples of `step`, below `whole`.

    `fixed`: parameters that do not depend on the width; `per_channel`: those that each channel has, its columns of the
    embedding and of a head of its own among them. `shortcuts`: how many have a matrix of width by width. `parameters`:
    of the model as it is, whose head may be tied.
    """

    whole: int
    step: int
    fixed: int
    per_channel: int
    parameters: int
    tied: bool
    shortcuts: int = 0

    def parameters_at(self, width: int) -> int:
        """Return how many parameters the model has with a width, and a head of its own."""
        return self.fixed + self.per_channel * width + self.shortcuts * width**2

    @property
    def most(self) -> int:
        """The largest width with fewer parameters than the model has; 0 without one."""
        widths = range(self.step, self.whole, self.step)
        return max((each for each in widths if self.parameters_at(each) < self.parameters), default=0)

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
            shortcuts = ", with matrices in its shortcuts" if self.shortcuts else ""
            tied = " and, since the head is tied, a head of its own," if self.tied else shortcuts and ","
            would = f"; with the width {width:,}{shortcuts}{tied} it would have {self.parameters_at(width):,}"
        raise BudgetError(f"{have}{would}. Give a multiple of {self.step}, at most {option('width', most)}.")


def widths_of(teacher: Teacher, bases: BasisRule = "one") -> Widths:
    """Return which residual widths a model can have, with one basis or with one for each boundary.

    Raises ModelError for a model without such a form.
    """
    layouts, model = block_layouts(teacher), teacher.model
    whole, step = int(model.config.hidden_size), STEP
    shortcuts = 0 if bases == "one" else 2 * len(layouts)
    if shortcuts:
        require_in_turn(teacher)
    else:
        step = _stock_step(teacher)
    blocks = structure.blocks_of(model, teacher.architecture)
    own = sum(
        parameter.numel()
        for block, layout in zip(blocks, layouts, strict=True)
        for name, parameter in block.named_parameters()
        if name in {*layout.reads, *layout.writes} or name.removesuffix(".weight") in layout.norms.values()
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters, tied = teacher.anatomy.total("parameters"), embedding is head
    own += embedding.numel() + whole  # and the norm before the head
    own += 0 if tied else head.numel()
    per_channel = own // whole + (int(head.shape[0]) if tied else 0)
    return Widths(whole, step, parameters - own, per_channel, parameters, tied, shortcuts)


def _stock_step(teacher: Teacher) -> int:
    """Return of what the residual widths of a stock type are multiples. Raises ModelError where it has one alone."""
    heads = int(teacher.model.config.num_attention_heads)
    for step in (STEP, math.lcm(STEP, heads)):
        if _stock_model(teacher, step) is not None:
            return step
    raise ModelError(
        f"transformers has no {teacher.anatomy.model_type} of another residual width with the same heads. Cut heads, "
        "neurons or blocks with billhook prune."
    )


def _numbers(config: Any, width: int) -> dict[str, float]:
    """Return what a config says otherwise of a residual stream of `width` channels."""
    return {
        "hidden_size": width,
        "head_dim": head_dim(config),
        "rms_norm_eps": float(config.rms_norm_eps) * int(config.hidden_size) / width,
        "tie_word_embeddings": False,
    }


def _stock_model(teacher: Teacher, width: int) -> Any | None:
    """Return the empty stock model with a residual stream of `width` channels; None where the type has none."""
    config = teacher.model.config
    return stock_shape(config, teacher.anatomy.model_type, _numbers(config, width))


def _model_with_shortcuts(teacher: Teacher, width: int) -> Any:
    """Return the empty model of our own type with a residual stream of `width` channels and its shortcuts."""
    config, row = teacher.model.config, teacher.architecture
    classes = pruned_classes(stock_classes(teacher.anatomy.model_type)[0])
    own = classes["AutoConfig"].from_dict({**stock_fields(config.to_dict()), **_numbers(config, width)})
    parts = row.parts(structure.blocks_of(teacher.model, row)[0], config)
    write_config(own, replace(teacher.pruned, shortcuts=True), row.blocks, parts)
    with torch.device("meta"):
        return classes["AutoModelForCausalLM"](own)


# -- the model --------------------------------------------------------------------------------------------------------


def sliced(teacher: Teacher, basis: torch.Tensor) -> Any:
    """Return the model whose residual stream h is Qᵀh, in the stock class; `basis`: Q, [width, fewer] with QᵀQ = 1.

    It computes what the teacher does where the stream is replaced by QQᵀh after the embedding and after every site.
    Norms divide by the root of the old width: their weights are all the root of old by new, and epsilon is times that.
    Weights are multiplied in float32, and rounded as the checkpoint's are. Raises ModelError for a model without such a
    form.
    """
    built = _stock_model(teacher, int(basis.shape[1]))
    assert built is not None, "a width of `widths_of`"
    return _filled(teacher, built, [basis])


def sliced_by_boundary(teacher: Teacher, bases: Sequence[torch.Tensor]) -> Any:
    """Return the model whose residual stream h at boundary l is Q_lᵀh, in a class of its own.

    `bases`: each Q_l, [width, fewer], after the embedding and after attention and MLP of every block in turn. Around
    each site the stream is times Q_lᵀ Q_(l+1). All else is as in `sliced`.
    """
    assert len(bases) == 2 * len(teacher.positions) + 1
    return _filled(teacher, _model_with_shortcuts(teacher, int(bases[0].shape[1])), bases)


@undisturbed
@torch.inference_mode(False)
@torch.no_grad()
def _filled(teacher: Teacher, built: Any, bases: Sequence[torch.Tensor]) -> Any:
    """Give an empty model the teacher's weights in new coordinates. `bases`: one of all boundaries, or one of each."""
    whole, width = apply(teacher, Plan()), int(teacher.model.config.hidden_size)
    turn = _Turn(math.sqrt(width / int(bases[0].shape[1])), float(whole.config.rms_norm_eps))
    path, final = teacher.architecture.blocks, whole.get_submodule(teacher.architecture.final[0])
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    layouts, weights = block_layouts(teacher), dict[str, torch.Tensor]()
    first = before = bases[0].float().to(teacher.device)
    for index, (block, layout) in enumerate(
        zip(structure.blocks_of(whole, teacher.architecture), layouts, strict=True)
    ):
        next_two = bases[2 * index + 1 : 2 * index + 3] or [first, first]
        between, after = (each.float().to(teacher.device) for each in next_two)
        into: dict[Part, torch.Tensor] = {"attention": before, "mlp": between}
        out_of: dict[Part, torch.Tensor] = {"attention": between, "mlp": after}
        weights |= {f"{path}.{index}.{name}": value for name, value in turn.block(block, layout, into, out_of)}
        if len(bases) > 1:
            around = {number: out_of[part].T @ into[part] for number, part in enumerate(PARTS)}
            weights |= {f"{path}.{index}.shortcuts.{number}.weight": value for number, value in around.items()}
        before = after
    names = {id(module): name for name, module in whole.named_modules()}
    weights[f"{names[id(final)]}.weight"] = turn.norm(final, before)
    weights[f"{names[id(head)]}.weight"] = head.weight.float() * turn.gain(final) @ before
    if getattr(head, "bias", None) is not None:
        weights[f"{names[id(head)]}.bias"] = head.bias.float()
    weights[f"{names[id(embedding)]}.weight"] = embedding.weight.float() @ first
    make_buffers(built, teacher.device)
    dtypes = {name: parameter.dtype for name, parameter in whole.named_parameters(remove_duplicate=False)}
    for name, parameter in list(built.named_parameters()):
        assert parameter.shape == weights[name].shape, name
        set_tensor(built, name, weights.pop(name).to(teacher.dtype).to(dtypes.get(name, whole.dtype)))
    table = built.get_input_embeddings()
    table.weight.mul_(_scale(embedding) / _scale(table))
    built.generation_config = whole.generation_config
    if len(bases) == 1:
        built.config.billhook = whole.config.billhook
    return built.eval()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A change of coordinates: the weight of every new norm, and the epsilon of the old ones."""

    weight: float
    eps: float

    def gain(self, norm: nn.Module) -> torch.Tensor:
        """Return by what a norm multiplies every channel."""
        weight: torch.Tensor = norm.get_parameter("weight").float()
        return weight + self._offset(norm)

    def norm(self, norm: nn.Module, basis: torch.Tensor) -> torch.Tensor:
        """Return the weight of the norm that stands in the place of `norm`."""
        return torch.full((basis.shape[1],), self.weight - self._offset(norm), device=basis.device)

    def _offset(self, norm: nn.Module) -> int:
        offset = rms_offset(norm, self.eps)
        assert offset is not None
        return offset

    def block(
        self, block: nn.Module, layout: BlockLayout, into: Mapping[Part, torch.Tensor],
        out_of: Mapping[Part, torch.Tensor],
    ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
        """Yield every parameter of a block in new coordinates: of the stream `into` a part, and of that `out_of` it.

        What a norm of heads reads is times the weight of the norms, so that its epsilon, which is that of the stream's
        norms in the config, is the old one beside it.
        """
        norms = {f"{name}.weight": part for part, name in layout.norms.items()}
        for name, parameter in block.named_parameters():
            value, turned = parameter.float(), inputs_first(block.get_submodule(name.rpartition(".")[0]))
            flat = value.dim() < 2 or name.endswith("bias")
            shaped = structure.as_outputs_by_inputs(block, name, value)
            if name in norms:
                yield name, self.norm(block.get_submodule(name.removesuffix(".weight")), into[norms[name]])
                continue
            if (part := layout.reads.get(name)) is not None:
                shaped = shaped * self.gain(block.get_submodule(layout.norms[part])) @ into[part]
            elif (part := layout.writes.get(name)) is not None:
                shaped = out_of[part].T @ shaped
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
def projected_logits(teacher: Teacher, bases: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Return the teacher's logits [rows, time, vocabulary] where the stream is QQᵀh after the embedding and every site.

    `bases`: one Q of all boundaries, or one of each.
    """
    row, config = teacher.architecture, teacher.model.config
    turned = [each.float().to(teacher.device) for each in bases]
    sites = [
        (block.get_submodule(layout.norms[part]), block.get_submodule(row.parts(block, config)[part]["zero"][0]))
        for block, layout in zip(structure.blocks_of(teacher.model, row), block_layouts(teacher), strict=True)
        for part in PARTS
    ]
    with ExitStack() as hooks:
        embedding = _Projection(turned[0])
        hooks.callback(teacher.model.get_input_embeddings().register_forward_hook(embedding.project).remove)
        for number, (norm, module) in enumerate(sites, 1):
            site = _Projection(turned[number if len(turned) > 1 else 0])
            hooks.callback(norm.register_forward_pre_hook(site.read).remove)
            hooks.callback(module.register_forward_hook(site.project).remove)
        logits: torch.Tensor = teacher.model(input_ids=rows.to(teacher.device), use_cache=False).logits
    return logits


class _Projection:
    """Hooks of one site, which change what it adds so that the sum is the projection of the stream on a basis."""

    def __init__(self, basis: torch.Tensor) -> None:
        self.basis, self.stream = basis, torch.zeros(1, device=basis.device)

    def read(self, norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep the stream before the site, which its norm reads."""
        self.stream = args[0]

    def project(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output of the site, or of the embedding, whose stream before is 0."""
        first = output[0] if isinstance(output, tuple) else output
        stream = self.stream.float()
        first = ((stream + first) @ self.basis @ self.basis.T - stream).to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first


def require_equal(teacher: Teacher, bases: Sequence[torch.Tensor], student: Any, rows: torch.Tensor) -> None:
    """Compare a sliced model with the projected teacher on `rows` [rows, time]; `bases` as there.

    Raises ModelError where they differ by more than the fourth root of the epsilon of the dtype, of the coarser one of
    checkpoint and computation, of the length of the logits: then the model does with its stream what its architecture
    does not say. Rounding stays far below that, and in experts that are chosen otherwise by it too.
    """
    whole = projected_logits(teacher, bases, rows).float()
    with torch.no_grad():
        logits = student(input_ids=rows.to(teacher.device), use_cache=False).logits.float()
    gap = float((logits - whole).norm() / whole.norm())
    if not gap <= max(torch.finfo(dtype).eps for dtype in (teacher.model.dtype, teacher.dtype)) ** 0.25:
        raise ModelError(
            f"The residual width of this {teacher.anatomy.model_type} cannot be cut: its logits would be {gap:.1%} off "
            "those of the same model with its stream projected. Cut heads, neurons or blocks with billhook prune."
        )
