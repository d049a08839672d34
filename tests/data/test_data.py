"""Token sets: rows inside documents, calibration apart from evaluation, one hash for one content."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from billhook.core.errors import DataError
from billhook.core.results.measured import EvalResult
from billhook.core.statistics import mean_interval
from billhook.data.calibration import calibration_tokens, held_out_tokens, require_disjoint
from billhook.data.choice_tasks import task_tokens
from billhook.data.generated import sample_texts
from billhook.data.generation_tasks import build_prompts
from billhook.data.splits import interleave
from billhook.data.texts import TextSpec, read_texts
from billhook.data.token_sets import (
    DOCUMENT_TOKENS,
    MIN_ROW,
    Document,
    TokenSet,
    documents,
    pack_rows,
    special_prefix,
    truncate,
)

MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=96))
SEEDS = (0, 1, 17)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def with_bos(model: Path) -> Any:
    """The same tokenizer, which puts <s> before a text of its own accord."""
    found: Any = transformers.AutoTokenizer.from_pretrained(model)
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(tiny.WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def rows(tokens: TokenSet) -> list[tuple[int, ...]]:
    return [tuple(row[:n].tolist()) for row, n in zip(tokens.rows, tokens.lengths, strict=True)]


def token_sets(
    data: Path | str,
    model: Any,
    tokenizer: Any,
    *,
    seed: int = 0,
    tokens: int = 300,
    eval_data: str | None = None,
    eval_tokens: int = 300,
) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens, which share no document."""
    calibrated = TextSpec(str(data), "text", tokens, 32, seed)
    held_out = TextSpec(eval_data or str(data), "text", eval_tokens, 48, seed)
    calibration = calibration_tokens(calibrated, model, tokenizer, held_out=eval_data)
    evaluation = held_out_tokens(held_out, model, tokenizer, calibration=str(data))
    require_disjoint(calibration, evaluation)
    return calibration, evaluation


def in_file(home: Path, lines: list[str]) -> Path:
    path = home / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


# -- documents and rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_crosses_a_document(seed: int, tokenizer: Any) -> None:
    said = texts(30, 90, seed)
    found = documents(said, tokenizer, seed)
    tokens = pack_rows(found, 900, 32, [], "here")
    whole = [tuple(tokenizer(text)["input_ids"]) for text in said]
    for ids, document in zip(rows(tokens), tokens.documents, strict=True):
        text = whole[tokens.clusters[document]]
        assert any(text[i : i + len(ids)] == ids for i in range(len(text))), "a row is a piece of its own text"
    assert (tokens.rows == 0).sum() == sum(tokens.rows.shape[1] - n for n in tokens.lengths), "only padding is zero"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rows_of_all_of_it_are_all_of_it(seed: int, tokenizer: Any) -> None:
    """Nothing is lost but ends that are too short for a row, and nothing comes twice."""
    said = texts(20, 90, seed)
    found = documents(said, tokenizer, seed)
    tokens = pack_rows(found, 10**6, 32, [], "here")
    together: dict[int, tuple[int, ...]] = {}
    for ids, document in zip(rows(tokens), tokens.documents, strict=True):
        text = tokens.clusters[document]
        together[text] = together.get(text, ()) + ids
    for number, text in enumerate(said):
        ids = tuple(tokenizer(text)["input_ids"])
        lost = len(ids) % 32 if len(ids) % 32 < MIN_ROW else 0
        assert together.get(number, ()) == ids[: len(ids) - lost]


def test_every_text_comes_once_before_any_comes_twice(tokenizer: Any) -> None:
    said = [" ".join(tiny.WORDS[:50])] * 3 + [" ".join(tiny.WORDS)] * 3
    tokens = pack_rows(documents(said, tokenizer, 0), 7 * 16, 16, [], "here")
    counts = [tokens.documents.count(d) for d in range(len(tokens.clusters))]
    assert sorted(counts) == [1, 1, 1, 1, 1, 2]


def test_long_texts_are_split_and_stay_one_cluster(tokenizer: Any) -> None:
    said = [" ".join(random.Random(0).choices(tiny.WORDS, k=2 * DOCUMENT_TOKENS + 100)), " ".join(tiny.WORDS), "w1 w2"]
    found = documents(said, tokenizer, 3)
    assert sorted(len(d.ids) for d in found) == sorted([len(tiny.WORDS), 100, DOCUMENT_TOKENS, DOCUMENT_TOKENS])
    long = [d for d in found if d.text == 0]
    assert sum((d.ids for d in long), ()) == tuple(tokenizer(said[0])["input_ids"]), "in order, nothing lost"
    assert {d.text for d in found[:2]} == {0, 1}, "every text once before any twice"
    tokens = pack_rows(found, 10**6, 64, [], "here")
    assert (len(tokens.clusters), len(set(tokens.clusters))) == (4, 2)
    assert replace(tokens.info(), documents=4, texts=2, source="here") == tokens.info()


@pytest.mark.parametrize("count", [16, 100, 101, 333, 640])
def test_the_tokens_asked_for_are_reached_by_at_most_a_short_row(count: int, tokenizer: Any) -> None:
    found = documents(texts(30, 90), tokenizer, 0)
    tokens = pack_rows(found, count, 32, [], "here")
    assert count <= tokens.tokens < count + MIN_ROW
    assert max(tokens.lengths) <= 32
    assert min(tokens.lengths) >= MIN_ROW


def test_the_order_is_the_seeds(tokenizer: Any) -> None:
    said = texts(30, 60)
    hashes = [pack_rows(documents(said, tokenizer, seed), 200, 32, [], "here").hash for seed in (0, 0, 1, 2)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_every_row_begins_as_the_tokenizer_begins_a_text(tokenizer: Any, with_bos: Any) -> None:
    assert special_prefix(tokenizer) == []
    assert special_prefix(with_bos) == [1]
    found = documents(texts(10, 60), with_bos, 0)
    assert not any(1 in d.ids for d in found), "the prefix belongs to rows, not to documents"
    tokens = pack_rows(found, 200, 32, special_prefix(with_bos), "here")
    assert all(ids[0] == 1 and 1 not in ids[1:] and len(ids) <= 32 for ids in rows(tokens))
    bare = pack_rows(documents(texts(10, 60), tokenizer, 0), 10**6, 31, [], "here")
    full = pack_rows(found, 10**6, 32, [1], "here")
    assert [ids[1:] for ids in rows(full)] == rows(bare)


def test_the_hash_is_of_what_is_measured_and_of_nothing_else() -> None:
    ids, other = tuple(range(3, 19)), tuple(range(4, 20))
    base = pack_rows([Document(0, ids), Document(1, other)], 32, 16, [], "here")
    assert pack_rows([Document(0, ids), Document(1, other)], 32, 16, [], "elsewhere").hash == base.hash
    assert pack_rows([Document(0, ids), Document(1, other), Document(2, ids)], 32, 16, [], "here").hash == base.hash
    different = [
        pack_rows([Document(0, other), Document(1, ids)], 32, 16, [], "here"),  # order
        pack_rows([Document(0, ids), Document(0, other)], 32, 16, [], "here"),  # clusters
        pack_rows([Document(0, ids), Document(1, (*other[:-1], 5))], 32, 16, [], "here"),  # one token
        pack_rows([Document(0, ids), Document(1, (*other[:-1], 0))], 32, 16, [], "here"),
        pack_rows([Document(0, ids), Document(1, other[:-1])], 32, 16, [], "here"),  # padded like the one above
        pack_rows([Document(0, ids + other)], 32, 16, [], "here"),  # documents
    ]
    assert torch.equal(different[3].rows, different[4].rows)
    assert len({tokens.hash for tokens in (base, *different)}) == 7


@pytest.mark.parametrize("count", [1, 33, 150, 10**6])
def test_the_first_tokens_are_whole_rows_from_the_front(count: int, tokenizer: Any) -> None:
    tokens = pack_rows(documents(texts(12, 90), tokenizer, 0), 500, 32, [], "here")
    part = truncate(tokens, count)
    n = len(part.lengths)
    assert rows(part) == rows(tokens)[:n]
    assert part.documents == tokens.documents[:n]
    assert part.clusters == tokens.clusters[: max(part.documents) + 1]
    assert part.tokens >= min(count, tokens.tokens)
    assert n == len(tokens.lengths) or part.tokens - part.lengths[-1] < count <= part.tokens
    assert (part.hash == tokens.hash) == (n == len(tokens.lengths))


# -- calibration and evaluation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_and_evaluation_share_no_document(seed: int, tokenizer: Any, tmp_path: Path) -> None:
    said = texts(25, 60, seed)
    path = in_file(tmp_path, [*said, *said[:10]])  # ten texts come twice
    calibration, evaluation = token_sets(path, MODEL, tokenizer, seed=seed)
    assert calibration.tokens >= 300
    assert evaluation.tokens >= 100
    assert not set(calibration.digests) & set(evaluation.digests)
    assert not set(rows(calibration)) & set(rows(evaluation))
    again = token_sets(path, MODEL, tokenizer, seed=seed)
    assert [tokens.hash for tokens in again] == [calibration.hash, evaluation.hash]


@pytest.mark.parametrize("count", [25, 80], ids=["halved by document", "halved by text"])
def test_what_is_held_out_is_so_under_every_seed(count: int, tokenizer: Any, tmp_path: Path) -> None:
    said = texts(count, 60, 0)
    path = in_file(tmp_path, [*said, *said[:10]])
    drawn = [token_sets(path, MODEL, tokenizer, seed=seed, tokens=300) for seed in range(4)]
    seen = {digest for calibration, _ in drawn for digest in calibration.digests}
    assert len(seen) > len(drawn[0][0].digests), "every seed draws its own documents"
    assert not seen & {digest for _, evaluation in drawn for digest in evaluation.digests}


def test_calibration_does_not_depend_on_how_much_is_evaluated(tokenizer: Any, text: Path) -> None:
    """So that losses of an earlier run are found again."""
    few, many = (token_sets(text, MODEL, tokenizer, eval_tokens=n) for n in (100, 1000))
    assert few[0].hash == many[0].hash
    assert few[1].hash != many[1].hash


def test_other_text_to_evaluate_on(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    other = in_file(tmp_path, texts(20, 60, seed=5))
    calibration, evaluation = token_sets(text, MODEL, tokenizer, tokens=3000, eval_data=str(other))
    assert calibration.tokens == 3000, "all of the text may be calibrated on"
    assert (calibration.source, evaluation.source) == (str(text), str(other))
    split = token_sets(text, MODEL, tokenizer, eval_data=str(text))
    assert [t.hash for t in split] == [t.hash for t in token_sets(text, MODEL, tokenizer)]


def test_self_is_sampled_in_batches_under_its_seed(model: Path, tokenizer: Any) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    calls: list[int] = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    before = torch.get_rng_state()
    one, again, other = (sample_texts(network, tokenizer, 300, seed, length=24) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are touched"
    assert one == again != other
    assert len(one) * 24 >= 300
    assert set(calls) == {13}, "of thirteen texts, for which one round would do if none ended early"
    assert len(calls) <= 3 * 2 * 23, "a token a step"
    assert len(set(one)) > 13, "the second batch is not the first one again"


def test_self_is_not_cut_as_answers_are(model: Path, tokenizer: Any) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    plain = sample_texts(network, tokenizer, 100, 4, length=24)
    network.generation_config.update(repetition_penalty=3.0, min_p=0.5, temperature=0.1, no_repeat_ngram_size=1)
    assert sample_texts(network, tokenizer, 100, 4, length=24) == plain
    assert network.generation_config.repetition_penalty == 3.0, "it is the model's again"


def test_self_is_evaluated_on_other_text(model: Path, tokenizer: Any, text: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    calibration, evaluation = token_sets("self", network, tokenizer, tokens=128, eval_data=str(text))
    assert (calibration.source, evaluation.source) == ("self", str(text))
    assert calibration.tokens >= 128


# -- files ----------------------------------------------------------------------------------------------------------

SAID = ["w1 w2 w3", "w4 \u2028 w5", "w6\nw7"]
ROWS = "".join(json.dumps({"body": text, "n": 1}, ensure_ascii=False) + "\n" for text in SAID)


def test_every_kind_of_file_gives_the_same_texts(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    for name, content in (
        ("a.jsonl", ROWS.encode()),
        ("b.jsonl.gz", gzip.compress(ROWS.encode())),
        ("c.json", ROWS.replace("\n", "\r\n\r\n").encode()),
        ("d.jsonl", b"\xef\xbb\xbf" + ROWS.encode()),  # with a byte order mark
    ):
        (tmp_path / name).write_bytes(content)
        assert read_texts(str(tmp_path / name), "body", tokenizer) == SAID, name
    datasets.Dataset.from_dict({"body": SAID, "n": [1, 2, 3]}).to_parquet(tmp_path / "e.parquet")
    assert read_texts(str(tmp_path / "e.parquet"), "body", tokenizer) == SAID


def test_a_text_file_is_one_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1\n\nw2", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"w1\n\nw2"))
    (tmp_path / "noname").write_text("w1\n\nw2", encoding="utf-8")
    for name in ("a.txt", "a.txt.gz", "noname"):
        assert read_texts(str(tmp_path / name), "text", tokenizer) == ["w1\n\nw2"]


def test_chats_are_read_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    assert read_texts(str(tmp_path / "a.jsonl"), "text", tokenizer) == ["w1 w2 w3 "]
    with pytest.raises(DataError, match="holds chats, and this model's tokenizer has no chat template"):
        read_texts(str(tmp_path / "a.jsonl"), "text", SimpleNamespace(chat_template=None))


def test_every_python_has_text() -> None:
    found = read_texts("pydoc", "text", None)
    assert sum(map(len, found)) > 100_000
    assert found == read_texts("pydoc", "text", None)


# -- what precedes a text, and copies of one ------------------------------------------------------------------------


def bracketed(model: Path, single: str) -> Any:
    """The tokenizer with special tokens around every text."""
    found: Any = transformers.AutoTokenizer.from_pretrained(model)
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 0)]
    )
    return found


@pytest.mark.parametrize(
    ("single", "prefix"),
    [("<s> $A </s>", [1]), ("<pad> <s> $A </s> </s>", [0, 1]), ("$A </s>", []), ("<s> $A", [1]), ("</s> $A </s>", [2])],
)
def test_what_precedes_a_text_is_found_whatever_follows_it(
    single: str, prefix: list[int], model: Path, tmp_path: Path
) -> None:
    tokenizer = bracketed(model, single)
    assert special_prefix(tokenizer) == prefix
    path = in_file(tmp_path, texts(30, 60))
    for tokens in token_sets(path, MODEL, tokenizer):
        assert all(list(ids[: len(prefix)]) == prefix and not {1, 2} & {*ids[len(prefix) :]} for ids in rows(tokens))
    item = tmp_path / "t.jsonl"
    item.write_text('{"query": "w1", "choices": ["w2", "w3"], "gold": 0}\n')
    assert rows(task_tokens(item, tokenizer)) == [(*prefix, 5, 6), (*prefix, 5, 7)]
    question = tmp_path / "q.jsonl"
    question.write_text('{"query": "w1", "answer": "w2", "target": "w2"}\n')
    assert rows(build_prompts(question, tokenizer).tokens) == [(*prefix, 5)]


def test_what_the_model_writes_begins_as_its_texts_do(model: Path) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    began: list[list[int]] = []
    plain = network.generate
    network.generate = lambda starts, **given: began.extend(starts.tolist()) or plain(starts, **given)
    sample_texts(network, bracketed(model, "<pad> <s> $A </s>"), 60, 0, length=20)
    assert began
    assert all(start == [0, 1] for start in began)


def test_copies_of_a_text_are_one(tokenizer: Any, tmp_path: Path) -> None:
    four = [" ".join(random.Random(i).choices(tiny.WORDS, k=60)) for i in range(4)]
    held_out = held_out_tokens(
        TextSpec(str(in_file(tmp_path, four * 25)), "text", 4000, 48, 0), MODEL, tokenizer, calibration="elsewhere"
    )
    assert held_out.info().documents > 60
    assert held_out.info().texts == 4
    sums, counts = tuple(map(float, held_out.clusters)), (9,) * len(held_out.clusters)
    result = EvalResult("perplexity", held_out.hash, sums, counts, held_out.clusters)
    estimate = mean_interval(result, 0)
    assert (estimate.clusters, estimate.reliable, estimate.reason) == (4, False, "few_texts")


def test_a_text_in_two_sources_is_one(tokenizer: Any) -> None:
    said = texts(6, 60, seed=3)
    first, second = (pack_rows(documents(said[i : i + 4], tokenizer, i), 10**6, 48, [], f"{i}") for i in (0, 2))
    both = interleave([first, second], "0+2")
    assert (both.info().documents, both.info().texts) == (8, 6)
