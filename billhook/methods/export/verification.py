"""An export in the runtime that serves it, beside the student: next tokens of a text, a greedy answer, tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from billhook.core.errors import BillhookError, MissingExtra
from billhook.core.results.exports import Verification
from billhook.methods.export import Student
from billhook.runtimes import RUNTIMES, Served

# Strings in several scripts, with what tokenizers treat apart: digits, spaces, contractions, emoji, other alphabets.
PROBE_TEXTS = (
    "The quick brown fox doesn't jump over 1,234 lazy dogs.",
    "  two spaces,\n\n\tand a tab; x_1 = foo(bar)[0] ** 2",
    "Ein Käfer überquert die Straße – «où est-il ?», ¿dónde está?",
    "Быстрая лиса перепрыгнула через ленивую собаку",
    "敏捷的棕色狐狸跳过了懒狗。素早い茶色の狐がのろまな犬を飛び越える。",
    "سريع الثعلب البني يقفز فوق الكلب الكسول · שועל חום מהיר",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है 🦊🐕‍🦺",
)
GENERATED = 64  # tokens of the greedy answer
# Nats at any position, of an export that holds the student's weights to 10 bits of mantissa or more. Seen in llama.cpp,
# whose KV cache is float16: 0.0001 of a trained model; of tiny random ones 0.0003 in float32 and 0.005 in float16.
EXACT_KL = 2e-2


def verify(name: str, path: Path, student: Student, *, most_kl: float | None = EXACT_KL) -> Verification | None:
    """Compare an export with its student in the runtime `name`; None where that is not installed, or not wanted.

    Both read `student.tokens`; the student in float32, as it would be saved. `most_kl`: the largest divergence at a
    position that is let be, in nats; None for an export that is rounded, whose divergence is told and not judged.
    Raises RuntimeFailed where the runtime does not run it, BillhookError where it departs.
    """
    if not (student.verify and RUNTIMES[name].installed):
        return None
    rows = student.tokens[:1]
    ids: list[int] = rows[0].tolist()
    with torch.inference_mode():
        mine = student.model(input_ids=rows.to(student.model.device), use_cache=False).logits[0].float().cpu()
    mine = mine.double().log_softmax(-1)
    asked = min(8, len(ids))
    with Served(name, path, context=len(ids) + GENERATED) as served:
        theirs = torch.from_numpy(served.logprobs(ids))[:, : mine.shape[-1]]
        answer = served.generate(ids[:asked], GENERATED)
        texts = _require_same_tokens(served, student)
    gaps = (mine.exp() * (mine - theirs)).sum(-1)
    same = mine.argmax(-1) == theirs.argmax(-1)
    kl, worst, agreement = float(gaps.mean()), float(gaps.max()), float(same.float().mean())
    expected = _greedy(student, ids[:asked], GENERATED)
    alike = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=True)) if a != b), GENERATED)
    if most_kl is not None and not worst <= most_kl:
        at = int(gaps.argmax())
        raise BillhookError(
            f"{name} does not compute what the student does: after {at + 1} tokens of the probe text its next token "
            f"diverges by {worst:.3g} nats (allowed: {most_kl:g}); {agreement:.0%} of the most likely tokens agree. "
            "Nothing was kept."
        )
    return Verification(name, RUNTIMES[name].version, len(ids), kl, worst, agreement, alike, GENERATED, texts)


def require_runtime(name: str) -> None:
    """Raise MissingExtra where a runtime is not installed."""
    if not RUNTIMES[name].installed:
        raise MissingExtra(f"Verifying an export in {name}", RUNTIMES[name].extra)


def _require_same_tokens(served: Served, student: Student) -> int | None:
    """Return how many probe texts a runtime tokenises as the student's tokenizer does; raise where one differs.

    A text that begins with a space may differ if it does not without: SentencePiece puts another space before it, and
    transformers' Metaspace does not.
    """
    tokenizer = student.teacher.tokenizer
    if tokenizer is None:
        return None
    alike = 0
    for text in PROBE_TEXTS:
        theirs, mine = served.tokenize(text), tokenizer(text)["input_ids"]
        alike += theirs == mine
        bare = text.lstrip(" ")
        if theirs != mine and (bare == text or served.tokenize(bare) != tokenizer(bare)["input_ids"]):
            at = next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), len(mine))
            raise BillhookError(
                f"{served.name} splits {text!r} into other tokens than the student's tokenizer: from token {at} on "
                f"{theirs[at : at + 4]} instead of {mine[at : at + 4]}. Nothing was kept."
            )
    return alike


@torch.inference_mode()
def _greedy(student: Student, ids: list[int], count: int) -> list[int]:
    """Return the tokens that greedy decoding of the student appends."""
    made = list(ids)
    for _ in range(count):
        rows = torch.tensor([made], device=student.model.device)
        made.append(int(student.model(input_ids=rows, use_cache=False).logits[0, -1].argmax()))
    return made[len(ids) :]
