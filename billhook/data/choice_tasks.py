"""Multiple-choice tasks: read a file of items, turn each choice into a request, and requests into a token set.

A file is .jsonl or .jsonl.gz, one item a line: `query`, `choices`, and `gold`, the number of the right choice from 0.
Where a choice fills a gap (WinoGrande), `contexts` holds one text a choice and `continuation` what follows all of
them. `subject` puts MMLU's sentence before the query. Other fields are not looked at. Shots, solved items that stand
before the query, come from a file of the same kind.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from billhook.core.errors import DataError, nearest
from billhook.data.texts import file_text, json_lines
from billhook.data.token_sets import Choices, TokenSet, special_prefix, token_set
from billhook.models.load import Teacher

SUBJECT = "The following are multiple choice questions (with answers) about {}.\n\n"
ITEM_EXAMPLE = '{"query": "…", "choices": ["…", "…"], "gold": 0}'
ITEM_FIELDS = {"query": str, "choices": list, "gold": int}
Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `number`: of its line in the file, from 1; `gold`: which choice is right, from 0."""

    number: int
    query: str
    choices: tuple[str, ...]
    gold: int
    contexts: tuple[str, ...] = ()  # in the place of the query, one a choice
    continuation: str = ""  # in the place of the choices, where there are contexts
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """How likely is `continuation` after `context`? `characters`: of the choice, without the blank before it."""

    context: str
    continuation: str
    characters: int


# -- items ----------------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[Item]:
    """The items of a task file. Raises DataError, with the line, for what is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "missing"
        raise DataError(f"The task file {path} is {kind}. Give a .jsonl or .jsonl.gz file of rows {ITEM_EXAMPLE}.")
    items = [_item(row, number, f"{path}, row {number},") for number, row in json_lines(file_text(file), str(path))]
    if not items:
        raise DataError(f"The task file {path} is empty. Give a .jsonl or .jsonl.gz file of rows {ITEM_EXAMPLE}.")
    return items


def _item(row: Any, number: int, where: str) -> Item:
    """One row, checked. `where`: begins what is said of it."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object. A row is {ITEM_EXAMPLE}.")
    for name, kind in ITEM_FIELDS.items():
        if name not in row:
            near = nearest(name, row)
            guess = f" Is it {near!r}?" if near else ""
            raise DataError(f"{where} has no field {name!r}.{guess} A row is {ITEM_EXAMPLE}.")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise DataError(f"{where} has {row[name]!r} as its {name!r}. A row is {ITEM_EXAMPLE}.")
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
        raise DataError(f"{where} has {len(contexts)} contexts for {len(choices)} choices. Give one a choice.")
    for name, text in (("continuation", continuation), ("subject", subject)):
        if not isinstance(text, str):
            raise DataError(f"{where} has {text!r} as its {name!r}. Give a text, or leave it out.")
    return Item(number, row["query"], choices, gold, contexts, continuation, subject)


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of texts none of which is blank."""
    texts = row.get(name) or []
    bad = texts if not isinstance(texts, list) else [x for x in texts if not isinstance(x, str) or not x.strip()]
    if bad:
        raise DataError(f"{where} has {bad!r} in its {name!r}. Give a list of texts that are not blank.")
    return tuple(texts)


# -- requests -------------------------------------------------------------------------------------------------------


def requests(item: Item, solved: str = "") -> list[Request]:
    """One request a choice: the choice after the query, or the continuation after each context; one blank between.

    Before them stand the subject's sentence, then `solved` items.
    """
    before = (SUBJECT.format(item.subject.replace("_", " ")) if item.subject else "") + solved
    if item.contexts:
        pairs = [(context, item.continuation) for context in item.contexts]
    else:
        pairs = [(item.query, choice) for choice in item.choices]
    return [Request(before + context, " " + text, len(text)) for context, text in pairs]


FewShot = tuple[str | Path, int]  # a task file, and how many of its items stand before each query


def few_shot_texts(items: Sequence[Item], subjects: Iterable[str], count: int, source: str) -> dict[str, str]:
    """{subject: the text of the first `count` items of that subject, solved}; where items have no subject, it is "".

    Each is its query, or its right context, one blank, the right choice, or the continuation, and an empty line. Raises
    DataError where there are fewer.
    """
    told = {}
    for subject in dict.fromkeys(subjects):
        mine = [item for item in items if item.subject == subject][:count]
        if count < 1 or len(mine) < count:
            of = f" of the subject {subject!r}" if subject else " without a subject"
            fewer = f"Ask for 1 to {len(mine)}." if mine else "Give shots from another file."
            raise DataError(f"{count} shots are wanted, and {source} has {len(mine)} items{of}. {fewer}")
        right = [requests(replace(item, subject=""))[item.gold] for item in mine]
        told[subject] = "".join(f"{request.context}{request.continuation}\n\n" for request in right)
    return told


@dataclass(frozen=True, slots=True)
class _Row:
    """The tokens of a request; from `first` on they are the continuation's."""

    ids: tuple[int, ...]
    first: int
    characters: int


def _rows(
    item: Item, solved: str, tokenizer: Any, prefix: Sequence[int], *, positions: int | None, source: str
) -> list[_Row]:
    """Context and continuation are tokenised together and the context alone; the continuation's tokens are the rest.

    Blanks at the end of a context go over to the continuation. A row begins with `prefix`, what the tokenizer puts
    before a text, or where there is no context either with BOS or EOS. What is longer than `positions` loses its
    beginning.
    """
    asked = requests(item, solved)
    heads = [request.context.rstrip() for request in asked]
    wholes = [request.context + request.continuation for request in asked]
    known = sorted({head for head in heads if head})  # most items have one context for all choices
    encoded = tokenizer([*wholes, *known], add_special_tokens=False, verbose=False)["input_ids"]
    lengths = {"": 0} | {head: len(ids) for head, ids in zip(known, encoded[len(wholes) :], strict=True)}
    rows = []
    for choice, (request, head, ids) in enumerate(zip(asked, heads, encoded, strict=False)):
        where = f"{source}, row {item.number}, choice {choice},"
        start = list(prefix) if prefix or lengths[head] else [_start(tokenizer, where)]
        row, first = (*start, *ids), len(start) + lengths[head]
        if first >= len(row):
            raise DataError(f"{where} has no token of its own with this tokenizer. Leave the row out.")
        over = max(0, len(row) - (positions or len(row)))
        if first <= over:
            sizes = f"{len(row) - first} tokens, and the model {positions} positions"
            raise DataError(f"{where} has {sizes}. Leave the row out.")
        rows.append(_Row(row[over:], first - over, request.characters))
    return rows


def _start(tokenizer: Any, where: str) -> int:
    """The token that stands for the beginning of a text."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(f"{where} has no context, and the tokenizer neither a BOS nor an EOS token. Leave the row out.")


# -- token sets -----------------------------------------------------------------------------------------------------


def load_items(
    path: str | Path,
    teacher: Teacher,
    part: Split | None,
    *,
    items: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    shots: FewShot | None = None,
) -> TokenSet:
    """As `task_tokens`, for one model: its tokenizer and its positions; at most so many items, or tokens."""
    limits: dict[str, Any] = {"limit_tokens": tokens, "limit_items": items, "seed": seed, "part": part, "shots": shots}
    positions = getattr(teacher.model.config, "max_position_embeddings", None)
    return task_tokens(path, teacher.tokenizer, positions=positions, **limits)


def task_tokens(
    path: str | Path,
    tokenizer: Any,
    *,
    limit_tokens: int | None = None,
    limit_items: int | None = None,
    seed: int = 0,
    positions: int | None = None,
    part: Split | None = None,
    shots: FewShot | None = None,
) -> TokenSet:
    """The items of a task file as a token set: a row a choice, a document an item, each item a text of its own.

    Items come in a seeded order, of which `limit_items`, or as many as hold `limit_tokens`, are taken. `positions`: of
    the model. `part`: every second item is for calibration, the others for evaluation; they share none, whatever seeds
    and limits. An item that is a copy of one for calibration is in neither. `shots`: a task file, and how many of its
    items stand solved before each query, the first ones, of the item's own subject; a copy of one is no item then.
    Raises DataError.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no task can be read. Put its tokenizer files into its folder.")
    items = read_items(path)
    random.Random(0).shuffle(items)  # which items are for what does not depend on the seed
    items = items if part is None else _part(items, part, str(path))
    random.Random(seed).shuffle(items)
    items, solved = (items, {}) if shots is None else _with_shots(items, shots, str(path))
    prefix = special_prefix(tokenizer)
    taken: list[tuple[Item, list[_Row]]] = []
    total = 0
    for item in items[:limit_items]:
        if limit_tokens is not None and total >= limit_tokens:
            break
        before = solved.get(item.subject, "")
        rows = _rows(item, before, tokenizer, prefix, positions=positions, source=str(path))
        taken.append((item, rows))
        total += sum(len(row.ids) for row in rows)
    every = [(number, row) for number, (_, rows) in enumerate(taken) for row in rows]
    return token_set(
        [row.ids for _, row in every],
        [number for number, _ in every],
        [item.number for item, _ in taken],
        [hashlib.sha256(repr([row.ids for row in rows]).encode()).hexdigest()[:16] for _, rows in taken],
        str(path),
        choices=Choices(
            tuple(row.first for _, row in every),
            tuple(row.characters for _, row in every),
            tuple(item.gold for item, _ in taken),
        ),
    )


def _with_shots(items: list[Item], shots: FewShot, source: str) -> tuple[list[Item], dict[str, str]]:
    """The items that are not among the shots, and the shots of each subject as text."""
    file, count = shots
    found = read_items(file)
    solved = few_shot_texts(found, [item.subject for item in items], count, str(file))
    shown = {tuple(requests(shot)) for s in solved for shot in [item for item in found if item.subject == s][:count]}
    rest = [item for item in items if tuple(requests(item)) not in shown]
    if not rest:
        raise DataError(f"All items of {source} are among its own {count} shots. Give shots from another file.")
    return rest, solved


def _part(items: list[Item], part: Split, source: str) -> list[Item]:
    """Every second item, or those of the others that are no copies of one of these."""
    mine = items[::2]
    seen = {tuple(requests(item)) for item in mine}
    rest = [item for item in items[1::2] if tuple(requests(item)) not in seen]
    if not rest:
        raise DataError(f"{source} has too few items to keep some for evaluation. Give a file of at least 2, all new.")
    return mine if part == "calibration" else rest
