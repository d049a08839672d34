"""The vocabulary of a model cut to what a text needs, as a run of the store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from billhook.core.budget import parse_vocabulary_share, spell_budget
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.target_folder import check_target, named_folder
from billhook.core.options import Amount, Source
from billhook.core.results.exports import VocabularyReport, VocabularyText
from billhook.core.results.specs import VocabularySpec, plain_options
from billhook.data.texts import SOURCE_SEPARATOR, require_given
from billhook.models import checks
from billhook.models.load import Model, Teacher, as_teacher, name_of, student_as_teacher
from billhook.models.vocabulary.files import TOKENIZER
from billhook.models.vocabulary.student import cut_model
from billhook.runs import check_inputs
from billhook.runs.job import store_and_watch
from billhook.runs.prepare import read_held_out
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE
from billhook.runs.vocabulary.choosing import COUNTED, Cut, choose_rows, counted_text, readable_vocabulary
from billhook.runs.vocabulary.measuring import Passages, compare_on, passages_of
from billhook.runs.vocabulary.writing import save_cut
from billhook.studies.run_study import begin_run, several


def cut_vocabulary(
    model: Model = "demo",
    *,
    data: Source,
    remove: Amount | None = None,
    eval_data: Source | Sequence[str] = (),
    out: str | Path | None = None,
    field: str = "text",
    tokens: int = COUNTED,
    eval_tokens: int = 16384,
    eval_length: int = 512,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
) -> VocabularyReport:
    """Remove tokens that a text does not need: rows of embedding and head, and entries of the tokenizer.

    Arguments:
        model: as for `load`, or a loaded Teacher.
        data: text of the kind that the model is for. The tokens without which it has the fewest tokens more go first.
        remove: a share of the vocabulary, such as 60% or 0.6. None: all tokens that the text does not use.
        eval_data: held-out texts, one or several; left out, a half of `data` that is not counted.
        out: the folder to write (default: MODEL-vocabulary).
        field: of a row that holds the text.
        tokens: how many of `data` are counted at most.
        eval_tokens, eval_length: of each held-out text, in all and per sequence.

    Special and added tokens and bytes stay, and so do the tokens that a kept one is merged from. Text that needs
    removed tokens falls back to smaller ones. Text without removed tokens has the same tokens as before, under new ids,
    and the same logits at them. The checkpoint has the type of the model. The folder appears whole or not at all.

    Raises BudgetError for a share that is none or too large, DataError for text that cannot be used, ModelError for a
    tokenizer of another kind, ResourceError for a model larger than the memory.
    """
    removed = None if remove is None else spell_budget(remove)
    evals = several(str(eval_data) if isinstance(eval_data, Path) else eval_data)
    given = {"field": field, "eval_tokens": eval_tokens, "eval_length": eval_length, "seed": seed, "device": device,
             "dtype": dtype, "trust_remote_code": trust_remote_code}  # fmt: skip
    spec = VocabularySpec(name_of(model), str(data), removed, evals, tokens, plain_options(given))
    asked = _options(spec)
    folder = named_folder(out if out is not None else f"{Path(spec.model).name}-vocabulary")
    check_target(folder)
    teacher = as_teacher(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, watch=watch)
    cut, held_out = _choose(teacher, spec, asked, watch)
    with begin_run(spec, device, Path(store), str(folder)) as (opened, run):
        told = store_and_watch(opened, run, watch)
        report = _write(teacher, spec, cut, held_out, folder=folder, watch=told)
        opened.update(run, result=report.to_json())
    return report


def _options(spec: VocabularySpec) -> list[EvalOptions]:
    """Return how each held-out text is read. Raises BudgetError, DataError and RecipeError before a model is loaded."""
    if spec.remove is not None:
        parse_vocabulary_share(spec.remove)
    require_given(spec.data)
    given = {"model": spec.model, "data": spec.data, **spec.options}
    asked = [parse_options(EvalOptions, {**given, "eval_data": each}) for each in spec.eval_data or (None,)]
    for each in asked:
        check_inputs(each)
    return asked


def _choose(
    teacher: Teacher, spec: VocabularySpec, asked: Sequence[EvalOptions], watch: EventListener
) -> tuple[Cut, list[Passages]]:
    """Return which rows are kept, and the held-out texts. Raises as `cut_vocabulary`; nothing is written yet."""
    vocabulary = readable_vocabulary(teacher)
    held_out = [read_held_out(each, teacher, watch) for each in asked]
    apart = SOURCE_SEPARATOR.join(spec.eval_data) or None
    counted = counted_text(spec.data, asked[0], spec.tokens, teacher, watch, held_out=apart)
    share = None if spec.remove is None else parse_vocabulary_share(spec.remove)
    cut = choose_rows(vocabulary, counted, None if share is None else math.ceil(share * vocabulary.rows), *held_out)
    return cut, [passages_of(each, teacher.tokenizer) for each in held_out]


def _write(
    teacher: Teacher,
    spec: VocabularySpec,
    cut: Cut,
    held_out: Sequence[Passages],
    *,
    folder: Path,
    watch: EventListener,
) -> VocabularyReport:
    """Write the smaller model, and measure it on held-out texts."""
    student = cut_model(teacher, cut.numbers)
    samples = [passage for each in held_out for passage in each.passages]
    smaller, seed = student_as_teacher(teacher, student), int(spec.options["seed"])

    def prove(tokenizer: Any) -> tuple[VocabularyText, ...]:
        other = replace(smaller, tokenizer=tokenizer)
        return tuple(compare_on(each, teacher, other, seed=seed, watch=watch) for each in held_out)

    texts = save_cut(teacher, student, cut.numbers, folder, prove=prove, texts=samples, watch=watch)
    return VocabularyReport(
        teacher.name, str(folder), spec.data, cut.counted, cut.used, cut.fixed, cut.rows, len(cut.numbers),
        teacher.anatomy.total("parameters"), smaller.anatomy.total("parameters"),
        _size(teacher.folder), _size(folder), texts,
    )  # fmt: skip


def _size(folder: Path) -> int:
    """Bytes of weights and tokenizer in a folder."""
    files = (*checks.shards(folder), folder / TOKENIZER)
    return sum(path.stat().st_size for path in files if path.is_file())
