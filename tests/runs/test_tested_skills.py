"""Skills in the proof of a run: a planted loss is named and only it, and what is undecided is not."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import billhook
from billhook.core.errors import DataError, UnknownName
from billhook.core.files.cache_keys import ChoicesKey
from billhook.core.results.run import RunResult, SkillChange
from billhook.data.skills import SKILLS, SkillName, parse_skills
from billhook.data.skills.tokens import skill_tokens
from billhook.data.token_sets import TokenSet
from billhook.report.frame import escaped
from billhook.report.run.card import model_card
from billhook.report.run.skills import lost_skills, skill_rows
from billhook.report.run_report import run_page, run_verdict
from billhook.runs.evaluation import skill_changes
from billhook.runs.recipe import Recipe
from billhook.runs.store import Store


def byte_level() -> Any:
    """A tokenizer of bytes, which writes everything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def sets() -> dict[SkillName, TokenSet]:
    made = {skill: skill_tokens(skill, byte_level(), positions=None) for skill in SKILLS}
    return {skill: tokens for skill, tokens in made.items() if tokens is not None}


def scorer(tokens: TokenSet, right: float, seed: int) -> list[float]:
    """Log-probabilities of choices by a model that gets about a share `right` of the items right."""
    assert tokens.choices is not None
    draw, sums = random.Random(seed), [0.0] * len(tokens.lengths)
    for d, gold in enumerate(tokens.choices.gold):
        best = gold if draw.random() < right else (gold + draw.randint(1, 3)) % 4
        for place in range(4):
            sums[4 * d + place] = draw.gauss(-9, 0.3) + 3 * (place == best)
    return sums


def changes(sets: Mapping[SkillName, TokenSet], before: float, after: Mapping[SkillName, float], seed: int = 0) -> Any:
    """What teacher and student get, of which the student keeps the teacher's answers to skills not in `after`."""
    tested = []
    for skill, tokens in sets.items():
        teacher = scorer(tokens, before, seed)
        student = scorer(tokens, after[skill], seed) if skill in after else [x - 1 for x in teacher]
        tested.append((skill, tokens, (teacher, student)))
    return skill_changes(tested, seed)


@pytest.mark.parametrize("broken", SKILLS)
def test_a_planted_loss_is_named_and_only_it(sets: dict[SkillName, TokenSet], broken: SkillName) -> None:
    found = changes(sets, 0.9, {broken: 0.5})
    assert [each.skill for each in found if each.lost] == [broken]
    for each in found:
        assert each.chance == 0.25
        assert each.change.n == (64 if each.skill == "recall" else 100)
        assert each.change.low <= each.student - each.teacher <= each.change.high
        assert each.change.value == pytest.approx(each.student - each.teacher)
        assert each.nats.value == pytest.approx(each.student_nats - each.teacher_nats)
        if each.skill != broken:  # all choices lost as much, so that their shares are as before
            assert (each.change.value, each.p) == (0, 1)
            assert each.nats.value == pytest.approx(0, abs=1e-9)


def test_a_gain_is_no_loss(sets: dict[SkillName, TokenSet]) -> None:
    found = changes(sets, 0.4, dict.fromkeys(SKILLS, 0.9))
    assert not any(each.lost for each in found)
    assert all(each.change.low > 0 and each.nats.low > 0 for each in found)


def test_models_that_guess_lose_nothing_more_often_than_a_test_may(sets: dict[SkillName, TokenSet]) -> None:
    """Of pairs of guessers, hardly one run in twenty names any of its four skills."""
    named = 0
    for seed in range(12):
        tested = [
            (skill, tokens, (scorer(tokens, 0.5, 2 * seed), scorer(tokens, 0.5, 2 * seed + 1)))
            for skill, tokens in sets.items()
        ]
        named += any(each.lost for each in skill_changes(tested, seed))
    assert named <= 3


def test_one_test_of_several_needs_more(sets: dict[SkillName, TokenSet]) -> None:
    """The p of a skill is that of Holm: it rises with the number of skills, and keeps their order."""
    alone = changes({"recall": sets["recall"]}, 0.9, {"recall": 0.8})
    among = changes(sets, 0.9, {"recall": 0.8})
    (same,) = [each for each in among if each.skill == "recall"]
    assert same.change == alone[0].change
    assert same.p == pytest.approx(min(1.0, 4 * alone[0].p))


def test_the_log_probability_tells_what_no_answer_shows(sets: dict[SkillName, TokenSet]) -> None:
    tokens = sets["arithmetic"]
    before = scorer(tokens, 1.0, 0)
    after = [0.5 * value for value in before]  # every choice is as likely to be the best, by less
    (found,) = skill_changes([("arithmetic", tokens, (before, after))], 0)
    assert (found.teacher, found.student, found.lost) == (1.0, 1.0, False)
    assert found.nats.high < 0


@pytest.mark.parametrize(
    ("text", "names"),
    [("all", SKILLS), ("none", ()), ("recall, arithmetic", ("arithmetic", "recall")), ("copying", ("copying",))],
)
def test_skills_are_named(text: str, names: tuple[str, ...]) -> None:
    assert parse_skills(text) == names == Recipe(remove="1sites", skills=text).tested_skills


def test_an_unknown_skill_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no skill called 'brakets'\. Did you mean 'brackets'"):
        Recipe(remove="1sites", skills="brakets")


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills")
    tiny.saved(folder / "model", "llama", vocab_size=257, max_position_embeddings=512)
    byte_level().save_pretrained(folder / "model")
    tiny.write_texts(folder / "texts.jsonl", 40, words=60)
    return folder


def pruned(home: Path, out: str, **options: Any) -> RunResult:
    little: dict[str, Any] = {"tokens": 240, "length": 24, "eval_tokens": 640, "eval_length": 32, "self_share": 0.0}
    return billhook.prune(
        home / "model", data=home / "texts.jsonl", remove="3sites", search="greedy", finalists=0, device="cpu",
        out=home / out, store=home / "runs.db", **little, **options,
    )  # fmt: skip


def test_a_run_tests_skills_once_and_says_nothing_of_guesses(home: Path) -> None:
    result = pruned(home, "a")
    tested = {each.skill: each for each in result.skills}
    assert list(tested) == [*SKILLS], "recall has shorter questions that fit"
    assert tested["recall"].change.n < 64
    assert tested["arithmetic"].change.n == 100
    assert not any(each.lost for each in result.skills), "a random model guesses, before and after"
    assert lost_skills(result) == ""
    assert "breaks" not in run_verdict(result)
    assert RunResult.from_json(result.to_json()).skills == result.skills
    page = run_page(result)
    assert all(cell in page for row in skill_rows(result) for cell in row[:5])
    scored = values(home)
    again = pruned(home, "b", skills="brackets")
    assert again.skills == (replaced(tested["brackets"], again),)
    assert values(home) == scored, "nothing is scored again"


def values(home: Path) -> int:
    """How many values about choices the store holds."""
    with closing(Store(home / "runs.db", read_only=True)) as store:
        return len(store.all_of(ChoicesKey))


def replaced(each: SkillChange, result: RunResult) -> SkillChange:
    """The same skill, tested alone: its p is not adjusted for others."""
    return replace(each, p=result.skills[0].p)


def test_a_run_without_skills_has_none(home: Path) -> None:
    result = pruned(home, "c", skills="none")
    assert (result.skills, result.reasons) == ((), ())
    assert "What pruning breaks" not in run_page(result)


def test_a_lost_skill_is_in_every_verdict(home: Path, sets: dict[SkillName, TokenSet]) -> None:
    result = replace(pruned(home, "d"), skills=changes(sets, 0.9, {"copying": 0.4}))
    (lost,) = [each for each in result.skills if each.lost]
    ends = f"{100 * lost.change.low:+.1f} to {100 * lost.change.high:+.1f} points".replace("-", "−")
    told = f"Copying breaks: it falls from {lost.teacher:.0%} to {lost.student:.0%} right ({ends}; guessing gets 25%)."
    assert lost_skills(result) == told
    assert told in run_verdict(result)
    assert told in model_card(result)
    assert escaped(told) in run_page(result)
    assert result.rows()[0]["copying_change_high"] == lost.change.high


# -- among tasks ------------------------------------------------------------------------------------------------------


def test_skills_are_tasks_of_comparisons(home: Path) -> None:
    student = pruned(home, "e").out
    among = {"data": (), "store": home / "runs.db", "device": "cpu"}
    found = billhook.compare(home / "model", student, tasks="skill:all", timed=False, out=home / "compared", **among)
    assert [each.source for each in found.sets] == [f"skill:{skill}" for skill in SKILLS]
    for each, of_run in zip(found.sets, pruned(home, "f").skills, strict=True):
        assert each.n == of_run.change.n, "all of them: no search has seen any"
        assert [value.estimate.value for value in each.values] == [of_run.teacher, of_run.student]
        assert each.pairs[0] is not None
        assert each.pairs[0].change == of_run.change
        assert all(flip.choices and flip.query for flip in each.flips)
    billhook.save_baseline("skilled", home / "model", tasks="skill:brackets", **among)
    report = billhook.gate(student, "skilled", store=home / "runs.db", device="cpu", margins="90pp")
    assert [(check.source, check.verdict) for check in report.checks] == [("skill:brackets", "PASS")]
    scores = billhook.evaluate_tasks(home / "model", "skill:copying", items=20, store=home / "runs.db", device="cpu")
    assert {each.estimate.n for each in scores.scores} == {20}


def test_a_sweep_measures_skills(home: Path) -> None:
    found = billhook.sweep(
        home / "model", "shortgpt", remove="1blocks", data=str(home / "texts.jsonl"), tasks="skill:brackets", items=30,
        tokens=240, length=24, eval_tokens=640, eval_length=32, self_share=0.0, out=home / "swept",
        store=home / "runs.db", device="cpu",
    )  # fmt: skip
    (trial,) = found.trials
    assert (found.evaluation["skill:brackets"].items, trial.results["skill:brackets"].kind) == (30, "accuracy")


def test_a_skill_that_is_none_and_a_model_that_cannot_be_asked(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no skill called 'copy'\. Did you mean 'copying'"):
        billhook.evaluate_tasks(home / "model", "skill:copy", store=tmp_path / "b.db")
    folder = tiny.with_tokenizer(tmp_path / "words")
    with pytest.raises(DataError, match=r"cannot be asked skill:recall: .* Leave the task out"):
        billhook.evaluate_tasks(folder, "skill:recall", store=tmp_path / "b.db", device="cpu")
