"""A model without a part of its vocabulary: equal tokens and logits where none is missing, smaller ones elsewhere."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vocabulary
import torch
import transformers
from tokenizers import Tokenizer, models

from billhook.core.errors import BudgetError, ModelError
from billhook.models.load import Teacher, load
from billhook.models.vocabulary.choice import tokens_to_keep
from billhook.models.vocabulary.entries import Vocabulary, read_vocabulary
from billhook.models.vocabulary.student import cut_model, new_numbers
from billhook.runs.vocabulary.writing import save_cut

KINDS = tiny_vocabulary.KINDS
ANY = ["naïve café, 1,234 — Быстрая лиса", "敏捷的棕色狐狸 🦊🐕‍🦺 \u200b\n\n\ttab", "  two spaces <|user|>x</s>"]


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("teacher") / request.param
    return load(tiny_vocabulary.folder(folder, request.param))


def counts(teacher: Teacher, texts: list[str]) -> Counter[int]:
    encoded = teacher.tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return Counter(index for ids in encoded for index in ids)


def cut(
    teacher: Teacher, folder: Path, uses: Counter[int], count: int | None = None
) -> tuple[Any, Any, dict[int, int]]:
    """The cut model and tokenizer, as transformers loads them, and the new ids."""
    vocabulary = read_vocabulary(teacher)
    numbers = new_numbers(vocabulary, tokens_to_keep(vocabulary, uses, count))
    tokenizer = save_cut(teacher, cut_model(teacher, numbers), numbers, folder, prove=lambda tokenizer: tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, numbers


@torch.inference_mode()
def test_text_of_kept_tokens_keeps_its_tokens_and_its_logits(teacher: Teacher, tmp_path: Path) -> None:
    texts = tiny_vocabulary.sentences()
    uses = counts(teacher, texts)
    model, tokenizer, numbers = cut(teacher, tmp_path / "cut", uses)
    assert len(numbers) < teacher.model.config.vocab_size - tiny_vocabulary.PADDING
    assert model.config.vocab_size == len(numbers) == len(tokenizer)
    assert type(model) is transformers.LlamaForCausalLM
    columns = torch.tensor(sorted(numbers, key=numbers.__getitem__))
    assert teacher.tokenizer is not None
    for number, text in enumerate(texts):
        old, new = teacher.tokenizer(text)["input_ids"], tokenizer(text)["input_ids"]
        assert new == [numbers[index] for index in old]
        if number % 50 == 0 and old:
            whole = teacher.model(input_ids=torch.tensor([old[:90]])).logits
            torch.testing.assert_close(
                model(input_ids=torch.tensor([new[:90]])).logits, whole[..., columns], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_any_text_is_read_and_written_back(teacher: Teacher, tmp_path: Path, share: float) -> None:
    texts = tiny_vocabulary.sentences()[:300]
    rows = teacher.model.config.vocab_size
    _, tokenizer, numbers = cut(teacher, tmp_path / "cut", counts(teacher, texts), int(share * rows))
    assert len(numbers) == rows - int(share * rows)
    assert teacher.tokenizer is not None
    for text in [*texts, *ANY]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == teacher.tokenizer.decode(teacher.tokenizer(text)["input_ids"])
        old = teacher.tokenizer(text)["input_ids"]
        if all(index in numbers for index in old):
            assert ids == [numbers[index] for index in old]
    chat = [{"role": "user", "content": "w1 w2"}]
    told = [each.decode(each.apply_chat_template(chat)["input_ids"]) for each in (teacher.tokenizer, tokenizer)]
    assert told[0] == told[1]


def test_every_kept_token_can_be_built(teacher: Teacher, tmp_path: Path) -> None:
    """What is merged stays mergeable: the cut tokenizer makes each kept token of its text as the whole one does."""
    _, tokenizer, numbers = cut(teacher, tmp_path / "cut", counts(teacher, tiny_vocabulary.sentences()[:100]))
    vocabulary = read_vocabulary(teacher)
    assert teacher.tokenizer is not None
    before, after = (each.backend_tokenizer.model for each in (teacher.tokenizer, tokenizer))
    for index in numbers.keys() & vocabulary.needs.keys():
        text = vocabulary.tokens[index]
        assert [each.id for each in before.tokenize(text)] == [index]
        assert [each.id for each in after.tokenize(text)] == [numbers[index]]


def test_special_ids_follow_in_every_file(teacher: Teacher, tmp_path: Path) -> None:
    model, tokenizer, numbers = cut(teacher, tmp_path / "cut", Counter(), teacher.model.config.vocab_size // 2)
    assert teacher.tokenizer is not None
    for text in [*tiny_vocabulary.SPECIAL, "<|tool|>"]:
        assert tokenizer.convert_tokens_to_ids(text) == numbers[teacher.tokenizer.convert_tokens_to_ids(text)]
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    generation = json.loads((tmp_path / "cut" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"])
    assert generation["suppress_tokens"] == [tokenizer.convert_tokens_to_ids("<|tool|>")]
    written = model.generate(**tokenizer("def f(x)", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert int(written.max()) < len(numbers)


@pytest.mark.parametrize("variant", ["llama_tied", "phi", "gpt2", "gemma3_text", "opt"])
@torch.inference_mode()
def test_tied_heads_and_heads_with_a_bias(variant: str, tmp_path: Path) -> None:
    whole = load(tiny_vocabulary.folder(tmp_path / "whole", variant=variant))
    model, tokenizer, numbers = cut(whole, tmp_path / "cut", counts(whole, tiny_vocabulary.sentences()[:50]))
    assert model.config.tie_word_embeddings == whole.model.config.tie_word_embeddings
    text = tiny_vocabulary.sentences()[7]
    assert whole.tokenizer is not None
    old, new = (torch.tensor([each(text)["input_ids"][:60]]) for each in (whole.tokenizer, tokenizer))
    columns = torch.tensor(sorted(numbers, key=numbers.__getitem__))
    torch.testing.assert_close(
        model(input_ids=new).logits, whole.model(input_ids=old).logits[..., columns], atol=1e-5, rtol=1e-5
    )
    again = load(tmp_path / "cut")
    assert again.anatomy.total("parameters") < whole.anatomy.total("parameters")


def added_tokens(vocabulary: Vocabulary, uses: Counter[int], kept: set[int]) -> int:
    """How many tokens more a text has, where every removed one becomes its parts."""

    def pieces(token: int) -> int:
        return 1 if token in kept else sum(map(pieces, vocabulary.parts[token]))

    return sum(times * (pieces(token) - 1) for token, times in uses.items())


def test_the_cheapest_tokens_go_first(teacher: Teacher, tmp_path: Path) -> None:
    """What goes next adds the fewest tokens of all that may go, and the text has as many more as that says."""
    vocabulary, texts = read_vocabulary(teacher), tiny_vocabulary.sentences()
    uses = counts(teacher, texts)
    free = set(tokens_to_keep(vocabulary, uses))
    assert added_tokens(vocabulary, uses, free) == 0
    count = vocabulary.rows - len(free)
    paths = [set(tokens_to_keep(vocabulary, uses, count + step)) for step in range(25)]
    compared = 0
    for fewer, last in itertools.pairwise(paths):
        assert last < fewer
        needed = {part for token in fewer for part in vocabulary.needs.get(token, ())}
        prices = {
            token: added_tokens(vocabulary, uses, fewer - {token})
            for token in (fewer & vocabulary.parts.keys()) - needed
            if len(vocabulary.parts[token]) > 1  # a use that becomes one other token adds none, and counts as one
        }
        (gone,) = fewer - last
        compared += gone in prices
        assert prices.get(gone, 0) <= min(prices.values())
    assert compared
    last, count = paths[-1], count + 24
    if not teacher.name.endswith("unigram"):
        _, tokenizer, _ = cut(teacher, tmp_path / "cut", uses, count)
        more = len([i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in ids]) - uses.total()
        assert more == added_tokens(vocabulary, uses, last)


def test_a_share_that_reaches_bytes_says_how_much_may_go(teacher: Teacher) -> None:
    vocabulary = read_vocabulary(teacher)
    least = len(tokens_to_keep(vocabulary, Counter(), vocabulary.rows - len(vocabulary.kept) - 1 - 40))
    assert least > len(vocabulary.kept)
    with pytest.raises(BudgetError, match=r"special and added tokens, bytes and what those need stay") as refused:
        tokens_to_keep(vocabulary, Counter(), vocabulary.rows)
    share = int(str(refused.value).split("remove='")[1].split("%")[0])
    tokens_to_keep(vocabulary, Counter(), share * vocabulary.rows // 100)


def test_tokenizers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"its tokenizer is a WordLevel\. Billhook cuts BPE, or Unigram"):
        read_vocabulary(load(tiny.with_tokenizer(tmp_path / "words")))
    with pytest.raises(ModelError, match="has no tokenizer"):
        read_vocabulary(load(tiny.saved(tmp_path / "none", "llama")))
    marked = tiny.saved(tmp_path / "marked", "llama")
    backend = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(marked)
    with pytest.raises(ModelError, match="BPE with end_of_word_suffix='</w>'"):
        read_vocabulary(load(marked))
