"""Tasks that a model answers by writing: read a file of questions with answers, and turn each into a prompt.

A file is .jsonl or .jsonl.gz, one question a line: `query`, `answer`, the way to the result as the examples before a
question show it, and `target`, the result alone. Other fields are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import DataError, nearest
from billhook.data.choice_tasks import FewShot
from billhook.data.texts import file_text, json_lines
from billhook.data.token_sets import TokenSet, special_prefix, token_set

QUESTION_EXAMPLE = '{"query": "…", "answer": "…", "target": "…"}'
QUESTION_FIELDS = ("query", "answer", "target")


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `number`: of its line in the file, from 1."""

    number: int
    query: str
    answer: str
    target: str


@dataclass(frozen=True)
class GenerationPrompts:
    """Questions as tokens, a row and a document each; the right `targets`; who turns tokens into text; how much room
    for an answer each row leaves."""

    tokens: TokenSet
    targets: tuple[str, ...]
    tokenizer: Any
    new_tokens: int

    @property
    def hash(self) -> str:
        """Of all that an outcome depends on, but the model."""
        told = json.dumps([self.tokens.hash, self.targets, self.new_tokens])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file. Raises DataError, with the line, for what is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "missing"
        raise DataError(
            f"The file of questions {path} is {kind}. Give a .jsonl or .jsonl.gz file of rows {QUESTION_EXAMPLE}."
        )
    found = []
    for number, row in json_lines(file_text(file), str(path)):
        where = f"{path}, row {number},"
        if not isinstance(row, dict):
            raise DataError(f"{where} is no object. A row is {QUESTION_EXAMPLE}.")
        for name in QUESTION_FIELDS:
            if name not in row:
                near = nearest(name, row)
                guess = f" Is it {near!r}?" if near else ""
                raise DataError(f"{where} has no field {name!r}.{guess} A row is {QUESTION_EXAMPLE}.")
            if not isinstance(row[name], str) or not row[name].strip():
                raise DataError(f"{where} has {row[name]!r} as its {name!r}. A row is {QUESTION_EXAMPLE}.")
        found.append(Question(number, *(row[name] for name in QUESTION_FIELDS)))
    if not found:
        raise DataError(
            f"The file of questions {path} is empty. Give a .jsonl or .jsonl.gz file of rows {QUESTION_EXAMPLE}."
        )
    return found


def is_generation_task(path: str | Path) -> bool:
    """Whether a file's first row is a question to be answered in writing: it has a target and no choices."""
    file = Path(path).expanduser()
    if not file.is_file():
        return False
    row = next((row for _, row in json_lines(file_text(file), str(path))), None)
    return isinstance(row, dict) and "target" in row and "choices" not in row


def build_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    limit_items: int | None = None,
    seed: int = 0,
    positions: int | None = None,
    new_tokens: int = 256,
    shots: FewShot | None = None,
) -> GenerationPrompts:
    """The questions of a file in a seeded order, the first `limit_items` of them.

    `shots`: a file of questions, and how many of them, the first ones, stand before each with their answers: query, one
    blank, answer, an empty line. A question that is shown so is not asked. `positions`: of the model; a prompt that
    leaves no room for `new_tokens` loses its beginning. Raises DataError.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no task can be read. Put its tokenizer files into its folder.")
    if positions is not None and positions <= new_tokens:
        raise DataError(f"The model has {positions} positions, and answers of {new_tokens} tokens leave no prompt.")
    questions, before = read_questions(path), ""
    if shots is not None:
        shown = _shown(*shots)
        before = "".join(f"{shot.query} {shot.answer}\n\n" for shot in shown)
        queries = {shot.query for shot in shown}
        questions = [question for question in questions if question.query not in queries]
        if not questions:
            raise DataError(f"All questions of {path} are among the {len(shown)} shots. Give shots from another file.")
    random.Random(seed).shuffle(questions)
    questions = questions[:limit_items]
    prefix, room = special_prefix(tokenizer), None if positions is None else positions - new_tokens
    encoded = tokenizer([before + q.query for q in questions], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [(*prefix, *ids)[-(room or len(prefix) + len(ids)) :] for ids in encoded]
    digests = [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows]
    tokens = token_set(rows, range(len(rows)), [q.number for q in questions], digests, str(path))
    return GenerationPrompts(tokens, tuple(q.target for q in questions), tokenizer, new_tokens)


def _shown(file: str | Path, count: int) -> Sequence[Question]:
    """The first questions of a file."""
    found = read_questions(file)
    if not 1 <= count <= len(found):
        raise DataError(f"{count} shots are wanted, and {file} has {len(found)} questions. Ask for 1 to {len(found)}.")
    return found[:count]
