"""What goes: scores, then a search, or as much as a margin allows. Everything that is measured is kept in the store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from billhook import speed
from billhook.audit import measure_regret, search_summary, with_words
from billhook.budget import Budget
from billhook.data import MIN_ROW, TextSpec, TokenSet, truncate
from billhook.errors import BudgetError, PlanError, ResourceError, UsageError
from billhook.execute import Executor, OnProgress, RefitExecutor, store_cache
from billhook.loading import Teacher, load
from billhook.losses import parse_loss
from billhook.margin import Margin, MarginCheck
from billhook.plan import Anatomy, MeasureRequest, Plan
from billhook.portions import generate_share, generated_token_count, halves, mixed_sets, select_documents
from billhook.probe import Probe, RacingOptions
from billhook.problem import Problem, parse_protection
from billhook.proof import RunContext, environment, evaluate_plans
from billhook.recipe import Recipe, read_plan
from billhook.records import Event, EventListener, Loss, Step, removal_trace
from billhook.recover import RECOVERIES, RecoveryTask
from billhook.scoring import ScoreFields, compute_scores, method_options
from billhook.search import OF_GROUPS, SEARCHES, Search, drive, estimate_losses, lowest_full
from billhook.store import LossKey
from billhook.tasks import load_items

LEAST_RECOVERY_TOKENS = 64  # tokens, of which something may be learnt
FOLD_TOKENS = 8192  # for a fold inside the search
FOLD = {"reach": "next"}  # its options; what stands farther behind is refitted after the search
GROWTH = Fraction(3, 2)  # of the share that goes, from trial to trial: a search far beyond the margin costs the most
FINEST = Fraction(1, 2)  # percent of the parameters, between what stays within a margin and what does not


@dataclass(frozen=True)
class PlanChoice:
    """What a run decided to remove, and how. `within`: what the margin said of each trial, where there was one."""

    plan: Plan
    steps: list[Step]
    search_summary: dict[str, Any]
    within: dict[str, Any] | None = None


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


def search_of(recipe: Recipe, problem: Problem) -> Search:
    """The search of a recipe, with its options, on a problem."""
    return SEARCHES[recipe.search](problem, **method_options(recipe)[0])


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


# -- the whole of it ------------------------------------------------------------------------------------------------


def choose_plan(
    job: RunContext,
    teacher: Teacher,
    calibration: TokenSet,
    held_out: TokenSet | None = None,
    given: Plan | None = None,
    *,
    along: bool = True,
) -> PlanChoice:
    """The plan of a run: given, searched for, or the largest within a margin, which is judged on `held_out` text.

    `along`: with the loss after every step, which a search by scores has not measured itself.
    """
    recipe = job.recipe
    probe = probe_of(recipe, teacher, calibration, job)
    plain = Executor(probe)
    measure = RefitExecutor(plain, _judge(job, teacher, calibration)) if recipe.fold_in_search else plain
    within: dict[str, Any] | None = None
    problem: Problem | None = None
    if given is not None:
        path = [given]
    else:
        scores = compute_scores(job, probe)
        if recipe.within is not None:
            assert held_out is not None
            problem, path, within = _largest_within_margin(job, teacher, measure, scores, held_out)
        else:
            anatomy = with_site_times(job, teacher) if counts_time(recipe) else teacher.anatomy
            problem = replace(problem_of(recipe, anatomy, recipe.budgets), **scores)
            path = run_search(job, problem, measure)
    rounds, conducted = list(measure.rounds), search_summary(probe)
    if recipe.audit:
        probe.release_streams()
        conducted["audit"] = _audit(job, probe, rounds)
    conducted = with_words(conducted)
    if not path or not path[-1]:
        return PlanChoice(Plan(), [], conducted, within)
    if not along:
        return PlanChoice(path[-1], [], conducted, within)
    told = _progress_of_request(job, "along the path", before=0, total=len(path))
    measured = {plan for ask, losses in rounds for plan, loss in zip(ask.plans, losses, strict=True) if not loss.bound}
    on_path = measure(MeasureRequest(tuple(path)), *([] if measured.issuperset(path) else [told]))
    whole = [(ask.plans, losses) for ask, losses in rounds if ask.tokens is None]
    return PlanChoice(
        path[-1], removal_trace(path, whole, on_path, problem.cost if problem else len), conducted, within
    )


def _judge(job: RunContext, teacher: Teacher, calibration: TokenSet) -> Callable[[Plan], Loss]:
    """The loss of a plan on the calibration tokens after a fold on other texts; stored."""
    recipe = job.recipe
    texts = recovery_tokens(recipe, teacher, job.watch)
    others = [d for d, digest in enumerate(texts.digests) if digest not in set(calibration.digests)]
    train = truncate(select_documents(texts, others), FOLD_TOKENS) if others else None
    if train is None or train.tokens < LEAST_RECOVERY_TOKENS:
        raise UsageError("--fold-in-search refits on texts that the search is not judged on. Give more --recover-data.")
    loss = parse_loss(recipe.loss)[0]
    treatment = f"fold {json.dumps([train.hash, FOLD])}"
    of = LossKey(teacher.fingerprint, calibration.hash, loss, teacher.compute_key, treatment)
    probe = Probe(teacher, calibration, loss, memory=recipe.memory_bytes)
    subject = RecoveryTask(teacher, Plan(), memory=recipe.memory_bytes, seed=recipe.seed, streams_by_tokens={})

    def judge(plan: Plan) -> Loss:
        known = job.store.loss(of, plan)
        if known is None:
            repair = RECOVERIES["fold"](replace(subject, plan=plan), train, train, **FOLD).cast_through(teacher.dtype)
            known = probe.loss_with_repair(plan, repair)
            job.store.add_loss(of, plan, known, job.run)
        return known

    return judge


def probe_of(recipe: Recipe, teacher: Teacher, calibration: TokenSet, job: RunContext | None = None) -> Probe:
    """The measuring engine as a recipe wants it; measurements are kept in the store of a job."""
    fast = RacingOptions(recipe.shortlist, recipe.risk) if recipe.fast else None
    loss = parse_loss(recipe.loss)[0]
    if job is None:
        return Probe(teacher, calibration, loss, memory=recipe.memory_bytes, fast=fast)
    kept = store_cache(job.store, job.run, teacher)
    return Probe(teacher, calibration, loss, memory=recipe.memory_bytes, fast=fast, cache_factory=kept)


def run_search(job: RunContext, problem: Problem, measure: Executor | RefitExecutor) -> list[Plan]:
    """The path of the recipe's search on one problem."""
    total = expected_losses(job.recipe, problem)
    return drive(search_of(job.recipe, problem), partial(_round, job, problem, measure, total))


# -- progress -------------------------------------------------------------------------------------------------------


def _round(
    job: RunContext, problem: Problem, measure: Executor | RefitExecutor, total: int | None, ask: MeasureRequest
) -> list[Loss]:
    """Measure one Ask of a search that has about `total` losses to measure (None: unknown), and show how far it is."""
    if not ask.plans:
        return measure(ask)
    gone = [problem.removed_cost(Plan(frozenset.intersection(*(plan.removed for plan in ask.plans))))]
    if any(plan.narrowed for plan in ask.plans):  # each plan lacks other widths, so that they have nothing in common
        gone = list(map(problem.removed_cost, ask.plans))
    each = zip(problem.budgets, map(min, zip(*gone, strict=True)), problem.targets, strict=True)
    sofar = ", ".join(f"{b.format(spent).split()[0]} of {b.format(need)} gone" for b, spent, need in each)
    before = sum(len(earlier.plans) for earlier, _ in measure.rounds)
    total = None if total is None else max(total, before + len(ask.plans))
    losses = measure(ask, _progress_of_request(job, sofar, before=before, total=total))
    if not all(loss.bound for loss in losses):
        mean, plan = lowest_full(ask.plans, losses)
        sites = [*plan.names(), *(f"{narrow.site} keeps {len(narrow.groups):,}" for narrow in sorted(plan.narrowed))]
        note = f"{', '.join(sites) or 'nothing'}: {mean:.6f}"
        job.store.add_event(job.run, Event("search", before + len(losses), total, note))
    return losses


def _progress_of_request(job: RunContext, sofar: str, *, before: int, total: int | None) -> OnProgress:
    """Shows every loss of one Ask: `before` of `total` losses were known when it began."""

    def told(done: int, of: int, best: float) -> None:
        known = f", lowest {job.recipe.loss} {best:.4f}" if math.isfinite(best) else ""
        most = None if total is None else max(total, before + of)
        job.watch(Event("search", before + done, most, sofar + known))

    return told


def expected_losses(recipe: Recipe, problem: Problem) -> int | None:
    """About how many losses the search of a recipe asks for, by its own closed form; None where it has none.

    The metric's scores need not be known yet.
    """
    if recipe.metric is not None and recipe.search in OF_GROUPS:
        problem = replace(problem, group_scores=problem.group_scores or {})
    elif recipe.metric is not None:
        problem = replace(problem, scores=problem.scores or {})
    return estimate_losses(recipe.search, problem, **method_options(recipe)[0])


def _audit(job: RunContext, probe: Probe, rounds: list[tuple[MeasureRequest, list[Loss]]]) -> list[dict[str, Any]]:
    """Every round again, exactly."""
    exact = Executor(probe_of(job.recipe.model_copy(update={"fast": False}), probe.teacher, probe.tokens, job))
    numbered = iter(range(len(rounds)))

    def measure(ask: MeasureRequest) -> list[Loss]:
        job.watch(Event("audit", next(numbered), len(rounds), "every candidate again"))
        return exact(ask)

    told = measure_regret(rounds, measure)
    job.watch(Event("audit", len(rounds), len(rounds), "done"))
    return told


# -- time as a budget -----------------------------------------------------------------------------------------------


def timing_of(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """What a measured time of a site depends on."""
    where = environment(str(teacher.device))
    return {"batch": recipe.batch, "context": recipe.context, "dtype": teacher.compute_key, "machine": where.machine,
            "threads": where.threads, "torch": where.torch}  # fmt: skip


def with_site_times(job: RunContext, teacher: Teacher) -> Anatomy:
    """The anatomy with the time that each site takes of a decoding step, measured once and kept."""
    recipe, of = job.recipe, timing_of(job.recipe, teacher)
    known = job.store.cached(teacher.fingerprint, "ns", of)
    if known is None:
        known = speed.site_times(teacher, recipe.batch, recipe.context, job.watch)
        job.store.remember(teacher.fingerprint, "ns", of, known, job.run)
    sites = tuple(replace(size, ns_per_token=known[str(size.site)]) for size in teacher.anatomy.sites)
    return replace(teacher.anatomy, sites=sites, rest=replace(teacher.anatomy.rest, ns_per_token=known["rest"]))


# -- as much as a margin allows -------------------------------------------------------------------------------------


def _largest_within_margin(
    job: RunContext, teacher: Teacher, measure: Executor | RefitExecutor, scores: ScoreFields, held_out: TokenSet
) -> tuple[Problem, list[Plan], dict[str, Any]]:
    """The largest share of the parameters whose removal stays within the recipe's margin on validation items.

    Shares grow by half until one is too much, then the gap is halved; each has a search of its own, which reuses what
    the others measured. Assumes that less is safer; every trial is told.
    """
    recipe, margin = job.recipe, job.recipe.margin
    assert margin is not None
    validation, _ = validation_and_test(recipe, margin, teacher, held_out)
    everything = teacher.anatomy.total("parameters")
    smallest = min(size.parameters for size in teacher.anatomy.sites) * Fraction(100, everything)
    low, high = Fraction(0), Fraction(100)
    best: tuple[Problem, list[Plan], MarginCheck] | None = None
    trials: list[dict[str, Any]] = []
    share = max(FINEST, smallest)
    while share < 100 and high - low > max(FINEST, smallest):
        try:
            problem = replace(problem_of(recipe, teacher.anatomy, (Budget(share, "params", True),)), **scores)
        except BudgetError:
            high, share = share, (low + share) / 2
            continue
        path = run_search(job, problem, measure)
        dense, student = evaluate_plans(job, teacher, [Plan(), path[-1]], validation, margin.kind)
        kept = margin.check(dense, student, recipe.seed)
        spent = Fraction(problem.removed_cost(path[-1])[0] * 100, everything)
        trials.append({"percent": float(spent), "within": kept.within, **_in_units(kept, margin)})
        if kept.within:
            low, best = spent, (problem, path, kept)
        else:
            high = share
        share = GROWTH * max(share, low) if high == 100 else (low + high) / 2
    told = {"margin": str(margin), "unit": _UNITS[margin.kind], "trials": trials, "data": validation.describe()}
    told["note"] = "" if best is None else best[2].lost.note
    if not trials:
        raise BudgetError("Nothing can go: one attention, one mlp and everything protected stay. Protect less.")
    if best is None:
        least = min(trials, key=lambda trial: trial["percent"])
        raise UsageError(
            f"Nothing can go within {margin}: removing {least['percent']:.2f}% of the parameters may already lose "
            f"{least['high']:.2f} {_UNITS[margin.kind]}. Allow more, or take more --eval-tokens."
        )
    return best[0], best[1], told


_UNITS = {"ppl": "percent of the perplexity", "pp": "percentage points of accuracy"}


def _in_units(kept: MarginCheck, margin: Margin) -> dict[str, float]:
    lost = kept.in_units(margin.kind)
    return {"lost": lost.value, "low": lost.low, "high": lost.high}


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
