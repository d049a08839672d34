"""Multiple-choice tasks: read a file of items, turn each choice into a request, and requests into a token set.

A file is .jsonl or .jsonl.gz, one item per line: `query`, `choices`, and `gold`, the number of the right choice from 0.
Where a choice fills a gap (WinoGrande), `contexts` holds one text per choice and `continuation` the text after all of
them. `subject` puts MMLU's sentence before the query. Other fields are ignored. Shots, solved items before the query,
come from a file of the same format.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from billhook.core.errors import DataError, nearest
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan_files import find_path
from billhook.core.results.json_form import JsonObject
from billhook.data.rows import UnusableRow, is_text, json_lines, leave_out
from billhook.data.token_sets import Choices, TokenSet, special_prefix, token_set, without_layout
from billhook.models.load import Teacher

SUBJECT = "The following are multiple choice questions (with answers) about {}.\n\n"
ITEM_EXAMPLE = '{"query": "…", "choices": ["…", "…"], "gold": 0}'
ITEM_FIELDS = {"query": str, "choices": list, "gold": int}
Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `number`: its line in the file, from 1; `gold`: the right choice, from 0."""

    number: int
    query: str
    choices: tuple[str, ...]
    gold: int
    contexts: tuple[str, ...] = ()  # instead of the query, one per choice
    continuation: str = ""  # instead of the choices, with contexts
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to score after a context. `characters`: of the choice, without the blank before it."""

    context: str
    continuation: str
    characters: int


# -- items ----------------------------------------------------------------------------------------------------------


def read_items(path: str | Path, watch: EventListener = ignore_events) -> list[Item]:
    """Read the items of a task file. Raises DataError, with the line, for a malformed one."""
    file = find_path(path)
    if file is None or not file.is_file():
        kind = "missing" if file is None else "a folder" if file.is_dir() else "not a regular file"
        raise DataError(f"The task file {path} is {kind}. Give a .jsonl or .jsonl.gz file of rows {ITEM_EXAMPLE}.")
    items: list[Item] = []
    unusable: list[str] = []
    for number, row in json_lines(file, str(path)):
        try:
            items.append(_item(row, number, f"{path}, row {number},"))
        except UnusableRow as error:
            unusable.append(error.message)
    leave_out(unusable, len(items) + len(unusable), str(path), watch)
    if not items:
        raise DataError(f"The task file {path} is empty. Give a .jsonl or .jsonl.gz file of rows {ITEM_EXAMPLE}.")
    return items


def _item(row: Any, number: int, where: str) -> Item:
    """Check one row, and return its item. `where`: the beginning of error messages."""
    check_fields(row, ITEM_FIELDS, where, ITEM_EXAMPLE)
    choices, gold = _texts(row, "choices", where), row["gold"]
    if len(choices) < 2:
        raise DataError(f"{where} has {len(choices)} choices. Give at least 2.")
    if not 0 <= gold < len(choices):
        last = len(choices) - 1
        raise DataError(f"{where} has gold {gold}, and {len(choices)} choices. gold counts from 0: give 0 to {last}.")
    contexts, subject = _texts(row, "contexts", where), row.get("subject", "")
    continuation = row.get("continuation", "")
    if bool(contexts) != bool(continuation):
        raise DataError(f"{where} has only one of 'contexts' and 'continuation'. Give both, or neither.")
    if contexts and len(contexts) != len(choices):
        raise DataError(f"{where} has {len(contexts)} contexts for {len(choices)} choices. Give one per choice.")
    for name, text in (("continuation", continuation), ("subject", subject)):
        if not isinstance(text, str):
            raise DataError(f"{where} has {text!r} as its {name!r}. Give a text, or leave it out.")
    require_text((row["query"], *choices, *contexts, continuation, subject), where)
    return Item(number, row["query"], choices, gold, contexts, continuation, subject)


def require_text(texts: Iterable[str], where: str) -> None:
    """Raise UnusableRow if one of the texts of a row cannot be written as UTF-8."""
    if not all(map(is_text, texts)):
        raise UnusableRow(f"{where} holds half of a surrogate pair, which is no character. Leave the row out.")


def check_fields(row: Any, fields: Mapping[str, type], where: str, example: str) -> None:
    """Raise DataError unless `row` is an object with these `fields`, each of its type."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object. A row is {example}.")
    for name, kind in fields.items():
        if name not in row:
            near = nearest(name, row)
            guess = f" Is it {near!r}?" if near else ""
            raise DataError(f"{where} has no field {name!r}.{guess} A row is {example}.")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise DataError(f"{where} has {row[name]!r} as its {name!r}. A row is {example}.")


def _texts(row: JsonObject, name: str, where: str) -> tuple[str, ...]:
    """Return the texts under `name`. Raises DataError if one is blank."""
    texts = row.get(name) or []
    bad = texts if not isinstance(texts, list) else [x for x in texts if not isinstance(x, str) or not x.strip()]
    if bad:
        raise DataError(f"{where} has {bad!r} in its {name!r}. Give a list of texts that are not blank.")
    return tuple(texts)


# -- requests -------------------------------------------------------------------------------------------------------


def requests(item: Item, solved: str = "") -> list[Request]:
    """Return one request per choice: the choice after the query, or the continuation after its context.

    One blank separates them. Before the context come the subject's sentence and the `solved` items.
    """
    before = (SUBJECT.format(item.subject.replace("_", " ")) if item.subject else "") + solved
    if item.contexts:
        pairs = [(context, item.continuation) for context in item.contexts]
    else:
        pairs = [(item.query, choice) for choice in item.choices]
    return [Request(before + context, " " + text, len(text)) for context, text in pairs]


FewShot = tuple[str | Path, int]  # a task file, and how many of its items to show before each query


def few_shot_texts(items: Sequence[Item], subjects: Iterable[str], count: int, source: str) -> dict[str, str]:
    """Return {subject: text of the first `count` items of that subject, solved}; without subjects the key is "".

    A solved item is the right request's context and continuation, then an empty line. Raises DataError for too few
    items.
    """
    texts = {}
    for subject in dict.fromkeys(subjects):
        shots = [item for item in items if item.subject == subject][:count]
        if count < 1 or len(shots) < count:
            kind = f" of the subject {subject!r}" if subject else " without a subject"
            fewer = f"Ask for 1 to {len(shots)}." if shots else "Give shots from another file."
            raise DataError(f"{count} shots are wanted, and {source} has {len(shots)} items{kind}. {fewer}")
        right = [requests(replace(item, subject=""))[item.gold] for item in shots]
        texts[subject] = "".join(f"{request.context}{request.continuation}\n\n" for request in right)
    return texts


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of a request; the continuation's begin at `first`."""

    ids: tuple[int, ...]
    first: int
    characters: int


def encode_items(items: Iterable[tuple[Item, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Return the tokens of all texts of items, each with what is solved before it, for `item_rows`."""
    asked = [request for item, solved in items for request in requests(item, solved)]
    texts = {request.context + request.continuation for request in asked}
    ordered = sorted(texts | {request.context.rstrip() for request in asked} - {""})
    return dict(zip(ordered, tokenizer(ordered, add_special_tokens=False, verbose=False)["input_ids"], strict=True))


def item_rows(
    item: Item, solved: str, encoded: Mapping[str, Sequence[int]], tokenizer: Any, prefix: Sequence[int], *,
    positions: int | None, source: str,
) -> list[Row]:  # fmt: skip
    """Return a row for each choice: context and continuation as one text, of which the context's tokens are the first.

    `encoded`: by `encode_items`. Blanks at the end of a context belong to the continuation. A row begins with
    `prefix`, the tokenizer's special tokens, or without any and without a context with BOS or EOS. A row longer than
    `positions` loses its first tokens.
    """
    rows = []
    for choice, request in enumerate(requests(item, solved)):
        where, head = f"{source}, row {item.number}, choice {choice},", request.context.rstrip()
        length = len(encoded[head]) if head else 0
        start = list(prefix) if prefix or length else [_start(tokenizer, where)]
        row, first = (*start, *encoded[request.context + request.continuation]), len(start) + length
        if first >= len(row):
            raise DataError(f"{where} has no token of its own with this tokenizer. Leave the row out.")
        over = max(0, len(row) - (positions or len(row)))
        if first <= over:
            raise DataError(
                f"{where} has {len(row) - first} tokens, and the model {positions} positions. Leave the row out."
            )
        rows.append(Row(row[over:], first - over, request.characters))
    return rows


def _start(tokenizer: Any, where: str) -> int:
    """Return the token that marks the beginning of a text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(f"{where} has no context, and the tokenizer neither a BOS nor an EOS token. Leave the row out.")


# -- token sets -----------------------------------------------------------------------------------------------------


def load_items(
    path: str | Path, teacher: Teacher, part: Split | None, *,
    items: int | None = None, tokens: int | None = None, seed: int = 0, shots: FewShot | None = None,
    watch: EventListener = ignore_events,
) -> TokenSet:  # fmt: skip
    """Return `task_tokens` with the tokenizer and the positions of `teacher`; at most `items`, or `tokens`."""
    positions = getattr(teacher.model.config, "max_position_embeddings", None)
    return task_tokens(
        path, teacher.tokenizer, positions=positions, part=part,
        limit_items=items, limit_tokens=tokens, seed=seed, shots=shots, watch=watch,
    )  # fmt: skip


def task_tokens(
    path: str | Path, tokenizer: Any, *,
    limit_tokens: int | None = None, limit_items: int | None = None, seed: int = 0, positions: int | None = None,
    part: Split | None = None, shots: FewShot | None = None, watch: EventListener = ignore_events,
) -> TokenSet:  # fmt: skip
    """Return the items of a task file as a token set: a row per choice, a document per item.

    Each is a text of its own; copies, which differ in whitespace at most, are one.

    - `limit_items`, `limit_tokens`: how many to take, in the order of `seed`.
    - `positions`: of the model.
    - `part`: half of the items is for calibration, half for evaluation, whatever the seed and the limits. Copies of
      calibration items are left out of evaluation.
    - `shots`: a task file, and how many of its first items of the same subject to show solved before each query. Copies
      of shots are left out.

    Raises DataError.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no task can be read. Put its tokenizer files into its folder.")
    items, texts, solved = select_items(path, part=part, seed=seed, shots=shots, watch=watch)
    prefix = special_prefix(tokenizer)
    taken: list[tuple[Item, list[Row]]] = []
    total = 0
    for item in items[:limit_items]:
        if limit_tokens is not None and total >= limit_tokens:
            break
        before = solved.get(item.subject, "")
        encoded = encode_items([(item, before)], tokenizer)
        rows = item_rows(item, before, encoded, tokenizer, prefix, positions=positions, source=str(path))
        taken.append((item, rows))
        total += sum(len(row.ids) for row in rows)
    return choice_tokens(taken, texts[: len(taken)], str(path))


def choice_tokens(items: Sequence[tuple[Item, Sequence[Row]]], texts: Sequence[int], source: str) -> TokenSet:
    """Return items with their rows as a token set, a document each; `texts`: the text that each comes from."""
    rows = [row for _, of_item in items for row in of_item]
    documents = [d for d, (_, of_item) in enumerate(items) for _ in of_item]
    digests = [hashlib.sha256(repr([row.ids for row in each]).encode()).hexdigest()[:16] for _, each in items]
    first, characters = tuple(row.first for row in rows), tuple(row.characters for row in rows)
    choices = Choices(first, characters, *zip(*((item.gold, item.number) for item, _ in items), strict=True))
    return token_set([row.ids for row in rows], documents, texts, digests, source, choices=choices)


def select_items(
    path: str | Path, *, part: Split | None, seed: int = 0, shots: FewShot | None = None,
    watch: EventListener = ignore_events,
) -> tuple[list[Item], list[int], dict[str, str]]:  # fmt: skip
    """Return items of a task in the order of `seed`, the line of the first copy of each, and solved text by subject.

    `part`, `shots`: as for `task_tokens`. Raises DataError.
    """
    items = read_items(path, watch)
    first_copies: dict[tuple[str, ...], int] = {}
    for item in items:
        first_copies.setdefault(_text_of(item), item.number)
    random.Random(0).shuffle(items)  # the parts do not depend on the seed
    items = items if part is None else _part(items, part, str(path))
    random.Random(seed).shuffle(items)
    items, solved = (items, {}) if shots is None else _with_shots(items, shots, str(path))
    return items, [first_copies[_text_of(item)] for item in items], solved


def _text_of(item: Item) -> tuple[str, ...]:
    """What copies of an item have in common: the text of its requests, whitespace aside."""
    return tuple(without_layout(request.context + request.continuation) for request in requests(item))


def _with_shots(items: list[Item], shots: FewShot, source: str) -> tuple[list[Item], dict[str, str]]:
    """Return the items that are not among the shots, and the text of the shots of each subject."""
    file, count = shots
    pool = read_items(file)
    solved = few_shot_texts(pool, [item.subject for item in items], count, str(file))
    shown = {_text_of(shot) for s in solved for shot in [item for item in pool if item.subject == s][:count]}
    rest = [item for item in items if _text_of(item) not in shown]
    if not rest:
        raise DataError(f"All items of {source} are among its own {count} shots. Give shots from another file.")
    return rest, solved


def _part(items: list[Item], part: Split, source: str) -> list[Item]:
    """Return every second item for calibration, or the others without copies of these for evaluation."""
    calibration = items[::2]
    seen = {_text_of(item) for item in calibration}
    evaluation = [item for item in items[1::2] if _text_of(item) not in seen]
    if not evaluation:
        raise DataError(f"{source} has too few items to keep some for evaluation. Give at least 2 different items.")
    return calibration if part == "calibration" else evaluation
