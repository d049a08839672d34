"""Questions of skills: made from a seed, one right choice each, by any tokenizer that can write them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import tiny
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from billhook.data.choice_tasks import Item
from billhook.data.prefixes import computed_positions
from billhook.data.skills import SKILLS, SkillName
from billhook.data.skills.tokens import ITEMS, skill_tokens
from billhook.data.skills.words import NAMES, NOUNS, THINGS, filler

CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}


# -- a solver of each skill, which reads nothing but the text ---------------------------------------------------------


def calculated(item: Item) -> list[str]:
    a, sign, b = re.fullmatch(r"(\d+) ([-+*]) (\d+) =", item.query.splitlines()[-1]).groups()  # type: ignore[union-attr]
    result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    return [choice for choice in item.choices if int(choice) == result]


def still_open(line: str) -> list[str] | None:
    """What of a line is open; None where a bracket closes another one than the innermost."""
    opened: list[str] = []
    for bracket in line.split():
        if bracket in CLOSES:
            opened.append(bracket)
        elif not opened or CLOSES[opened.pop()] != bracket:
            return None
    return opened


def closed(item: Item) -> list[str]:
    line = item.query.splitlines()[-1]
    return [choice for choice in item.choices if still_open(f"{line} {choice}") is not None]


def repeated(item: Item) -> list[str]:
    whole, begun = (line.split() for line in item.query.splitlines())
    assert whole[: len(begun)] == begun
    return [choice for choice in item.choices if choice == whole[len(begun)]]


def recalled(item: Item) -> list[str]:
    told, asked = item.query.splitlines()
    facts = dict(re.findall(r"(The \w+ of \w+ is) (\w+)\.", told))
    return [choice for choice in item.choices if choice == facts[asked]]


SOLVERS: dict[SkillName, Callable[[Item], list[str]]] = {
    "arithmetic": calculated, "brackets": closed, "copying": repeated, "recall": recalled,
}  # fmt: skip


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("seed", [0, 1, 77])
def test_every_question_has_one_right_choice(skill: SkillName, seed: int) -> None:
    items = ITEMS[skill](seed)
    assert len({item.query for item in items}) == len(items) == (64 if skill == "recall" else 100)
    for item in items:
        assert len(set(item.choices)) == len(item.choices) == 4
        assert SOLVERS[skill](item) == [item.choices[item.gold]], item


@pytest.mark.parametrize("skill", SKILLS)
def test_a_seed_makes_the_same_questions_and_another_one_others(skill: SkillName) -> None:
    assert ITEMS[skill](3) == ITEMS[skill](3)
    shared = {item.query for item in ITEMS[skill](3)} & {item.query for item in ITEMS[skill](4)}
    assert len(shared) < 20  # of small numbers there are not many


@pytest.mark.parametrize("skill", SKILLS)
def test_a_guess_by_place_or_length_gets_what_chance_gets(skill: SkillName) -> None:
    items = ITEMS[skill](0)
    places = Counter(item.gold for item in items)
    assert all(len(items) / 10 <= places[place] <= len(items) * 0.4 for place in range(4))
    for pick in (min, max):
        right = sum(pick(item.choices, key=len) == item.choices[item.gold] for item in items)
        assert right <= 0.4 * len(items), "the right choice is neither the shortest nor the longest"


def test_shown_answers_are_right_and_are_not_asked() -> None:
    for skill in ("arithmetic", "brackets"):
        for item in ITEMS[skill](0):
            *shown, asked = item.query.splitlines()
            assert len(shown) == 4
            for line in shown:
                assert not line.startswith(asked + " ")
                if skill == "brackets":
                    assert still_open(line) == []
                else:
                    left, right = line.split(" = ")
                    assert eval(left) == int(right)


def test_neither_digits_nor_rank_give_a_result_away() -> None:
    ranks: Counter[int] = Counter()
    for item in ITEMS["arithmetic"](0):
        assert len({len(choice) for choice in item.choices}) == 1
        ranks[sorted(map(int, item.choices)).index(int(item.choices[item.gold]))] += 1
    assert all(10 <= ranks[rank] <= 40 for rank in range(4)), ranks


def test_a_word_before_is_not_enough_where_every_word_stands_twice() -> None:
    asked = 0
    for item in ITEMS["copying"](0)[75:]:
        whole, begun = (line.split() for line in item.query.splitlines())
        followers = {b for a, b in pairwise(whole) if a == begun[-1]}
        assert followers <= set(item.choices)
        asked += len(followers) > 1
    assert asked >= 20


def test_wrong_words_of_recall_were_told_of_somebody_else_or_something_else() -> None:
    for number, item in enumerate(ITEMS["recall"](0)):
        told, asked = item.query.splitlines()
        facts = re.findall(r"The (\w+) of (\w+) is (\w+)\.", told)
        thing, person = re.fullmatch(r"The (\w+) of (\w+) is", asked).groups()  # type: ignore[union-attr]
        assert set(item.choices) <= {word for _, _, word in facts}
        if number >= 32:  # facts of two kinds
            rival = next(word for what, who, word in facts if who == person and what != thing)
            assert rival in item.choices


def test_what_stands_between_facts_and_question_holds_no_answer() -> None:
    from random import Random

    words = set(re.findall(r"\w+", filler(Random(0), 500)))
    assert not words & {*NOUNS, *NAMES, *THINGS}
    assert all(len(set(each)) == len(each) for each in (NOUNS, NAMES, THINGS))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def fast(backend: Tokenizer, **special: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


def texts() -> list[str]:
    return [f"{item.query} {choice}" for skill in SKILLS for item in ITEMS[skill](5) for choice in item.choices]


def byte_level() -> Any:
    """GPT-2's kind: a blank belongs to the word after it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    return fast(backend)


def sentencepiece_like() -> Any:
    """Llama's kind: a text begins with a blank, and BOS stands before it."""
    from tokenizers import processors

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    backend.train_from_iterator(texts(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return fast(backend, bos_token="<s>", unk_token="<unk>")


def whole_blanks() -> Any:
    """A kind for which the blank between words is a token of its own."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(True)]
    )
    backend.train_from_iterator(texts(), trainers.WordLevelTrainer(special_tokens=["</s>", "<unk>"]))
    return fast(backend, unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like, whole_blanks])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_any_tokenizer_scores_the_choice_and_nothing_else(tokenizer: Any) -> None:
    for skill in SKILLS:
        tokens = skill_tokens(skill, tokenizer, positions=None)
        assert tokens is not None
        assert tokens.choices is not None
        items = {item.number: item for item in ITEMS[skill](0)}
        assert tokens.choices.numbers == tuple(items), "nothing is left out"
        for number, gold, d in zip(tokens.choices.numbers, tokens.choices.gold, range(len(items)), strict=True):
            rows = [r for r, document in enumerate(tokens.documents) if document == d]
            ids = [tokens.rows[r, : tokens.lengths[r]].tolist() for r in rows]
            heads = {tuple(row[: tokens.choices.first[r]]) for r, row in zip(rows, ids, strict=True)}
            assert len(heads) == 1, "all choices of an item continue the same tokens"
            ends = [tokenizer.decode(row[tokens.choices.first[r] :]) for r, row in zip(rows, ids, strict=True)]
            written = [re.sub("[ Ġ▁]", "", end) for end in ends]
            assert written == [choice.replace(" ", "") for choice in items[number].choices]
            assert items[number].choices[gold] == SOLVERS[skill](items[number])[0]


def test_what_is_computed_lies_between_every_prefix_once_and_every_input_whole(tokenizer: Any) -> None:
    for skill in SKILLS:
        tokens = skill_tokens(skill, tokenizer, positions=None)
        assert tokens is not None
        inputs = {tuple(row[: n - 1].tolist()) for row, n in zip(tokens.rows, tokens.lengths, strict=True)}
        prefixes = {ids[:n] for ids in inputs for n in range(1, len(ids) + 1)}
        assert len(prefixes) <= computed_positions(tokens) <= sum(map(len, inputs)) < tokens.tokens
        if skill in ("arithmetic", "brackets"):
            assert computed_positions(tokens) < sum(map(len, inputs)) / 2, "solved lines are read once"


def test_items_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    whole = skill_tokens("recall", tokenizer, positions=None)
    assert whole is not None
    middle = sorted(whole.lengths)[len(whole.lengths) // 2]
    some = skill_tokens("recall", tokenizer, positions=middle)
    assert some is not None
    assert max(some.lengths) <= middle < max(whole.lengths)
    assert skill_tokens("recall", tokenizer, positions=10) is None


def test_a_tokenizer_that_writes_all_choices_alike_tests_nothing(tmp_path: Any) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tiny.with_tokenizer(tmp_path / "model"))
    assert [skill_tokens(skill, words, positions=None) for skill in SKILLS] == [None] * len(SKILLS)
