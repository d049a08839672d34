"""Multiple-choice tasks: requests, tokens, accuracy and the losses `task` and `task_error`, each against plain sums."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_checkpoints import hooked
from test_probe import Diary
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from billhook.core.errors import DataError, ModelError, UnknownName, UsageError
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.results.measured import Loss
from billhook.data.choice_tasks import Item, read_items, requests, task_tokens
from billhook.data.generation_tasks import build_prompts
from billhook.data.splits import select_documents
from billhook.data.token_sets import TokenSet, truncate
from billhook.engine.losses import ITEM_LOSSES, LOSSES, LossSpec, parse_loss
from billhook.engine.probe import Probe, RacingOptions
from billhook.methods.evaluate import EVALUATIONS
from billhook.methods.evaluate.multiple_choice import log_probabilities, score_choices
from billhook.methods.metrics import METRICS
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor, store_cache
from billhook.runs.store import Store

Folder = Callable[[str], Path]
ROW = {"query": "a b", "choices": ["c", "d"], "gold": 1}
PLANS = [
    Plan(),
    *(Plan.parse(["mlp.2", *more]) for more in ([], ["attention.1"], ["attention.0", "mlp.3"])),
]


def letters(merges: Sequence[tuple[str, str]] = ((" ", "a"),), bos: bool = False) -> Any:
    """A tokenizer of single characters, blanks too, and of `merges`."""
    alphabet = ["<s>", "</s>", "\n", " ", *map(chr, range(33, 127))]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def random_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Items of 2 to 5 choices of 1 to 4 words; every fifth with contexts of its own, every seventh with a subject."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=draw.randint(least, most)))

    rows = []
    for number in range(count):
        choices = [words(1, 4) for _ in range(draw.randint(2, 5))]
        row = {"id": f"r{number}", "query": words(0, 8), "choices": choices, "gold": draw.randrange(len(choices))}
        if number % 5 == 4:
            row |= {"contexts": [words(1, 8) for _ in choices], "continuation": words(1, 5)}
        rows.append(row | ({"subject": "abstract_w3"} if number % 7 == 6 else {}))
    return rows


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tasks") / "items.jsonl", *random_rows(50))


def pieces(tokens: TokenSet, tokenizer: Any) -> list[tuple[list[str], list[str]]]:
    """Tokens of context and choice of every row, in letters."""
    assert tokens.choices is not None
    told = []
    for row, n, begins in zip(tokens.rows, tokens.lengths, tokens.choices.first, strict=True):
        names = tokenizer.convert_ids_to_tokens(row[:n].tolist())
        told.append((names[:begins], names[begins:]))
    return told


# -- requests and tokens --------------------------------------------------------------------------------------------


def test_requests_put_one_blank_before_the_choice_and_count_its_characters() -> None:
    asked = requests(Item(1, "q", ("c", " dé"), 0))
    assert [(r.context, r.continuation, r.characters) for r in asked] == [("q", " c", 1), ("q", "  dé", 3)]


def test_a_continuation_is_scored_after_each_of_the_contexts() -> None:
    asked = requests(Item(1, "not read", ("nor", "these"), 0, ("x saw a", "x saw b"), "run."))
    assert [(r.context, r.continuation, r.characters) for r in asked] == [
        ("x saw a", " run.", 4),
        ("x saw b", " run.", 4),
    ]


def test_a_subject_is_named_before_the_query() -> None:
    asked = requests(Item(1, "2?\nAnswer:", ("A", "B"), 0, subject="high_school_maths"))
    begins = "The following are multiple choice questions (with answers) about high school maths.\n\n"
    assert [r.context for r in asked] == [begins + "2?\nAnswer:"] * 2


def test_shots_stand_solved_before_the_query_and_after_the_subject(tmp_path: Path) -> None:
    """Written out as lm-evaluation-harness writes MMLU: description, shots of the subject in order, query."""
    shots = [
        {"query": "1?\nAnswer:", "choices": ["A", "B"], "gold": 1, "subject": "old_maths"},
        {"query": "x?\nAnswer:", "choices": ["A", "B"], "gold": 0, "subject": "law"},
        {"query": "2?\nAnswer:", "choices": ["A", "B"], "gold": 0, "subject": "old_maths"},
        {"query": "3?\nAnswer:", "choices": ["A", "B"], "gold": 0, "subject": "old_maths"},
    ]
    file = write(tmp_path / "dev.jsonl", *shots)
    row = {"query": "9?\nAnswer:", "choices": ["A", "B"], "gold": 0, "subject": "old_maths"}
    tokens = task_tokens(write(tmp_path / "t.jsonl", row), letters(), shots=(file, 2))
    begins = "The following are multiple choice questions (with answers) about old maths.\n\n"
    context = begins + "1?\nAnswer: B\n\n2?\nAnswer: A\n\n9?\nAnswer:"
    told = [("".join(before), "".join(own)) for before, own in pieces(tokens, letters())]
    assert told == [(context, " A"), (context, " B")]
    bare = task_tokens(tmp_path / "t.jsonl", letters())
    assert bare.hash != tokens.hash
    assert bare.clusters == tokens.clusters


def test_a_shot_of_a_gap_is_its_right_context_and_the_continuation(tmp_path: Path) -> None:
    gap = {"query": "q", "choices": ["x", "y"], "gold": 1, "contexts": ["so x", "so y"], "continuation": "ran."}
    ask = {"query": "q", "choices": ["v", "w"], "gold": 0, "contexts": ["as v", "as w"], "continuation": "sat."}
    file = write(tmp_path / "dev.jsonl", gap)
    tokens = task_tokens(write(tmp_path / "t.jsonl", ask), letters(), shots=(file, 1))
    told = [("".join(before), "".join(own)) for before, own in pieces(tokens, letters())]
    assert told == [("so y ran.\n\nas v", " sat."), ("so y ran.\n\nas w", " sat.")]


def test_shots_that_are_missing_or_are_the_items_themselves(tmp_path: Path) -> None:
    law = ROW | {"subject": "law"}
    path = write(tmp_path / "t.jsonl", ROW, ROW | {"query": "c"}, ROW | {"query": "d"})
    tokens = task_tokens(path, letters(), shots=(path, 1))
    assert len(tokens.clusters) == 2, "the first one is shown solved"
    with pytest.raises(DataError, match=r"t\.jsonl are among its own 3 shots\. Give shots from another file"):
        task_tokens(path, letters(), shots=(path, 3))
    with pytest.raises(DataError, match=r"5 shots are wanted, .* has 3 items without a subject\. Ask for 1 to 3"):
        task_tokens(path, letters(), shots=(path, 5))
    with pytest.raises(DataError, match=r"1 shots .* 0 items of the subject 'law'\. Give shots from another file"):
        task_tokens(write(tmp_path / "law.jsonl", law), letters(), shots=(path, 1))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("query", "choice", "context", "own"),
    [
        ("b", "a", ["b"], [" a"]),
        ("b ", "a", ["b"], [" ", " a"]),  # what is blank at the end goes over
        ("b\n \n", "a", ["b"], ["\n", " ", "\n", " a"]),
        (" b", " a", [" ", "b"], [" ", " a"]),  # a choice may have a blank of its own, and a query begin with one
        ("a a", "xa", ["a", " a"], [" ", "x", "a"]),
        ("", "a", ["<s>"], [" a"]),  # where there is no context, it is BOS
        (" \n", "a", ["<s>"], [" ", "\n", " a"]),
    ],
)
def test_the_tokens_of_a_choice_are_those_that_the_context_does_not_have(
    query: str, choice: str, context: list[str], own: list[str], bos: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.jsonl", {"query": query, "choices": [choice, "z"], "gold": 0})
    tokens = task_tokens(path, letters(bos=bos))
    expected = ["<s>", *context] if bos and context != ["<s>"] else context
    assert pieces(tokens, letters())[0] == (expected, own)


def test_partial_rows_are_tokenised_context_by_context(tmp_path: Path) -> None:
    row = {"query": "q", "choices": ["x", "y"], "gold": 0, "contexts": ["so a", "so b "], "continuation": "a."}
    tokens = task_tokens(write(tmp_path / "t.jsonl", row), letters())
    assert pieces(tokens, letters()) == [(["s", "o", " a"], [" a", "."]), (["s", "o", " ", "b"], [" ", " a", "."])]
    assert tokens.choices is not None
    assert tokens.choices.characters == (2, 2)


def test_a_row_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"query": "bcdef", "choices": ["a", "xyz"], "gold": 0})
    tokens = task_tokens(path, letters(bos=True), positions=5)
    assert pieces(tokens, letters()) == [(["c", "d", "e", "f"], [" a"]), (["f"], [" ", "x", "y", "z"])]
    with pytest.raises(DataError, match=r"t.jsonl, row 1, choice 1, has 4 tokens, and the model 4 positions\. Leave"):
        task_tokens(path, letters(), positions=4)


def test_choices_without_a_token_or_a_beginning_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"query": "b", "choices": ["a", "c"], "gold": 0})
    with pytest.raises(DataError, match=r"row 1, choice 0, has no token of its own with this tokenizer\. Leave"):
        task_tokens(path, letters([(" ", "a"), ("b", " a")]))
    path = write(tmp_path / "t.jsonl", {"query": "", "choices": ["a", "c"], "gold": 0})
    bare = letters()
    bare.bos_token = None
    assert pieces(task_tokens(path, bare), letters())[0] == (["</s>"], [" a"])
    bare.eos_token = None
    with pytest.raises(DataError, match=r"choice 0, has no context, and the tokenizer neither a BOS nor an EOS token"):
        task_tokens(path, bare)
    with pytest.raises(DataError, match="no tokenizer, so no task can be read"):
        task_tokens(path, None)


def test_one_row_a_choice_and_one_document_an_item(file: Path, tokenizer: Any) -> None:
    tokens, items = task_tokens(file, tokenizer), read_items(file)
    assert tokens.choices is not None
    assert sorted(tokens.clusters) == list(range(1, 51))
    assert list(tokens.clusters) != sorted(tokens.clusters), "items come in a seeded order"
    taken = [items[number - 1] for number in tokens.clusters]
    assert tokens.documents == tuple(d for d, item in enumerate(taken) for _ in item.choices)
    assert tokens.choices.gold == tuple(item.gold for item in taken)
    assert tokens.choices.characters == tuple(r.characters for item in taken for r in requests(item))
    assert tokens.info().items == tokens.info().texts == 50
    assert len(set(tokens.digests)) == 50
    assert task_tokens(file, tokenizer).hash == tokens.hash != task_tokens(file, tokenizer, seed=1).hash


def test_gzip_is_the_same(file: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert task_tokens(tmp_path / "items.jsonl.gz", tokenizer).hash == task_tokens(file, tokenizer).hash


def test_the_right_answer_is_part_of_the_hash(tokenizer: Any, tmp_path: Path) -> None:
    row = {"query": "w1", "choices": ["w2", "w3"], "gold": 0}
    hashes = [task_tokens(write(tmp_path / "t.jsonl", row | {"gold": gold}), tokenizer).hash for gold in (0, 1)]
    assert hashes[0] != hashes[1]


def test_limits_take_the_beginning_and_so_does_first(file: Path, tokenizer: Any) -> None:
    whole = task_tokens(file, tokenizer)
    for count in (1, 40, 137, 10**6):
        part = task_tokens(file, tokenizer, limit_tokens=count)
        assert truncate(whole, count).hash == part.hash
        assert truncate(whole, count).choices == part.choices
        assert part.tokens >= min(count, whole.tokens)
        assert part.clusters == whole.clusters[: len(part.clusters)]
        last = part.documents.index(len(part.clusters) - 1)
        assert sum(part.lengths[:last]) < count, "not an item more"
    assert task_tokens(file, tokenizer, limit_items=7).clusters == whole.clusters[:7]


@pytest.mark.parametrize("seed", [0, 3])
def test_calibration_and_evaluation_share_no_item_whatever_the_limits(
    seed: int, tokenizer: Any, tmp_path: Path
) -> None:
    rows = random_rows(30)
    path = write(tmp_path / "t.jsonl", *rows, *rows[:10])  # some stand in the file twice
    mine = task_tokens(path, tokenizer, seed=seed, part="calibration", limit_items=12)
    rest = task_tokens(path, tokenizer, seed=seed, part="evaluation", limit_tokens=10**6)
    whole = task_tokens(path, tokenizer, seed=seed, part="calibration")
    assert mine.clusters == whole.clusters[:12]
    assert len(whole.clusters) == 20
    assert 10 <= len(rest.clusters) < 20
    assert not set(whole.digests) & set(rest.digests)
    assert not set(whole.clusters) & set(rest.clusters)


# -- accuracy -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(teacher: Teacher, tokenizer: Any, item: Item) -> list[float]:
    """Log-probabilities of an item's choices: one forward pass a choice, float64, words counted by hand."""
    subject = f"{'The following are multiple choice questions (with answers) about'} abstract w3.\n\n"
    before = subject if item.subject else ""
    sums = []
    for i, choice in enumerate(item.choices):
        context = before + (item.contexts[i] if item.contexts else item.query)
        own = tokenizer(item.continuation or choice)["input_ids"]
        ids = torch.tensor([*(tokenizer(context)["input_ids"] or [1]), *own])
        logits = teacher.model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - len(own), len(ids))))
    return sums


def test_accuracy_equals_choices_scored_one_at_a_time(model: Path, file: Path, tokenizer: Any) -> None:
    teacher, tokens, items = load(model), task_tokens(file, tokenizer), read_items(file)
    sums = {number: by_hand(teacher, tokenizer, items[number - 1]) for number in tokens.clusters}
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for number in tokens.clusters:
        item = items[number - 1]
        sizes = [len(item.continuation or choice) for choice in item.choices]
        for name, values in (
            ("acc", sums[number]),
            ("acc_norm", [x / n for x, n in zip(sums[number], sizes, strict=True)]),
        ):
            right[name].append(float(max(range(len(values)), key=values.__getitem__) == item.gold))
    seen: list[int] = []
    assert log_probabilities(teacher.model, tokens, watch=lambda event: seen.append(event.done)) == pytest.approx(
        [x for number in tokens.clusters for x in sums[number]], rel=1e-4
    )
    assert seen[-1] == tokens.tokens
    assert right["acc"] != right["acc_norm"]
    for name in ("acc", "acc_norm"):
        found = EVALUATIONS[name](teacher.model, tokens)
        assert (found.name, found.tokens, found.clusters) == (name, tokens.hash, tokens.clusters)
        assert list(found.sums) == right[name]
        assert found.counts == (1,) * 50
        assert 0 < found.mean == sum(right[name]) / 50 < 1


def test_of_equal_choices_the_first_is_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    row = {"query": "w1", "choices": ["w2", "w2"]}
    tokens = task_tokens(write(tmp_path / "t.jsonl", row | {"gold": 0}, row | {"gold": 1}), tokenizer)
    told = score_choices(tokens, [-3.0] * 4)
    assert tokens.choices is not None
    assert told["acc"].sums == told["acc_norm"].sums == tuple(float(gold == 0) for gold in tokens.choices.gold)
    log_probabilities = torch.full((1, 2), -3.0)
    assert [float(ITEM_LOSSES["task_error"](log_probabilities, gold)) for gold in (0, 1)] == [0, 1]


def test_accuracy_of_text_and_of_broken_models_is_refused(model: Path, file: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"made up is text, and accuracy needs multiple-choice items\. Give"):
        EVALUATIONS["acc"](load(model).model, text_tokens())
    with pytest.raises(ModelError, match=r"NaN or infinite\. Try dtype='float32'"):
        score_choices(task_tokens(file, tokenizer, limit_items=1), [float("nan")] * 5)


# -- the losses -----------------------------------------------------------------------------------------------------


def text_tokens() -> TokenSet:
    from test_probe import token_set

    return token_set()


@torch.no_grad()
def plain(teacher: Teacher, tokens: TokenSet, plan: Plan) -> tuple[list[list[float]], dict[str, Loss]]:
    """Log-probabilities of the choices of every item through the stock model with hooks, and the losses, by hand."""
    assert tokens.choices is not None
    items: list[list[float]] = [[] for _ in tokens.clusters]
    for row, n, document, begins in zip(
        tokens.rows, tokens.lengths, tokens.documents, tokens.choices.first, strict=True
    ):
        with hooked(teacher, plan):
            logits = teacher.model(input_ids=row[None, :n], use_cache=False).logits[0].double().log_softmax(-1)
        items[document].append(float(sum(logits[at - 1, row[at]] for at in range(begins, n))))
    shares = [torch.tensor(of, dtype=torch.float64).softmax(0) for of in items]
    golds, ones = tokens.choices.gold, (1,) * len(items)
    likely = tuple(-float(share[gold].log()) for share, gold in zip(shares, golds, strict=True))
    wrong = tuple(float(of.index(max(of)) != gold) for of, gold in zip(items, golds, strict=True))
    return items, {"task": Loss("task", likely, ones), "task_error": Loss("task_error", wrong, ones)}


def close(a: Loss, b: Loss) -> None:
    assert (a.name, a.counts, a.bound) == (b.name, b.counts, b.bound)
    assert a.sums == pytest.approx(b.sums, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("variant", ["llama", "phi", "gemma2", "gpt2", "falcon"])
def test_losses_equal_the_plain_pass(variant: str, checkpoint: Folder, file: Path, tokenizer: Any) -> None:
    """Both walks, in memory and streamed, several plans: losses, log-probabilities and accuracies."""
    teacher, tokens = load(checkpoint(variant)), task_tokens(file, tokenizer, limit_items=10, positions=16)
    streamed = load(checkpoint(variant), memory=0)
    assert streamed.weights is not None
    expected = [plain(teacher, tokens, plan) for plan in PLANS]
    assert len({losses["task"].mean for _, losses in expected}) == len(PLANS), "the plans should differ"
    for which in (teacher, streamed):
        for walk in ("layers", "depth-first"):
            for name in ITEM_LOSSES:
                probe = Probe(which, tokens, name, walk=walk)
                for measured, (_, losses) in zip(probe.losses(PLANS), expected, strict=True):
                    close(measured, losses[name])
            told = probe.row_sums([*PLANS, PLANS[0]])
            assert told[-1] == told[0]
            for row_sums, (items, losses) in zip(told[:-1], expected, strict=True):
                assert row_sums == pytest.approx([x for of in items for x in of], rel=1e-4, abs=1e-4)
                right = score_choices(tokens, row_sums)["acc"].sums
                assert [1 - error for error in losses["task_error"].sums] == list(right)
    with hooked(teacher, PLANS[1]):
        found = log_probabilities(teacher.model, tokens)
    assert found == pytest.approx([x for of in expected[1][0] for x in of], rel=1e-4, abs=1e-4)


def answered(tokens: TokenSet, row_sums: list[float]) -> TokenSet:
    """The same items, of which the likeliest choices are the right ones."""
    assert tokens.choices is not None
    of = [[x for x, d in zip(row_sums, tokens.documents, strict=True) if d == document]
          for document in range(len(tokens.clusters))]  # fmt: skip
    gold = tuple(values.index(max(values)) for values in of)
    return dataclasses.replace(tokens, choices=dataclasses.replace(tokens.choices, gold=gold))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("loss", ["task", "task_error"])
def test_the_best_are_those_of_a_full_search(
    loss: str, streamed: bool, checkpoint: Folder, file: Path, tokenizer: Any
) -> None:
    """Where one removal answers as it should, and the others do not."""
    teacher = load(checkpoint("llama"), memory=0 if streamed else None)
    tokens = task_tokens(file, tokenizer)
    plans = [Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]
    tokens = answered(tokens, Probe(teacher, tokens, loss).row_sums([Plan.parse(["attention.2"])])[0])
    full = Probe(teacher, tokens, loss).losses(plans)
    probe = Probe(teacher, tokens, loss)
    found = probe.losses(plans, best=1)
    best = min(range(len(plans)), key=lambda i: (full[i].mean, i))
    complete = [i for i in range(len(plans)) if not found[i].bound]
    assert min(complete, key=lambda i: (found[i].mean, i)) == best
    assert plans[best] == Plan.parse(["attention.2"])
    for i in complete:
        close(found[i], full[i])
    for i in set(range(len(plans))) - set(complete):
        assert full[best].mean - 1e-5 <= found[i].mean <= full[i].mean + 1e-5
    assert streamed or probe.tally[0]["bound"] > 0, "nothing was abandoned"


def test_a_race_measures_items_whole_and_no_piece_twice(checkpoint: Folder, file: Path, tokenizer: Any) -> None:
    teacher, tokens, diary = load(checkpoint("llama")), task_tokens(file, tokenizer), Diary()
    plans = [Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]
    full = dict(zip(plans, Probe(teacher, tokens, "task").losses(plans), strict=True))
    probe = Probe(teacher, tokens, "task", fast=RacingOptions(shortlist=6, risk=0.05), cache_factory=lambda *of: diary)
    found = dict(probe.iter_losses(plans, 2))
    assert probe.tally[0]["raced"] > 0
    assert sum(not loss.bound for loss in found.values()) >= 2
    for plan, loss in found.items():
        if not loss.bound:
            close(loss, full[plan])
    assert {quality for _, quality, _ in diary.pieces} == {"full"}
    assert max(diary.written.values()) == 1


def test_what_is_stored_comes_back_also_of_the_first_tokens(
    checkpoint: Folder, file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    teacher, tokens = load(checkpoint("llama")), task_tokens(file, tokenizer)
    ask = MeasureRequest(tuple(PLANS)), MeasureRequest(tuple(PLANS), tokens=100)
    with closing(Store(tmp_path / "runs.db")) as store:
        told, sites = [], []
        for _ in range(2):
            kept = store_cache(store, store.new_run("prune", {}, {}, "out"), teacher)
            probe = Probe(teacher, tokens, "task", cache_factory=kept)
            execute = Executor(probe)
            told.append([execute(each) for each in ask])
            sites.append(probe.site_evaluations)
        assert told[0] == told[1]
        assert sites[0] > sites[1] == 0
        assert len(told[0][1][0].sums) == len(truncate(tokens, 100).clusters) < 50


def test_a_loss_and_a_token_set_must_fit(checkpoint: Folder, file: Path, tokenizer: Any) -> None:
    teacher = load(checkpoint("llama"))
    with pytest.raises(UsageError, match=r"loss='task' scores .*, and made up is text\. Type loss='task:FILE"):
        Probe(teacher, text_tokens(), "task")
    for loss in LOSSES:
        with pytest.raises(UsageError, match=rf"loss='{loss}' reads text, and .*items\. Type loss='task:.*task_error:"):
            Probe(teacher, task_tokens(file, tokenizer), loss)


def test_metrics_of_a_task_are_the_rises_of_its_loss(checkpoint: Folder, file: Path, tokenizer: Any) -> None:
    teacher, tokens = load(checkpoint("llama")), task_tokens(file, tokenizer, limit_items=12)
    for loss in ITEM_LOSSES:
        probe = Probe(teacher, tokens, loss)
        scores = METRICS["loo_task"](probe)
        dense, *without = probe.losses([Plan(), *(Plan(frozenset([s])) for s in teacher.anatomy.sites_present())])
        for site, measured in zip(teacher.anatomy.sites_present(), without, strict=True):
            assert scores[site].value == pytest.approx(measured.mean - dense.mean, abs=1e-5)
        values = METRICS["shapley_task"](probe, pairs=2)
        nothing = probe.losses([Plan(frozenset(teacher.anatomy.sites_present()))])[0]
        total = sum(score.value for unit, score in values.items() if isinstance(unit, Site))
        assert total == pytest.approx(nothing.mean - dense.mean, rel=1e-4, abs=1e-6)


def test_a_metric_sees_the_tokens_of_a_task(checkpoint: Folder, file: Path, tokenizer: Any) -> None:
    teacher, tokens = load(checkpoint("llama")), task_tokens(file, tokenizer)
    ones = Probe(teacher, tokens, "task").mean_over_tokens({"one": lambda x, y: torch.ones(len(x))})
    assert {score.value for score in ones["one"].values()} == {1.0}


def test_how_a_loss_is_spelled() -> None:
    assert [parse_loss(loss) for loss in LOSSES] == [LossSpec(loss) for loss in LOSSES]
    assert parse_loss("task:a/b:c.jsonl") == LossSpec("task", "a/b:c.jsonl")
    assert parse_loss("task_error:x.jsonl.gz") == LossSpec("task_error", "x.jsonl.gz")
    for spelled in ("task", "task:"):
        with pytest.raises(UsageError, match=r"loss='task' needs a file of .*items\. Type loss='task:FILE\.jsonl'"):
            parse_loss(spelled)
    with pytest.raises(UsageError, match=r"loss='kl' takes no file\. Type loss='kl', or loss='task:x\.jsonl'"):
        parse_loss("kl:x.jsonl")
    with pytest.raises(UnknownName, match=r"'taks'.*'task'\?.*js, kl, .*task, task_error"):
        parse_loss("taks:x.jsonl")


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2, is not JSON \(.*\)\. One object a line, please"),
        ([1], r"row 2, is not an object\. A row is \{"),
        ({"query": "a", "choices": ["b", "c"]}, r"row 2, has no field 'gold'\. A row is .*\"gold\": 0"),
        ({"querry": "a", "choices": ["b", "c"], "gold": 0}, r"row 2, has no field 'query'\. Is it 'querry'\?"),
        (ROW | {"query": 3}, r"row 2, has 3 as its 'query'"),
        (ROW | {"choices": "bc"}, r"row 2, has 'bc' as its 'choices'"),
        (ROW | {"gold": "1"}, r"row 2, has '1' as its 'gold'"),
        (ROW | {"gold": True}, r"row 2, has True as its 'gold'"),
        (ROW | {"gold": 2}, r"row 2, has gold 2, and 2 choices\. gold counts from 0: give 0 to 1"),
        (ROW | {"gold": -1}, r"row 2, has gold -1"),
        (ROW | {"choices": ["b"]}, r"row 2, has 1 choices\. Give at least 2"),
        (ROW | {"choices": ["b", " "]}, r"row 2, has \[' '\] in its 'choices'\. Give a list of texts"),
        (ROW | {"choices": ["b", 1]}, r"row 2, has \[1\] in its 'choices'"),
        (ROW | {"contexts": ["b", "c"]}, r"row 2, has only one of 'contexts' and 'continuation'\. Give both"),
        (ROW | {"continuation": "b"}, r"row 2, has only one of"),
        (ROW | {"contexts": "bc", "continuation": "b"}, r"row 2, has 'bc' in its 'contexts'"),
        (
            ROW | {"contexts": ["b"] * 3, "continuation": "b"},
            r"row 2, has 3 contexts for 2 choices\. Give one per choice",
        ),
        (ROW | {"contexts": ["b"] * 2, "continuation": 7}, r"row 2, has 7 as its 'continuation'\. Give a text"),
        (ROW | {"subject": 7}, r"row 2, has 7 as its 'subject'\. Give a text, or leave it out"),
    ],
)
def test_rows_that_are_no_items_are_refused_by_number(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ROW, row)
    with pytest.raises(DataError, match=rf"t\.jsonl, {message}"):
        read_items(path)


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl is missing\. Give a \.jsonl or \.jsonl\.gz file"):
        read_items(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"is a folder\. Give"):
        read_items(tmp_path)
    with pytest.raises(DataError, match=r"t\.jsonl is empty\. Give"):
        read_items(write(tmp_path / "t.jsonl", " "))
    (tmp_path / "t.jsonl").write_bytes(json.dumps(ROW).encode("utf-16"))
    with pytest.raises(DataError, match=r"t\.jsonl is not UTF-8 text .*iconv"):
        read_items(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"t\.jsonl\.gz is no gzip file"):
        read_items(tmp_path / "t.jsonl.gz")
    with pytest.raises(DataError, match=r"too few items to keep some for evaluation\. Give at least 2"):
        task_tokens(write(tmp_path / "t.jsonl", ROW, ROW), letters(), part="calibration")


def test_copies_of_an_item_are_one_text(tmp_path: Path) -> None:
    items = [{"query": f"w{i} w{i + 1}", "choices": ["w1", "w2 w3"], "gold": i % 2} for i in range(5)]
    copies = [items[0] | {"query": " w0\tw1 "}, items[0] | {"gold": 1}, items[3] | {"choices": ["w1 ", "w2  w3"]}]
    file, tokenizer = write(tmp_path / "t.jsonl", *items, *copies), letters()
    whole = task_tokens(file, tokenizer)
    assert whole.choices is not None
    assert sorted(whole.choices.numbers) == list(range(1, 9))
    firsts = dict(zip(whole.choices.numbers, whole.clusters, strict=True))
    assert firsts == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 1, 7: 1, 8: 4}
    assert (whole.info().items, whole.info().texts) == (8, 5)
    parts = [task_tokens(file, tokenizer, part=part) for part in ("calibration", "evaluation")]
    assert not set(parts[0].clusters) & set(parts[1].clusters)
    for some in (*parts, select_documents(whole, [5, 2, 0]), truncate(whole, 20)):
        assert some.choices is not None
        assert {firsts[number] for number in some.choices.numbers} == set(some.clusters)
        assert len(some.choices.numbers) == len(some.clusters)
    rows = [{"query": q, "answer": "w5", "target": "w5"} for q in ("w1 w2", "w3", "w1  w2 ")]
    questions = write(tmp_path / "q.jsonl", *rows)
    prompts = build_prompts(questions, tokenizer)
    assert dict(zip(prompts.numbers, prompts.tokens.clusters, strict=True)) == {1: 1, 2: 2, 3: 1}
