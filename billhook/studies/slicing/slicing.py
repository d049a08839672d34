"""The residual stream of a model cut to fewer channels, as a run of the store."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from billhook.core.budget import parse_basis_rule, parse_width, spell_budget
from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.foreign_files import read_json_object
from billhook.core.files.target_folder import check_target, named_folder, publish, staging_folder
from billhook.core.options import Amount, BasisRule, Source
from billhook.core.plan import Plan
from billhook.core.results.exports import SliceReport, SliceText
from billhook.core.results.specs import SliceSpec, plain_options
from billhook.core.statistics import exp_capped, mean_interval, paired_difference
from billhook.data.calibration import calibration_tokens, require_disjoint
from billhook.data.texts import SOURCE_SEPARATOR
from billhook.data.token_sets import TokenSet
from billhook.methods.evaluate.perplexity import measure_perplexity
from billhook.methods.export.checkpoint import verify_round_trip, write_checkpoint
from billhook.models import checks
from billhook.models.device import dtype_name
from billhook.models.load import Model, Teacher, as_teacher, name_of, student_as_teacher
from billhook.models.pruned_config import MANIFEST
from billhook.models.repair import NO_REPAIR
from billhook.models.residual.student import Widths, require_equal, sliced, sliced_by_boundary, widths_of
from billhook.runs import check_inputs
from billhook.runs.job import store_and_watch
from billhook.runs.prepare import calibration_spec, read_held_out
from billhook.runs.recipe import CalibrationOptions, EvalOptions, parse_options
from billhook.runs.store import STORE
from billhook.studies.run_study import begin_run, several
from billhook.studies.slicing.basis import Basis, basis_of, boundary_bases


class SliceOptions(CalibrationOptions, EvalOptions):
    """Which text a basis is found on, and which it is measured on."""


def slice_model(
    model: Model = "demo",
    *,
    width: Amount,
    bases: BasisRule = "one",
    data: Source = "pydoc",
    eval_data: Source | Sequence[str] = (),
    out: str | Path | None = None,
    field: str = "text",
    tokens: int = 4096,
    length: int = 128,
    eval_tokens: int = 16384,
    eval_length: int = 512,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
) -> SliceReport:
    """Cut the residual stream of a model to fewer channels, those that its text uses most, after a rotation (SliceGPT).

    Arguments:
        model: as for `load`, or a loaded Teacher.
        width: channels that are left, such as 448, or their share, such as 75% or 0.75. It is rounded down to what
            the type allows: a multiple of 8, in Llama with one basis also of the heads.
        bases: of the stream: `one` of all boundaries, or one of each `boundary`, as in the paper.
        data: calibration text, of which the bases are found.
        eval_data: held-out texts, one or several; left out, a half of `data` that is not calibrated on.
        out: the folder to write (default: MODEL-slice).
        field: of a row that holds the text.
        tokens, length: of the calibration text, in all and per sequence.
        eval_tokens, eval_length: of each held-out text, in all and per sequence.

    With one basis the checkpoint has the type of the model, which any software loads: `hidden_size` is smaller. With a
    basis for each boundary a matrix stands in the shortcut around every attention and MLP: the checkpoint is of a type
    of its own, and nothing can be removed from it afterwards. A tied head becomes a matrix of its own. The folder
    appears whole or not at all. A search of depth, or of depth and width, loses less at equal size wherever that was
    measured, and one basis less than one for each boundary.

    Raises BudgetError for a width that is none, or saves nothing, DataError for text that cannot be used, ModelError
    for a type without such a form, ResourceError for a model larger than the memory.
    """
    asked, evals = spell_budget(width), several(str(eval_data) if isinstance(eval_data, Path) else eval_data)
    given = {"field": field, "tokens": tokens, "length": length, "eval_tokens": eval_tokens,
             "eval_length": eval_length, "seed": seed, "device": device, "dtype": dtype,
             "trust_remote_code": trust_remote_code}  # fmt: skip
    spec = SliceSpec(name_of(model), asked, str(data), evals, plain_options(given), parse_basis_rule(bases))
    options = _options(spec)
    folder = named_folder(out if out is not None else f"{Path(spec.model).name}-slice")
    check_target(folder)
    teacher = as_teacher(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, watch=watch)
    cut = _choose(teacher, spec, options, watch)
    with begin_run(spec, device, Path(store), str(folder)) as (opened, run):
        report = _write(teacher, spec, cut, folder, store_and_watch(opened, run, watch))
        opened.update(run, result=report.to_json())
    return report


@dataclass(frozen=True, slots=True)
class _Cut:
    """The width that is left, of those that the model can have, and the texts that say how and what it costs."""

    widths: Widths
    width: int
    calibration: TokenSet
    held_out: tuple[TokenSet, ...]


def _options(spec: SliceSpec) -> list[SliceOptions]:
    """Return how each held-out text is read. Raises BudgetError, DataError and RecipeError before a model is loaded."""
    parse_width(spec.width)
    given = {"model": spec.model, "data": spec.data, **spec.options}
    options = [parse_options(SliceOptions, {**given, "eval_data": each}) for each in spec.eval_data or (None,)]
    for each in options:
        check_inputs(each)
    return options


def _choose(teacher: Teacher, spec: SliceSpec, options: Sequence[SliceOptions], watch: EventListener) -> _Cut:
    """Return the width and the texts. Raises as `slice_model`; nothing is measured or written yet."""
    if teacher.weights is not None:
        raise ResourceError(f"{teacher.name} is larger than the memory that is free, so it cannot be cut here.")
    if teacher.model.dtype.itemsize < teacher.dtype.itemsize:
        raise UsageError(
            f"Every weight is computed anew, and {dtype_name(teacher.model.dtype)} rounds those of {teacher.name}. Use "
            f"{option('dtype', dtype_name(teacher.dtype))}."
        )
    widths = widths_of(teacher, spec.bases)
    width = widths.nearest(parse_width(spec.width))
    held_out = tuple(read_held_out(each, teacher, watch) for each in options)
    with teacher.lock:  # it may write some of its text
        calibration = calibration_tokens(
            calibration_spec(options[0]), teacher.model, teacher.tokenizer, watch,
            held_out=SOURCE_SEPARATOR.join(spec.eval_data) or None,
        )  # fmt: skip
    for each in held_out:
        require_disjoint(calibration, each)
    return _Cut(widths, width, calibration, held_out)


def _write(teacher: Teacher, spec: SliceSpec, cut: _Cut, folder: Path, watch: EventListener) -> SliceReport:
    """Measure the narrower model on held-out texts, and write it."""
    found = _bases(teacher, spec.bases, cut, watch)
    kept = [basis.vectors for basis in found]
    student = sliced(teacher, *kept) if spec.bases == "one" else sliced_by_boundary(teacher, kept)
    require_equal(teacher, kept, student, cut.calibration.rows[:1, : cut.calibration.lengths[0]])
    smaller, seed = student_as_teacher(teacher, student), int(spec.options["seed"])
    texts = tuple(_compare(each, teacher, smaller, seed, watch) for each in cut.held_out)
    _save(teacher, student, cut, folder, watch)
    return SliceReport(
        teacher.name, str(folder), spec.data, cut.calibration.tokens, spec.width, cut.widths.step, cut.widths.whole,
        cut.width, fmean(basis.kept(cut.width) for basis in found), cut.widths.tied, cut.widths.parameters,
        smaller.anatomy.total("parameters"), _size(teacher.folder), _size(folder), texts, spec.bases,
    )  # fmt: skip


def _bases(teacher: Teacher, rule: BasisRule, cut: _Cut, watch: EventListener) -> list[Basis]:
    """Return the directions that are left: of all boundaries, or of each."""
    if rule == "one":
        return [basis_of(teacher, cut.calibration, watch).first(cut.width)]
    return boundary_bases(teacher, cut.calibration, cut.width, watch)


def _compare(tokens: TokenSet, teacher: Teacher, student: Teacher, seed: int, watch: EventListener) -> SliceText:
    """Compare two models on the same tokens."""
    before, after = (
        next(measure_perplexity(each, [(Plan(), NO_REPAIR)], tokens, watch=watch)) for each in (teacher, student)
    )
    first, second = (mean_interval(each, seed).mapped(exp_capped) for each in (before, after))
    ratio = paired_difference(before, after, seed).mapped(exp_capped)
    return SliceText(tokens.source, tokens.tokens, first, second, ratio)


def _save(teacher: Teacher, student: Any, cut: _Cut, folder: Path, watch: EventListener) -> None:
    """Write the student to the new `folder`, with both widths in billhook.json: it is there whole, or not."""
    check_target(folder, teacher.folder, teacher.anatomy.total("bytes"))
    aside = staging_folder(folder, secrets.token_hex(3))
    try:
        write_checkpoint(student, teacher.tokenizer, Plan(), aside, teacher=teacher, watch=watch)
        manifest, told = aside / MANIFEST, {"width": cut.widths.whole, "kept": cut.width}
        told |= {"shortcuts": cut.widths.shortcuts} if cut.widths.shortcuts else {}
        manifest.write_text(json.dumps(read_json_object(manifest) | {"residual": told}, indent=2) + "\n")
        verify_round_trip(student, aside, torch.arange(16)[None] % student.config.vocab_size, watch)
        publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in checks.shards(folder))
