"""Tasks that a model answers by writing: how often the number that it writes is the right one, item by item."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import EvalResult
from billhook.data.generation_tasks import GenerationPrompts
from billhook.methods.evaluate import evaluation

STOPS = ("Question:", "</s>", "<|im_end|>")  # those of the harness for GSM8K; besides, the tokenizer's EOS
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
GENERATION_BATCH_POSITIONS = 4096  # tokens of one batch at the end of its answers, padding too


@evaluation
def strict_match(
    model: Any, tokens: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = ""
) -> EvalResult:
    """Exact match of the number behind the first `#### ` of an answer, as GSM8K's own answers end: 1 where it is right.

    Greedy; prompts are those of `billhook.data.generation_tasks`. Where `flexible_match` is wanted too:
    `generate_answers` and `score_answers`.

    Source: Cobbe et al. 2021, Training verifiers to solve math word problems (arXiv 2110.14168); Gao et al.,
    lm-evaluation-harness 0.4, gsm8k, strict-match.
    """
    return score_answers(tokens, generate_answers(model, tokens, watch=watch, who=who))["strict_match"]


@evaluation
def flexible_match(
    model: Any, tokens: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = ""
) -> EvalResult:
    """Exact match of the last number of an answer, wherever it stands: 1 where it is the right one.

    Source: Gao et al., lm-evaluation-harness 0.4, gsm8k, flexible-extract.
    """
    return score_answers(tokens, generate_answers(model, tokens, watch=watch, who=who))["flexible_match"]


def score_answers(prompts: GenerationPrompts, answers: Sequence[str]) -> dict[str, EvalResult]:
    """`strict_match` and `flexible_match`, 1 or 0 a question, of what a model wrote."""
    told = {}
    for name, number in (("strict_match", strict_number), ("flexible_match", flexible_number)):
        pairs = zip(answers, prompts.targets, strict=True)
        right = tuple(float(number(answer) == plain_number(target)) for answer, target in pairs)
        told[name] = EvalResult(name, prompts.hash, right, (1,) * len(right), prompts.tokens.clusters)
    return told


def strict_number(answer: str) -> str | None:
    """The number behind the first `#### `, plainly written; None without one."""
    found = STRICT.search(answer)
    return plain_number(found[1]) if found else None


def flexible_number(answer: str) -> str | None:
    """The last thing that looks like a number, plainly written; None without one."""
    found = FLEXIBLE.findall(answer)
    return plain_number(found[-1]) if found else None


def plain_number(text: str) -> str:
    """Without commas, dollars, a full stop at the end, and what stands before the last `#### `."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return text.removesuffix(".").lower()


@torch.inference_mode()
def generate_answers(
    model: Any, prompts: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = ""
) -> list[str]:
    """What the model writes to every prompt, greedily, up to the first of STOPS or `new_tokens`.

    Prompts of similar length are padded on the left and answered together, with a KV cache.
    """
    tokens, tokenizer = prompts.tokens, prompts.tokenizer
    end = tokenizer.eos_token_id
    fill = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    answers, done = [""] * len(tokens.lengths), 0
    for rows in _batches(tokens.lengths, prompts.new_tokens):
        longest = max(tokens.lengths[row] for row in rows)
        ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            length = tokens.lengths[row]
            ids[i, longest - length :] = tokens.rows[row, :length]
            mask[i, longest - length :] = 1
        found = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=prompts.new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=fill,
            stopping_criteria=StoppingCriteriaList([_stopped(tokenizer, longest)]),
        )
        for row, new in zip(rows, found[:, longest:].tolist(), strict=True):
            own = new[: new.index(end)] if end in new else new
            answers[row] = truncate_at_stop(tokenizer.decode(own, skip_special_tokens=False))
        done += len(rows)
        watch(Event("evaluate", done, len(answers), {"of": who}))
    return answers


def truncate_at_stop(text: str) -> str:
    """A text up to the first of STOPS."""
    for stop in STOPS:
        text = text.partition(stop)[0]
    return text


def _batches(lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
    """Row numbers, the longest first, as many together as keep to BATCH_POSITIONS."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while order:
        count = max(1, GENERATION_BATCH_POSITIONS // (lengths[order[0]] + new_tokens))
        yield order[:count]
        order = order[count:]


def _stopped(tokenizer: Any, start: int) -> Callable[..., torch.Tensor]:
    """Which lines have just written one of STOPS: [lines, time] -> [lines]; what they write begins at `start`."""
    most = max(map(len, STOPS))  # a token has a character at least, so that a stop has no more tokens

    def done(ids: torch.Tensor, *of: Any, **options: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - most) :], skip_special_tokens=False)
        return torch.tensor([any(stop in text for stop in STOPS) for text in texts], device=ids.device)

    return done
