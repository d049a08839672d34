"""Losses from the head's inputs, without the logits of the whole set.

For a linear head z = W h + b the divergence needs no logits of the teacher; u_t = Wᵀ softmax(z_p) is a row of floats:

    KL_t = lse(z_q) - lse(z_p) - u_t · (h_q - h_p)

and lse(z_q) is summed over pieces of the vocabulary. Over the words S with nearly all of the teacher's probability it
costs a fraction, and the rest of the vocabulary has, by Jensen's inequality, at least

    Σ_{v not in S} exp(z_q,v) ≥ m_t · exp(lse(z_p) + ū_t · (h_q - h_p)),

m_t = the teacher's probability outside S, ū_t its mean row of W there: a lower bound of KL for d more floats per token.

Losses that depend only on lengths of logits and angles between them are computed from R h, where RᵀR = WᵀW: it has the
size of h instead of the vocabulary's, and the same lengths and angles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812

from billhook.core.registry import wrong_return
from billhook.engine.losses import LOSSES, WordTerms, loss_facts, top_count, topk_and_rest
from billhook.models.accelerator.products import keeps_narrow, wide_product
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.device import float64_place
from billhook.models.load import Teacher

VOCABULARY_AT_A_TIME = 8192
LOGITS_BYTES = 2**26  # per document, where a loss needs whole logits
COVERED = 0.98  # share of the teacher's probability that the words of a bound cover
LEAST_OUTSIDE = 1e-3  # least probability outside the bound's words that counts
WORTH_BOUNDING = 0.5  # the largest share of the vocabulary for which a bound is cheaper than the loss


@dataclass(frozen=True)
class Reference:
    """Values of the teacher that losses need on one document group; all over its counted tokens, in float32."""

    hidden: torch.Tensor  # [tokens, width], the head's inputs; [0, width] where the loss does not need the teacher
    targets: torch.Tensor  # [tokens], -100 where there is none
    lse: torch.Tensor | None = None  # [tokens]
    mean_row: torch.Tensor | None = None  # u: [tokens, width]
    rest: torch.Tensor | None = None  # lse over the words that are not in the bound, or not in `top`: [tokens]
    rest_row: torch.Tensor | None = None  # ū: [tokens, width]
    top: torch.Tensor | None = None  # the likeliest words: [tokens, k]
    top_logits: torch.Tensor | None = None  # logits of `top`: [tokens, k]

    def at(self, picked: slice) -> Reference:
        """Return the reference of the picked tokens."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Reference(*(None if x is None else x[picked] for x in parts))  # type: ignore[arg-type]


HeadBatch = tuple[torch.Tensor, Reference]  # inputs of students' heads [plans, tokens, width], and the teacher


class Head:
    """Output embedding of one teacher, with fast ways to its losses.

    `room`: bytes that a copy of the bound's rows may take.
    """

    def __init__(self, teacher: Teacher, loss: str, room: int) -> None:
        model, row = teacher.model, teacher.architecture
        self._teacher, self.loss, self._room = teacher, loss, room
        self._tokens = work_sizes(teacher.device).head_tokens  # at a time
        self._facts = loss_facts(loss)
        self._embedding = model.get_output_embeddings()
        self.words, self.width = map(int, self._embedding.weight.shape)
        bias = getattr(self._embedding, "bias", None)
        self._bias = None if bias is None else bias.float()
        self._scale = float(getattr(model.config, row.head_scale)) if row.head_scale else 1.0
        self._cap: float | None = getattr(model.config, row.head_softcap, None) if row.head_softcap else None
        self._picked: torch.Tensor | None = None  # words of the bound
        self._rows: torch.Tensor | None = None  # their rows of W
        self._rotated: tuple[torch.Tensor, torch.Tensor | None] | None = None  # R, and the rotated bias

    @property
    def bounds(self) -> bool:
        """Whether `bound` is cheaper than `losses`."""
        return self._rows is not None

    # -- logits -----------------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first word, rows of W [words, width]) over the vocabulary, in order; see `_as_multiplied`."""
        weights = self._teacher.weights
        first = 0
        whole = weights.head(VOCABULARY_AT_A_TIME) if weights else self._embedding.weight.split(VOCABULARY_AT_A_TIME)
        for piece in whole:
            yield first, self._as_multiplied(piece)
            first += len(piece)

    def _as_multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of W in float32, or as they are where the device multiplies them with float32 sums."""
        return rows if keeps_narrow(rows.device, rows.dtype) else rows.float()

    def _logits(self, hidden: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        z = F.linear(hidden, rows, bias) if rows.dtype == torch.float32 else wide_product(hidden, rows, bias)
        z = z * self._scale if self._scale != 1.0 else z
        return self._cap * torch.tanh(z / self._cap) if self._cap else z

    def _bias_of(self, first: int, count: int) -> torch.Tensor | None:
        return None if self._bias is None else self._bias[first : first + count]

    def _lse(self, all_hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return log Σ exp of the logits, [tokens], for each [tokens, width]. Reads the head once."""
        sizes = [len(hidden) for hidden in all_hidden]
        if len(sizes) > 1 and sum(sizes) <= 4 * self._tokens:  # small tensors are faster together
            return list(self._lse([torch.cat(all_hidden)])[0].split(sizes))
        totals = [torch.full(hidden.shape[:1], -torch.inf, device=hidden.device) for hidden in all_hidden]
        for first, rows in self._pieces():
            bias = self._bias_of(first, len(rows))
            for hidden, total in zip(all_hidden, totals, strict=True):
                for h, out in zip(hidden.split(self._tokens), total.split(self._tokens), strict=True):
                    torch.logaddexp(out, self._logits(h, rows, bias).logsumexp(-1), out=out)
        return totals

    # -- the teacher ------------------------------------------------------------------------------------------------

    def references(self, hidden: list[torch.Tensor], targets: list[torch.Tensor]) -> list[Reference]:
        """Return the teacher's references, from its head's inputs [tokens, width] and targets by document group."""
        if self.loss == "topk_kl":
            return self._with_top(hidden, targets)
        if self._facts.rotation_free and self._cap is None:
            self._rotated = self._rotate()
        if self.loss != "kl" and self._facts.terms is None:
            return [Reference(h, t) for h, t in zip(hidden, targets, strict=True)]
        if self.loss != "kl" or self._cap is not None:
            return [Reference(*values) for values in zip(hidden, targets, self._lse(hidden), strict=True)]
        sizes = [len(h) for h in hidden]
        joined = torch.cat(hidden)
        lse = self._lse([joined])[0]
        mean_row = torch.zeros_like(joined)
        mass = torch.zeros(self.words, device=joined.device)
        for first, rows in self._pieces():
            bias = self._bias_of(first, len(rows))
            for h, at, u in zip(*(x.split(self._tokens) for x in (joined, lse, mean_row)), strict=True):
                p = (self._logits(h, rows, bias) - at[:, None]).exp()
                u += p @ rows.float()
                mass[first : first + len(rows)] += p.sum(0)
        rest, rest_row = self._choose_words(joined, lse, mean_row, mass)
        parts = [x.split(sizes) if x is not None else [None] * len(sizes) for x in (lse, mean_row, rest, rest_row)]
        return [Reference(*values) for values in zip(hidden, targets, *parts, strict=True)]

    def _choose_words(
        self, hidden: torch.Tensor, lse: torch.Tensor, mean_row: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Choose the words of the bound; return the lse outside and the mean row there, or None twice if it costs more.

        `mass` [words]: the teacher's probability of each word, summed over the tokens.
        """
        order = mass.argsort(descending=True)
        sorted_mass = mass[order].cpu().double()
        covered = sorted_mass.cumsum(0) / sorted_mass.sum()
        count = int((covered < COVERED).sum()) + 1
        if count > WORTH_BOUNDING * self.words or 4 * count * self.width > self._room:
            return None, None
        self._picked = order[:count].sort().values
        weights = self._teacher.weights
        rows = self._embedding.weight[self._picked] if weights is None else weights.head_rows(self._picked)
        self._rows = self._as_multiplied(rows)
        bias = None if self._bias is None else self._bias[self._picked]
        rest, rest_row = torch.empty_like(lse), torch.empty_like(mean_row)
        for h, at, u, m, r in zip(*(x.split(self._tokens) for x in (hidden, lse, mean_row, rest, rest_row)),
                                  strict=True):  # fmt: skip
            p = (self._logits(h, self._rows, bias) - at[:, None]).exp()
            outside = 1 - p.sum(-1)
            enough = outside > LEAST_OUTSIDE  # below it the differences are rounding, and the bound leaves them out
            r[:] = torch.where(enough[:, None], (u - p @ self._rows.float()) / outside[:, None], 0.0)
            m[:] = torch.where(enough, outside.log() + at, -torch.inf)
        return rest, rest_row

    def _with_top(self, hidden: list[torch.Tensor], targets: list[torch.Tensor]) -> list[Reference]:
        """Return references with the likeliest words, chosen anew from each piece and the best so far."""
        joined = torch.cat(hidden)
        chunks = joined.split(self._tokens)
        best = [(h.new_empty(len(h), 0), h.new_empty(len(h), 0, dtype=torch.int64)) for h in chunks]
        rest = torch.full(joined.shape[:1], -torch.inf, device=joined.device)
        for first, rows in self._pieces():
            words = torch.arange(first, first + len(rows), device=joined.device)
            for i, (h, others) in enumerate(zip(chunks, rest.split(self._tokens), strict=True)):
                known, ids = best[i]
                values = torch.cat((known, self._logits(h, rows, self._bias_of(first, len(rows)))), -1)
                ids = torch.cat((ids, words.expand(len(h), -1)), -1)
                picked = values.topk(top_count(self.words)).indices
                kept = topk_and_rest(values, picked)
                best[i] = kept[:, :-1], ids.gather(-1, picked)
                torch.logaddexp(others, kept[:, -1], out=others)
        logits, top = (torch.cat(parts) for parts in zip(*best, strict=True))
        lse = torch.logaddexp(logits.logsumexp(-1), rest)
        parts = [x.split([len(h) for h in hidden]) for x in (lse, rest, top, logits)]
        return [
            Reference(h, t, lse=total, rest=others, top=ids, top_logits=z)
            for h, t, total, others, ids, z in zip(hidden, targets, *parts, strict=True)
        ]

    def _rotate(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return R [n, width] and c [n] such that R h + c has the lengths and angles of W h + b; n <= width + 1.

        Summed and factored in float64, on the CPU where the device lacks it.
        """
        device = self._embedding.weight.device if self._teacher.weights is None else self._teacher.device
        place = float64_place(device)
        size = self.width + (self._bias is not None)
        gram = torch.zeros(size, size, dtype=torch.float64, device=place)
        for first, rows in self._pieces():
            bias = self._bias_of(first, len(rows))
            whole = rows.float() if bias is None else torch.cat((rows.float(), bias[:, None]), -1)
            whole = whole.to(place).double()
            gram.addmm_(whole.T, whole)
        factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if failed:  # W has less than full rank: slower, equal up to rounding
            values, vectors = torch.linalg.eigh(gram)
            factor = values.clamp(min=0).sqrt()[:, None] * vectors.T
        factor = factor.float().to(device)
        return factor[:, : self.width].contiguous(), None if self._bias is None else factor[:, -1].contiguous()

    # -- students ---------------------------------------------------------------------------------------------------

    def bound(self, hidden: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return a lower bound of each token's KL, up to rounding: [plans, tokens], like `hidden` without its width."""
        assert self._rows is not None
        assert self._picked is not None
        bias = None if self._bias is None else self._bias[self._picked]
        flat = hidden.flatten(0, 1)
        logits = [self._logits(h, self._rows, bias).logsumexp(-1) for h in flat.split(self._tokens)]
        inside = torch.cat(logits).view(hidden.shape[:2])
        assert reference.lse is not None
        assert reference.mean_row is not None
        assert reference.rest is not None
        assert reference.rest_row is not None
        along, outside = self._moved(hidden, reference, reference.mean_row, reference.rest_row)
        return torch.logaddexp(inside, reference.rest + outside) - reference.lse - along

    def _moved(self, hidden: torch.Tensor, reference: Reference, *rows: torch.Tensor) -> list[torch.Tensor]:
        """Return (h_q - h_p) times each of `rows` [tokens, width], scaled like the head: [plans, tokens] each."""
        products = _dots(hidden - reference.hidden, *rows)
        return products if self._scale == 1.0 else [x * self._scale for x in products]

    def losses(self, batches: list[HeadBatch]) -> list[torch.Tensor]:
        """Return the loss of each token of each batch ([plans, tokens, width] and its reference): [plans, tokens]."""
        if self.loss == "kl" and self._cap is not None:
            return self._capped_kl(batches)
        if self.loss == "topk_kl":
            return self._topk_kl(batches)
        if self.loss not in ("kl", "nll") and self._facts.terms is None:
            return [self._from_logits(hidden, reference) for hidden, reference in batches]
        flat = self._lse([hidden.flatten(0, 1) for hidden, _ in batches])
        lse = [x.view(hidden.shape[:2]) for x, (hidden, _) in zip(flat, batches, strict=True)]
        if self._facts.terms is not None:
            return self._over_words(batches, lse, self._facts.terms)
        one = self._kl if self.loss == "kl" else self._nll
        return [one(hidden, reference, x) for (hidden, reference), x in zip(batches, lse, strict=True)]

    def _kl(self, hidden: torch.Tensor, reference: Reference, lse: torch.Tensor) -> torch.Tensor:
        assert reference.lse is not None
        assert reference.mean_row is not None
        return lse - reference.lse - self._moved(hidden, reference, reference.mean_row)[0]

    def _nll(self, hidden: torch.Tensor, reference: Reference, lse: torch.Tensor) -> torch.Tensor:
        ids = reference.targets.clamp(min=0)
        weights = self._teacher.weights
        rows = (self._embedding.weight[ids] if weights is None else weights.head_rows(ids)).float()
        z = _dots(hidden, rows)[0]
        z = (z if self._bias is None else z + self._bias[ids]) * self._scale
        z = self._cap * torch.tanh(z / self._cap) if self._cap else z
        return (lse - z).masked_fill(reference.targets < 0, 0.0)

    def nll_gradients(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return d nll / d hidden of each token, [tokens, width] like `hidden`. Each token has a target: [tokens].

        A streamed head is read twice.
        """
        gradients = torch.zeros_like(hidden)
        lse = self._lse([hidden])[0]
        for first, rows in self._pieces():
            bias = self._bias_of(first, len(rows))
            parts = (x.split(self._tokens) for x in (hidden, lse, targets, gradients))
            for h, at, target, out in zip(*parts, strict=True):
                z = self._logits(h, rows, bias)
                slope = (z - at[:, None]).exp()  # of the loss by the logits: [tokens, words]
                here = ((target >= first) & (target < first + len(rows))).nonzero()[:, 0]
                slope[here, target[here] - first] -= 1
                slope *= self._scale * (1 - (z / self._cap) ** 2 if self._cap else 1.0)
                out += slope @ rows.float()
        return gradients

    def _walk(self, batches: list[HeadBatch]) -> Iterator[tuple[int, torch.Tensor, int, slice]]:
        """Yield each piece of the head with slices of each batch: (first word, rows of W, batch, tokens)."""
        for first, rows in self._pieces():
            for number, (hidden, _) in enumerate(batches):
                for start in range(0, hidden.shape[1], self._tokens):
                    yield first, rows, number, slice(start, start + self._tokens)

    def _both(self, batches: list[HeadBatch]) -> Iterator[tuple[int, int, slice, torch.Tensor, torch.Tensor]]:
        """Yield the logits of teacher and student by piece: (batch, plan, tokens, z_p, z_q), z: [tokens, words]."""
        for first, rows, number, at in self._walk(batches):
            bias = self._bias_of(first, len(rows))
            hidden, reference = batches[number]
            teacher = self._logits(reference.hidden[at], rows, bias)
            for plan, student in enumerate(hidden[:, at]):
                yield number, plan, at, teacher, self._logits(student, rows, bias)

    def _capped_kl(self, batches: list[HeadBatch]) -> list[torch.Tensor]:
        """Return KL through a head that is not linear: the sums of `_kl`, over logits of both sides."""
        lse = [torch.full(hidden.shape[:2], -torch.inf, device=hidden.device) for hidden, _ in batches]
        along = [torch.zeros(hidden.shape[:2], device=hidden.device) for hidden, _ in batches]
        for i, plan, at, teacher, student in self._both(batches):
            reference = batches[i][1].lse
            assert reference is not None
            lse[i][plan, at] = torch.logaddexp(lse[i][plan, at], student.logsumexp(-1))
            along[i][plan, at] += ((teacher - reference[at, None]).exp() * (student - teacher)).sum(-1)
        for total, (_, known) in zip(lse, batches, strict=True):
            assert known.lse is not None
            total -= known.lse
        return [x - y for x, y in zip(lse, along, strict=True)]

    def _over_words(self, batches: list[HeadBatch], lse: list[torch.Tensor], terms: WordTerms) -> list[torch.Tensor]:
        """Return losses that are sums over words, from log-probabilities of both sides."""
        values = [torch.zeros(hidden.shape[:2], device=hidden.device) for hidden, _ in batches]
        for i, plan, at, teacher, student in self._both(batches):
            reference = batches[i][1].lse
            assert reference is not None
            values[i][plan, at] += terms(teacher - reference[at, None], student - lse[i][plan, at, None]).sum(-1)
        return values

    def _topk_kl(self, batches: list[HeadBatch]) -> list[torch.Tensor]:
        """Return lse(z_q) - lse(z_p) - the teacher's mean of z_q - z_p; all other words count as one."""
        top = [torch.full(hidden.shape[:2], -torch.inf, device=hidden.device) for hidden, _ in batches]
        rest = [x.clone() for x in top]
        along = [torch.zeros_like(x) for x in top]
        for first, rows, i, at in self._walk(batches):
            hidden, reference = batches[i][0], batches[i][1].at(at)
            assert reference.top is not None
            assert reference.top_logits is not None
            assert reference.lse is not None
            here = (reference.top >= first) & (reference.top < first + len(rows))  # [tokens, k]
            words = (reference.top - first).clamp(0, len(rows) - 1)
            p = (reference.top_logits - reference.lse[:, None]).exp().where(here, 0.0)
            away = torch.full_like(reference.top_logits, torch.inf).masked_fill_(here, -torch.inf)
            for plan, student in enumerate(hidden[:, at]):
                z = self._logits(student, rows, self._bias_of(first, len(rows)))
                after = z.gather(-1, words)
                z.scatter_reduce_(-1, words, away, "amin")  # in any order: what is not here leaves the word as it is
                inside = after.masked_fill(~here, -torch.inf).logsumexp(-1)
                top[i][plan, at] = torch.logaddexp(top[i][plan, at], inside)
                rest[i][plan, at] = torch.logaddexp(rest[i][plan, at], z.logsumexp(-1))
                along[i][plan, at] += (p * (after - reference.top_logits)).sum(-1)
        losses = []
        for inside, outside, moved, (_, reference) in zip(top, rest, along, batches, strict=True):
            assert reference.lse is not None
            assert reference.rest is not None
            others = (reference.rest - reference.lse).exp() * (outside - reference.rest)
            losses.append(torch.logaddexp(inside, outside) - reference.lse - moved - others)
        return losses

    def _from_logits(self, hidden: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Return any registered loss, from logits, or their rotation, of a few tokens at a time."""
        token_loss = LOSSES[self.loss]
        values = torch.empty(hidden.shape[:2], device=hidden.device)
        words = self.words if self._rotated is None else len(self._rotated[0])
        few = max(1, min(self._tokens, LOGITS_BYTES // (4 * words)))
        for start in range(0, hidden.shape[1], few):
            at = slice(start, start + few)
            teacher, targets = self._loss_inputs(reference.hidden[at]), reference.targets[at]
            together = max(1, few // len(targets))
            for students, out in zip(hidden.split(together), values.split(together), strict=True):
                logits = self._loss_inputs(students[:, at].flatten(0, 1)).split(len(targets))
                for i, student in enumerate(logits):
                    loss = token_loss(teacher, student, targets)
                    if not isinstance(loss, torch.Tensor) or loss.shape != targets.shape:
                        got = f"one of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else loss
                        raise wrong_return("loss", self.loss, f"a tensor of {len(targets)} values, one a token", got)
                    out[i, at] = loss
        return values

    def _loss_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits, or for a rotation-free loss numbers of equal lengths and angles: [tokens, any]."""
        return self.logits(hidden) if self._rotated is None else self._logits(hidden, *self._rotated)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [tokens, vocabulary] of few tokens."""
        logits = torch.empty(len(hidden), self.words, device=hidden.device)
        for first, rows in self._pieces():
            logits[:, first : first + len(rows)] = self._logits(hidden, rows, self._bias_of(first, len(rows)))
        return logits


def _dots(hidden: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Return `hidden` [plans, tokens, width] times each of `rows` [tokens, width] by token: [plans, tokens] each."""
    stacked = torch.stack(rows, dim=-1)  # [tokens, width, kinds]
    products = torch.bmm(hidden.transpose(0, 1), stacked)  # [tokens, plans, kinds]: reads `hidden` once
    return [products[:, :, k].T for k in range(len(rows))]
