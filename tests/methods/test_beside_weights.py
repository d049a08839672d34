"""The files of a teacher that travel with its student, byte for byte, and what a tokenizer is read as afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import transformers

from billhook.core.plan import Plan
from billhook.methods.export.checkpoint import save
from billhook.models.load import load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
TRAVEL = {
    "special_tokens_map.json": '{"bos_token":  "<s>"}',
    "added_tokens.json": "{}",
    "tokenizer.model": "\x00scores\xff",
    "tokenizer.model.v3": "more",
    "vocab.json": '{"a": 0}',
    "merges.txt": "#version: 0.2\n",
    "qwen.tiktoken": "IQ== 0\n",
    "tekken.json": "{}",
    "chat_template.jinja": "{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "LICENSE": "MIT, and who wrote it",
    "LICENSE.md": "again",
    "license_llama3.txt": "another",
    "NOTICE": "Llama is licensed …",
    "USE_POLICY.md": "not for …",
    "Third_Party_Notices.txt": "…",
}
STAY = {
    "README.md": "The teacher's card: not what the student is.",
    "model.safetensors.index.json.bak": "{}",
    "training_args.bin": "pickle",
    "tokenizer.safetensors": "no weights",
    "tokenization_own.py": "raise SystemExit",
    "billhook.json": "{}",
}


def student(source: Path, target: Path, names: str = "mlp.1") -> Path:
    teacher, plan = load(source), Plan.parse(names.split(","))
    save(apply(teacher, plan), teacher.tokenizer, plan, target, teacher=teacher)
    return target


@pytest.mark.parametrize("memory", [None, 0])
def test_files_travel_byte_for_byte(memory: int | None, tmp_path: Path) -> None:
    source = tiny.with_tokenizer(tmp_path / "teacher")
    before = {name: (source / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    teacher = load(source, memory=memory)
    (source / "additional_chat_templates").mkdir()
    for name, text in (TRAVEL | STAY).items():
        (source / name).write_bytes(text.encode())
    plan = Plan.parse(["mlp.1"])
    save(apply(teacher, plan), teacher.tokenizer, plan, tmp_path / "out", teacher=teacher)
    for name, data in (before | {name: text.encode() for name, text in TRAVEL.items()}).items():
        assert (tmp_path / "out" / name).read_bytes() == data, name
    mine = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert not mine & STAY.keys() - {"billhook.json"}
    assert (tmp_path / "out" / "billhook.json").read_text() != STAY["billhook.json"]


def test_another_tokenizer_is_written_and_none_of_the_teachers(tmp_path: Path) -> None:
    source = tiny.with_tokenizer(tmp_path / "teacher")
    (source / "added_tokens.json").write_text("{}")
    teacher, plan = load(source), Plan.parse(["mlp.1"])
    other = transformers.AutoTokenizer.from_pretrained(source)
    other.chat_template = "{{ 1 }}"
    save(apply(teacher, plan), other, plan, tmp_path / "out", teacher=teacher)
    assert load(tmp_path / "out").tokenizer.chat_template == "{{ 1 }}"  # type: ignore[union-attr]
    assert not (tmp_path / "out" / "added_tokens.json").exists()


def test_the_code_of_a_tokenizer_travels_where_its_settings_name_it(tmp_path: Path) -> None:
    source = tiny.with_tokenizer(tmp_path / "teacher")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenization_own.py").write_text("class Own: ...\n")
    (source / "modeling_billhook.py").write_text("another's\n")
    out = student(source, tmp_path / "out")
    assert (out / "tokenization_own.py").read_text() == "class Own: ...\n"
    assert "another's" not in (out / "modeling_billhook.py").read_text()


@pytest.mark.parametrize("told", ["LlamaTokenizerFast", "GPT2Tokenizer", None])
@pytest.mark.parametrize("variant", ["phi3", "qwen2", "llama", "gemma2", "gpt2", "mistral"])
def test_a_student_reads_its_tokenizer_as_its_teacher_does(variant: str, told: str | None, tmp_path: Path) -> None:
    """transformers goes by the type of the model, and `billhook-…` is another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    source = tiny.saved(tmp_path / "teacher", variant, vocab_size=320)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat and the dog and the hat", "cats sat"], trainer)
    backend.save(str(source / "tokenizer.json"))
    backend.model.save(str(source))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": told} if told else {}))
    mine, other = load(source).tokenizer, load(student(source, tmp_path / "out")).tokenizer
    assert type(mine) is type(other)
    text = "the cat  and <s> the hat"
    assert mine(text).input_ids == other(text).input_ids  # type: ignore[misc]
