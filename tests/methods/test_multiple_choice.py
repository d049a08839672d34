"""Log-probabilities of choices: shared beginnings and the head where it is read change no number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import hooked

from billhook.core.events import ignore_events
from billhook.core.plan import Plan
from billhook.data.prefixes import Input, SharingCosts, batch_groups, group_by_prefix, keep_worthwhile, unique_inputs
from billhook.data.token_sets import Choices, TokenSet, token_set
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply, masked
from billhook.runs.evaluation import choice_logprobs
from billhook.runs.job import RunContext
from billhook.runs.recipe import parse_recipe
from billhook.runs.store import Store

Folder = Callable[[str], Path]
Item = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]  # contexts, one a choice or one for all, and choices


def items_set(items: Sequence[Item]) -> TokenSet:
    """Items given by their tokens."""
    rows, first, documents = [], [], []
    for document, (contexts, choices) in enumerate(items):
        for i, choice in enumerate(choices):
            context = contexts[i % len(contexts)]
            rows.append((*context, *choice))
            first.append(len(context))
            documents.append(document)
    count = len(items)
    choices_of = Choices(tuple(first), (1,) * len(rows), (0,) * count)
    return token_set(rows, documents, range(count), [""] * count, "made up", choices=choices_of)


def drawn(count: int, seed: int, *, most: int = 20) -> list[Item]:
    """Items of 2 to 4 choices: contexts of 1 to `most` tokens, shared, almost shared or not; choices of 1 to 6."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(3, 64), k=draw.randint(least, most)))

    items: list[Item] = []
    for number in range(count):
        choices = [words(1, 1 if number % 3 == 1 else 6) for _ in range(draw.randint(2, 4))]
        begin = words(1, 1 if number % 5 == 1 else most)
        contexts = [begin] if number % 4 else [begin + words(0, 3) for _ in choices]
        items.append((contexts, choices))
    return items


@torch.no_grad()
def by_rows(model: Any, tokens: TokenSet) -> list[float]:
    """One forward pass a row over the whole row, without a cache, summed in float64."""
    assert tokens.choices is not None
    sums = []
    for row, n, begins in zip(tokens.rows, tokens.lengths, tokens.choices.first, strict=True):
        logits = model(input_ids=row[None, :n], use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logits[at - 1, row[at]]) for at in range(begins, n)))
    return sums


def close(model: Any, tokens: TokenSet, sharing: SharingCosts = SharingCosts()) -> None:  # noqa: B008
    sums = log_probabilities(model, tokens, sharing=sharing)
    assert sums == pytest.approx(by_rows(model, tokens), rel=1e-4, abs=1e-4)


@contextmanager
def counted(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(token positions, positions that the head saw) of every forward pass inside."""
    seen: list[list[int]] = []
    handles = [
        model.get_input_embeddings().register_forward_hook(lambda m, args, y: seen.append([args[0].numel(), 0])),
        model.get_output_embeddings().register_forward_hook(
            lambda m, args, y: seen[-1].__setitem__(1, y.shape[:-1].numel())
        ),
    ]
    told: list[tuple[int, int]] = []
    try:
        yield told
    finally:
        told += [(a, b) for a, b in seen]
        for handle in handles:
            handle.remove()


def sharing_from(saved: int) -> SharingCosts:
    """Prefixes are shared from so many saved tokens on."""
    return SharingCosts(group=saved, length=saved, share=0)


# -- no number changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_sums_are_those_of_rows_on_their_own(variant: str, checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All architectures, whole, and as a student that lost its first attention and more; sharing whatever it saves."""
    teacher = load(checkpoint(variant))
    for removed in ((), ("attention.0", "mlp.1", "attention.2"), ("attention.3", "mlp.3")):
        model = apply(teacher, Plan.parse(removed)) if removed else teacher.model
        for seed, most in ((0, 20), (1, 4)):
            tokens = items_set(drawn(8, seed, most=most))
            close(model, tokens)
            close(model, tokens, sharing_from(0))


TOKENS = st.lists(st.integers(3, 8), min_size=1, max_size=7).map(tuple)  # few kinds, so that beginnings meet
ITEM = st.tuples(
    st.lists(TOKENS, min_size=1, max_size=3), st.lists(TOKENS.map(lambda ids: ids[:4]), min_size=2, max_size=4)
)


@pytest.fixture(scope="module")
def teacher(checkpoint: Folder) -> Teacher:
    return load(checkpoint("llama"))


@settings(max_examples=25)
@given(items=st.lists(ITEM, min_size=1, max_size=6), sharing=st.sampled_from([0, 1, 32]))
def test_any_items_shared_or_not(items: list[Item], sharing: int, teacher: Teacher) -> None:
    close(teacher.model, items_set(items), sharing_from(sharing))


def test_a_teacher_with_masked_sites_is_read_the_plain_way(checkpoint: Folder, teacher: Teacher) -> None:
    plan, tokens = Plan.parse(["attention.0", "mlp.2"]), items_set(drawn(8, 3, most=40))
    with hooked(teacher, plan):
        expected = by_rows(teacher.model, tokens)
        assert log_probabilities(teacher.model, tokens) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    with masked(teacher, plan), counted(teacher.model) as seen:
        assert log_probabilities(teacher.model, tokens) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert sum(positions for positions, _ in seen[1:]) >= sum(len(path.ids) for path in unique_inputs(tokens))


def test_nothing_is_shared_behind_a_sliding_window(checkpoint: Folder) -> None:
    """The tiny mistral sees 6 tokens: items of 6 are shared, longer ones are not, and all are right."""
    model = load(checkpoint("mistral")).model
    short, long = ((((3, 4, 5),), ((6, 7, 8), (9, 7, 8))), (((3, 4, 5) * 20,), ((6, 7, 8), (9, 7, 8))))
    for item, shared in ((short, True), (long, False)):
        tokens = items_set([(list(item[0]), list(item[1]))])
        close(model, tokens)
        with counted(model) as seen:
            log_probabilities(model, tokens, sharing=sharing_from(0))
        assert (len(seen) == 3) == shared, "the trial of the cache, and two passes where a beginning is shared"


# -- what it saves --------------------------------------------------------------------------------------------------


def test_a_context_is_computed_once_and_the_head_where_it_is_read(teacher: Teacher) -> None:
    context = tuple(random.Random(5).choices(range(3, 64), k=30))
    tokens = items_set([([context], [(5, 6, 7), (8, 9), (10, 11, 12), (13,)])])
    with counted(teacher.model) as seen:
        log_probabilities(teacher.model, tokens, sharing=sharing_from(16))
    assert seen[1:] == [(30, 1), (3 * 2, 2 + 1 + 2)], "30 tokens once, then 2, 1 and 2, padded to 2"


def test_choices_of_one_token_take_one_row_and_contexts_of_one_token_are_not_shared(teacher: Teacher) -> None:
    letters = [(5,), (6,), (7,), (8,)]
    tokens = items_set([([(9,) * 20], letters), ([(9,) * 12], letters), ([(4,)], letters)])
    with counted(teacher.model) as seen:
        sums = log_probabilities(teacher.model, tokens)
    assert sum(read for _, read in seen[1:]) == 3
    assert sum(positions for positions, _ in seen[1:]) <= 3 * 20
    assert sums == pytest.approx(by_rows(teacher.model, tokens), rel=1e-4, abs=1e-4)


def test_a_preamble_is_shared_across_items(teacher: Teacher) -> None:
    draw = random.Random(7)
    preamble = tuple(draw.choices(range(3, 64), k=60))
    items: list[Item] = [
        ([preamble + tuple(draw.choices(range(3, 64), k=draw.randint(2, 6)))], [(5,), (6,), (7,)]) for _ in range(20)
    ]
    tokens = items_set(items)
    (family,) = group_by_prefix(unique_inputs(tokens), None)
    assert family.shared >= 60
    assert family.positions < 60 + 20 * 7
    close(teacher.model, tokens)
    with counted(teacher.model) as seen:
        log_probabilities(teacher.model, tokens)
    assert sum(positions for positions, _ in seen[1:]) < 60 + 20 * 7 < tokens.tokens / 10


def cheapest(paths: list[Input], sharing: int) -> int:
    """Positions, and `sharing` more for each prefix, of the best way to cut the sorted paths, by trying all."""
    if not paths:
        return 0
    found = [len(paths[0].ids) + cheapest(paths[1:], sharing)]
    for end in range(2, len(paths) + 1):
        some = paths[:end]
        shared = next(
            (i for i in range(99) if len({path.ids[: i + 1] for path in some}) > 1 or i == len(some[0].ids)), 0
        )
        shared = min(shared, *(len(path.ids) for path in some))
        if shared:
            cost = sum(len(path.ids) for path in some) - (end - 1) * shared + sharing
            found.append(cost + cheapest(paths[end:], sharing))
    return min(found)


@settings(max_examples=40)
@given(items=st.lists(ITEM, min_size=1, max_size=3), sharing=st.sampled_from([0, 2, 5]))
def test_families_take_the_fewest_positions(items: list[Item], sharing: int) -> None:
    paths = unique_inputs(items_set(items))[:9]
    found = group_by_prefix(paths, None, sharing_from(sharing))
    assert [path for family in found for path in family.inputs] == paths
    assert all(path.ids[: f.shared] == f.inputs[0].ids[: f.shared] for f in found for path in f.inputs)
    assert sum(f.positions + sharing * bool(f.shared) for f in found) == cheapest(paths, sharing)


def test_beginnings_of_a_length_of_which_there_are_few_are_not_shared(teacher: Teacher) -> None:
    """They would take passes of their own, and save less than these cost; with enough of them they save more."""
    draw = random.Random(3)

    def items(count: int) -> list[Item]:
        contexts = [tuple(draw.choices(range(3, 64), k=40)) for _ in range(count)]
        return [([context], [(5, 6), (7, 8)]) for context in contexts]

    few, many = (group_by_prefix(unique_inputs(items_set(items(count))), None) for count in (2, 3))
    assert [family.shared for family in few] == [40] * 2
    assert [family.shared for family in keep_worthwhile(few)] == [0] * 4
    assert keep_worthwhile(many) == many
    assert keep_worthwhile(few[:1] + many) == few[:1] + many
    long = [([tuple(draw.choices(range(3, 64), k=40))], [(5, *range(3, 40)), (6, *range(3, 40))]) for _ in range(9)]
    families_of_long = group_by_prefix(unique_inputs(items_set(long)), None)
    assert [family.shared for family in families_of_long] == [40] * 9
    assert {family.shared for family in keep_worthwhile(families_of_long)} == {0}, "a quarter saved is not enough"


def test_batches_keep_their_bounds_and_lose_nothing() -> None:
    found = group_by_prefix(unique_inputs(items_set(drawn(60, 11))), None)
    batches = list(batch_groups(found, 200, 30))
    assert sorted(map(id, found)) == sorted(id(family) for batch in batches for family in batch)
    for batch in batches:
        assert len({family.shared for family in batch}) == 1
        lines, longest = sum(len(f.inputs) for f in batch), max(f.longest for f in batch)
        assert len(batch) == 1 or (lines * longest <= 200 and sum(f.reads for f in batch) <= 30)
    assert len(batches) < len(found)


def test_the_same_again_and_progress_to_the_end(teacher: Teacher) -> None:
    tokens, seen = items_set(drawn(30, 13, most=50)), []
    sums = log_probabilities(teacher.model, tokens, watch=lambda event: seen.append((event.done, event.total)))
    assert sums == log_probabilities(teacher.model, tokens)
    assert seen == sorted(seen)
    assert seen[-1] == (tokens.tokens, tokens.tokens)


# -- what a killed evaluation leaves --------------------------------------------------------------------------------


class Dying(Store):
    """A store whose process is killed before it stores its value number `last`."""

    last = 10**6

    def add(self, *values: Any) -> None:
        if self.last == 0:
            raise KeyboardInterrupt
        self.last -= 1
        super().add(*values)


def filed(store: Store) -> dict[str, int]:
    """How many batches each run has measured."""
    return dict(store._db.execute("SELECT run, count(*) FROM facts WHERE what = 'choices' GROUP BY run").fetchall())


@pytest.mark.parametrize("repaired", [False, True])
def test_a_killed_evaluation_resumes_after_its_last_batch(repaired: bool, model: Path, tmp_path: Path) -> None:
    teacher = load(model)
    tokens = items_set(drawn(20, 17))
    plan = Plan.parse(["mlp.1", "attention.2"])
    change = {"model.layers.3.mlp.down_proj.weight": teacher.model.model.layers[3].mlp.down_proj.weight * 1.5}
    sides = [(plan, Repair(weights=change))] if repaired else [(Plan(), NO_REPAIR), (plan, NO_REPAIR)]
    recipe = parse_recipe({"model": str(model), "remove": "1sites"})

    def ask(store: Store) -> tuple[str, list[list[float]]]:
        run = store.new_run("prune", {}, {}, "out")
        context = RunContext(recipe, store, run, tmp_path, ignore_events, {})
        return run, choice_logprobs(context, teacher, sides, tokens, batch_items=6)

    with closing(Dying(tmp_path / "runs.db")) as store:
        store.last = 2 * len(sides)
        with pytest.raises(KeyboardInterrupt):
            ask(store)
        (killed,) = filed(store)
        assert filed(store) == {killed: 2 * len(sides)}, "two batches of four"
    with closing(Store(tmp_path / "runs.db")) as store:
        second, sums = ask(store)
        assert filed(store) == {killed: 2 * len(sides), second: 2 * len(sides)}
        with counted(teacher.model) as seen:
            third, again = ask(store)
        assert again == sums
        assert not seen
        assert third not in filed(store)
    for (removed, repair), found in zip(sides, sums, strict=True):
        student = apply(teacher, removed, repair=repair) if removed.removed else teacher.model
        assert found == pytest.approx(by_rows(student, tokens), rel=1e-4, abs=1e-4)
