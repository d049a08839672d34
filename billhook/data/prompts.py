"""Prompts for endpoints, from a file: lines of text, rows with `prompt` or `messages`, or the items of a task."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import DataError, UsageError, option
from billhook.core.plan_files import find_path
from billhook.core.results.json_form import JsonObject
from billhook.data.choice_tasks import Request, read_items, requests
from billhook.data.rows import file_text, is_text, json_lines, kind_of

PROMPT_EXAMPLES = (
    '{"prompt": "…"}, {"messages": [{"role": "user", "content": "…"}]} or {"query": "…", "choices": […], "gold": 0}'
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a text, or the messages of a chat. `number`: its line in the file, from 1.

    `choices`, `gold`: the scored choices of a task's item, and which of them is right.
    """

    number: int
    text: str = ""
    messages: tuple[JsonObject, ...] = ()
    choices: tuple[Request, ...] = ()
    gold: int = 0


def read_prompts(path: str | Path, kind: str = "chat", limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read the prompts of a file in order, or a sample of `limit` by `seed`.

    .txt: one per line; .jsonl: rows with `prompt` or `messages`, or a task's (`choice_tasks`); .gz of both. Raises
    DataError, with the line, for a malformed row, and UsageError for messages where `kind` is not chat.
    """
    file, suffix = find_path(path), kind_of(Path(path))
    if file is None or not file.is_file() or suffix not in (".txt", ".jsonl"):
        problem = "missing" if file is None else "a folder" if file.is_dir() else "not .txt or .jsonl"
        raise DataError(f"The file of prompts {path} is {problem}. Give a .txt, one prompt per line, or a .jsonl file.")
    prompts = _lines(file_text(file)) if suffix == ".txt" else _rows(file, str(path), kind)
    if not prompts:
        raise DataError(f"The file of prompts {path} is empty. Write one prompt per line.")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i] for i in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def _lines(text: str) -> list[Prompt]:
    return [Prompt(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _rows(file: Path, source: str, kind: str) -> list[Prompt]:
    rows = list(json_lines(file, source))
    if rows and isinstance(rows[0][1], dict) and "choices" in rows[0][1]:
        return _items(source)
    return [_parse_prompt(row, number, f"{source}, row {number},", kind) for number, row in rows]


def _parse_prompt(row: Any, number: int, where: str, kind: str) -> Prompt:
    text, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if not is_text(json.dumps(row, ensure_ascii=False)):
        raise DataError(f"{where} holds half of a surrogate pair, which is no character. Leave the row out.")
    if isinstance(text, str) and text.strip():
        return Prompt(number, text)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise DataError(f"{where} is not a prompt. A row is {PROMPT_EXAMPLES}.")
    if kind != "chat":
        raise UsageError(
            f"{where} holds messages, which only a chat takes. Use {option('kind', 'chat')}, or give `prompt`."
        )
    return Prompt(number, messages=tuple(messages))


def _items(source: str) -> list[Prompt]:
    """Read the items of a task: the query is the prompt, the choices after it are scored."""
    prompts = []
    for item in read_items(source):
        choices = tuple(requests(item))
        if not all(choice.context.strip() for choice in choices):
            raise DataError(f"{source}, row {item.number}, has no text before its choices. Leave the row out.")
        prompts.append(Prompt(item.number, choices[0].context, choices=choices, gold=item.gold))
    return prompts
