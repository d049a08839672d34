"""What a run needs before it measures: the teacher, its tokens, the problem and the engine."""

from __future__ import annotations

from dataclasses import replace

from billhook.core.anatomy import Anatomy
from billhook.core.budget import Budget
from billhook.core.errors import PlanError, ResourceError
from billhook.core.events import EventListener
from billhook.core.margin import Margin
from billhook.core.plan import Plan
from billhook.core.plan_files import read_plan
from billhook.core.problem import Problem, parse_protection
from billhook.data.calibration import TextSpec, generate_share, generated_token_count, mixed_sets
from billhook.data.choice_tasks import load_items
from billhook.data.splits import halves
from billhook.data.token_sets import MIN_ROW, TokenSet
from billhook.engine.losses import parse_loss
from billhook.engine.probe import Probe, RacingOptions
from billhook.models.load import Teacher, load
from billhook.runs.executor import store_cache
from billhook.runs.job import RunContext
from billhook.runs.recipe import Recipe
from billhook.runs.search import method_options

LEAST_RECOVERY_TOKENS = 64  # tokens, of which something may be learnt


def load_teacher(recipe: Recipe, watch: EventListener) -> Teacher:
    """The model of a recipe, loaded as the recipe says. Raises ResourceError for a memory that two blocks fill."""
    teacher = load(
        recipe.model, device=recipe.device, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code,
        memory=recipe.memory_bytes, watch=watch,
    )  # fmt: skip
    if recipe.memory_bytes is not None and teacher.weights is not None and teacher.weight_bytes > recipe.memory_bytes:
        raise ResourceError(
            f"--memory {recipe.memory} is too little: a block that is measured and the next one that is read take "
            f"{teacher.weight_bytes / 1e6:,.0f} MB of weights. Give --memory {-(-4 * teacher.weight_bytes // 10**6)}MB "
            "or more."
        )
    return teacher


def validate(recipe: Recipe, teacher: Teacher) -> Plan | None:
    """The plan that a recipe gives, if it gives one. Raises UsageError before anything is computed."""
    parse_loss(recipe.loss)
    method_options(recipe)
    protected = parse_protection(recipe.protect, teacher.anatomy)
    lost = sorted(site for site in teacher.removed_earlier.removed if site.block in teacher.positions)
    if recipe.stock and lost:
        raise PlanError(
            f"--stock needs weights for every site that stays in the shape, and {', '.join(map(str, lost))} went in an "
            "earlier pruning. Leave --stock out, or start from the unpruned model."
        )
    if recipe.plan is not None:
        plan = read_plan(recipe.plan, teacher.anatomy, teacher.fingerprint)
        if not plan:
            raise PlanError(f"--plan {recipe.plan!r} removes nothing. Name sites to remove: attention.7,mlp.16.")
        if plan.narrowed and recipe.stock:
            raise PlanError("--stock has no place for sites that become narrower. Leave it out.")
        return teacher.anatomy.check(plan, protected)
    if recipe.remove is not None and not counts_time(recipe):
        problem_of(recipe, teacher.anatomy, recipe.budgets)
    return None


def counts_time(recipe: Recipe) -> bool:
    """Whether a budget is in time, which has to be measured before it means anything."""
    return any(budget.unit == "ms" for budget in recipe.budgets)


def problem_of(recipe: Recipe, anatomy: Anatomy, budgets: tuple[Budget, ...]) -> Problem:
    """The problem of a recipe. Raises BudgetError if it cannot be met."""
    return Problem(anatomy, budgets, parse_protection(recipe.protect, anatomy), recipe.seed).check()


def text_spec(recipe: Recipe) -> TextSpec:
    """The texts that a recipe names, and how many tokens of them."""
    return TextSpec(
        *(recipe.data, recipe.eval_data, recipe.field),
        *(recipe.tokens, recipe.length, recipe.eval_tokens, recipe.eval_length, recipe.seed),
        self_share=recipe.self_share,
    )


def load_token_sets(job: RunContext, teacher: Teacher, spec: TextSpec) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens. What the model writes for them is filed, so that whoever asks again, on
    another machine too, gets the same."""
    own = None
    if tokens := generated_token_count(spec):
        of = {"tokens": tokens, "length": spec.length, "seed": spec.seed}
        own = job.store.cached(teacher.fingerprint, "written", of)
        if own is None and (own := generate_share(spec, teacher.model, teacher.tokenizer, job.watch)):
            job.store.remember(teacher.fingerprint, "written", of, own, job.run)
    return mixed_sets(spec, teacher.model, teacher.tokenizer, job.watch, generated=own)


def task_calibration(recipe: Recipe, teacher: Teacher) -> TokenSet | None:
    """Calibration tokens from a task, where the loss of a recipe is a task's."""
    file = parse_loss(recipe.loss)[1]
    return None if file is None else load_items(file, teacher, "calibration", tokens=recipe.tokens, seed=recipe.seed)


def tokens_for(
    recipe: Recipe, teacher: Teacher, watch: EventListener, job: RunContext | None = None
) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens of a recipe; where its loss is a task's, calibration is that task's.

    What the model writes for a `job` is filed.
    """
    task, wanted = task_calibration(recipe, teacher), text_spec(recipe)
    if task is not None:  # of text, only what is held out
        wanted = replace(wanted, tokens=2 * MIN_ROW, self_share=0.0)
    if recipe.plan is not None:  # nothing is searched
        wanted = replace(wanted, self_share=0.0)
    with teacher.lock:  # it may write some of it
        if job is not None:
            calibration, held_out = load_token_sets(job, teacher, wanted)
        else:
            calibration, held_out = mixed_sets(wanted, teacher.model, teacher.tokenizer, watch)
    return (calibration if task is None else task), held_out


def recovery_tokens(recipe: Recipe, teacher: Teacher, watch: EventListener) -> TokenSet:
    """What recoveries learn from: the calibration half of the text, as much as is wanted or there is."""
    most = getattr(teacher.model.config, "max_position_embeddings", recipe.recover_length)
    wanted = replace(
        text_spec(recipe), data=recipe.recover_data or recipe.data, eval_data=None, tokens=recipe.recover_tokens,
        length=min(recipe.recover_length, most), eval_tokens=64, eval_length=16, least=LEAST_RECOVERY_TOKENS, self_share=0.0,
    )  # fmt: skip
    return mixed_sets(wanted, teacher.model, teacher.tokenizer, watch)[0]


def probe_of(recipe: Recipe, teacher: Teacher, calibration: TokenSet, job: RunContext | None = None) -> Probe:
    """The measuring engine as a recipe wants it; measurements are kept in the store of a job."""
    fast = RacingOptions(recipe.shortlist, recipe.risk) if recipe.fast else None
    loss = parse_loss(recipe.loss)[0]
    if job is None:
        return Probe(teacher, calibration, loss, memory=recipe.memory_bytes, fast=fast)
    kept = store_cache(job.store, job.run, teacher)
    return Probe(teacher, calibration, loss, memory=recipe.memory_bytes, fast=fast, cache_factory=kept)


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
