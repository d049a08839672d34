"""Losses: the distance of a student from its teacher, or from the data, by token. Accumulated in float32.

In nats, except `angular` (radians) and `norm` (logits).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F  # noqa: N812

from billhook.core.errors import UnknownName, UsageError, option
from billhook.core.registry import RegistryWithFacts

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ItemLoss = Callable[[torch.Tensor, int], torch.Tensor]

WordTerms = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # log-probabilities of both sides -> [tokens, words]


@dataclass(frozen=True, slots=True)
class LossFacts:
    """Facts that a loss states in its decorator.

    - `unit`: of its values.
    - `never_negative`: no token's value is below 0, so that a partial sum bounds the whole and bad candidates are
      dropped early.
    - `counts_targets`: it counts predicted tokens; the last token of a row has no target.
    - `rotation_free`: rotating both sides' logits does not change it, so that inner products suffice.
    - `terms`: it is a sum over words of these terms, computed over pieces of the vocabulary.
    """

    unit: str = "nats"
    never_negative: bool = False
    counts_targets: bool = False
    rotation_free: bool = False
    terms: WordTerms | None = None


LOSSES: RegistryWithFacts[TokenLoss, LossFacts] = RegistryWithFacts("loss", unstated=LossFacts())

ITEM_LOSSES: RegistryWithFacts[ItemLoss, LossFacts] = RegistryWithFacts("task_loss", unstated=LossFacts())


@overload
def loss(function: TokenLoss, /) -> TokenLoss:
    """Add a loss without facts."""


@overload
def loss(
    *, unit: str = ..., never_negative: bool = ..., counts_targets: bool = ..., rotation_free: bool = ...,
    terms: WordTerms | None = ...,
) -> Callable[[TokenLoss], TokenLoss]:  # fmt: skip
    """Return the decorator that adds a loss with these facts."""


def loss(
    function: TokenLoss | None = None, /, *, unit: str = "nats", never_negative: bool = False,
    counts_targets: bool = False, rotation_free: bool = False, terms: WordTerms | None = None,
) -> TokenLoss | Callable[[TokenLoss], TokenLoss]:  # fmt: skip
    """Add a loss over tokens under its own name, with its facts: see LossFacts."""
    add = LOSSES.add_with(LossFacts(unit, never_negative, counts_targets, rotation_free, terms))
    return add if function is None else add(function)


@overload
def item_loss(function: ItemLoss, /) -> ItemLoss:
    """Add an item loss without facts."""


@overload
def item_loss(*, unit: str = ..., never_negative: bool = ...) -> Callable[[ItemLoss], ItemLoss]:
    """Return the decorator that adds an item loss with these facts."""


def item_loss(
    function: ItemLoss | None = None, /, *, unit: str = "nats", never_negative: bool = False
) -> ItemLoss | Callable[[ItemLoss], ItemLoss]:
    """Add a loss over the items of a multiple-choice task under its own name, with its facts: see LossFacts."""
    add = ITEM_LOSSES.add_with(LossFacts(unit, never_negative))
    return add if function is None else add(function)


def loss_facts(name: str) -> LossFacts:
    """Return the facts of a loss over tokens or over items. Raises UnknownName."""
    return ITEM_LOSSES.facts(name) if name in ITEM_LOSSES else LOSSES.facts(name)


TOP_K = 512  # tokens that `topk_kl` tells apart


@loss(never_negative=True)
def kl(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions, in nats; the default.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], each at
    least 0 up to rounding. Deviation from EvoPress: over the whole vocabulary, not the top k.

    Formula: Σ_v p_v log(p_v / q_v)
    Cost: the head once; no logits of the teacher.
    Source: Kullback and Leibler 1951; as a pruning objective, Sieberling et al. 2024, EvoPress (arXiv 2410.14649).
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def js_terms(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the terms of `js` by word, from log-probabilities of both sides, [tokens, words]."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle))


@loss(never_negative=True, terms=js_terms)
def js(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the next-token distributions, in nats, between 0 and log 2; symmetric.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens]. Deviation:
    the textbook definition; FinerCut's code computes KL(M || P) instead of KL(P || M).

    Formula: (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2
    Cost: the head four times: logits of both sides, twice.
    Source: Lin 1991; as a pruning objective, Zhang et al. 2024, FinerCut (arXiv 2405.18218).
    """
    return js_terms(teacher.float().log_softmax(-1), student.float().log_softmax(-1)).sum(-1)


def finercut_js_terms(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the terms of `finercut_js` by word, from log-probabilities of both sides, [tokens, words]."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return middle.exp() * (middle - 0.5 * (p + q))


@loss(never_negative=True, terms=finercut_js_terms)
def finercut_js(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """FinerCut's Jensen-Shannon: (KL(M || P) + KL(M || Q)) / 2, M = (P + Q) / 2, in nats; symmetric.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], each at least 0
    up to rounding. What FinerCut's code computes: against the textbook (`js`) the arguments of both KL are swapped, so
    that it has no upper bound. Deviation: summed over the vocabulary, where the code takes the mean over tokens and
    vocabulary; the ranking is the same.

    Formula: (KL(m || p) + KL(m || q)) / 2, m = (p + q) / 2
    Cost: the head four times, as js.
    Source: Zhang et al. 2024, FinerCut (arXiv 2405.18218), its `js_divergence`.
    """
    return finercut_js_terms(teacher.float().log_softmax(-1), student.float().log_softmax(-1)).sum(-1)


@loss(never_negative=True)
def topk_kl(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the teacher's 512 likeliest tokens and one bucket of all others, in nats.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], each at least 0
    up to rounding, and at most `kl`: merging tokens only loses information (the data-processing inequality). Of a
    vocabulary under 1,024 the likelier half. Deviation from EvoPress, which leaves the other tokens out and normalises
    both sides over the top k: that is no bound of `kl`, and does not see probability that leaves the top k.

    Formula: Σ over the teacher's top k words, and one bucket of the rest, of p log(p / q)
    Cost: the head once, as kl.
    Source: Sieberling et al. 2024, EvoPress (arXiv 2410.14649); the bucket is ours.
    """
    top = teacher.topk(top_count(teacher.shape[-1])).indices
    return kl(topk_and_rest(teacher.float(), top), topk_and_rest(student.float(), top), targets)


def top_count(words: int) -> int:
    """Return how many tokens of a vocabulary of `words` `topk_kl` tells apart; the bucket is never empty."""
    return min(TOP_K, words // 2)


def topk_and_rest(logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return the logits of the words `top` [tokens, k] and, last, of all others together: [tokens, k + 1]."""
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logits.gather(-1, top), others), -1)


@loss(unit="radians", never_negative=True, rotation_free=True)
def angular(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Angle between the logits of teacher and student, arccos of the cosine clamped to [0, 1], in radians.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], between 0 and
    pi / 2. Deviation: computed as 2 atan2(|u - v|, |u + v|) of the normalised logits, the same angle, but precise also
    where they are almost parallel, where arccos is not.

    Formula: arccos(clamp(z_p·z_q / (||z_p|| ||z_q||), 0, 1))
    Cost: width² per token, through the inner products of the head's rows; the whole head where it is soft-capped.
    Source: Zhang et al. 2024, FinerCut (arXiv 2405.18218), its `angular_distance`.
    """
    u, v = F.normalize(teacher.float(), dim=-1), F.normalize(student.float(), dim=-1)
    angle = 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))
    return angle.clamp(max=math.pi / 2)


@loss(unit="logits", never_negative=True, rotation_free=True)
def norm(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L2 norm, over the vocabulary, of the difference between the logits of teacher and student, in logits.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], each at least
    0; their mean is D of the paper. It sees a shift of all logits, which changes no probability. Deviation from
    FinerCut's `norm`: that is the Frobenius norm over all tokens of a sample, this the mean of the norms of its tokens.

    Formula: ||z_p - z_q||₂
    Cost: as angular.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286).
    """
    return (teacher.float() - student.float()).square().sum(-1).sqrt()


@loss(never_negative=True, counts_targets=True)
def nll(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the next token, in nats; its exponential is the perplexity.

    `teacher`: not used; `student`: logits [tokens, vocabulary]; `targets`: [tokens], -100 where there is no next token.
    Returns [tokens], 0 where there is no target.

    Formula: -log q_target
    Cost: the head once.
    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), as perplexity; Song et al. 2024, SLEB (arXiv
    2402.09025).
    """
    return F.cross_entropy(student.float(), targets, reduction="none", ignore_index=-100)


# -- losses over the items of a multiple-choice task ----------------------------------------------------------------


@item_loss(never_negative=True)
def task(log_probabilities: torch.Tensor, gold: int) -> torch.Tensor:
    """Cross-entropy in nats of the right choice among the choices of an item, by their log-probabilities.

    `log_probabilities`: [plans, choices], in nats, summed over each choice's tokens; `gold`: the number of the right
    one. Returns [plans], at least 0. Deviation: the paper has the 0-1 loss, `task_error`; this one moves before an
    answer does.

    Formula: -log softmax over the choices of Σ log q of their tokens, at the right one
    Cost: the head once, for the tokens of choices.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), the loss of a task.
    """
    return -log_probabilities.log_softmax(-1)[..., gold]


@item_loss(never_negative=True)
def task_error(log_probabilities: torch.Tensor, gold: int) -> torch.Tensor:
    """1 where another choice of an item is likelier than the right one, else 0; its mean is 1 - accuracy.

    `log_probabilities`: [plans, choices], in nats, summed over each choice's tokens; `gold`: the number of the right
    one. Returns [plans]. Of equal choices the first is the answer. Deviation: any items, whose choices may have many
    tokens; the paper asks MMLU, 5-shot, for one letter.

    Formula: 1 if the likeliest choice is not the right one, else 0
    Cost: as task.
    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), zero-one loss.
    """
    return (log_probabilities.argmax(-1) != gold).to(log_probabilities.dtype)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss by `name`, with the `file` of a task's items."""

    name: str
    file: str | None = None

    def __str__(self) -> str:
        return self.name if self.file is None else f"{self.name}:{self.file}"


def parse_loss(spelled: str) -> LossSpec:
    """Return the loss that a recipe spells `kl`, or `task:FILE`.

    Raises UnknownName, or UsageError for a task loss without a file and for a file with another loss.
    """
    name, _, file = spelled.partition(":")
    known = (*LOSSES, *ITEM_LOSSES)
    if name not in known:
        raise UnknownName("loss", name, known, " `billhook methods` describes them.")
    if name in tuple(ITEM_LOSSES) and not file:
        raise UsageError(
            f"{option('loss', name)} needs a file of multiple-choice items. Type {option('loss', f'{name}:FILE.jsonl')}"
        )
    if name in tuple(LOSSES) and file:
        raise UsageError(
            f"{option('loss', name)} takes no file. Type {option('loss', name)}, or {option('loss', f'task:{file}')}"
        )
    return LossSpec(name, file or None)
