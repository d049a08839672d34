"""Halves, portions and mixtures of token sets: nothing lost, nothing twice, nothing across."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import transformers
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.errors import DataError, UsageError
from billhook.core.events import Event, ignore_events
from billhook.data.calibration import calibration_tokens, held_out_tokens, require_disjoint
from billhook.data.splits import disjoint_parts, halves, interleave, select_documents
from billhook.data.texts import TextSpec, external_sources
from billhook.data.token_sets import Choices, Document, TokenSet, pack_rows, truncate
from billhook.data.token_sets import token_set as token_set_of
from billhook.models.load import Teacher, load
from billhook.runs.job import RunContext
from billhook.runs.prepare import calibration_spec, load_calibration, tokens_for
from billhook.runs.recipe import Recipe, parse_recipe, recipe_names, with_overrides
from billhook.runs.store import Store


def token_sets(data: str, teacher: Teacher, tokens: int, eval_tokens: int) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens of one text, or mixture, which share no document."""
    spec = TextSpec(data, "text", tokens, 20, 0)
    calibration = calibration_tokens(spec, teacher.model, teacher.tokenizer)
    held_out = TextSpec(external_sources(data), "text", eval_tokens, 20, 0)
    evaluation = held_out_tokens(held_out, teacher.model, teacher.tokenizer, calibration=data)
    require_disjoint(calibration, evaluation)
    return calibration, evaluation


def token_set(texts: int, seed: int = 0, source: str = "made up") -> TokenSet:
    """Texts of one to three documents of different lengths."""
    draw = random.Random(f"{seed} {source}")
    found = [
        Document(text, tuple(draw.choices(range(3, 64), k=draw.randint(8, 60))))
        for text in range(texts)
        for _ in range(draw.randint(1, 3))
    ]
    return pack_rows(found, 10**9, 16, [1], source)


def rows(tokens: TokenSet) -> Counter[tuple[str, tuple[int, ...]]]:
    """Every row with the digest of its document."""
    return Counter(
        (tokens.digests[d], tuple(row[:n].tolist()))
        for row, n, d in zip(tokens.rows, tokens.lengths, tokens.documents, strict=True)
    )


def texts(tokens: TokenSet) -> dict[str, int]:
    return dict(zip(tokens.digests, tokens.clusters, strict=True))


@given(st.integers(2, 9), st.integers(0, 99))
def test_halves_are_the_whole_and_share_no_text(count: int, seed: int) -> None:
    whole = token_set(count, seed)
    one, other = halves(whole)
    assert rows(one) + rows(other) == rows(whole)
    assert not set(one.clusters) & set(other.clusters)
    assert abs(len(set(one.clusters)) - len(set(other.clusters))) <= 1
    assert texts(one) | texts(other) == texts(whole)


def test_one_text_is_halved_by_documents_and_one_document_not() -> None:
    found = [Document(0, tuple(range(3, 20))), Document(0, tuple(range(20, 40)))]
    one, other = halves(pack_rows(found, 10**9, 16, [], "made up"))
    assert len(one.clusters) == len(other.clusters) == 1
    with pytest.raises(UsageError, match="cannot be halved"):
        halves(one)


@given(st.integers(3, 12), st.integers(0, 99), st.integers(20, 80))
def test_portions_are_large_enough_and_disjoint(count: int, seed: int, size: int) -> None:
    whole = token_set(count, seed)
    if whole.tokens < 2 * (size + 90):  # a document more than is needed goes into each
        return
    portions = disjoint_parts(whole, size, 2)
    assert all(portion.tokens >= size for portion in portions)
    assert not set(portions[0].digests) & set(portions[1].digests)
    assert rows(portions[0]) + rows(portions[1]) <= rows(whole)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_a_mixture_holds_all_and_begins_with_both(a: int, b: int, seed: int) -> None:
    sets = [token_set(a, seed, "a"), token_set(b, seed, "b")]
    both = interleave(sets, "a+b")
    assert rows(both) == rows(sets[0]) + rows(sets[1])
    assert len(set(both.clusters)) == sum(len(set(s.clusters)) for s in sets)
    assert list(both.documents) == sorted(both.documents)
    assert [d in sets[0].digests for d in both.digests[:2]] == [True, False]
    beginning = truncate(both, 30)
    assert beginning.digests == both.digests[: len(beginning.digests)]


def test_too_few_documents_for_portions_are_refused() -> None:
    with pytest.raises(DataError, match="gives 2 parts of 50 tokens that share no document, and 9 are wanted"):
        disjoint_parts(pack_rows([Document(i, tuple(range(3, 63))) for i in range(2)], 10**9, 16, [], "made up"), 50, 9)


def test_halves_of_items_keep_what_makes_them_choices() -> None:
    rows = [(5, 6, 7), (5, 8), (9, 10), (9, 11), (9, 12, 13)]
    of = Choices((1, 1, 1, 1, 1), (4, 3, 2, 5, 6), (1, 2))
    whole = token_set_of(rows, [0, 0, 1, 1, 1], [3, 8], ["a", "b"], "made up", choices=of)
    one, other = halves(whole)
    assert (one.choices, other.choices) == (Choices((1, 1), (4, 3), (1,)), Choices((1, 1, 1), (2, 5, 6), (2,)))
    assert (one.digests, other.digests) == (("a",), ("b",))


def test_picking_everything_changes_nothing() -> None:
    whole = token_set(4)
    assert select_documents(whole, range(len(whole.clusters))).hash == whole.hash


def test_a_mixture_of_files_shares_out_tokens_and_proof(tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    one, two = (tiny.write_texts(tmp_path / f"{name}.jsonl", 120, seed=i) for i, name in enumerate("ab"))
    calibration, held_out = token_sets(f"{one}+{two}", teacher, 400, 400)
    assert 400 <= calibration.tokens <= 440
    assert 400 <= held_out.tokens <= 440
    assert not set(calibration.digests) & set(held_out.digests)
    alone = [token_sets(str(p), teacher, 200, 200) for p in (one, two)]
    assert rows(calibration) == rows(alone[0][0]) + rows(alone[1][0])
    assert rows(held_out) == rows(alone[0][1]) + rows(alone[1][1])


def test_a_mixture_with_the_models_own_words_proves_on_the_text(tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    file = tiny.write_texts(tmp_path / "a.jsonl", 120)
    transformers.set_seed(0)
    calibration, held_out = token_sets(f"{file}+self", teacher, 200, 200)
    assert calibration.tokens >= 200
    assert held_out.source == str(file)


def test_the_model_writes_its_share_and_the_proof_is_the_texts(tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    file = tiny.write_texts(tmp_path / "a.jsonl", 120)
    wanted = TextSpec(str(file), "text", 400, 20, 0)
    recipe = Recipe(remove="1sites", data=str(file), tokens=400, length=20, eval_tokens=200, eval_length=20)
    alone, held_out = token_sets(str(file), teacher, 400, 200)
    mixed, same = tokens_for(recipe.model_copy(update={"self_share": 0.25}), teacher, ignore_events)
    assert (mixed.source, same.hash) == (f"{file}+self", held_out.hash)
    assert mixed.hash == calibration_tokens(wanted, teacher.model, teacher.tokenizer, self_share=0.25).hash
    given = calibration_tokens(replace(wanted, tokens=300), teacher.model, teacher.tokenizer)
    assert not rows(given) - rows(mixed), "three quarters are the text's first rows"
    own = rows(mixed) - rows(given)
    assert 100 <= sum(count * len(ids) for (_, ids), count in own.items()) <= 120
    assert not {digest for digest, _ in own} & {digest for digest, _ in rows(alone)}


@pytest.mark.parametrize("why", ["no start", "stops", "streamed"])
def test_a_model_that_cannot_write_takes_the_text_alone_and_says_so(why: str, tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    file = tiny.write_texts(tmp_path / "a.jsonl", 120)
    wanted = TextSpec(str(file), "text", 200, 20, 0)
    alone = calibration_tokens(wanted, teacher.model, teacher.tokenizer)
    if why == "no start":
        teacher.tokenizer.bos_token = teacher.tokenizer.eos_token = None
    elif why == "stops":
        teacher.model.generate = lambda starts, **options: starts
    else:
        teacher.model.to("meta")
    told: list[Event] = []
    got = calibration_tokens(wanted, teacher.model, teacher.tokenizer, told.append, self_share=0.5)
    assert got.hash == alone.hash
    (note,) = [str(event.values["because"]) for event in told if event.values.get("alone_on") == str(file)]
    assert {"no start": "neither a BOS", "stops": "stops at once", "streamed": "does not fit"}[why] in note


def test_what_the_model_wrote_is_filed(tmp_path: Path) -> None:
    """A run that goes on elsewhere must get the same tokens, though other hardware would sample others."""
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    file = tiny.write_texts(tmp_path / "a.jsonl", 120)
    recipe = Recipe(remove="1sites", data=str(file), tokens=200, length=20, eval_tokens=200, eval_length=20)
    with closing(Store(tmp_path / "s.db")) as store:
        job = RunContext(
            recipe, store, store.new_run("prune", recipe.model_dump(), {}, ""), tmp_path, ignore_events, {}
        )
        spec = calibration_spec(recipe)
        first_time = load_calibration(job, teacher, spec, self_share=recipe.self_share)
        assert first_time.source == f"{file}+self"
        teacher.model.generate = None  # it would fail
        assert load_calibration(job, teacher, spec, self_share=recipe.self_share).hash == first_time.hash
        with pytest.raises(TypeError):
            load_calibration(job, teacher, replace(spec, seed=1), self_share=recipe.self_share)


def test_only_our_recipes_let_the_model_write() -> None:
    shares = {name: Recipe(**with_overrides(name, remove="1sites")).self_share for name in recipe_names()}
    assert {name for name, share in shares.items() if share} == {"billhook-depth", "billhook-width"}
    assert parse_recipe({"remove": "1sites"}).self_share == shares["billhook-depth"]


@pytest.mark.parametrize("data", ["{}+", "+{}", "{}++self"])
def test_an_empty_source_is_refused(data: str, tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    file = tiny.write_texts(tmp_path / "a.jsonl", 120)
    with pytest.raises(UsageError, match=r"one of them is empty\. Write my\.jsonl\+self"):
        token_sets(data.format(file), teacher, 100, 100)


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    """Two files with the same texts in another order: what one calibrates on, the other would prove with."""
    teacher = load(tiny.with_tokenizer(tmp_path / "m"))
    one = tiny.write_texts(tmp_path / "a.jsonl", 120)
    two = tmp_path / "b.jsonl"
    two.write_text("\n".join(reversed(one.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match="more than one source"):
        token_sets(f"{one}+{two}", teacher, 2000, 2000)
