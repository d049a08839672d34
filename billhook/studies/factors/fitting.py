"""Factors of the linear maps of a model, from what a text gives them: spectra first, then in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import PARTS, Plan, Site
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.blocks import BlockRunner
from billhook.engine.statistics.gradient_pass import gradients_by_block
from billhook.engine.statistics.group_pass import Passes
from billhook.models import structure
from billhook.models.device import to_float64
from billhook.models.factors.spectrum import lost_share, output_energies, spectrum
from billhook.models.factors.student import declare_factors, linear_stages, put_factors
from billhook.models.load import Teacher, student_as_teacher, undisturbed
from billhook.models.surgery import apply

Place = tuple[Site, str]  # a linear map: its site, and its name in the block


def linear_sizes(teacher: Teacher) -> dict[Place, tuple[int, int]]:
    """Return (outputs, inputs) of every linear map of the attentions and MLPs of a teacher in memory, in forward order.

    Mixtures of experts, and parts that have no channel groups, have none.
    """
    blocks = structure.blocks_of(teacher.model, teacher.architecture)
    stages = (stage for index in range(len(blocks)) for stage in _stages(teacher, index))
    shapes = ((place, _weight(teacher.block(place[0].block), place[1]).shape) for stage in stages for place in stage)
    return {place: (int(shape[0]), int(shape[1])) for place, shape in shapes}


@undisturbed
@torch.inference_mode()
def all_energies(teacher: Teacher, tokens: TokenSet, watch: EventListener = ignore_events) -> dict[Place, torch.Tensor]:
    """Return the energies of the outputs of every linear map by principal direction (see Spectrum); one pass."""
    walk = _Walk(teacher, tokens)
    found: dict[Place, torch.Tensor] = {}
    for index in range(len(walk.blocks)):
        watch(Event("spectra", index, len(walk.blocks)))
        places = [place for stage in _stages(teacher, index) for place in stage]
        found |= {place: output_energies(weight, gram).cpu() for place, weight, gram in walk.read(index, places)}
        walk.advance(index)
    watch(Event("spectra", len(walk.blocks), len(walk.blocks)))
    return found


@undisturbed
@torch.no_grad()
def all_loss_changes(
    teacher: Teacher, tokens: TokenSet, watch: EventListener = ignore_events
) -> dict[Place, torch.Tensor]:
    """Return by how much the loss changes without each direction, in first order: see `Spectrum.loss_changes`.

    The loss is the mean negative log-likelihood of a token. Two passes forward and one backward; memory: the streams
    between all blocks, twice, and the gradients of one block. Raises ResourceError where they do not fit.
    """
    walk = _Walk(teacher, tokens)
    streams = []
    for index in range(len(walk.blocks)):
        streams.append(walk.streams)
        walk.advance(index)
    found: dict[Place, torch.Tensor] = {}
    for index, block, gradients, _ in gradients_by_block(Passes(walk.bench), fisher=False):
        watch(Event("spectra", len(walk.blocks) - 1 - index, len(walk.blocks)))
        walk.streams = streams.pop()
        places = [place for stage in _stages(teacher, index) for place in stage]
        for place, weight, gram in walk.read(index, places):
            slope = _by_outputs(block, place[1], gradients[f"{place[1]}.weight"])
            found[place] = spectrum(weight, gram).loss_changes(weight, slope).cpu()
    watch(Event("spectra", len(walk.blocks), len(walk.blocks)))
    return found


@undisturbed
@torch.inference_mode()
def factored(
    teacher: Teacher, tokens: TokenSet, ranks: Mapping[Place, int], watch: EventListener = ignore_events
) -> tuple[Any, dict[Place, float]]:
    """Return a student whose linear maps have factors of these ranks, and the share of each output's energy lost.

    In forward order: each map is fitted to what the student before it gives, whose maps are factors already. The
    factors are rounded to the checkpoint's dtype at once. All other tensors are the teacher's.
    """
    student = apply(teacher, Plan())
    walk = _Walk(student_as_teacher(teacher, student), tokens)
    lost: dict[Place, float] = {}
    for index, block in enumerate(walk.blocks):
        watch(Event("factor", index, len(walk.blocks)))
        for stage in _stages(teacher, index):
            for place, weight, gram in list(walk.read(index, [place for place in stage if place in ranks])):
                of, rank = spectrum(weight, gram), ranks[place]
                up, down = (part.to(teacher.dtype).to(student.dtype) for part in of.factors(weight, rank))
                put_factors(block, place[1], up, down)
                lost[place] = lost_share(of.energies, rank)
        walk.advance(index)
    by_site: dict[Site, dict[str, int]] = {}
    for (site, name), rank in ranks.items():
        by_site.setdefault(site, {})[name] = rank
    declare_factors(teacher, student, by_site)
    watch(Event("factor", len(walk.blocks), len(walk.blocks)))
    return student, lost


class _Walk:
    """A text on its way through the blocks of a model that change meanwhile."""

    def __init__(self, teacher: Teacher, tokens: TokenSet) -> None:
        self.bench = Measurer(teacher, tokens, "nll")
        self.runner = BlockRunner(teacher, self.bench.runner.chunk)  # the bench's own may have recorded its modules
        self.blocks = structure.blocks_of(teacher.model, teacher.architecture)
        self.streams = [self.runner.embed(group.ids) for group in self.bench.groups]

    def read(self, index: int, places: Sequence[Place]) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor]]:
        """Yield linear maps of a block, each with its weight [outputs, inputs] and Σ x xᵀ of its inputs, float64."""
        if not places:
            return
        block = self.blocks[index]
        read: dict[str, list[torch.Tensor]] = {name: [] for _, name in places}
        handles = [
            block.get_submodule(name).register_forward_pre_hook(lambda m, inputs, of=of: of.append(inputs[0]))
            for name, of in read.items()
        ]
        try:
            for x in self.streams:
                self.runner.call(index, block, x)
        finally:
            for handle in handles:
                handle.remove()
        grams: dict[tuple[int, ...], torch.Tensor] = {}  # maps that read the same share one
        for place in places:
            key = tuple(map(id, read[place[1]]))
            if key not in grams:
                grams[key] = self._gram(read[place[1]])
            yield place, _weight(block, place[1]), grams[key]

    def _gram(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for x, group in zip(inputs, self.bench.groups, strict=True):
            rows = to_float64(group.tokens_of(x.reshape(*group.ids.shape, -1)))
            total = rows.T @ rows if total is None else total + rows.T @ rows
        assert total is not None, "a text has groups"
        return total

    def advance(self, index: int) -> None:
        """Take the text through a block."""
        self.streams = [self.runner.call(index, self.blocks[index], x) for x in self.streams]


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    """Return a linear map's weight [outputs, inputs] in float64."""
    return _by_outputs(block, name, block.get_parameter(f"{name}.weight").detach())


def _by_outputs(block: nn.Module, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return values of the shape of a linear map's weight as [outputs, inputs] in float64."""
    return to_float64(structure.as_outputs_by_inputs(block, f"{name}.weight", values))


def _stages(teacher: Teacher, index: int) -> list[list[Place]]:
    """Return the linear maps of a teacher's block by what they read, in order."""
    present, block = set(teacher.anatomy.sites_present()), teacher.block(teacher.positions[index])
    found: list[list[Place]] = []
    for site in (Site(teacher.positions[index], part) for part in PARTS):
        if site in present:
            stages = linear_stages(block, site.part, teacher.architecture, teacher.model.config)
            found += [[(site, name) for name in stage] for stage in stages]
    return found
