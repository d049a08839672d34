"""Perplexity on held-out text, document by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import nll
from billhook.engine.probe import Probe
from billhook.engine.workers.team import Team
from billhook.methods.evaluate import batches, evaluation
from billhook.methods.evaluate.served import ServedModel
from billhook.models.device import to_float64
from billhook.models.load import Teacher, student_as_teacher
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply

Student = tuple[Plan, Repair]  # what a plan leaves of a teacher, repaired


@evaluation
@torch.inference_mode()
def perplexity(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Return the negative log-likelihood of each document in nats; exp of the mean per token is the perplexity.

    Each row of `tokens` is read on its own from its first token, without a sliding window. Values depend on the row
    length: compare only those of the same token set. This is the plain forward pass of any model, whose logits have
    its dtype; what Billhook shows is `measure_perplexity`.

    Source: Jelinek et al. 1977; the window rule is ours.
    """
    per_row = [0.0] * len(tokens.lengths)
    done = 0
    for batch in batches(tokens, model):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        sums = [
            to_float64(nll(logits[i, :n], logits[i, :n], batch.targets[i, :n])).sum()
            for i, n in enumerate(batch.lengths)
        ]
        for row, value in zip(batch.rows, torch.stack(sums).tolist(), strict=True):  # one wait for the device
            per_row[row] = value
        done += sum(batch.lengths)
        watch(Event("evaluate", done, tokens.tokens, {"of": who}))
    return EvalResult("perplexity", tokens.hash, *_by_document(tokens, per_row), tokens.clusters)


def measure_perplexity(
    teacher: Teacher,
    students: Sequence[Student],
    tokens: TokenSet,
    *,
    memory: int | None = None,
    team: Team | None = None,
    watch: EventListener = ignore_events,
) -> Iterator[EvalResult]:
    """Yield the perplexity of what each plan leaves of a teacher, repaired, by the measuring engine.

    All numbers of a run, a study or a comparison come from here, so that equal models get equal ones in every dtype:
    streams are in the compute dtype, logits and their sums in float32 and above. Bare plans share their passes. A
    repaired student in memory is measured as the teacher that its checkpoint will be. A model in a runtime is itself
    the only student. `team`: workers of the teacher, which share bare plans.
    """
    if isinstance(teacher.model, ServedModel):
        yield perplexity(teacher.model, tokens, watch=watch, who=teacher.name)
        return
    bare = list(dict.fromkeys(plan for plan, repair in students if repair == NO_REPAIR))
    if bare and team is not None:
        team.meet(len(bare) * tokens.tokens)
    probe = Probe(teacher, tokens, "nll", memory=memory, team=team) if bare else None
    done = dict(zip(bare, _nats(probe, bare), strict=True)) if probe is not None else {}
    for plan, repair in students:
        who = {"of": "student" if plan else "teacher"}
        watch(Event("evaluate", 0, tokens.tokens, who))
        if repair == NO_REPAIR:
            result = done[plan]
        elif teacher.weights is not None:
            probe = Probe(teacher, tokens, "nll", memory=memory, repaired=(plan, repair))
            (result,) = _nats(probe, [plan])
        else:
            student = student_as_teacher(teacher, apply(teacher, plan, repair=repair))
            (result,) = _nats(Probe(student, tokens, "nll", memory=memory), [Plan()])
        watch(Event("evaluate", tokens.tokens, tokens.tokens, who))
        yield result


def _nats(probe: Probe, plans: Sequence[Plan]) -> list[EvalResult]:
    tokens = probe.tokens
    return [
        EvalResult("perplexity", tokens.hash, loss.sums, loss.counts, tokens.clusters) for loss in probe.losses(plans)
    ]


def _by_document(tokens: TokenSet, per_row: list[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the sums and counts of predicted tokens per document, from the sums per row."""
    sums, counts = [0.0] * len(tokens.clusters), [0] * len(tokens.clusters)
    for document, value, length in zip(tokens.documents, per_row, tokens.lengths, strict=True):
        sums[document] += value
        counts[document] += length - 1
    return tuple(sums), tuple(counts)
