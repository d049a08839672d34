"""What a run needs before it measures: the teacher, its tokens, the problem and the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.budget import Budget, parse_budgets
from billhook.core.errors import PlanError, ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.cache_keys import GeneratedKey
from billhook.core.margin import Margin
from billhook.core.plan import Plan, Site
from billhook.core.plan_files import read_plan
from billhook.core.problem import Problem, parse_protection
from billhook.core.registry import OptionValues, split_names
from billhook.data.calibration import (
    calibration_tokens,
    generate_share,
    generated_token_count,
    held_out_tokens,
    require_disjoint,
    require_foreign,
)
from billhook.data.choice_tasks import load_items
from billhook.data.splits import halves, without_documents
from billhook.data.texts import SELF, TextSpec, external_sources, split_sources
from billhook.data.token_sets import TokenSet, truncate
from billhook.engine.losses import parse_loss
from billhook.engine.measurements import no_cache
from billhook.engine.probe import Probe, RacingOptions
from billhook.engine.workers.hiring import require_workers
from billhook.methods.evaluate.served import load_served
from billhook.methods.export import EXPORTS, arranged, form_of
from billhook.methods.export.serving import limits_of, require_fit
from billhook.methods.export.targets import Form, limited, limits, narrower
from billhook.methods.recover import adds, unfit
from billhook.methods.search import drive, narrows
from billhook.models.load import Teacher, as_teacher
from billhook.models.pruned_config import require_prunable
from billhook.models.surgery import stock_holds
from billhook.runs import check_inputs
from billhook.runs.executor import store_cache
from billhook.runs.job import RunContext
from billhook.runs.recipe import CalibrationOptions, EvalOptions, Recipe, TextOptions
from billhook.runs.search import expected_losses, method_options, scores_experts, search_of
from billhook.runtimes.artefacts import is_served, require_checkpoint

NOTHING: Mapping[str, Teacher] = MappingProxyType({})

LEAST_RECOVERY_TOKENS = 64  # tokens, of which something may be learnt


def open_model(options: TextOptions, watch: EventListener, loaded: Mapping[str, Teacher] = NOTHING) -> Teacher:
    """The model of some options for evaluations: as `load_teacher`, or in the runtime of a name ENGINE:FILE.

    That chooses device, dtype and memory itself.
    """
    if options.model in loaded or not is_served(options.model):
        return load_teacher(options, watch, loaded)
    check_inputs(options)
    return load_served(options.model, watch)


def load_teacher(recipe: TextOptions, watch: EventListener, loaded: Mapping[str, Teacher] = NOTHING) -> Teacher:
    """The model of some options, loaded as they say, or the one of its name that is `loaded`.

    Raises ResourceError for a memory that two blocks fill, and as `check_inputs` before the model is loaded.
    """
    check_inputs(recipe)
    if recipe.model not in loaded:
        require_checkpoint(recipe.model)
    teacher = as_teacher(
        loaded.get(recipe.model, recipe.model), device=recipe.device, dtype=recipe.dtype, memory=recipe.memory_bytes,
        trust_remote_code=recipe.trust_remote_code, watch=watch,
    )  # fmt: skip
    if recipe.memory_bytes is not None and teacher.weights is not None and teacher.weight_bytes > recipe.memory_bytes:
        raise ResourceError(
            f"{option('memory', recipe.memory)} is too little: a block that is measured and the next one that is "
            "read take "
            f"{teacher.weight_bytes / 1e6:,.0f} MB of weights. Give "
            f"{option('memory', f'{-(-4 * teacher.weight_bytes // 10**6)}MB')} "
            "or more."
        )
    return teacher


def validate(recipe: Recipe, teacher: Teacher) -> Plan | None:
    """The plan that a recipe gives, if no search chooses one. Raises UsageError before anything is computed."""
    require_prunable(teacher.pruned, teacher.name)
    parse_loss(recipe.loss)
    method_options(recipe)
    require_workers(recipe.workers, teacher)
    for name in (recipe.writes, *exports_beside(recipe)):
        form_of(name, teacher, Plan())
    require_recoveries(recipe, teacher)
    protected = parse_protection(recipe.protect, teacher.anatomy)
    lost = sorted(site for site in teacher.removed_earlier.removed if site.block in teacher.positions)
    if recipe.stock and lost:
        raise PlanError(
            f"{option('stock', True)} needs weights for every site that stays in the shape, and "
            f"{', '.join(map(str, lost))} went in an "
            f"earlier pruning. Leave {option('stock')} out, or start from the unpruned model."
        )
    if recipe.plan is not None:
        plan = read_plan(recipe.plan, teacher.anatomy, teacher.fingerprint)
        if not plan:
            raise PlanError(f"{option('plan', recipe.plan)} removes nothing. Name sites to remove: attention.7,mlp.16.")
        if plan.narrowed and recipe.stock:
            raise PlanError(f"{option('stock', True)} has no place for sites that become narrower. Leave it out.")
        require_fit(recipe.targets, teacher, plan)
        for name in exports_beside(recipe):
            form_of(name, teacher, plan)
        return teacher.anatomy.check(plan, protected)
    if recipe.vocabulary_alone:
        return Plan()
    check_search(recipe, teacher)
    return None


def check_search(recipe: Recipe, teacher: Teacher) -> None:
    """Raise where a search cannot meet its budgets, but for those of time, or an export has no place for its widths."""
    most = limits_of_recipe(recipe, teacher)
    narrowed = {most.mlp_widths, most.attention_widths} - {"none"}
    widths = "none" if not narrowed else "alike" if "alike" in narrowed else "any"
    if narrows(recipe.search) and (widths == "none" or (widths == "alike" and not recipe.uniform)):
        instead = f"Add {option('uniform', True)}, take" if widths == "alike" else "Take"
        kind, name = ("target", recipe.target) if recipe.targets else ("export", recipe.writes)
        raise PlanError(
            f"The {kind} {name} has no place for sites of different widths, which the search {recipe.search} "
            f"chooses. {instead} {option('search', 'swap')}, or another {kind}."
        )
    unknown = recipe.remove is None or counts_time(recipe)
    if recipe.fold_in_search:
        some = Problem(teacher.anatomy, parse_budgets("50%params") if unknown else recipe.budgets)
        if expected_losses(recipe, some) == 0:
            with_scores = f" by the metric {recipe.metric}" if recipe.metric else ""
            raise UsageError(
                f"{option('fold_in_search', True)} judges what a search measures, and {recipe.search}{with_scores} "
                f"measures nothing. Take {option('search', 'greedy')}, or leave {option('fold_in_search')} out."
            )
    if unknown:
        return
    problem = problem_of(recipe, teacher, teacher.anatomy, recipe.budgets)
    expected_losses(recipe, problem)
    if recipe.uniform and (widths == "alike" or not recipe.protect):
        sizes = [size for size in problem.anatomy.sites if size.groups]
        even = replace(problem, group_scores={size.site: (0.0,) * len(size.groups) for size in sizes})
        (plan,) = drive(search_of(recipe, even), lambda request: [])
        if not stock_holds(teacher, plan):
            widths = ", ".join(f"{len(each.groups)} groups of {each.site}" for each in sorted(plan.narrowed)[:2])
            raise PlanError(
                f"{option('uniform', True)} keeps the stock shape, and a {teacher.anatomy.model_type} has none with "
                f"{widths}. Ask for another {option('remove')}, narrow the mlps alone "
                f"({option('set', {'parts': 'mlp'})}), or leave {option('uniform')} out."
            )


def counts_time(recipe: Recipe) -> bool:
    """Whether a budget is in time, which has to be measured before it means anything."""
    return any(budget.unit == "ms" for budget in recipe.budgets)


def problem_of(recipe: Recipe, teacher: Teacher, anatomy: Anatomy, budgets: tuple[Budget, ...]) -> Problem:
    """The problem of a recipe, in which nothing changes that its targets cannot express.

    `anatomy`: the teacher's, with times where a budget counts them. Raises BudgetError if it cannot be met.
    """
    most, protected = limits_of_recipe(recipe, teacher), parse_protection(recipe.protect, anatomy)
    anatomy = limited(anatomy, most, teacher.model.config)
    if scores_experts(recipe):  # nothing else has scores
        sites = (size if size.expert else replace(size, groups=(), group=None) for size in anatomy.sites)
        anatomy = replace(anatomy, sites=tuple(sites))
    if most.first_attention:
        protected |= {Site(min(anatomy.sites_present()).block, "attention")}
    return Problem(anatomy, budgets, protected, recipe.seed, blocks_only=most.sites == "none").check()


def exports_beside(recipe: Recipe) -> tuple[str, ...]:
    """The names of the exports of a recipe that stand beside its checkpoint."""
    return arranged(split_names(recipe.export))[1]


def limits_of_recipe(recipe: Recipe, teacher: Teacher) -> Form:
    """What the targets of a recipe, and its export, can express of a model."""
    forms = [EXPORTS.facts(name) for name in (recipe.writes, *exports_beside(recipe))]
    own = limits(forms, teacher.anatomy.model_type, teacher.model.config) or Form()
    return narrower(own, limits_of(recipe.targets, teacher.model.config)) if recipe.targets else own


def require_recoveries(recipe: Recipe, teacher: Teacher) -> None:
    """Raise PlanError where a recovery adds what a target of the recipe, or its export, has no place for."""
    most = limits_of_recipe(recipe, teacher)
    constants = most.inserts or most.constants
    for name in applicable_recoveries(recipe, teacher):
        added = adds(name, recipe.recover_set)
        if not {"": True, "patches": most.inserts, "constants": constants, "biases": most.biases}[added]:
            where = option("target", recipe.target) if recipe.target else option("export", recipe.export)
            raise PlanError(f"{where} has no place for the {added} of {name}. Recover by fold or lora.")


def applicable_recoveries(recipe: Recipe, teacher: Teacher) -> tuple[str, ...]:
    """Return the recoveries of a recipe that can change something in this model.

    Those with a question mark are left out where they cannot. Raises UsageError for another one.
    """
    found = []
    for name in recipe.recoveries:
        reason = unfit(name, teacher)
        if reason is None:
            found.append(name)
        elif name not in recipe.optional_recoveries:
            raise UsageError(reason)
    return tuple(found)


def calibration_spec(options: CalibrationOptions) -> TextSpec:
    """The calibration text that options name."""
    return TextSpec(options.data, options.field, options.tokens, options.length, options.seed)


def held_out_spec(options: EvalOptions) -> TextSpec:
    """The held-out text that options name: their own one, or what is kept of the calibration text.

    Where the model writes all of that, the documentation of Python.
    """
    source = options.eval_data or external_sources(options.data) or "pydoc"
    return TextSpec(source, options.field, options.eval_tokens, options.eval_length, options.seed)


def read_held_out(options: EvalOptions, teacher: Teacher, watch: EventListener = ignore_events) -> TokenSet:
    """The held-out tokens on which `prune` with the same options proves its student."""
    return _held_out(held_out_spec(options), teacher, watch, options.data)


def read_held_out_half(
    options: EvalOptions, source: str, teacher: Teacher, watch: EventListener = ignore_events, *, seed: int
) -> TokenSet:
    """Held-out tokens of a text, from the half of it that is never calibration, whatever is calibrated on."""
    spec = TextSpec(external_sources(source) or source, options.field, options.eval_tokens, options.eval_length, seed)
    return _held_out(spec, teacher, watch)


def _held_out(spec: TextSpec, teacher: Teacher, watch: EventListener, calibration: str | None = None) -> TokenSet:
    own = teacher.model, teacher.tokenizer
    return held_out_tokens(spec, *own, watch, calibration=calibration, halved_by=teacher.halved_by)


def _calibration(spec: TextSpec, teacher: Teacher, watch: EventListener, **given: Any) -> TokenSet:
    return calibration_tokens(spec, teacher.model, teacher.tokenizer, watch, halved_by=teacher.halved_by, **given)


def load_calibration(
    job: RunContext,
    teacher: Teacher,
    spec: TextSpec,
    *,
    held_out: str | None = None,
    self_share: float = 0.0,
    before_writing: Callable[[TokenSet | None], None] = lambda foreign: None,
    least: int | None = None,
) -> TokenSet:
    """Calibration tokens as `calibration_tokens` reads them. What the model writes for them is stored, so that whoever
    asks again, on another machine too, gets the same."""

    def write() -> list[str]:
        if not (tokens := generated_token_count(spec, self_share)):
            return []
        key = GeneratedKey(teacher.fingerprint, tokens, spec.length, spec.seed)
        if (stored := job.store.lookup(key)) is not None:
            return stored
        own = generate_share(spec, self_share, teacher.model, teacher.tokenizer, job.watch)
        if own:  # where it could not write any, another machine may
            job.store.add(key, own, job.run)
        return own

    given: OptionValues = {"held_out": held_out, "self_share": self_share, "least": least}
    return _calibration(spec, teacher, job.watch, write=write, before_writing=before_writing, **given)


def task_calibration(
    options: CalibrationOptions, teacher: Teacher, watch: EventListener = ignore_events
) -> TokenSet | None:
    """Calibration tokens from a task, where the loss is a task's."""
    file = parse_loss(options.loss).file
    if file is None:
        return None
    return load_items(file, teacher, "calibration", tokens=options.tokens, seed=options.seed, watch=watch)


def read_calibration(
    options: CalibrationOptions,
    teacher: Teacher,
    watch: EventListener,
    job: RunContext | None = None,
    *,
    self_share: float | None = None,
    before_writing: Callable[[TokenSet | None], None] = lambda foreign: None,
) -> TokenSet:
    """Calibration tokens of options; where their loss is a task's, that task's. What the model writes is stored by a
    `job`. `self_share`: instead of theirs. `before_writing`: see `calibration_tokens`; of a task it gets None."""
    if (task := task_calibration(options, teacher, watch)) is not None:
        before_writing(None)
        return task
    spec, share = calibration_spec(options), options.self_share if self_share is None else self_share
    with teacher.lock:  # it may write some of it
        given: OptionValues = {"held_out": options.eval_data, "self_share": share, "before_writing": before_writing}
        if job is not None:
            return load_calibration(job, teacher, spec, **given)
        return _calibration(spec, teacher, watch, **given)


def unseen_tokens(recipe: Recipe, teacher: Teacher, watch: EventListener, *seen: TokenSet) -> TokenSet | None:
    """As many tokens of the calibration text as a recipe asks for, of documents that are not among those `seen`.

    None where the text holds no two more, is a task, or is written by the model alone.
    """
    source = external_sources(recipe.data)
    if parse_loss(recipe.loss).file is not None or not source:
        return None
    spec = replace(calibration_spec(recipe), source=source, tokens=2 * recipe.tokens)
    given: OptionValues = {"held_out": recipe.eval_data, "least": 1}
    more = without_documents(_calibration(spec, teacher, watch, **given), *seen)
    return None if more is None or len(more.digests) < 2 else truncate(more, recipe.tokens)


def tokens_for(
    recipe: Recipe, teacher: Teacher, watch: EventListener, job: RunContext | None = None
) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens of a recipe, which share no document; see `read_calibration`.

    All text and tasks that the recipe names are read before the model writes any.
    """
    if recipe.eval_data is not None:
        require_foreign(recipe.eval_data)
    share = 0.0 if recipe.plan is not None or recipe.vocabulary_alone else recipe.self_share  # nothing is searched
    read: list[TokenSet] = []

    def read_the_rest(foreign: TokenSet | None) -> None:
        held_out = read_held_out(recipe, teacher, watch)
        if foreign is not None:
            require_disjoint(foreign, held_out)
        _read_all(recipe, teacher, held_out, watch)
        read.append(held_out)

    calibration = read_calibration(recipe, teacher, watch, job, self_share=share, before_writing=read_the_rest)
    (held_out,) = read
    if calibration.choices is None:
        require_disjoint(calibration, held_out)
    return calibration, held_out


def _read_all(recipe: Recipe, teacher: Teacher, held_out: TokenSet, watch: EventListener) -> None:
    """Read the tasks and the text that are needed later. Raises as their reading does."""
    if recipe.margin is not None:
        validation_and_test(recipe, recipe.margin, teacher, held_out)
    for file in {parse_loss(recipe.loss).file, recipe.margin.file if recipe.margin is not None else None} - {None}:
        load_items(str(file), teacher, "evaluation", seed=recipe.seed, watch=watch)
    learns = applicable_recoveries(recipe, teacher) or recipe.fold_in_search
    if learns and SELF not in split_sources(recipe.recover_data or recipe.data):
        recovery_tokens(recipe, teacher, watch)


def recovery_tokens(recipe: Recipe, teacher: Teacher, watch: EventListener) -> TokenSet:
    """What recoveries learn from: the calibration half of the text, as much as is wanted or there is."""
    most = getattr(teacher.model.config, "max_position_embeddings", recipe.recover_length)
    source, length = recipe.recover_data or recipe.data, min(recipe.recover_length, most)
    spec = TextSpec(source, recipe.field, recipe.recover_tokens, length, recipe.seed)
    return _calibration(spec, teacher, watch, least=LEAST_RECOVERY_TOKENS)


def probe_of(recipe: Recipe, teacher: Teacher, calibration: TokenSet, job: RunContext | None = None) -> Probe:
    """The measuring engine as a recipe wants it; measurements are kept in the store of a job."""
    return Probe(
        teacher, calibration, parse_loss(recipe.loss).name, memory=recipe.memory_bytes,
        fast=RacingOptions(recipe.shortlist, recipe.risk) if recipe.fast else None,
        cache_factory=no_cache if job is None else store_cache(job.store, job.run, teacher),
        team=None if job is None else job.team, bfloat16=recipe.dtype == "auto",
    )  # fmt: skip


def validation_and_test(
    recipe: Recipe, margin: Margin, teacher: Teacher, held_out: TokenSet
) -> tuple[TokenSet, TokenSet]:
    """The items on which a margin is judged, and those of the proof, which no choice has seen.

    Half each of the held-out text, or of the items of its task.
    """
    if margin.kind == "ppl":
        return halves(held_out)
    assert margin.file is not None
    return halves(load_items(margin.file, teacher, "evaluation", seed=recipe.seed))
