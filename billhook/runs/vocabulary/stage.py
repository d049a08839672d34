"""The first stage of a run with a budget of the vocabulary: a smaller model, which the rest of the run prunes."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from billhook.core.budget import rows_of
from billhook.core.errors import BillhookError
from billhook.core.events import Event, EventListener
from billhook.core.plan import Plan
from billhook.core.results.exports import VocabularyChange
from billhook.data.texts import external_sources
from billhook.data.token_sets import TokenSet
from billhook.methods.export.beside_weights import write_companions
from billhook.models import checks
from billhook.models.load import Teacher, student_as_teacher
from billhook.models.pruned_config import MANIFEST
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.vocabulary.entries import Vocabulary, tokenizer_json
from billhook.models.vocabulary.files import cut_files, verify_tokenizer
from billhook.models.vocabulary.student import cut_model
from billhook.runs.evaluation import perplexity_results
from billhook.runs.job import RunContext
from billhook.runs.prepare import read_held_out
from billhook.runs.recipe import Recipe
from billhook.runs.vocabulary.choosing import COUNTED, Cut, choose_rows, counted_text
from billhook.runs.vocabulary.measuring import passages_of, text_change, tokens_of
from billhook.runs.vocabulary.writing import is_cut_folder, note_cut, save_cut


@dataclass(frozen=True)
class Pruned:
    """What a run prunes: `teacher`, and the model as it was `given`, whose vocabulary was `cut`; None: the same."""

    given: Teacher
    teacher: Teacher
    cut: Cut | None = None

    @property
    def pair(self) -> tuple[Teacher, Teacher]:
        """The model that a student is compared with, and the one that it was pruned from."""
        return self.given, self.teacher


def choose_cut(recipe: Recipe, given: Teacher, vocabulary: Vocabulary, watch: EventListener) -> Cut:
    """Choose the rows that a recipe's text needs most. Raises BudgetError, DataError."""
    assert recipe.vocabulary is not None
    source, held_out = external_sources(recipe.data), read_held_out(recipe, given, watch)
    counted = counted_text(source, recipe, COUNTED, given, watch, held_out=recipe.eval_data)
    return choose_rows(vocabulary, counted, rows_of(recipe.vocabulary, vocabulary.rows), held_out)


def cut_first(job: RunContext, given: Teacher, vocabulary: Vocabulary | None, folder: Path) -> Pruned:
    """Carry out the stage: the smaller model is written to `folder`, unless an earlier attempt did, and is pruned then.

    A `vocabulary` of None is not cut.
    """
    if vocabulary is None:
        return Pruned(given, given)
    with job.stage("vocabulary"):
        cut = choose_cut(job.recipe, given, vocabulary, job.watch)
        job.watch(Event("vocabulary", len(cut.numbers), cut.rows, {"tokens": cut.counted}))
        student = cut_model(given, cut.numbers)
        tokenizer = None
        if is_cut_folder(folder, given, cut.numbers):
            with suppress(BillhookError):
                tokenizer = verify_tokenizer(given.tokenizer, folder, cut.numbers, ())
        if tokenizer is None:
            shutil.rmtree(folder, ignore_errors=True)
            tokenizer = save_cut(given, student, cut.numbers, folder, prove=lambda found: found, watch=job.watch)
        smaller = replace(_smaller(given, student, tokenizer), folder=folder, fingerprint=checks.fingerprint(folder))
        return Pruned(given, smaller, cut)


def preview_cut(recipe: Recipe, given: Teacher, vocabulary: Vocabulary | None, watch: EventListener) -> Teacher:
    """Return the model that the rest of a run would prune. Nothing is kept on disk."""
    if vocabulary is None:
        return given
    cut = choose_cut(recipe, given, vocabulary, watch)
    with tempfile.TemporaryDirectory(prefix="billhook-") as name:
        folder = Path(name)
        shutil.copyfile(given.folder / "config.json", folder / "config.json")
        write_companions(None, given, folder)
        cut_files(folder, tokenizer_json(given), cut.numbers)
        tokenizer = verify_tokenizer(given.tokenizer, folder, cut.numbers, ())
    return _smaller(given, cut_model(given, cut.numbers), tokenizer)


def _smaller(given: Teacher, student: Any, tokenizer: Any) -> Teacher:
    return replace(student_as_teacher(given, student), tokenizer=tokenizer, halved_by=given.tokenizer)


def vocabulary_change(
    job: RunContext, of: Pruned, plan: Plan, repair: Repair, proof: TokenSet
) -> VocabularyChange | None:
    """Measure what a smaller vocabulary, and then the plan, change on the text of the proof; None where it was not cut.

    Bits per byte are compared with the model as it was given; what the plan alone changes, on its own tokens too.
    """
    if of.cut is None:
        return None
    passages, (before, after) = tokens_of(passages_of(proof, of.teacher.tokenizer), of.given, of.teacher)
    (first,) = perplexity_results(replace(job, team=None), of.given, [(Plan(), NO_REPAIR)], before)  # no worker has it
    found = perplexity_results(job, of.teacher, [(Plan(), NO_REPAIR), *([(plan, repair)] if plan else [])], after)
    pair, seed, sizes = (of.given, of.teacher), job.recipe.seed, of.teacher.anatomy.sizes()
    alone, text = (text_change(passages, pair, (before, after), (first, each), seed) for each in (found[0], found[-1]))
    by_plan = text_change(passages, (of.teacher, of.teacher), (after, after), (found[0], found[-1]), seed).change
    return VocabularyChange(
        of.cut.source, of.cut.counted, of.cut.used, of.cut.fixed, of.cut.rows, len(of.cut.numbers), sizes.parameters,
        sizes.bytes, alone, text, by_plan if plan else None,
    )  # fmt: skip


def note_models(folder: Path, models: Pruned) -> None:
    """Say in each billhook.json of a student and its exports what its vocabulary was cut to, and of which model."""
    if models.cut is not None:
        for manifest in folder.rglob(MANIFEST):
            note_cut(manifest, models.given, models.cut.numbers)
