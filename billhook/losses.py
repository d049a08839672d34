"""How far a student is from its teacher, or from the data, token by token. Registered; nats; accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from billhook.errors import UnknownName, UsageError
from billhook.registry import Registry

TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: Registry[TokenLoss] = Registry("loss")
loss = LOSSES.add
ItemLoss = Callable[[torch.Tensor, int], torch.Tensor]
ITEM_LOSSES: Registry[ItemLoss] = Registry("task_loss")
item_loss = ITEM_LOSSES.add


@loss
def kl(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions, in nats; the default.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens], each at
    least 0 up to rounding. Deviation from EvoPress: over the whole vocabulary, not the top k.

    Source: Kullback and Leibler 1951; as a pruning objective, Sieberling et al. 2024, EvoPress (arXiv 2410.14649).
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@loss
def js(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the next-token distributions, in nats, between 0 and log 2; symmetric.

    `teacher`, `student`: logits [tokens, vocabulary]; `targets`: [tokens] (not used). Returns [tokens]. Deviation:
    the textbook definition; FinerCut's code computes KL(M || P) in the place of KL(P || M).

    Source: Lin 1991; as a pruning objective, Zhang et al. 2024, FinerCut (arXiv 2405.18218).
    """
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


@loss
def nll(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the next token, in nats; its exponential is the perplexity.

    `teacher`: not used; `student`: logits [tokens, vocabulary]; `targets`: [tokens], -100 where there is no next token.
    Returns [tokens], 0 where there is no target.

    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), as perplexity; Song et al. 2024, SLEB (arXiv
    2402.09025).
    """
    return F.cross_entropy(student.float(), targets, reduction="none", ignore_index=-100)


COUNTS_TARGETS = frozenset({"nll"})  # losses over predicted tokens: the last token of a row has none
NEVER_NEGATIVE = frozenset({"kl", "js", "nll", "task", "task_error"})  # a sum over some documents bounds the whole


# -- losses over the items of a multiple-choice task ----------------------------------------------------------------


@item_loss
def task(log_probabilities: torch.Tensor, gold: int) -> torch.Tensor:
    """Cross-entropy in nats of the right choice among the choices of an item, by their log-probabilities.

    `log_probabilities`: [plans, choices], in nats, summed over each choice's tokens; `gold`: the number of the right
    one. Returns [plans], at least 0. Deviation: the paper has the 0-1 loss, `task_error`; this one moves before an
    answer does.

    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), the loss of a task.
    """
    return -log_probabilities.log_softmax(-1)[..., gold]


@item_loss
def task_error(log_probabilities: torch.Tensor, gold: int) -> torch.Tensor:
    """1 where another choice of an item is likelier than the right one, else 0; its mean is 1 - accuracy.

    `log_probabilities`: [plans, choices], in nats, summed over each choice's tokens; `gold`: the number of the right
    one. Returns [plans]. Of equal choices the first is the answer. Deviation: any items, whose choices may have many
    tokens; the paper asks MMLU, 5-shot, for one letter.

    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), zero-one loss.
    """
    return (log_probabilities.argmax(-1) != gold).to(log_probabilities.dtype)


def split_loss(spelled: str) -> tuple[str, str | None]:
    """(name, task file) of a loss as a recipe spells it: `kl`, or `task:FILE`.

    Raises UnknownName, or UsageError for a task loss without a file and for a file where none belongs.
    """
    name, _, file = spelled.partition(":")
    known = (*LOSSES, *ITEM_LOSSES)
    if name not in known:
        raise UnknownName("loss", name, known, " `billhook methods` describes them.")
    if name in tuple(ITEM_LOSSES) and not file:
        raise UsageError(f"--loss {name} needs a file of multiple-choice items. Type --loss {name}:FILE.jsonl")
    if name in tuple(LOSSES) and file:
        raise UsageError(f"--loss {name} takes no file. Type --loss {name}, or --loss task:{file}")
    return name, file or None
