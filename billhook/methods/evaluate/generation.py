"""Generation tasks: how often the number that a model writes is right, item by item."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import EvalResult
from billhook.data.generated import generating_by
from billhook.data.generation_tasks import GenerationPrompts
from billhook.methods.evaluate import evaluation
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.structure import rope_boundary

STOPS = ("Question:", "</s>", "<|im_end|>")  # the harness's for GSM8K, besides the tokenizer's EOS
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@evaluation
def strict_match(
    model: Any, tokens: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = ""
) -> EvalResult:
    """Score 1 where the number after the first `#### ` of a greedy answer is right, as GSM8K's answers end.

    Prompts: `billhook.data.generation_tasks`. For `flexible_match` too, call `generate_answers` and `score_answers`.

    Source: Cobbe et al. 2021, Training verifiers to solve math word problems (arXiv 2110.14168); Gao et al.,
    lm-evaluation-harness 0.4, gsm8k, strict-match.
    """
    return score_answers(tokens, generate_answers(model, tokens, watch=watch, who=who))["strict_match"]


@evaluation
def flexible_match(
    model: Any, tokens: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = ""
) -> EvalResult:
    """Score 1 where the last number of a greedy answer is right.

    Source: Gao et al., lm-evaluation-harness 0.4, gsm8k, flexible-extract.
    """
    return score_answers(tokens, generate_answers(model, tokens, watch=watch, who=who))["flexible_match"]


def score_answers(prompts: GenerationPrompts, answers: Sequence[str]) -> dict[str, EvalResult]:
    """Score answers by `strict_match` and `flexible_match`, 1 or 0 per question."""
    results = {}
    for name, number in (("strict_match", strict_number), ("flexible_match", flexible_number)):
        pairs = zip(answers, prompts.targets, strict=True)
        right = tuple(float(number(answer) == plain_number(target)) for answer, target in pairs)
        results[name] = EvalResult(name, prompts.hash, right, (1,) * len(right), prompts.tokens.clusters)
    return results


def strict_number(answer: str) -> str | None:
    """Return the number after the first `#### `, in plain form; None without one."""
    match = STRICT.search(answer)
    return plain_number(match[1]) if match else None


def flexible_number(answer: str) -> str | None:
    """Return the last number, in plain form; None without one."""
    matches = FLEXIBLE.findall(answer)
    return plain_number(matches[-1]) if matches else None


def plain_number(text: str) -> str:
    """Return a number without commas, dollars, a final full stop, and anything before the last `#### `."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return text.removesuffix(".").lower()


@torch.inference_mode()
def generate_answers(
    model: Any, prompts: GenerationPrompts, *, watch: EventListener = ignore_events, who: str = "",
    stops: Sequence[str] = STOPS, batch_positions: int | None = None,
) -> list[str]:  # fmt: skip
    """Return the model's greedy answer to each prompt, up to the first of `stops` or `new_tokens`.

    Prompts of similar length are padded on the left and answered together with a KV cache, at most `batch_positions`
    tokens at a time, with their complete answers and padding (None: as many as the device takes).
    """
    tokens, tokenizer = prompts.tokens, prompts.tokenizer
    end = tokenizer.eos_token_id
    fill = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)
    plain = GenerationConfig(max_new_tokens=prompts.new_tokens, do_sample=False, eos_token_id=end, pad_token_id=fill)
    answers, done = [""] * len(tokens.lengths), 0
    most = batch_positions or work_sizes(torch.device(model.device)).answer_positions
    for rows in _batches(tokens.lengths, prompts.new_tokens, most, rope_boundary(model.config)):
        longest = max(tokens.lengths[row] for row in rows)
        ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            length = tokens.lengths[row]
            ids[i, longest - length :] = tokens.rows[row, :length]
            mask[i, longest - length :] = 1
        with generating_by(model, plain):
            outputs = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                stopping_criteria=StoppingCriteriaList([_stopped(tokenizer, longest, stops)]),
            )  # fmt: skip
        for row, new in zip(rows, outputs[:, longest:].tolist(), strict=True):
            answer = new[: new.index(end)] if end in new else new
            answers[row] = truncate_at_stop(tokenizer.decode(answer, skip_special_tokens=False), stops)
        done += len(rows)
        watch(Event("evaluate", done, len(answers), {"of": who}))
    return answers


def truncate_at_stop(text: str, stops: Sequence[str] = STOPS) -> str:
    """Return a text up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _batches(
    lengths: Sequence[int], new_tokens: int, positions: int, boundary: int | None = None
) -> Iterator[list[int]]:
    """Yield row numbers, the longest rows first, with at most `positions` tokens per batch.

    Rows whose answers may reach beyond `boundary` are only with rows as long as they.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while order:
        count = max(1, positions // (lengths[order[0]] + new_tokens))
        if boundary is not None and lengths[order[0]] + new_tokens > boundary:
            count = min(count, sum(lengths[row] == lengths[order[0]] for row in order))
        yield order[:count]
        order = order[count:]


def _stopped(tokenizer: Any, start: int, stops: Sequence[str]) -> Callable[..., torch.Tensor]:
    """Return the criterion of which lines just wrote a stop: [lines, time] -> [lines]; answers begin at `start`."""
    longest = max(map(len, stops))  # a token has at least one character, so a stop has no more tokens

    def done(ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - longest) :], skip_special_tokens=False)
        return torch.tensor([any(stop in text for stop in stops) for text in texts], device=ids.device)

    return done
