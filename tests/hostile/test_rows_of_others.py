"""Texts, tasks, questions and prompts of any content. Each is read or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hostile import bounded, damaged, edits, examples, json_bytes, values
from hypothesis import given
from hypothesis import strategies as st

from billhook.data.choice_tasks import read_items
from billhook.data.generation_tasks import read_questions
from billhook.data.prompts import read_prompts
from billhook.data.texts import read_texts
from billhook.models.load import load

ROWS: tuple[Any, ...] = (
    {"text": "w1 w2"},
    {
        "messages": [
            {"role": "user", "content": "w1"},
            {"role": "assistant", "content": [{"type": "text", "text": "w2"}]},
        ]
    },
    {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
    {"query": "w1", "choices": ["w2", "w3"], "gold": 0},
    {"question": "w1", "answer": "w2"},
    {"prompt": "w1"},
)
line = json_bytes | st.sampled_from(ROWS).flatmap(
    lambda row: (edits(row) | st.just(row)).map(lambda value: json.dumps(value).encode())
)
rows = st.lists(line, max_size=4).map(b"\n".join)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load(model).tokenizer


@examples(250)
@given(data=st.data())
def test_texts(tokenizer: Any, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.parquet"]))
    content = data.draw(rows)
    if name.endswith(".gz"):
        content = data.draw(st.just(gzip.compress(content, mtime=0)) | damaged(gzip.compress(content, mtime=0)))
    (tmp_path / name).write_bytes(content)
    with bounded():
        read_texts(
            str(tmp_path / name), data.draw(st.sampled_from(["text", "messages", "conversations", "a"])), tokenizer
        )


@examples(150)
@given(content=rows)
def test_tasks_questions_and_prompts(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for read in (read_items, read_questions, read_prompts):
        with bounded():
            read(path)


@examples(50)
@given(source=values.map(str) | st.text(max_size=40))
def test_names_of_texts(source: str, tokenizer: Any) -> None:
    with bounded():
        read_texts(source, "text", tokenizer)
