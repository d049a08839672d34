"""Tasks answered by writing: prompts, where an answer ends, which number counts, and batches that change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_choice_tasks import letters, write

from billhook.core.errors import DataError
from billhook.core.plan import Plan
from billhook.data.generation_tasks import GenerationPrompts, build_prompts, read_questions
from billhook.methods.evaluate import EVALUATIONS
from billhook.methods.evaluate.generation import (
    flexible_number,
    generate_answers,
    plain_number,
    score_answers,
    strict_number,
    truncate_at_stop,
)
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
ROW = {"query": "Question: 1+1?\nAnswer:", "answer": "One and one.\n#### 2", "target": "2"}


# -- which number counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("He has 3 left.\n#### 18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("#### -5.50.", "-5.50", "-5.50"),
        ("#### 7 or #### 8", "7", "8"),  # strictly the first, flexibly the last
        ("####9", None, "9"),  # the blank counts
        ("The answer is $1,000.", None, "1000"),
        ("It is 12 eggs, so 7", None, "7"),
        ("so 3 eggs.", None, "3"),
        ("none at all", None, None),
        ("", None, None),
    ],
)
def test_strict_and_flexible_numbers(answer: str, strict: str | None, flexible: str | None) -> None:
    assert strict_number(answer) == strict
    assert flexible_number(answer) == flexible


def test_numbers_are_compared_plainly() -> None:
    assert [plain_number(text) for text in ("1,000", "$5", "5.", "5.0", "see\n#### 4")] == [
        "1000",
        "5",
        "5",
        "5.0",
        "4",
    ]


def test_an_answer_ends_at_the_first_stop() -> None:
    assert truncate_at_stop("a 2\n\nQuestion: 3 <|im_end|> 4") == "a 2\n\n"
    assert truncate_at_stop("a<|im_end|>Question:") == "a"
    assert truncate_at_stop("no stop") == "no stop"


def test_outcomes_of_planted_answers(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"query": "b", "target": "1,200"}, ROW | {"query": "c", "target": "7"}]
    prompts = build_prompts(write(tmp_path / "q.jsonl", *rows), letters())
    planted = {1: "#### 2", 2: "It costs $1200.", 3: "#### 8, no, 7"}
    told = score_answers(prompts, [planted[number] for number in prompts.tokens.clusters])
    right = {name: dict(zip(result.clusters, result.sums, strict=True)) for name, result in told.items()}
    assert right == {"strict_match": {1: 1, 2: 0, 3: 0}, "flexible_match": {1: 1, 2: 1, 3: 1}}
    assert {result.tokens for result in told.values()} == {prompts.hash}


# -- prompts --------------------------------------------------------------------------------------------------------


def text_of(prompts: GenerationPrompts) -> list[str]:
    pairs = zip(prompts.tokens.rows, prompts.tokens.lengths, strict=True)
    return ["".join(letters().convert_ids_to_tokens(row[:n].tolist())) for row, n in pairs]


def test_shots_stand_with_their_answers_before_the_question(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"query": "Question: 2+2?\nAnswer:", "answer": "#### 4", "target": "4"}, ROW | {"query": "Q"}]
    path = write(tmp_path / "q.jsonl", *rows)
    prompts = build_prompts(path, letters(), shots=(path, 2))
    shown = "Question: 1+1?\nAnswer: One and one.\n#### 2\n\nQuestion: 2+2?\nAnswer: #### 4\n\n"
    assert text_of(prompts) == [shown + "Q"], "questions that are shown are not asked"
    assert text_of(build_prompts(path, letters(bos=True), limit_items=1, positions=8, new_tokens=5)) in (
        ["er:"],
        ["Q"],
        ["<s>Q"],
    )
    with pytest.raises(DataError, match=r"are among the 3 shots\. Give shots from another file"):
        build_prompts(path, letters(), shots=(path, 3))
    with pytest.raises(DataError, match=r"4 shots are wanted, and .* has 3 questions\. Ask for 1 to 3"):
        build_prompts(path, letters(), shots=(path, 4))
    with pytest.raises(DataError, match=r"has 5 positions, and answers of 5 tokens leave no room for a prompt"):
        build_prompts(path, letters(), positions=5, new_tokens=5)
    with pytest.raises(DataError, match="no tokenizer"):
        build_prompts(path, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], r"row 2, is not an object\. A row is"),
        ({"query": "a", "anwser": "b", "target": "1"}, r"row 2, has no field 'answer'\. Is it 'anwser'\?"),
        (ROW | {"target": 3}, r"row 2, has 3 as its 'target'"),
        (ROW | {"answer": " "}, r"row 2, has ' ' as its 'answer'"),
    ],
)
def test_rows_that_are_no_questions_are_refused_by_number(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", ROW, row))


def test_files_that_hold_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is missing\. Give"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"q\.jsonl is empty\. Give"):
        read_questions(write(tmp_path / "q.jsonl", " "))


def test_the_hash_knows_the_target_and_the_room(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", ROW)
    one = build_prompts(path, letters())
    assert one.hash == build_prompts(path, letters()).hash
    assert one.hash != build_prompts(path, letters(), new_tokens=9).hash
    assert one.hash != build_prompts(write(path, ROW | {"target": "3"}), letters()).hash


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries of 1 to 9 words."""
    rows = [ROW | {"query": " ".join(tiny.WORDS[i : i + 1 + i % 9])} for i in range(14)]
    return write(tmp_path_factory.mktemp("questions") / "q.jsonl", *rows)


def one_by_one(model: Any, prompts: GenerationPrompts) -> list[str]:
    """Every prompt alone, token by token, without a cache, padding or transformers' generate."""
    end, told = prompts.tokenizer.eos_token_id, []
    for row, n in zip(prompts.tokens.rows, prompts.tokens.lengths, strict=True):
        ids = row[:n].tolist()
        for _ in range(prompts.new_tokens):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == end:
                ids.pop()
                break
        told.append(truncate_at_stop(prompts.tokenizer.decode(ids[n:])))
    return told


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma2", "falcon_alibi", "opt"])
def test_batches_write_what_every_prompt_gets_alone(
    variant: str, checkpoint: Folder, words: Any, questions: Path
) -> None:
    teacher: Teacher = load(checkpoint(variant))
    prompts = build_prompts(questions, words, new_tokens=10)
    for removed in ((), ("attention.0", "mlp.2")):
        model = apply(teacher, Plan.parse(removed)) if removed else teacher.model
        expected = one_by_one(model, prompts)
        assert len(set(expected)) > 5
        for most in (1, 40, 4096):
            assert generate_answers(model, prompts, batch_positions=most) == expected


def test_every_line_stops_by_itself(checkpoint: Folder, words: Any, questions: Path) -> None:
    """A word that some lines write early is made a stop: no answer has it, and the others go on."""
    model, prompts = load(checkpoint("llama")).model, build_prompts(questions, words, new_tokens=12)
    free = generate_answers(model, prompts)
    stop = next(word for word in words.get_vocab() if 2 < sum(word in text.split() for text in free) < len(free) - 2)
    stopped = generate_answers(model, prompts, stops=(stop,))
    assert stopped == [text.partition(stop)[0] for text in free]
    assert stopped != free


def test_the_evaluations_give_one_outcome_a_question(model: Path, words: Any, questions: Path, tmp_path: Path) -> None:
    teacher = load(model)
    prompts = build_prompts(questions, words, new_tokens=6)
    answers = dict(zip(prompts.tokens.clusters, generate_answers(teacher.model, prompts), strict=True))
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    numbers = [flexible_number(answers[i]) for i in range(1, len(rows) + 1)]
    rows = [
        row | {"target": n if i % 2 and n else "none"} for i, (row, n) in enumerate(zip(rows, numbers, strict=True))
    ]
    planted = build_prompts(write(tmp_path / "q.jsonl", *rows), words, new_tokens=6)
    seen: list[int] = []
    found = EVALUATIONS["flexible_match"](teacher.model, planted, watch=lambda event: seen.append(event.done))
    assert found.sums == tuple(float(number % 2 == 0) for number in planted.tokens.clusters)
    assert found.counts == (1,) * len(rows)
    assert seen[-1] == len(rows)
    assert set(EVALUATIONS["strict_match"](teacher.model, planted).sums) == {0.0}
