"""Which rows of a vocabulary are kept: those that a text needs most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from billhook.core.budget import Budget, rows_of
from billhook.core.errors import ModelError, ResourceError
from billhook.core.events import EventListener
from billhook.data.calibration import calibration_tokens, require_disjoint, row_length
from billhook.data.texts import TextSpec
from billhook.data.token_sets import DOCUMENT_TOKENS, TokenSet
from billhook.models.load import Teacher, student_as_teacher
from billhook.models.vocabulary.choice import beyond, tokens_to_keep
from billhook.models.vocabulary.entries import Vocabulary, read_vocabulary
from billhook.models.vocabulary.student import cut_model, new_numbers
from billhook.runs.recipe import Recipe, TextOptions
from billhook.runs.vocabulary.measuring import tokens_before

COUNTED = 1 << 22  # tokens of a text


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows that are kept, and what they were chosen by.

    Fields:
        rows: of the embedding before.
        numbers: {old id: new id}.
        fixed: rows that stay whatever is removed.
        counted, used: tokens of the text, and how many of them are different.
        source: of the text.
        digests: of its documents.
    """

    rows: int
    numbers: Mapping[int, int]
    fixed: int
    counted: int
    used: int
    source: str
    digests: tuple[str, ...] = ()


def readable_vocabulary(teacher: Teacher) -> Vocabulary:
    """Read a vocabulary that can be cut here. Raises ResourceError for a streamed model, ModelError for a tokenizer."""
    if teacher.weights is not None:
        raise ResourceError(f"{teacher.name} is larger than the memory that is free, so it cannot be cut here.")
    vocabulary = read_vocabulary(teacher)
    tokens_before(teacher.tokenizer)
    return vocabulary


def counted_text(
    source: str, options: TextOptions, tokens: int, teacher: Teacher, watch: EventListener, *, held_out: str | None
) -> TokenSet:
    """Read at most `tokens` of a text, from the half of it that is not `held_out`. Raises DataError."""
    length = row_length(DOCUMENT_TOKENS, teacher.model.config)
    spec = TextSpec(source, options.field, tokens, length, options.seed)
    return calibration_tokens(spec, teacher.model, teacher.tokenizer, watch, held_out=held_out, least=1)


def choose_rows(vocabulary: Vocabulary, counted: TokenSet, count: int | None, *held_out: TokenSet) -> Cut:
    """Choose the rows to keep where `count` go, or all that the text does not use.

    Raises BudgetError where fewer can go, DataError where the text is held out.
    """
    for each in held_out:
        require_disjoint(counted, each)
    uses: Counter[int] = Counter()
    for row, length in zip(counted.rows, counted.lengths, strict=True):
        uses.update(row[:length].tolist())
    numbers = new_numbers(vocabulary, tokens_to_keep(vocabulary, uses, count))
    return Cut(vocabulary.rows, numbers, len(vocabulary.kept), uses.total(), len(uses), counted.source, counted.digests)


def of_that_size(recipe: Recipe, given: Teacher) -> tuple[Teacher, Vocabulary | None]:
    """Return a model of the size that a budget of the vocabulary leaves, for checks before any text is read.

    The model as it is where a recipe has no such budget. Raises as `readable_vocabulary`, and BudgetError where less
    can be removed.
    """
    if recipe.vocabulary is None:
        return given, None
    vocabulary = readable_vocabulary(given)
    count = rows_of(recipe.vocabulary, vocabulary.rows)
    if count > len(vocabulary.parts):
        raise beyond(vocabulary, count, len(vocabulary.parts))
    some = {index: index for index in range(vocabulary.rows - count)}
    return student_as_teacher(given, cut_model(given, some)), vocabulary


def share_of_rows(recipe: Recipe, teacher: Teacher, budget: Budget) -> float | None:
    """Return which percentage of a vocabulary holds as much as a budget in parameters or bytes asks for, rounded up.

    At most what can be removed. None for other budgets, and where it cannot be cut, or is cut by the recipe already.
    """
    if budget.unit not in ("params", "bytes") or recipe.vocabulary is not None:
        return None
    try:
        vocabulary = readable_vocabulary(teacher)
    except (ModelError, ResourceError):
        return None
    embedding, head = teacher.model.get_input_embeddings(), teacher.model.get_output_embeddings()
    per_row = sum(each.numel() // len(each) for each in {embedding.weight, head.weight})
    each = per_row * (teacher.dtype.itemsize if budget.unit == "bytes" else 1)
    wanted = math.ceil(100 * budget.target(teacher.anatomy) / each / vocabulary.rows)
    most = 100 * len(vocabulary.parts) // vocabulary.rows
    return float(min(wanted, most)) if most else None
