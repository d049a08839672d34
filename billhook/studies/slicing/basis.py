"""The basis of a narrower residual stream: the directions along which a text's streams are longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from billhook.core.events import Event, EventListener, ignore_events
from billhook.data.token_sets import TokenSet
from billhook.engine.bench import Measurer
from billhook.engine.blocks import KEPT, NO_MLP
from billhook.models.device import float64_place, to_float64
from billhook.models.load import Teacher, undisturbed


@dataclass(frozen=True, slots=True)
class Basis:
    """Directions of the residual stream, `vectors` [width, width], columns of length 1 at right angles.

    `energies`: of each direction, the longest first: the share of a stream's squared length that lies along it, the
    mean over tokens and boundaries. They add up to 1. Both are float64, on the CPU where the device has none.
    """

    vectors: torch.Tensor
    energies: torch.Tensor

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
    moment = second_moment(teacher, tokens, watch)
    energies, vectors = torch.linalg.eigh(moment / moment.trace())
    return Basis(vectors.flip(1), energies.flip(0).clamp_min(0.0))


@undisturbed
@torch.no_grad()
def second_moment(teacher: Teacher, tokens: TokenSet, watch: EventListener = ignore_events) -> torch.Tensor:
    """Return Σ u uᵀ [width, width] in float64 over tokens and boundaries, u: a residual stream of length 1."""
    bench = Measurer(teacher, tokens, "nll")
    width = int(teacher.model.config.hidden_size)
    moment = torch.zeros(width, width, dtype=torch.float64, device=float64_place(teacher.device))
    for number, streams in enumerate(_boundaries(bench), 1):
        watch(Event("calibrate", number, 2 * bench.runner.depth + 1, {"step": "streams"}))
        for group, stream in zip(bench.groups, streams, strict=True):
            rows = to_float64(group.tokens_of(stream))
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            moment.addmm_(rows.T, rows)
    return moment


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
