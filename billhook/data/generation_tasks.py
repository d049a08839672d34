"""Generation tasks: read a file of questions with answers, and turn each into a prompt.

A file is .jsonl or .jsonl.gz, one question per line: `query`, `answer`, the full answer as few-shot examples show it,
and `target`, the result alone. Other fields are ignored.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import DataError
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan_files import find_path
from billhook.data.choice_tasks import FewShot, check_fields, require_text
from billhook.data.rows import UnusableRow, json_lines, leave_out
from billhook.data.token_sets import TokenSet, special_prefix, token_set, without_layout

QUESTION_EXAMPLE = '{"query": "…", "answer": "…", "target": "…"}'
QUESTION_FIELDS = {"query": str, "answer": str, "target": str}


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `number`: its line in the file, from 1."""

    number: int
    query: str
    answer: str
    target: str


@dataclass(frozen=True)
class GenerationPrompts:
    """Questions as tokens, a row and a document each, with the right `targets`; answers have at most `new_tokens`.

    `numbers`: the line of each in the file, from 1. Copies of a question are one text.
    """

    tokens: TokenSet
    targets: tuple[str, ...]
    tokenizer: Any
    new_tokens: int
    numbers: tuple[int, ...]

    @property
    def hash(self) -> str:
        """A digest of all that an outcome depends on, except the model."""
        content = json.dumps([self.tokens.hash, self.targets, self.new_tokens])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_questions(path: str | Path, watch: EventListener = ignore_events) -> list[Question]:
    """Read the questions of a file. Raises DataError, with the line, for a malformed one."""
    file = find_path(path)
    if file is None or not file.is_file():
        kind = "missing" if file is None else "a folder" if file.is_dir() else "not a regular file"
        raise DataError(
            f"The file of questions {path} is {kind}. Give a .jsonl or .jsonl.gz file of rows {QUESTION_EXAMPLE}."
        )
    questions: list[Question] = []
    unusable: list[str] = []
    for number, row in json_lines(file, str(path)):
        try:
            questions.append(_question(row, number, f"{path}, row {number},"))
        except UnusableRow as error:
            unusable.append(error.message)
    leave_out(unusable, len(questions) + len(unusable), str(path), watch)
    if not questions:
        raise DataError(
            f"The file of questions {path} is empty. Give a .jsonl or .jsonl.gz file of rows {QUESTION_EXAMPLE}."
        )
    return questions


def _question(row: Any, number: int, where: str) -> Question:
    """Check one row, and return its question. `where`: the beginning of error messages."""
    check_fields(row, QUESTION_FIELDS, where, QUESTION_EXAMPLE)
    blank = next((name for name in QUESTION_FIELDS if not row[name].strip()), None)
    if blank:
        raise DataError(f"{where} has {row[blank]!r} as its {blank!r}. A row is {QUESTION_EXAMPLE}.")
    texts = [row[name] for name in QUESTION_FIELDS]
    require_text(texts, where)
    return Question(number, *texts)


def is_generation_task(path: str | Path) -> bool:
    """Return whether a file's first row has a target and no choices."""
    file = find_path(path)
    if file is None or not file.is_file():
        return False
    row = next((row for _, row in json_lines(file, str(path))), None)
    return isinstance(row, dict) and "target" in row and "choices" not in row


def build_prompts(
    path: str | Path, tokenizer: Any, *,
    limit_items: int | None = None, seed: int = 0, positions: int | None = None, new_tokens: int = 256,
    shots: FewShot | None = None, watch: EventListener = ignore_events,
) -> GenerationPrompts:  # fmt: skip
    """Return the prompts of the first `limit_items` questions of a file, in the order of `seed`.

    `shots`: a file of questions, and how many of its first ones to show before each prompt: query, one blank, answer,
    an empty line. These are left out of the prompts. `positions`: of the model; a prompt that leaves no room for
    `new_tokens` loses its first tokens. Raises DataError.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no task can be read. Put its tokenizer files into its folder.")
    if positions is not None and positions <= new_tokens:
        raise DataError(
            f"The model has {positions} positions, and answers of {new_tokens} tokens leave no room for a prompt. Give "
            f"new_tokens below {positions}."
        )
    questions, texts, before = select_questions(path, limit_items=limit_items, seed=seed, shots=shots, watch=watch)
    prefix, room = special_prefix(tokenizer), None if positions is None else positions - new_tokens
    encoded = tokenizer([before + q.query for q in questions], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [(*prefix, *ids)[-(room or len(prefix) + len(ids)) :] for ids in encoded]
    digests = [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows]
    numbers = tuple(q.number for q in questions)
    tokens = token_set(rows, range(len(rows)), texts, digests, str(path))
    return GenerationPrompts(tokens, tuple(q.target for q in questions), tokenizer, new_tokens, numbers)


def select_questions(
    path: str | Path, *, limit_items: int | None = None, seed: int = 0, shots: FewShot | None = None,
    watch: EventListener = ignore_events,
) -> tuple[list[Question], list[int], str]:  # fmt: skip
    """Return the first `limit_items` questions in the order of `seed`, the lines of their first copies, and the shots.

    `shots`: as for `build_prompts`; they are one text. Raises DataError.
    """
    questions, before = read_questions(path, watch), ""
    first_copies: dict[str, int] = {}
    for question in questions:
        first_copies.setdefault(without_layout(question.query), question.number)
    if shots is not None:
        shown = _first_questions(*shots)
        before = "".join(f"{shot.query} {shot.answer}\n\n" for shot in shown)
        queries = {without_layout(shot.query) for shot in shown}
        questions = [question for question in questions if without_layout(question.query) not in queries]
        if not questions:
            raise DataError(f"All questions of {path} are among the {len(shown)} shots. Give shots from another file.")
    random.Random(seed).shuffle(questions)
    questions = questions[:limit_items]
    return questions, [first_copies[without_layout(q.query)] for q in questions], before


def _first_questions(file: str | Path, count: int) -> Sequence[Question]:
    questions = read_questions(file)
    most = len(questions)
    if not 1 <= count <= most:
        raise DataError(f"{count} shots are wanted, and {file} has {most} questions. Ask for 1 to {most}.")
    return questions[:count]
