"""Measuring of pieces: the walk over the blocks, the head, and their layout in the available memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from billhook.core.errors import ModelError, UsageError, option
from billhook.core.plan import Plan
from billhook.core.registry import wrong_return
from billhook.core.results.measured import WorkPlan
from billhook.data.token_sets import TokenSet
from billhook.engine.blocks import BlockRunner
from billhook.engine.document_groups import document_groups
from billhook.engine.head import VOCABULARY_AT_A_TIME, Head, Reference
from billhook.engine.losses import ITEM_LOSSES, loss_facts
from billhook.engine.prefix_trie import PlanBits, Walk, WalkJob
from billhook.engine.racing import Quality, Sums
from billhook.engine.single_plan import RepairedWalk
from billhook.engine.workers.division import ALONE, Division
from billhook.models.accelerator.memory import with_less
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.accelerator.spreading import summed_free
from billhook.models.architectures import widest
from billhook.models.device import dtype_name
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import Repair
from billhook.models.structure import rope_boundary

SAMPLE_EVERY = 4  # a sampled piece takes one of so many positions


@dataclass(frozen=True, slots=True)
class _TokenValues:
    """Losses of tokens that may still be on their way: `values` [jobs, tokens], the document or row of each token."""

    jobs: list[WalkJob]  # of one document group
    values: torch.Tensor
    of: torch.Tensor
    times: float  # by which a sum is multiplied


class Measurer:
    """Measurer of the jobs of one teacher on one token set under one loss.

    - `memory`: bytes for weights and activations together; None is half of what the machine has free.
    - `walk`: the order of the walk, instead of choosing it by memory.
    - `repaired`: a plan to measure under a repair of its blocks.
    - `division`: how many workers share the document groups. All are this one's until `own` says otherwise.
    """

    def __init__(
        self, teacher: Teacher, tokens: TokenSet, loss: str, *, memory: int | None = None, walk: str | None = None,
        repaired: tuple[Plan, Repair] | None = None, division: Division = ALONE,
    ) -> None:  # fmt: skip
        self._item_loss = ITEM_LOSSES.get(loss)
        if (self._item_loss is None) != (tokens.choices is None):
            raise UsageError(_unfit(loss, tokens))
        loss = loss if self._item_loss is None else "nll"  # of the tokens of the choices
        self.teacher, self.loss = teacher, loss
        boundary = rope_boundary(teacher.model.config)
        self.groups = document_groups(tokens, teacher.device, boundary, division.workers, teacher.head_device)
        self._own, self._here = frozenset(range(len(self.groups))), division.here
        self.sizes = work_sizes(teacher.device, int(teacher.model.config.hidden_size))
        self.runner = BlockRunner(teacher, self.sizes.chunk)
        self._fixed, self._parts = walk, 1  # the parts of a batch of jobs
        self._limit = self._room(memory)
        self._head = self._new_head()
        self.bits = PlanBits(teacher.positions)
        self.walk = Walk(self.runner, [group.ids for group in self.groups], self._limit, self.bits)
        self._references: dict[int, Reference] = {}  # by document group
        self._runs: Walk | RepairedWalk = self.walk
        if repaired is not None:
            self.use_repair(*repaired)
        self.layout = self.arrange(1)

    def own(self, groups: Iterable[int]) -> None:
        """Prepare for jobs of these document groups; what is cached of others is dropped."""
        self._own = frozenset(groups)
        self._references = {g: reference for g, reference in self._references.items() if g in self._own}
        self.walk.streams.drop(lambda node: node[0] not in self._own)

    workers = abreast = 1
    rounding = 0.0

    def interleaved(self, order: Sequence[int]) -> list[int]:
        """Return the document groups in the order in which they are measured: as given."""
        return list(order)

    def masks(self, plans: Sequence[Plan]) -> list[int]:
        """Return the plans as the bit masks that the walk reads. Raises PlanError if one does not fit the teacher."""
        if narrowed := self.bits.unknown(plans):
            for plan in plans:
                if plan.narrowed:
                    self.teacher.anatomy.check(plan)
            self.bits.add(narrowed)
        return [self.bits.mask(plan) for plan in plans]

    def begin(self, plans: int, base: int | None = None) -> None:
        """Prepare for a batch of so many plans; streams from which none that does `base` can start are dropped."""
        if base is not None:
            self.walk.evict(base)
        self.layout = self.arrange(plans)

    def release(self) -> None:
        """Drop the cached streams; later measurements compute them again."""
        self.walk.streams.clear()

    def use_repair(self, plan: Plan, repair: Repair) -> None:
        """Measure `plan` under `repair` from now on."""
        self._runs = RepairedWalk(self.walk, plan, self.masks([plan])[0], repair)

    # -- memory -----------------------------------------------------------------------------------------------------

    def _new_head(self) -> Head:
        return Head(self.teacher, self.loss, self._limit // (8 * len(self.teacher.devices)))

    @property
    def room(self) -> int:
        """Bytes for residual streams."""
        return self._limit

    def limit_room(self, room: int) -> None:
        """Take at most so many bytes for residual streams from now on."""
        self._limit = min(self._limit, room)
        self.layout = self.arrange(1)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's residual stream."""
        return int(self.teacher.model.config.hidden_size) * int(self.teacher.model.dtype.itemsize)

    def _room(self, memory: int | None) -> int:
        """Return the bytes for residual streams under a memory budget."""
        if memory is None:
            return summed_free(self.teacher.devices) // (2 * self._here)
        config = self.teacher.model.config
        width, wide = int(config.hidden_size), widest(config)
        working = 4 * (self.runner.chunk * 4 * wide + self.sizes.head_tokens * VOCABULARY_AT_A_TIME)
        if self.teacher.weights is not None:  # a piece of the head as it is stored, and in float32
            working += 6 * VOCABULARY_AT_A_TIME * width
        if loss_facts(self.loss).rotation_free:  # in float64: WᵀW, its factor and a piece of the head
            working += 8 * width * (2 * width + VOCABULARY_AT_A_TIME)
        reference = 4 * sum(group.tokens for group in self.groups) * (3 * width + 2)
        return max(0, memory - self.teacher.weight_bytes - working - reference)

    def arrange(self, plans: int) -> WorkPlan:
        """Choose walk and checkpoints for a batch of so many plans."""
        own = [self.groups[g].ids.numel() for g in self._own] or [0]
        largest, tokens = max(own), sum(own)
        streamed, devices = self.teacher.weights is not None, len(self.teacher.devices)
        width = int(self.teacher.model.config.hidden_size)
        wave = self.sizes.wave * devices
        if streamed:
            wave = max(1, self._limit // (2 * (self.token_bytes + 4 * width)))  # with hidden
        live = 2 * (plans + 1) * largest * self.token_bytes  # before and after a block
        if streamed:
            live = 2 * min(wave, (plans + 1) * tokens) * self.token_bytes
        walk = self._fixed or ("layers" if streamed or live <= self._limit // (2 * devices) else "depth-first")
        free = max(0, self._limit - (live if walk == "layers" else 0))
        depth = self.runner.depth
        wanted = (plans + 1) * depth * tokens * self.token_bytes // 2  # a branch begins half way, on average
        interval = 0 if free < wanted / depth else -(-wanted // free)
        ends = frozenset({depth})
        self.walk.checkpoints = ends | frozenset(range(interval, depth, interval)) if interval else ends
        self.walk.streams.limit = free
        kept = min(free, wanted // interval) if interval else 0
        return WorkPlan(walk, streamed, len(self.groups), interval, free, kept, wave)

    # -- measuring --------------------------------------------------------------------------------------------------

    @property
    def bounds(self) -> bool:
        """Whether pieces can be measured as lower bounds."""
        self._refer()
        return self._head.bounds

    def supported_quality(self, quality: Quality) -> Quality:
        """Return the quality that can be measured: items cannot be sampled position by position."""
        return quality if self._item_loss is None else "full"

    def pieces(self, quality: Quality, jobs: Sequence[WalkJob]) -> Iterator[dict[WalkJob, Sums]]:
        """Yield what `measure` returns of the jobs, in waves."""
        sizes = [group.tokens for group in self.groups]
        for batch in job_batches(jobs, sizes, self.layout.wave, split=self.layout.streamed):
            yield self.measure(quality, batch)

    def measure(self, quality: Quality, jobs: Sequence[WalkJob]) -> dict[WalkJob, Sums]:
        """Return the nats of each document of each job's group; of a task, the loss of each item."""
        nats = self.row_nats(self.supported_quality(quality), jobs)
        if self._item_loss is None:
            return nats
        by_item: dict[WalkJob, Sums] = {}
        for g, group_jobs in _by_group(jobs).items():
            likely = -torch.tensor([nats[job] for job in group_jobs], dtype=torch.float64)  # [plans, rows]
            values = [self._item_loss(likely[:, rows], gold) for rows, gold in self.groups[g].items]
            for value in values:
                if not isinstance(value, torch.Tensor) or value.shape != likely.shape[:1]:
                    raise wrong_return(
                        "loss", self._item_loss.__name__, f"a tensor of {len(likely)} values, one a plan", value
                    )
            by_item |= dict(zip(group_jobs, map(tuple, torch.stack(values, 1).tolist()), strict=True))
        return by_item

    def row_nats(self, quality: Quality, jobs: Sequence[WalkJob]) -> dict[WalkJob, Sums]:
        """Return the nats of each document of each job's group; where rows are choices, of each row.

        Where memory runs out it tries again with less at a time. Raises ResourceError where that does not help.
        """
        return with_less(lambda: self._in_parts(quality, jobs), self._halve, self.teacher.device)

    def _in_parts(self, quality: Quality, jobs: Sequence[WalkJob]) -> dict[WalkJob, Sums]:
        """Return `row_nats` of the jobs, in twice as many parts after each time that memory ran out."""
        size = -(-len(jobs) // self._parts)
        nats: dict[WalkJob, Sums] = {}
        for start in range(0, len(jobs), max(1, size)):
            nats |= self._nats(quality, jobs[start : start + size])
        return nats

    def _halve(self) -> None:
        """Drop what is cached, and take half as much at a time from now on."""
        self._parts *= 2
        self._limit //= 2
        self.runner.chunk = max(1, self.runner.chunk // 2)
        self.release()
        self.walk.streams.limit //= 2

    @undisturbed
    def _nats(self, quality: Quality, jobs: Sequence[WalkJob]) -> dict[WalkJob, Sums]:
        """Return `row_nats`, in one walk. Where nothing is cheaper than the loss, that is the bound."""
        self._refer(job[0] for job in jobs)
        quality = "full" if quality == "bound" and not self._head.bounds else quality
        values: list[_TokenValues] = []
        waiting: dict[int, list[tuple[WalkJob, torch.Tensor]]] = defaultdict(list)
        for job, stream in self._runs.run(jobs, self.layout.walk == "layers"):
            group = self.groups[job[0]]
            waiting[job[0]].append((job, group.read_of(stream).to(self.teacher.head_device)))
            if self.teacher.weights is None and len(waiting[job[0]]) * len(group.targets) >= self.sizes.head_tokens:
                values += self._values(quality, [waiting.pop(job[0])])
        rest = list(waiting.values())
        waiting.clear()
        return self._sums(values + self._values(quality, rest))  # a streamed head is read once, for built-in losses

    def _values(self, quality: Quality, waiting: list[list[tuple[WalkJob, torch.Tensor]]]) -> list[_TokenValues]:
        """Return the loss of each token, from the streams that the head reads; each list is of one document group."""
        numbers = [pairs[0][0][0] for pairs in waiting]
        jobs = [[job for job, _ in pairs] for pairs in waiting]
        batches = []
        for number in numbers:  # the parts of a stack are released
            stacked = torch.stack([x for _, x in waiting.pop(0)])
            batches.append((self.runner.final_norm(stacked), self._references[number]))
        by_row = self._item_loss is not None
        of = [self.groups[g].row_of if by_row else self.groups[g].document_of for g in numbers]
        share = 1.0
        if quality == "bound":
            values = [self._head.bound(hidden, reference) for hidden, reference in batches]
        elif quality == "sample":
            picked = [slice(g % SAMPLE_EVERY, None, SAMPLE_EVERY) for g in numbers]
            some = [(hidden[:, at], reference.at(at)) for (hidden, reference), at in zip(batches, picked, strict=True)]
            share = float(SAMPLE_EVERY)
            of = [documents[at] for documents, at in zip(of, picked, strict=True)]
            values = self._head.losses(some)
        else:
            values = self._head.losses(batches)
        return [_TokenValues(*each, share) for each in zip(jobs, values, of, strict=True)]

    def _sums(self, batches: Sequence[_TokenValues]) -> dict[WalkJob, Sums]:
        """Return nats by document, or by row of choices. All values leave the device at once."""
        by_job: dict[WalkJob, Sums] = {}
        if not batches:
            return by_job
        sizes = [batch.values.numel() for batch in batches]
        values = torch.cat([batch.values.flatten() for batch in batches]).cpu().double().split(sizes)
        for batch, flat in zip(batches, values, strict=True):
            group = self.groups[batch.jobs[0][0]]
            size = len(group.documents if self._item_loss is None else group.rows)
            sums = torch.zeros(len(batch.jobs), size, dtype=torch.float64)
            sums.index_add_(1, batch.of, flat.view(batch.values.shape)).mul_(batch.times)
            for job, row in zip(batch.jobs, sums.tolist(), strict=True):
                if not all(math.isfinite(x) for x in row):
                    raise ModelError(self._where_not_finite(job))
                by_job[job] = tuple(row)
        return by_job

    @undisturbed
    def _refer(self, groups: Iterable[int] = ()) -> None:
        """Compute the teacher's references of its own document groups and of `groups`, once.

        Those of further groups begin anew: which words a bound counts is chosen over all of them.
        """
        wanted = self._own | set(groups) | self._references.keys()
        if wanted == self._references.keys():
            return
        if self._references:
            self._head = self._new_head()
        new = sorted(wanted)
        targets = [self.groups[g].targets for g in new]
        if self.loss == "nll":  # needs the data, not the teacher
            nothing = torch.empty(0, self._head.width, device=self.teacher.head_device)
            self._references = {g: Reference(nothing, target) for g, target in zip(new, targets, strict=True)}
            return
        final = {
            g: self.runner.final_norm(self.groups[g].tokens_of(stream))
            for (g, _), stream in self.walk.run([(g, 0) for g in new], True)
        }
        hidden = [final[g] for g in new]
        finite = torch.stack([torch.isfinite(h).all() for h in hidden]).tolist()
        if False in finite:
            raise ModelError(self._where_not_finite((new[finite.index(False)], 0)))
        self._references = dict(zip(new, self._head.references(hidden, targets), strict=True))

    @undisturbed
    def check_finite(self, streams: Sequence[torch.Tensor], numbers: Sequence[int] | None = None) -> None:
        """Raise ModelError, naming the block, unless the streams after the last block are finite.

        `numbers`: their document groups; None: all, one stream each.
        """
        of = range(len(self.groups)) if numbers is None else numbers
        pairs = zip(of, streams, strict=True)
        finite = torch.stack([torch.isfinite(self.groups[g].tokens_of(stream)).all() for g, stream in pairs]).tolist()
        if False in finite:
            raise ModelError(self._where_not_finite((of[finite.index(False)], 0)))

    def _where_not_finite(self, job: WalkJob) -> str:
        """Return the message that names the first block with NaN or infinity."""
        bad: list[int] = []

        def look(depth: int, streams: Sequence[torch.Tensor]) -> None:
            if not all(bool(torch.isfinite(stream).all()) for stream in streams):
                bad.append(self.teacher.positions[depth])

        walk = Walk(self.runner, self.walk.ids, 0, self.bits)
        walk.look = look
        list(walk.run([job], layers=True))
        plan = self.bits.plan(job[1])
        dtype = dtype_name(self.teacher.model.dtype)
        where = f"block {min(bad)}" if bad else "the head"
        without = f" with {plan} removed" if plan else ""
        broken = "the checkpoint itself is broken: download it again."
        advice = (
            f"Try {option('dtype', 'float32')}; if it stays, {broken}" if dtype != "float32" else broken.capitalize()
        )
        return f"Activations are NaN or infinite from {where} on{without}, in {dtype}. {advice}"

    @undisturbed
    def logits(self, plan: Plan) -> torch.Tensor:
        """Return the logits [rows, time, vocabulary] of all rows under a plan, in float32."""
        ((_, stream),) = self._runs.run([(0, self.masks([plan])[0])], layers=True)
        hidden = self.runner.final_norm(stream)
        return self._head.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


def _unfit(loss: str, tokens: TokenSet) -> str:
    """Return the message for a loss that does not fit a token set."""
    if tokens.choices is None:
        return (
            f"{option('loss', loss)} scores multiple-choice items, and {tokens.source} is text. Type "
            f"{option('loss', f'{loss}:FILE.jsonl')}"
        )
    names = " or ".join(option("loss", f"{name}:{tokens.source}") for name in ITEM_LOSSES)
    return f"{option('loss', loss)} reads text, and {tokens.source} holds multiple-choice items. Type {names}"


def _by_group(jobs: Sequence[WalkJob]) -> dict[int, list[WalkJob]]:
    """Return the jobs by document group."""
    by_group: dict[int, list[WalkJob]] = defaultdict(list)
    for job in jobs:
        by_group[job[0]].append(job)
    return by_group


def job_batches(jobs: Sequence[WalkJob], sizes: Sequence[int], most: int, *, split: bool) -> Iterator[list[WalkJob]]:
    """Yield jobs in batches of at most `most` tokens, of whole document groups; larger groups are `split` or whole."""
    batch: list[WalkJob] = []
    tokens = 0
    for group, group_jobs in _by_group(jobs).items():
        step = max(1, most // sizes[group]) if split else len(group_jobs)
        for part in (group_jobs[start : start + step] for start in range(0, len(group_jobs), step)):
            if batch and tokens + len(part) * sizes[group] > most:
                yield batch
                batch, tokens = [], 0
            batch += part
            tokens += len(part) * sizes[group]
    if batch:
        yield batch
