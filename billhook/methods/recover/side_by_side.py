"""Teacher and student side by side, block by block: the view of recoveries without training.

One pass reads each block once, so that a model larger than memory is read from its file once. A visitor may change the
student at each site; later sites see the change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
    """One site of teacher and student, over the counted tokens of all groups, in float32.

    - `inputs` [tokens, m]: input of the student's output projection; of a removed site, input of a patch.
    - `before`, `after` [tokens, width]: the student's residual stream; `teacher_*`: the teacher's.
    - `weight`: the teacher's name of the output projection's weight; None where the site is removed, or its output is
      not added to the stream directly.
    - `value` [width, m], `bias` [width]: that weight in the student, and the bias if there is one.
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


# A visitor's answer: an addition to the weight [width, m] or bias [width] of the output projection, a patch, or None.
Change = torch.Tensor | Patch | None
Visit = Callable[[SiteView], Change]

# For each part of a block, the streams of all groups before and after it.
Passed = dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]


def execution_order(bench: Measurer) -> list[Site]:
    """List the teacher's sites in the order of `side_by_side`: of parallel parts the attention last."""
    sites = bench.teacher.anatomy.sites_present()
    return sorted(sites, key=lambda s: (s.block, (s.part == "attention") == bench.runner.parallel))


def removed_runs(sites: Sequence[Site], plan: Plan) -> list[tuple[Site, ...]]:
    """Group the removed sites among `sites` into runs without a kept site between."""
    return [tuple(run) for removed, run in groupby(sites, key=lambda site: site in plan.removed) if removed]


def equivalent_places(bench: Measurer, plan: Plan) -> list[tuple[Site, ...]]:
    """Group the teacher's sites into places between which no kept sublayer reads the residual stream.

    An addition to the stream at one site of a place has the effect of the same addition at another.
    """
    places: list[tuple[Site, ...]] = []
    for _, together in groupby(execution_order(bench), key=lambda site: site.block if bench.runner.parallel else site):
        sites = tuple(together)  # parallel parts add to the stream at once
        if places and plan.removed.issuperset(sites):
            places[-1] += sites
        else:
            places.append(sites)
    return places


def _flat(bench: Measurer, streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the counted tokens of all groups: [tokens, any], in float32."""
    return torch.cat([group.tokens_of(x) for x, group in zip(streams, bench.groups, strict=True)]).float()


def lookahead_targets(sites: Sequence[Site], plan: Plan) -> dict[Site, Site]:
    """Map each kept site that precedes a run of removed sites to the last site of that run."""
    ends = {run[0]: run[-1] for run in removed_runs(sites, plan)}
    return {before: ends[after] for before, after in pairwise(sites) if after in ends and before not in plan.removed}


class TeacherStreams:
    """The teacher's residual streams before and after each site, on the tokens of a bench.

    `again`: cache the streams of the first pass for later ones, if they fit into half of the bench's memory.
    """

    def __init__(self, bench: Measurer, *, again: bool = False) -> None:
        self.bench = bench
        streams = (3 if bench.runner.parallel else 2) * bench.runner.depth
        tokens = sum(group.ids.numel() for group in bench.groups)
        self._caches = again and streams * tokens * bench.token_bytes <= bench.room // 2
        self._cached: list[Passed] = []

    @property
    def teacher(self) -> Teacher:
        """The teacher that these streams belong to."""
        return self.bench.teacher

    def step(self, index: int, block: nn.Module, streams: list[torch.Tensor]) -> Passed:
        """Compute block `index` from the teacher's streams before it. Blocks must come in order, from the first."""
        if index < len(self._cached):
            return self._cached[index]
        runner = self.bench.runner
        variants = {KEPT, NO_MLP, NO_ATTENTION} if runner.parallel else {KEPT, NO_MLP}
        outputs = runner.step(index, block, [(x, variants) for x in streams])
        ends, middles, others = ([out.get(v, out[KEPT]) for out in outputs] for v in (KEPT, NO_MLP, NO_ATTENTION))
        # parallel parts read the same stream: each is seen as if it came last
        passed = {"attention": (others, ends) if runner.parallel else (streams, middles), "mlp": (middles, ends)}
        if self._caches:
            self._cached.append(passed)
        return passed

    def passes(self) -> Iterator[Passed]:
        """Yield all blocks in order, from the cache if it holds all of them."""
        runner = self.bench.runner
        if len(self._cached) == runner.depth:
            yield from self._cached
            return
        streams = [runner.embed(group.ids) for group in self.bench.groups]
        for index, block in enumerate(runner.blocks(range(runner.depth))):
            passed = self.step(index, block, runner.fetch(index, streams))
            yield passed
            streams = passed["mlp"][1]


@undisturbed
@torch.inference_mode()
def streams_after(streams: TeacherStreams, sites: Collection[Site]) -> dict[Site, torch.Tensor]:
    """Return the teacher's residual stream after each of `sites`, [tokens, width] in float32."""
    after: dict[Site, torch.Tensor] = {}
    for position, passed in zip(streams.teacher.positions, streams.passes(), strict=True):
        for site in (Site(position, part) for part in PARTS):
            if site in sites:
                after[site] = _flat(streams.bench, passed[site.part][1])
    return after


@undisturbed
@torch.inference_mode()
def side_by_side(streams: TeacherStreams, plan: Plan, repair: Repair, visit: Visit) -> Repair:
    """Show `visit` each site of the teacher in order of execution; return the repair with all changes."""
    bench, runner = streams.bench, streams.bench.runner
    teacher = [runner.embed(group.ids) for group in bench.groups]
    student = list(teacher)
    present = set(runner.teacher.anatomy.sites_present())

    for index, block in enumerate(runner.blocks(range(runner.depth))):
        position = runner.teacher.positions[index]
        sites = [Site(position, part) for part in PARTS if Site(position, part) in present]
        teacher, student = runner.fetch(index, teacher), runner.fetch(index, student)
        passed = streams.step(index, block, teacher)
        with patched_block(runner, index, block, plan, repair):
            for together in [sites] if runner.parallel else [[site] for site in sites]:
                after, inputs = _capture_inputs(runner, index, block, student, together)
                for site in together[::-1]:
                    weight = None if site in plan.removed else _output(runner, index, block, site)
                    value, bias = (None, None) if weight is None else _values(runner, index, block, weight)
                    tokens = (_flat(bench, x) for x in (inputs[site], student, after, *passed[site.part]))
                    change = visit(SiteView(site, site in plan.removed, weight, value, bias, *tokens))
                    repair = _with(repair, block, site, (weight, value), change)
                    after = _changed(after, inputs[site], change)
                student = after
        teacher = passed["mlp"][1]
    bench.check_finite(student)
    return repair


def _output(runner: BlockRunner, index: int, block: nn.Module, site: Site) -> str | None:
    """Return the teacher's name of the weight of a site's output projection."""
    name = structure.output_projection(block, site.part, runner.row, runner.model.config)
    return None if name is None else f"{runner.row.blocks}.{index}.{name}.weight"


def _values(runner: BlockRunner, index: int, block: nn.Module, weight: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return an output projection of block `index` in float32: [outputs, inputs], and its bias [outputs]."""
    name = weight.removeprefix(f"{runner.row.blocks}.{index}.")
    module = block.get_submodule(name.removesuffix(".weight"))
    bias = getattr(module, "bias", None)
    value = structure.as_outputs_by_inputs(block, name, block.get_parameter(name).detach()).float()
    return value, None if bias is None else bias.detach().float()


def _with(
    repair: Repair, block: nn.Module, site: Site, at: tuple[str | None, torch.Tensor | None], change: Change
) -> Repair:
    """Return the repair with one more change; `at`: name and value of the output projection's weight."""
    if change is None:
        return repair
    if isinstance(change, Patch):
        assert site not in repair.patches, f"{site} has a patch"
        return repair.with_patches({site: change})
    weight, value = at
    assert weight is not None and value is not None, f"{site} has no weight to change"  # noqa: PT018
    name = next(name for name, _ in block.named_parameters() if weight.endswith(f".{name}"))
    if change.dim() == 1:
        bias = getattr(block.get_submodule(name.removesuffix(".weight")), "bias", None)
        if bias is None or site in repair.biases:
            return repair.with_bias(site, change + repair.biases.get(site, torch.zeros_like(change)))
        return repair.with_weights({f"{weight.removesuffix('weight')}bias": bias.detach() + change.to(bias.dtype)})
    changed = torch.empty_like(block.get_parameter(name))
    structure.as_outputs_by_inputs(block, name, changed).copy_(value + change)
    return repair.with_weights({weight: changed})


def _capture_inputs(
    runner: BlockRunner, index: int, block: nn.Module, streams: list[torch.Tensor], sites: list[Site]
) -> tuple[list[torch.Tensor], dict[Site, list[torch.Tensor]]]:
    """Run a block with only the parts of `sites`; return its streams and the inputs of the output projections."""
    config = runner.model.config
    parts = runner.row.parts(block, config)
    without = tuple(part for part in PARTS if part not in [site.part for site in sites])
    captured: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    with runner.without_parts(block, without), ExitStack() as stack:
        for site in sites:
            name = structure.output_projection(block, site.part, runner.row, config) or parts[site.part]["zero"][0]

            def capture(module: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                captured[site].append(args[0] if args else kwargs["hidden_states"])

            stack.callback(block.get_submodule(name).register_forward_pre_hook(capture, with_kwargs=True).remove)
        after = [runner.call(index, block, x) for x in streams]
    return (
        after,
        {  # [rows, time, m]: some blocks flatten rows and time
            site: [x.reshape(*y.shape[:2], -1) for x, y in zip(inputs, after, strict=True)]
            for site, inputs in captured.items()
        },
    )


def _changed(streams: list[torch.Tensor], inputs: list[torch.Tensor], change: Change) -> list[torch.Tensor]:
    """Return the streams after a change at the site that they have just passed."""
    if change is None:
        return streams
    pairs = zip(streams, inputs, strict=True)
    if isinstance(change, Patch):
        return [y + change.forward(x).to(y.dtype) for y, x in pairs]
    if change.dim() == 1:
        return [y + change.to(y.dtype) for y, _ in pairs]
    return [y + (x.float() @ change.T).to(y.dtype) for y, x in pairs]
