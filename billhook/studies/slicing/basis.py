"""Bases of a narrower residual stream: the directions along which a text's streams are longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from billhook.core.events import Event, EventListener, ignore_events
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.blocks import KEPT, NO_ATTENTION, NO_MLP
from billhook.models.device import float64_place, to_float64
from billhook.models.load import Teacher, undisturbed


@dataclass(frozen=True, slots=True)
class Basis:
    """Directions of the residual stream, `vectors` [width, directions], columns of length 1 at right angles.

    `energies` [width]: of each direction, the longest first, those without a vector too: the share of the squared
    length of the streams it was found on that lies along it. They add up to 1. Both are float64, on the CPU where the
    device has none.
    """

    vectors: torch.Tensor
    energies: torch.Tensor

    def first(self, width: int) -> Basis:
        """Return the basis of the first `width` directions."""
        return replace(self, vectors=self.vectors[:, :width].clone())

    def kept(self, width: int) -> float:
        """Return the share of the squared length that the first `width` directions hold."""
        return float(self.energies[:width].sum())


def basis_of(teacher: Teacher, tokens: TokenSet, watch: EventListener = ignore_events) -> Basis:
    """Return the eigenvectors of the second moment of the residual stream, over all tokens and boundaries.

    Boundaries are those after the embedding, after every attention and after every MLP. Every stream is divided by its
    length: norms read directions alone, and without that a few tokens outweigh all others, whose streams are a thousand
    times as long. The mean is not subtracted.

    Cost: one forward pass, and a product of [width, tokens] with its transpose at each boundary.
    Source: Ashkboos et al. 2024, SliceGPT (arXiv 2401.15024), with one basis for all boundaries.
    """
    return _eigenvectors(second_moment(teacher, tokens, watch))


@undisturbed
@torch.no_grad()
def second_moment(teacher: Teacher, tokens: TokenSet, watch: EventListener = ignore_events) -> torch.Tensor:
    """Return Σ u uᵀ [width, width] in float64 over tokens and boundaries, u: a residual stream of length 1.

    So that an energy of its eigenvectors is the mean over tokens and boundaries.
    """
    bench = Measurer(teacher, tokens, "nll")
    width = int(teacher.model.config.hidden_size)
    moment = torch.zeros(width, width, dtype=torch.float64, device=float64_place(teacher.device))
    for number, streams in enumerate(_boundaries(bench), 1):
        watch(Event("calibrate", number, 2 * bench.runner.depth + 1, {"step": "streams"}))
        for rows in _rows(bench, streams):
            unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            moment.addmm_(unit.T, unit)
    return moment


@undisturbed
@torch.no_grad()
def boundary_bases(teacher: Teacher, tokens: TokenSet, width: int, watch: EventListener = ignore_events) -> list[Basis]:
    """Return the first `width` eigenvectors of Σ h hᵀ, h the stream at a boundary, for each boundary in forward order.

    Each is found on the streams that the sliced model has there: those of all boundaries before are projected on their
    bases. Streams are summed as they are, and the mean is not subtracted. Boundaries are those of `basis_of`.

    Cost: as `basis_of`, and the eigenvectors of [width, width] at each boundary.
    Source: Ashkboos et al. 2024, SliceGPT (arXiv 2401.15024).
    """
    bench, found = Measurer(teacher, tokens, "nll"), list[Basis]()
    runner, whole = bench.runner, int(teacher.model.config.hidden_size)

    def projected(streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        moment = torch.zeros(whole, whole, dtype=torch.float64, device=float64_place(teacher.device))
        for rows in _rows(bench, streams):
            moment.addmm_(rows.T, rows)
        found.append(_eigenvectors(moment).first(width))
        watch(Event("calibrate", len(found), 2 * runner.depth + 1, {"step": "streams"}))
        kept = [found[-1].vectors.to(stream.device, torch.float32) for stream in streams]
        return [(stream.float() @ q @ q.T).to(stream.dtype) for stream, q in zip(streams, kept, strict=True)]

    streams = projected([runner.embed(group.ids) for group in bench.groups])
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        for alone in (NO_MLP, NO_ATTENTION):
            done = runner.step(index, block, [(stream, {alone}) for stream in streams])
            streams = projected([after[alone] for after in done])
    bench.check_finite(streams)
    return found


def _rows(bench: Measurer, streams: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the streams of the tokens of every document group, [tokens, width], of their streams with padding."""
    for group, stream in zip(bench.groups, streams, strict=True):
        yield to_float64(group.tokens_of(stream))


def _eigenvectors(moment: torch.Tensor) -> Basis:
    """Return all eigenvectors of a second moment, by descending eigenvalue."""
    energies, vectors = torch.linalg.eigh(moment / moment.trace())
    return Basis(vectors.flip(1), energies.flip(0).clamp_min(0.0))


def _boundaries(bench: Measurer) -> Iterator[Sequence[torch.Tensor]]:
    """Yield the streams [rows, time, width] of every document group, boundary by boundary; one pass."""
    runner = bench.runner
    wanted = {KEPT} if runner.parallel else {KEPT, NO_MLP}
    streams = [runner.embed(group.ids) for group in bench.groups]
    yield streams
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        done = runner.step(index, block, [(stream, wanted) for stream in streams])
        if not runner.parallel:
            yield [after[NO_MLP] for after in done]
        streams = [after[KEPT] for after in done]
        yield streams
    bench.check_finite(streams)
