"""Rows as people have them: chats, tables, packed files, rows that cannot be used, and files beyond the memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import transformers

import billhook
from billhook.core.errors import DataError
from billhook.core.events import Event, ignore_events
from billhook.data import calibration
from billhook.data import rows as reading
from billhook.data.calibration import calibration_tokens, held_out_tokens
from billhook.data.chats import chat_text
from billhook.data.choice_tasks import read_items
from billhook.data.generation_tasks import read_questions
from billhook.data.prompts import read_prompts
from billhook.data.rows import UnusableRow
from billhook.data.texts import TextSpec, find_file, read_source, read_texts
from billhook.data.token_sets import TokenSet, encode_texts
from billhook.runs.prepare import tokens_for
from billhook.runs.recipe import Recipe

MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=96))
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take "
    "turns') }}{% endif %}{{ m.role }}: {{ m.content }} {% endfor %}"
)
SAID = ["w1 w2 w3", "w4, w5", "w6\nw7"]


@pytest.fixture
def tokenizer(model: Path) -> Any:
    found: Any = transformers.AutoTokenizer.from_pretrained(model)
    found.chat_template = ALTERNATING
    return found


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


# -- chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([("system", "w0"), ("user", "w1")], "roles must take turns"),
        ([("user", "w1"), ("assistant", "w2"), ("assistant", "w3")], "roles must take turns"),
        ([], "without messages"),
        ([("user", None)], "message 1, has no content"),
    ],
)
def test_a_chat_that_no_template_takes_is_left_out_and_told(
    turns: list[tuple[str, Any]], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    good, bad = chat(("user", "w1"), ("assistant", "w2")), chat(*turns)
    told: list[Event] = []
    path = written(tmp_path / "a.jsonl", [*[good] * 6, bad, *[good] * 6])
    assert read_texts(path, "messages", tokenizer, told.append) == ["user: w1 assistant: w2 "] * 12
    (event,) = told
    assert (event.done, event.total, event.values["left_out"]) == (12, 13, 1)
    assert words in str(event.values["note"])
    assert "row 7" in str(event.values["note"])
    path = written(tmp_path / "b.jsonl", [good, bad, bad])
    with pytest.raises(DataError, match=rf"row 2.*{words}.*2 of 3 rows, too many"):
        read_texts(path, "messages", tokenizer)


def test_chats_under_other_names_are_read_like_messages(tokenizer: Any, tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}
    named = {"conversations": chat(("user", "w1"), ("assistant", "w2"))["messages"]}
    parts = chat(("user", [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]), ("assistant", "w2"))
    for field in ("conversations", "text"):
        path = written(tmp_path / "a.jsonl", [shared, named, parts])
        assert read_texts(path, field, tokenizer) == ["user: w1 assistant: w2 "] * 3


def test_a_part_that_is_no_text_is_refused_by_row(tokenizer: Any, tmp_path: Path) -> None:
    image = chat(("user", [{"type": "image", "url": "x"}]))
    with pytest.raises(DataError, match="row 2, message 1, has a part of the kind 'image', which is no text"):
        read_texts(written(tmp_path / "a.jsonl", [chat(("user", "w1"))] + [image]), "messages", tokenizer)
    with pytest.raises(DataError, match="row 1, message 1, is no message"):
        chat_text(["w1"], tokenizer, "a.jsonl", 1)


def test_a_missing_content_beside_a_call_is_not_spelt_out(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m['content'] }} {% endfor %}"
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    said = chat(("user", "w1"), ("assistant", None), tool_calls=calls)["messages"]
    assert "None" not in chat_text(said, tokenizer, "a.jsonl", 1)
    with pytest.raises(UnusableRow, match="has no content"):
        chat_text([{"role": "user"}], tokenizer, "a.jsonl", 1)


# -- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (7, "7"), ({"a": 1}, r'\{"a": 1\}')])
def test_a_row_without_a_text_is_told_with_what_stands_there(value: Any, shown: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "w1"}, {"text": value}])
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2, has {shown} as its 'text'\. Give a text there"):
        read_texts(path, "text", None)


def test_half_a_character_leaves_its_row_out_everywhere(tmp_path: Path) -> None:
    half, told = "w1 \ud83d", list[Event]()
    path = written(tmp_path / "a.jsonl", [{"text": "w1", "note": half}, *[{"text": "w1"}] * 10, {"text": half}])
    assert read_texts(path, "text", None, told.append) == ["w1"] * 11, "what is not read may hold anything"
    item = {"query": "w1", "choices": ["w2", "w3"], "gold": 0}
    path = written(tmp_path / "i.jsonl", [*[item] * 10, item | {"choices": ["w2", half]}])
    assert len(read_items(path, told.append)) == 10
    question = {"query": "w1", "answer": "w2", "target": "w2"}
    path = written(tmp_path / "q.jsonl", [*[question] * 10, question | {"answer": half}])
    assert len(read_questions(path, told.append)) == 10
    assert [(event.values["left_out"], event.total) for event in told] == [(1, 12), (1, 11), (1, 11)]
    with pytest.raises(DataError, match=r"row 1, holds half of a surrogate pair.*2 of 2 rows"):
        read_texts(written(tmp_path / "b.jsonl", [{"text": half}] * 2), "text", None)
    with pytest.raises(DataError, match="row 1, holds half of a surrogate pair"):
        read_prompts(written(tmp_path / "p.jsonl", [{"prompt": half}]))


def test_several_fields_are_joined(tmp_path: Path) -> None:
    rows = [{"ask": "w1", "more": "", "say": "w2"}, {"ask": "w3", "more": "w4", "say": "w5"}, {"ask": "w6"}]
    path = written(tmp_path / "a.jsonl", rows)
    assert read_texts(path, "ask, more,say", None) == ["w1\n\nw2", "w3\n\nw4\n\nw5", "w6"]
    with pytest.raises(DataError, match=r"No row of .* has the field 'sya'"):
        read_texts(path, "ask,sya", None)
    with pytest.raises(DataError, match=r"row 1, has no text field 'text'.*ask', 'more', 'say'"):
        read_texts(path, "text", None)


def test_tables_are_read_as_tables(tmp_path: Path) -> None:
    import pyarrow

    quoted = ['"' + text + '"' for text in SAID]
    (tmp_path / "a.csv").write_text("n,body\n" + "".join(f"1,{text}\n" for text in quoted))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(("n\tbody\n" + "".join(f"1\t{t}\n" for t in quoted)).encode()))
    table = pyarrow.table({"n": [1, 2, 3], "body": SAID})
    for name, new in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.csv", "a.tsv.gz", "a.arrow", "b.arrow"):
        assert read_texts(str(tmp_path / name), "body", None) == SAID, name
        with pytest.raises(DataError, match=r"has no text field 'boddy'.*body"):
            read_texts(str(tmp_path / name), "boddy", None)
    (tmp_path / "b.csv").write_text("body,n\nw1,1\n\nw2\n")
    assert read_texts(str(tmp_path / "b.csv"), "body", None) == ["w1", "w2"]
    with pytest.raises(DataError, match="row 4, has null as its 'n'"):
        read_texts(str(tmp_path / "b.csv"), "n", None)


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def test_packed_files_are_unpacked_and_damage_is_told(tmp_path: Path) -> None:
    import pyarrow

    lines = "".join(json.dumps({"text": text}) + "\n" for text in SAID).encode()
    packed = {name: pack(lines) for name, pack in PACKERS.items()}
    packed["zst"] = pyarrow.compress(lines, codec="zstd", asbytes=True)
    for name, content in packed.items():
        path = tmp_path / f"a.jsonl.{name}"
        path.write_bytes(content)
        assert read_texts(str(path), "text", None) == SAID, name
        for damaged in (content[: len(content) // 2], b"plain", b""):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"damaged one|holds no text"):
                read_texts(str(path), "text", None)


def test_an_array_of_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in SAID], indent=1))
    assert read_texts(str(tmp_path / "a.json"), "text", None) == SAID


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}", '{"text": "\0"}', "{]"])
def test_json_of_any_depth_is_refused_by_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n' + content + "\n")
    with pytest.raises(DataError, match=r"line 2, is not JSON|zero bytes"):
        read_texts(str(tmp_path / "a.jsonl"), "text", None)


@pytest.mark.parametrize("text", ["w" * 5000, "a\0b", "~nobody-here/a.txt", "x/" * 4000, "\ud83d", "a b.parquet"])
def test_a_text_that_names_no_file_is_told(text: str) -> None:
    for read in (lambda: find_file(text), lambda: read_items(text), lambda: read_questions(text)):
        with pytest.raises(DataError, match="is missing"):
            read()


# -- beyond the memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that small files exceed."""
    for name, size in (("WHOLE", 40_000), ("SAMPLE", 20_000), ("LONGEST", 40_000), ("MOST", 60_000)):
        monkeypatch.setattr(reading, name, size)


@pytest.mark.usefixtures("small")
def test_of_a_large_file_a_sample_is_read_that_does_not_depend_on_its_packing(tmp_path: Path) -> None:
    path = tiny.write_texts(tmp_path / "a.jsonl", 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    found = read_source(str(path), "text", None)
    assert not found.whole
    assert found == read_source(str(tmp_path / "a.jsonl.gz"), "text", None)
    assert 15_000 < sum(map(len, found.texts)) <= 20_000
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    places = [lines.index(text) for text in found.texts]
    assert places == sorted(places)
    assert places[-1] > 2 * len(places), "not only the beginning"
    more = read_source(str(path), "text", None, tokens=5000)
    assert sum(map(len, more.texts)) > 100_000, "as much as is wanted"


@pytest.mark.usefixtures("small")
def test_samples_of_every_size_and_seed_are_halved_alike(tokenizer: Any, tmp_path: Path) -> None:
    path = str(tiny.write_texts(tmp_path / "a.jsonl", 6000))
    sets = [
        calibration_tokens(TextSpec(path, "text", tokens, 32, seed), MODEL, tokenizer)
        for tokens, seed in ((300, 0), (300, 1), (8000, 0))
    ]
    held_out = held_out_tokens(TextSpec(path, "text", 4000, 32, 0), MODEL, tokenizer)
    assert held_out.tokens == 4000
    assert len(set(sets[0].digests) | set(sets[1].digests)) > len(sets[0].digests)
    for each in sets:
        assert not set(each.digests) & set(held_out.digests)


@pytest.mark.usefixtures("small")
def test_what_is_needed_whole_is_refused_when_it_never_ends(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"text": "' + b"w" * 10**7))
    with pytest.raises(DataError, match="line 1, has more than"):
        read_texts(str(bomb), "text", None)
    bomb.write_bytes(gzip.compress(b"\n" * 10**7))
    for read in (read_items, read_questions):
        with pytest.raises(DataError, match="holds more than"):
            read(bomb)
    (tmp_path / "a.txt").write_text("w1 é " * 20_000, encoding="utf-8")
    found = read_source(str(tmp_path / "a.txt"), "text", None)
    assert not found.whole
    assert found.texts[0] == ("w1 é " * 20_000)[: len(found.texts[0])]


def test_a_long_text_has_the_tokens_of_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from billhook.data import token_sets

    text = " ".join(f"w{i % 61}" for i in range(9000))
    (whole,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(token_sets, "PIECE", 5000)
    monkeypatch.setattr(token_sets, "CONTEXT", 100)
    assert len(list(token_sets._pieces(text, tokenizer))) > 4
    assert encode_texts(["w1", text, "w2"], tokenizer) == [[5], whole, [6]]
    assert len(list(token_sets._pieces("w" * 30_000, tokenizer))) == 1, "where it cannot be cut it is whole"


def test_what_will_be_refused_is_refused_before_the_model_writes(tokenizer: Any, tmp_path: Path) -> None:
    spec = TextSpec(str(tiny.write_texts(tmp_path / "a.jsonl", 20)), "text", 100_000, 32, 0)

    def write() -> list[str]:
        raise AssertionError("the model writes")

    with pytest.raises(DataError, match="too short"):
        calibration_tokens(spec, MODEL, tokenizer, self_share=0.5, write=write)
    few, read = replace(spec, tokens=64), list[str]()

    def before(foreign: TokenSet | None) -> None:
        assert foreign is not None
        read.append(foreign.source)

    with pytest.raises(AssertionError, match="the model writes"):
        calibration_tokens(few, MODEL, tokenizer, self_share=0.5, write=write, before_writing=before)
    assert read == [f"{spec.source}+self"]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_text_is_read_once(share: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = calibration._read

    def counted(source: str, *given: Any) -> Any:
        read.append(source)
        return plain(source, *given)

    monkeypatch.setattr(calibration, "_read", counted)
    own, other = (str(tiny.write_texts(tmp_path / f"{name}.jsonl", 60, seed=i)) for i, name in enumerate("ab"))
    asked = Recipe(remove="1sites", data=own, eval_data=other, tokens=160, length=20, eval_tokens=160, eval_length=20,
                   self_share=share)  # fmt: skip
    tokens_for(asked, billhook.load(model), ignore_events)
    assert sorted(read) == [own, other]
