"""A model with low-rank factors in the place of its linear maps, as a run of the store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from billhook.core.budget import Budget, parse_parameter_budget, parse_rank_rule, spell_budget
from billhook.core.errors import BudgetError, ResourceError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.target_folder import check_target, named_folder
from billhook.core.options import Amount, RankRule, Source
from billhook.core.plan import Plan
from billhook.core.results.exports import FactoredMap, FactorReport
from billhook.core.results.specs import FactorSpec, plain_options
from billhook.core.statistics import mean_interval, paired_difference
from billhook.data.calibration import require_disjoint
from billhook.data.token_sets import TokenSet
from billhook.methods.evaluate.perplexity import measure_perplexity
from billhook.methods.export.checkpoint import save
from billhook.models.factors.ranks import most_saved, ranks_by_energy, ranks_by_loss
from billhook.models.load import Model, Teacher, as_teacher, name_of, student_as_teacher
from billhook.models.pruned_config import require_prunable
from billhook.models.repair import NO_REPAIR
from billhook.runs import check_inputs
from billhook.runs.job import store_and_watch
from billhook.runs.prepare import read_calibration, read_held_out
from billhook.runs.recipe import CalibrationOptions, EvalOptions, parse_options
from billhook.runs.store import STORE
from billhook.studies.factors.fitting import Place, all_energies, all_loss_changes, factored, linear_sizes
from billhook.studies.run_study import begin_run


def factor(
    model: Model = "demo",
    *,
    remove: Amount,
    ranks: RankRule = "loss",
    data: Source = "pydoc",
    eval_data: Source | None = None,
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
) -> FactorReport:
    """Replace linear maps of attentions and MLPs by two smaller ones each, the best for a text.

    Arguments:
        model: as for `load`, or a loaded Teacher.
        remove: how many parameters to save at least: 10%, 0.1 or 20Mparams.
        ranks: what they are chosen by, `energy` or `loss`.
        data: the text whose outputs the factors keep.
        eval_data: held-out text; left out, a part of `data` that is not calibrated on.
        out: the folder to write (default: MODEL-factors).
        field: of a row that holds the text.
        tokens, length: of `data`, in all and per sequence.
        eval_tokens, eval_length: of the held-out text.

    A map W becomes V (Vᵀ W), V the first r eigenvectors of Σ y yᵀ of its outputs y = W x: no matrix of rank r is nearer
    to W on the text. Maps are fitted in forward order, on what the factors before them give. Ranks are spread under one
    budget by what the model as it was tells, the loss (`ranks_by_loss`) or the energy of outputs (`ranks_by_energy`);
    maps for which factors save nothing stay whole. The factors are the optimum of LLM-ROM (arXiv 2312.07046), of the
    whitened truncation of SVD-LLM (arXiv 2403.07378), and of Swift-SVD (arXiv 2604.01609); ranks by loss are after
    ZS-SVD (arXiv 2602.02848). A ridge of a millionth of the mean square of the inputs is ours.

    The folder is a checkpoint of a type of its own, and appears whole or not at all. Raises BudgetError for a size that
    factors cannot save, DataError for unusable text, ResourceError for a model or gradients larger than the memory.
    """
    asked = {"field": field, "tokens": tokens, "length": length, "eval_tokens": eval_tokens, "eval_length": eval_length,
             "seed": seed, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}  # fmt: skip
    budget = parse_parameter_budget(spell_budget(remove))
    held_out = None if eval_data is None else str(eval_data)
    spec = FactorSpec(name_of(model), str(budget), str(data), held_out, plain_options(asked), parse_rank_rule(ranks))
    fit_on, prove_on = _options(spec)
    folder = named_folder(out if out is not None else f"{Path(spec.model).name}-factors")
    check_target(folder)
    teacher = as_teacher(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, watch=watch)
    needed = _needed(teacher, budget)
    calibration, unseen = read_calibration(fit_on, teacher, watch), read_held_out(prove_on, teacher, watch)
    require_disjoint(calibration, unseen)
    with begin_run(spec, device, Path(store), str(folder)) as (opened, run):
        told = store_and_watch(opened, run, watch)
        report = _write(teacher, spec, _Texts(calibration, unseen), needed, folder=folder, watch=told)
        opened.update(run, result=report.to_json())
    return report


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the factors are fitted on, and what they are proven on."""

    calibration: TokenSet
    held_out: TokenSet


def _options(spec: FactorSpec) -> tuple[CalibrationOptions, EvalOptions]:
    """Return how both texts are read. Raises DataError and RecipeError before a model is loaded."""
    given = {"model": spec.model, "data": spec.data, "eval_data": spec.eval_data, **spec.options}
    names = (set(CalibrationOptions.model_fields), set(EvalOptions.model_fields))
    mine, theirs = ({name: value for name, value in given.items() if name in those} for those in names)
    fit_on, prove_on = parse_options(CalibrationOptions, mine), parse_options(EvalOptions, theirs)
    check_inputs(prove_on)
    return fit_on, prove_on


def _needed(teacher: Teacher, budget: Budget) -> int:
    """Return how many parameters must be saved.

    Raises ResourceError, ModelError and BudgetError before a text is read.
    """
    if teacher.weights is not None:
        raise ResourceError(f"{teacher.name} is larger than the memory that is free, so it cannot be factored here.")
    require_prunable(teacher.pruned, teacher.name)
    needed, most = math.ceil(budget.target(teacher.anatomy)), most_saved(linear_sizes(teacher))
    if needed > most:
        raise BudgetError(
            f"{option('remove', str(budget))} asks for {needed:,} parameters, and factors of rank 1 in the place of "
            f"every linear map save {most:,}. Ask for less."
        )
    return needed


def _write(
    teacher: Teacher, spec: FactorSpec, texts: _Texts, needed: int, *, folder: Path, watch: EventListener
) -> FactorReport:
    """Fit the factors, measure them on held-out text, and write the checkpoint."""
    sizes = linear_sizes(teacher)
    ranks = _ranks(teacher, spec.ranks, texts.calibration, needed, watch)
    student, lost = factored(teacher, texts.calibration, ranks, watch)
    smaller, seed = student_as_teacher(teacher, student), int(spec.options["seed"])
    one, other = (
        next(measure_perplexity(each, [(Plan(), NO_REPAIR)], texts.held_out, watch=watch))
        for each in (teacher, smaller)
    )
    save(student, teacher.tokenizer, Plan(), folder, teacher=teacher, watch=watch)
    maps = [
        FactoredMap(place[0], place[1], *sizes[place], rank, lost[place]) for place, rank in sorted(ranks.items())
    ]  # fmt: skip
    return FactorReport(
        teacher.name, str(folder), spec.remove, texts.calibration.source, texts.calibration.tokens,
        teacher.anatomy.total("parameters"), smaller.anatomy.total("parameters"), len(sizes) - len(maps), tuple(maps),
        texts.held_out.source, mean_interval(one, seed), mean_interval(other, seed),
        paired_difference(one, other, seed), spec.ranks,
    )  # fmt: skip


def _ranks(
    teacher: Teacher, rule: RankRule, calibration: TokenSet, needed: int, watch: EventListener
) -> dict[Place, int]:
    """Return the ranks of the linear maps that are factored, by their outputs' energies or by the loss."""
    sizes = linear_sizes(teacher)
    if rule == "energy":
        return ranks_by_energy(sizes, all_energies(teacher, calibration, watch), needed)
    return ranks_by_loss(sizes, all_loss_changes(teacher, calibration, watch), needed)
