"""Teacher and student side by side, block by block: what repairs without training see.

One pass reads every block once, whatever it computes, so that a model larger than memory is read from the file once.
The student is what a plan leaves of the teacher, with what a repair has changed so far; a visitor may change more at
every site, and the student goes on with that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import nn

from billhook.core.plan import PARTS, Plan, Site
from billhook.engine.bench import Measurer
from billhook.engine.blocks import KEPT, NO_ATTENTION, NO_MLP, BlockRunner
from billhook.engine.single_plan import patched_block
from billhook.models import structure
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import Patch, Repair


@dataclass(slots=True)
class SiteView:
    """One site, reached by both sides. Over the counted tokens of all groups, in float32.

    `inputs` [tokens, m]: what the student's output projection reads, m wide; of a removed site, what its place is
    given. `before`, `after` [tokens, width]: the student's residual stream; `teacher_before`, `teacher_after`: the
    teacher's. `weight`: the teacher's name for the weight of the output projection; None where the site is removed, or
    its output is not added to the stream as it is. `value` [width, m]: that weight, as the student has it; `bias`
    [width]: of the same projection, where it has one.
    """

    site: Site
    removed: bool
    weight: str | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    inputs: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    teacher_before: torch.Tensor
    teacher_after: torch.Tensor


# What a visitor wants: to add to the weight [width, m] or the bias [width] of an output projection, to put a patch
# there, or nothing.
Change = torch.Tensor | Patch | None
Visit = Callable[[SiteView], Change]

# Of a block: the streams of all groups before and after each part of it.
Passed = dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]


def execution_order(bench: Measurer) -> list[Site]:
    """The sites that the teacher has, as `side_by_side` shows them: of parallel parts the attention last."""
    sites = bench.teacher.anatomy.sites_present()
    return sorted(sites, key=lambda s: (s.block, (s.part == "attention") == bench.runner.parallel))


def removed_runs(sites: Sequence[Site], plan: Plan) -> list[tuple[Site, ...]]:
    """The removed sites of `sites`, those that follow each other together."""
    return [tuple(run) for gone, run in groupby(sites, key=lambda site: site in plan.removed) if gone]


def equivalent_places(bench: Measurer, plan: Plan) -> list[tuple[Site, ...]]:
    """The sites of a teacher, those together between which no sublayer that stays reads the residual stream.

    What one of them adds to the stream, another of the same place may add in its stead.
    """
    told: list[tuple[Site, ...]] = []
    for _, together in groupby(execution_order(bench), key=lambda site: site.block if bench.runner.parallel else site):
        sites = tuple(together)  # which add to the stream at once
        if told and plan.removed.issuperset(sites):
            told[-1] += sites
        else:
            told.append(sites)
    return told


def _flat(bench: Measurer, streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """The counted tokens of all groups: [tokens, any], in float32."""
    return torch.cat([x[group.counted] for x, group in zip(streams, bench.groups, strict=True)]).float()


def lookahead_targets(sites: Sequence[Site], plan: Plan) -> dict[Site, Site]:
    """The last removed site behind each that stays and is followed by removed ones."""
    gone = {run[0]: run[-1] for run in removed_runs(sites, plan)}
    return {before: gone[after] for before, after in pairwise(sites) if after in gone and before not in plan.removed}


class TeacherStreams:
    """The teacher's residual streams before and after every site, on the tokens of a bench.

    `again`: what one pass has computed, the next one is given, if all of it fits into half of the room of the bench.
    """

    def __init__(self, bench: Measurer, *, again: bool = False) -> None:
        self.bench = bench
        streams = (3 if bench.runner.parallel else 2) * bench.runner.depth
        tokens = sum(group.ids.numel() for group in bench.groups)
        self._keeps = again and streams * tokens * bench.token_bytes <= bench.room // 2
        self._kept: list[Passed] = []

    @property
    def teacher(self) -> Teacher:
        """Whose streams these are."""
        return self.bench.teacher

    def step(self, index: int, block: nn.Module, streams: list[torch.Tensor]) -> Passed:
        """What block `index` makes of the streams that the teacher has before it. Blocks in order, from the first."""
        if index < len(self._kept):
            return self._kept[index]
        trunk = self.bench.runner
        wanted = {KEPT, NO_MLP, NO_ATTENTION} if trunk.parallel else {KEPT, NO_MLP}
        done = trunk.step(index, block, [(x, wanted) for x in streams])
        ends, middles, others = ([each.get(v, each[KEPT]) for each in done] for v in (KEPT, NO_MLP, NO_ATTENTION))
        passed = {"attention": (streams, middles), "mlp": (middles, ends)}
        if trunk.parallel:  # both read the same stream: each is seen as if it came last
            passed = {"attention": (others, ends), "mlp": (middles, ends)}
        if self._keeps:
            self._kept.append(passed)
        return passed

    def passes(self) -> Iterator[Passed]:
        """All blocks, in order. Nothing is read or computed where all is known."""
        trunk = self.bench.runner
        if len(self._kept) == trunk.depth:
            yield from self._kept
            return
        streams = [trunk.embed(group.ids) for group in self.bench.groups]
        for index, block in enumerate(trunk.blocks(range(trunk.depth))):
            passed = self.step(index, block, streams)
            yield passed
            streams = passed["mlp"][1]


@undisturbed
@torch.inference_mode()
def streams_after(streams: TeacherStreams, sites: Collection[Site]) -> dict[Site, torch.Tensor]:
    """The teacher's residual stream after each of `sites`, [tokens, width] in float32."""
    found: dict[Site, torch.Tensor] = {}
    for position, passed in zip(streams.bench.teacher.positions, streams.passes(), strict=True):
        for site in (Site(position, part) for part in PARTS):
            if site in sites:
                found[site] = _flat(streams.bench, passed[site.part][1])
    return found


@undisturbed
@torch.inference_mode()
def side_by_side(streams: TeacherStreams, plan: Plan, repair: Repair, visit: Visit) -> Repair:
    """Show `visit` every site that the teacher has, in order of execution; the repair with all that it changed."""
    bench, trunk, groups = streams.bench, streams.bench.runner, streams.bench.groups
    teacher = [trunk.embed(group.ids) for group in groups]
    student = list(teacher)
    alive = set(trunk.teacher.anatomy.sites_present())
    flat = partial(_flat, bench)

    for index, block in enumerate(trunk.blocks(range(trunk.depth))):
        position = trunk.teacher.positions[index]
        sites = [Site(position, part) for part in PARTS if Site(position, part) in alive]
        passed = streams.step(index, block, teacher)
        with patched_block(trunk, index, block, plan, repair):
            for together in [sites] if trunk.parallel else [[site] for site in sites]:
                after, heard = _capture_inputs(trunk, index, block, student, together)
                for site in together[::-1]:
                    weight = None if site in plan.removed else _output(trunk, index, block, site)
                    value, bias = (None, None) if weight is None else _values(trunk, index, block, weight)
                    told = (flat(x) for x in (heard[site], student, after, *passed[site.part]))
                    change = visit(SiteView(site, site in plan.removed, weight, value, bias, *told))
                    repair = _with(repair, block, site, (weight, value), change)
                    after = _changed(after, heard[site], change)
                student = after
        teacher = passed["mlp"][1]
    bench.check_finite(student)
    return repair


def _output(trunk: BlockRunner, index: int, block: nn.Module, site: Site) -> str | None:
    """What the teacher calls the weight of a site's output projection."""
    name = structure.output_projection(block, site.part, trunk.row, trunk.model.config)
    return None if name is None else f"{trunk.row.blocks}.{index}.{name}.weight"


def _values(trunk: BlockRunner, index: int, block: nn.Module, weight: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An output projection as it stands in block `index`, in float32: [outputs, inputs], and its bias [outputs]."""
    name = weight.removeprefix(f"{trunk.row.blocks}.{index}.")
    module = block.get_submodule(name.removesuffix(".weight"))
    bias = getattr(module, "bias", None)
    value = structure.as_outputs_by_inputs(block, name, block.get_parameter(name).detach()).float()
    return value, None if bias is None else bias.detach().float()


def _with(
    repair: Repair, block: nn.Module, site: Site, at: tuple[str | None, torch.Tensor | None], change: Change
) -> Repair:
    """The repair with one change more; `at`: name and value of the weight of the output projection."""
    if change is None:
        return repair
    if isinstance(change, Patch):
        assert site not in repair.patches, f"{site} has a patch"
        return repair.with_patches({site: change})
    weight, value = at
    assert weight is not None, f"{site} has no weight to change"
    assert value is not None, f"{site} has no weight to change"
    name = next(name for name, _ in block.named_parameters() if weight.endswith(f".{name}"))
    if change.dim() == 1:
        bias = getattr(block.get_submodule(name.removesuffix(".weight")), "bias", None)
        if bias is None or site in repair.biases:
            return repair.with_bias(site, change + repair.biases.get(site, torch.zeros_like(change)))
        return repair.with_weights({f"{weight.removesuffix('weight')}bias": bias.detach() + change.to(bias.dtype)})
    own = block.get_parameter(name)
    fresh = torch.empty_like(own)
    structure.as_outputs_by_inputs(block, name, fresh).copy_(value + change)
    return repair.with_weights({weight: fresh})


def _capture_inputs(
    trunk: BlockRunner, index: int, block: nn.Module, streams: list[torch.Tensor], sites: list[Site]
) -> tuple[list[torch.Tensor], dict[Site, list[torch.Tensor]]]:
    """The streams after a block with no parts but those of `sites`, and what their output projections read."""
    parts = trunk.row.parts(block, trunk.model.config)
    without = tuple(part for part in PARTS if part not in [site.part for site in sites])
    heard: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    with trunk.without_parts(block, without), ExitStack() as stack:
        for site in sites:
            name = (
                structure.output_projection(block, site.part, trunk.row, trunk.model.config)
                or parts[site.part]["zero"][0]
            )
            module, kept = block.get_submodule(name), heard[site]

            def hear(module: nn.Module, args: Any, kwargs: Any, kept: list[torch.Tensor] = kept) -> None:
                kept.append(args[0] if args else kwargs["hidden_states"])

            stack.callback(module.register_forward_pre_hook(hear, with_kwargs=True).remove)
        after = [trunk.call(index, block, x) for x in streams]
    return after, {site: _shaped(inputs, after) for site, inputs in heard.items()}


def _shaped(inputs: list[torch.Tensor], streams: list[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as [rows, time, m]: some blocks flatten rows and time."""
    return [x.reshape(*y.shape[:2], -1) for x, y in zip(inputs, streams, strict=True)]


def _changed(streams: list[torch.Tensor], inputs: list[torch.Tensor], change: Change) -> list[torch.Tensor]:
    """Streams after a change at the site that they have just passed."""
    if change is None:
        return streams
    pairs = zip(streams, inputs, strict=True)
    if isinstance(change, Patch):
        return [y + change.forward(x).to(y.dtype) for y, x in pairs]
    if change.dim() == 1:
        return [y + change.to(y.dtype) for y, _ in pairs]
    return [y + (x.float() @ change.T).to(y.dtype) for y, x in pairs]
