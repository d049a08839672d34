"""The plan of a run: given, searched for, or the largest within a margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, partial

from billhook.core.anatomy import Anatomy
from billhook.core.budget import Budget
from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.events import Event, EventValue
from billhook.core.files.cache_keys import FinalistsKey, FoldedOn, LossKey, PlanLossKey, SiteTimesKey
from billhook.core.margin import MarginTrial, WithinReport
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss, Step, paired_gap
from billhook.core.results.run import AuditedRound, Exchange, FinalChoice, Influence, SearchSummary, SiteLoss
from billhook.data.splits import without_documents
from billhook.data.token_sets import TokenSet, truncate
from billhook.engine.losses import loss_facts, parse_loss
from billhook.engine.probe import Probe
from billhook.methods.evaluate import speed
from billhook.methods.recover import RECOVERIES, RecoveryTask, Round
from billhook.models.device import environment
from billhook.models.load import Teacher, student_as_teacher
from billhook.models.surgery import apply
from billhook.runs.evaluation import evaluate_plans
from billhook.runs.executor import Executor, RefitExecutor
from billhook.runs.job import RunContext, with_team
from billhook.runs.prepare import (
    LEAST_RECOVERY_TOKENS,
    counts_time,
    probe_of,
    problem_of,
    recovery_tokens,
    unseen_tokens,
    validation_and_test,
)
from billhook.runs.recipe import Recipe
from billhook.runs.search import ScoreFields, compute_scores, in_units, progress_of_request, run_search
from billhook.runs.trace import Rounds, exchanges, losses_alone, measure_regret, removal_trace, search_summary

FOLD_TOKENS = 8192  # for a fold inside the search
INFLUENCE_TOKENS = 1024  # on which each choice of a plan is held against another one, at most half of the unseen text
FOLD = {"reach": "next"}  # its options; what stands farther behind is refitted after the search
GROWTH = Fraction(3, 2)  # of the removed share, from trial to trial: a search far beyond the margin costs the most
# What of a recipe says how much is removed, is read before the search, or comes after it.
NOT_OF_THE_SEARCH = {
    *("about", "model", "remove", "within", "plan", "data", "field", "tokens", "length", "self_share", "eval_data"),
    *("eval_tokens", "eval_length", "recover", "recover_set", "finalists", "device", "dtype", "skills", "workers"),
}
FINEST = Fraction(1, 2)  # percent of the parameters, between what stays within a margin and what does not


@dataclass(frozen=True)
class PlanChoice:
    """What a run decided to remove, and how. `within`: what the margin said of each trial, where there was one.

    `judged_on`: digests of the documents on which finalists were judged.
    """

    plan: Plan
    steps: list[Step]
    search_summary: SearchSummary
    within: WithinReport | None = None
    alone: tuple[SiteLoss, ...] = ()
    judged_on: tuple[str, ...] = ()


# -- the whole of it ------------------------------------------------------------------------------------------------


def choose_plan(
    job: RunContext,
    teacher: Teacher,
    calibration: TokenSet,
    held_out: TokenSet | None = None,
    given: Sequence[Plan] = (),
    *,
    along: bool = True,
) -> PlanChoice:
    """The plan of a run: searched for, or the largest within a margin, which is judged on `held_out` text.

    `given`: plans, of which the last is the run's, and nothing is searched. `along`: with the loss after every step,
    which a search by scores has not measured itself.
    """
    with with_team(job, teacher) as shared:
        return _choice(shared, teacher, (calibration, held_out), given, along)


def _choice(
    job: RunContext, teacher: Teacher, texts: tuple[TokenSet, TokenSet | None], given: Sequence[Plan], along: bool
) -> PlanChoice:
    """`choose_plan`, with the workers of the run."""
    recipe, (calibration, held_out) = job.recipe, texts
    probe = probe_of(recipe, teacher, calibration, job)
    plain = Executor(probe)
    measure = RefitExecutor(plain, _judge(job, teacher, calibration, calibration)) if recipe.fold_in_search else plain
    within: WithinReport | None = None
    final: FinalChoice | None = None
    seen = (calibration, *([held_out] if held_out is not None else []))
    unseen = cache(lambda: unseen_tokens(recipe, teacher, job.watch, *seen))
    problem: Problem | None = None
    if given:
        path = list(dict.fromkeys(given))
    else:
        scores = compute_scores(job, probe)
        if recipe.within is not None:
            assert held_out is not None
            search = partial(_search, job, probe, measure=measure, texts=(calibration, unseen))
            problem, path, within, final = _largest_within_margin(job, teacher, search, scores, held_out)
        else:
            anatomy = with_site_times(job, teacher) if counts_time(recipe) else teacher.anatomy
            problem = _with_scores(problem_of(recipe, teacher, anatomy, recipe.budgets), scores)
            path, final = _search(job, probe, problem, measure, (calibration, unseen))
    rounds, summary = list(measure.rounds), replace(search_summary(probe), final=final)
    if recipe.audit:
        probe.release_streams()
        summary = replace(summary, audit=tuple(_audit(job, probe, rounds)))
    if not path or not path[-1]:
        return PlanChoice(Plan(), [], summary, within)
    if not along:
        return PlanChoice(path[-1], [], summary, within)
    if problem is not None and recipe.finalists > 1 and teacher.weights is None:
        summary = replace(summary, influence=_influence(job, probe, (problem, path[-1], rounds), unseen))
    progress = progress_of_request(job, {"step": "path"}, before=0, total=len(path))
    measured = {plan for ask, losses in rounds for plan, loss in zip(ask.plans, losses, strict=True) if not loss.bound}
    on_path = measure(MeasureRequest(tuple(path)), *([] if measured.issuperset(path) else [progress]))
    whole = [(ask.plans, losses) for ask, losses in rounds if ask.tokens is None]
    steps = removal_trace(path, whole, on_path, problem.cost if problem else len)
    bounds = probe.fast is None and loss_facts(parse_loss(recipe.loss).name).never_negative
    judged_on = more.digests if final is not None and (more := unseen()) is not None else ()
    return PlanChoice(path[-1], steps, summary, within, losses_alone(rounds, bounds=bounds), judged_on)


def _with_scores(problem: Problem, scores: ScoreFields) -> Problem:
    """Return a problem with importance scores; of channel groups, of the sites that may be narrowed."""
    groups = scores.get("group_scores")
    if groups is None:
        return replace(problem, **scores)
    free = {size.site for size in problem.anatomy.sites if size.groups}
    return replace(problem, group_scores={site: of_one for site, of_one in groups.items() if site in free})


def _judge(job: RunContext, teacher: Teacher, tokens: TokenSet, calibration: TokenSet) -> Callable[[Plan], Loss]:
    """The loss of a plan on `tokens` after a fold on texts that are not of the calibration; stored."""
    recipe = job.recipe
    texts = without_documents(recovery_tokens(recipe, teacher, job.watch), calibration, tokens)
    train = truncate(texts, FOLD_TOKENS) if texts is not None else None
    if train is None or train.tokens < LEAST_RECOVERY_TOKENS:
        raise UsageError(
            f"{option('fold_in_search', True)} refits on texts that the search is not judged on. Give more "
            f"{option('recover_data')}."
        )
    loss = parse_loss(recipe.loss).name
    treatment = FoldedOn(train.hash, **FOLD)
    of = LossKey(teacher.fingerprint, tokens.hash, loss, teacher.compute_key, treatment)
    probe = Probe(teacher, tokens, loss, memory=recipe.memory_bytes)
    subject = RecoveryTask(teacher, Plan(), memory=recipe.memory_bytes, seed=recipe.seed, streams_by_tokens={})

    def measure(plan: Plan) -> Loss:
        repair = RECOVERIES["fold"](replace(subject, plan=plan), train, train, **FOLD).cast_through(teacher.dtype)
        return probe.loss_with_repair(plan, repair)

    def judge(plan: Plan) -> Loss:
        return job.store.remember(PlanLossKey(of, plan), partial(measure, plan), job.run)

    return judge


# -- pruning in rounds ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RoundPlanner:
    """The `replan` of a recovery that prunes and trains in turn.

    `plans`: of the rounds so far. `averages`: the scores of channel groups over these rounds, by site and number.
    """

    job: RunContext
    teacher: Teacher
    calibration: TokenSet
    plans: list[Plan] = field(default_factory=list)
    averages: dict[tuple[Site, int], float] = field(default_factory=dict)

    def __call__(self, this: Round) -> Plan:
        """Return the plan of a round: the one before, and the groups of that student that the search removes next."""
        if this.number == 1:
            self.plans, self.averages = [], {}
        recipe, anatomy = self.job.recipe, self.teacher.anatomy
        student = self._student(this)
        probe = probe_of(recipe, student, self.calibration, self.job)
        self._average(student.anatomy, compute_scores(self.job, probe)["group_scores"], this.beta)
        plan, needed = this.plan, [budget.missing(anatomy, this.plan, this.share) for budget in recipe.budgets]
        if budgets := tuple(budget for budget in needed if budget is not None):
            values = {
                size.site: tuple(self.averages[size.site, number] for number in size.groups)
                for size in student.anatomy.sites if size.groups and (size.site, size.groups[0]) in self.averages
            }  # fmt: skip
            problem = _with_scores(problem_of(recipe, student, student.anatomy, budgets), {"group_scores": values})
            plan = plan.combined_with(run_search(self.job, problem, Executor(probe))[-1])
        self.plans.append(plan)
        told: dict[str, EventValue] = {"round": this.number}
        for budget in recipe.budgets:
            told[f"removed_{budget.unit}"] = in_units(budget, budget.removed_cost(anatomy, plan))
            told[f"target_{budget.unit}"] = in_units(budget, budget.target(anatomy))
        self.job.watch(Event("search", this.number, this.rounds, told))
        return plan

    def _student(self, this: Round) -> Teacher:
        """Return the student of the round before as a teacher, of which all that is stored has a name of its own."""
        if not this.plan:
            return self.teacher
        made = student_as_teacher(self.teacher, apply(self.teacher, this.plan, repair=this.repair))
        return replace(made, fingerprint=f"{self.teacher.fingerprint}-{this.plan.key()}-{this.repair.key()}")

    def _average(self, anatomy: Anatomy, scores: Mapping[Site, Sequence[float]], beta: float) -> None:
        """Set the moving average, from 0, of the scores of groups that a student still has."""
        numbers = {size.site: size.groups for size in anatomy.sites}
        self.averages = {
            (site, number): beta * self.averages.get((site, number), 0.0) + (1 - beta) * score
            for site, values in scores.items() for number, score in zip(numbers[site], values, strict=True)
        }  # fmt: skip


# -- the last choice ------------------------------------------------------------------------------------------------


def _search(
    job: RunContext, probe: Probe, problem: Problem, measure: Executor | RefitExecutor,
    texts: tuple[TokenSet, Callable[[], TokenSet | None]],
) -> tuple[list[Plan], FinalChoice | None]:  # fmt: skip
    """The path of the recipe's search, to the best of its finalists on text that no round has seen.

    Hundreds of candidates are compared on the same tokens, so that the lowest loss is partly luck. What the same
    search found for other sizes, in the same store, is among the finalists where it meets the budgets. `texts`: the
    calibration, and what reads the unseen one.
    """
    path = run_search(job, problem, measure)
    if job.recipe.finalists < 2 or not measure.rounds:
        return path, None

    def meets(plan: Plan) -> bool:
        return problem.is_met(plan) and problem.is_valid(plan)

    recipe = job.recipe.model_dump(mode="json", exclude=NOT_OF_THE_SEARCH, exclude_defaults=True)
    key = FinalistsKey(probe.teacher.fingerprint, recipe, texts[0].hash)
    known = [Plan.from_json(plan) for plan in job.store.lookup(key) or ()]
    elsewhere = [plan for plan in known if plan != path[-1] and meets(plan)]
    if elsewhere:
        measure(MeasureRequest(tuple(elsewhere)))
    losses = {
        plan: loss
        for ask, answers in measure.rounds if ask.tokens is None
        for plan, loss in zip(ask.plans, answers, strict=True) if not loss.bound and meets(plan)
    }  # fmt: skip
    plans = list(dict.fromkeys([path[-1], *sorted(losses, key=lambda plan: losses[plan].mean)]))[: job.recipe.finalists]
    if len(plans) < 2 or path[-1] not in losses or (unseen := texts[1]()) is None:
        return path, None
    chosen, final = _final_choice(job, probe, losses, plans, unseen=unseen, calibration=texts[0])
    job.store.add(key, [plan.to_json() for plan in dict.fromkeys([*known, path[-1], chosen])], job.run)
    if chosen == path[-1]:
        return path, final
    before = [plan for plan in path[:-1] if plan.removed <= chosen.removed and plan.narrowed <= chosen.narrowed]
    return [*before, chosen], replace(final, elsewhere=chosen in elsewhere)


def _final_choice(
    job: RunContext, probe: Probe, measured: Mapping[Plan, Loss], plans: list[Plan], *, unseen: TokenSet,
    calibration: TokenSet,
) -> tuple[Plan, FinalChoice]:  # fmt: skip
    """The plan with the lowest loss on text that no round has seen. The first of `plans` is the search's own.

    `measured`: their losses on the `calibration` text.
    """
    own, *others = plans
    if job.recipe.fold_in_search:
        judge = _judge(job, probe.teacher, unseen, calibration)
        losses = {plan: judge(plan) for plan in plans}
    else:
        judging = probe.without_racing(unseen)
        losses = {own: judging.losses([own])[0]}

        def show(done: int) -> None:
            job.watch(Event("finalists", 1 + done, len(plans)))

        # Only a plan that is better than the search's own counts.
        better = judging.iter_losses(others, 1, ceiling=losses[own].sums, on_progress=show)
        losses |= {plan: loss for plan, loss in better if not loss.bound}
    chosen = min((plan for plan in plans if plan in losses), key=lambda plan: losses[plan].mean)
    gap, error = paired_gap(losses[own], losses[chosen])
    return chosen, FinalChoice(
        len(plans), measured[chosen].mean, losses[chosen].mean, losses[own].mean, gap, error, False, unseen.info()
    )


def _influence(
    job: RunContext, probe: Probe, found: tuple[Problem, Plan, Rounds], more: Callable[[], TokenSet | None]
) -> Influence | None:
    """Each choice of a plan against the best other one, by estimates on text that no round has seen."""
    others, plan = exchanges(*found), found[1]
    if not others or (unseen := more()) is None:
        return None

    def show(done: int) -> None:
        job.watch(Event("influence", done, 1 + len(others)))

    few = truncate(unseen, min(INFLUENCE_TOKENS, unseen.tokens // 2))
    measured = dict(probe.for_estimates(few).iter_losses([plan, *others], on_progress=show, estimate=True))
    gaps = [(sites, paired_gap(measured[other], measured[plan])) for other, sites in others.items()]
    told = [Exchange(site, other, gap, error) for (site, other), (gap, error) in gaps]
    return Influence(tuple(sorted(told, key=lambda each: each.gap)), few.info())


def _audit(job: RunContext, probe: Probe, rounds: list[tuple[MeasureRequest, list[Loss]]]) -> list[AuditedRound]:
    """Every round again, exactly."""
    exact = Executor(probe.without_racing(probe.tokens))
    numbered = iter(range(len(rounds)))

    def measure(ask: MeasureRequest) -> list[Loss]:
        job.watch(Event("audit", next(numbered), len(rounds), {"step": "measure_again"}))
        return exact(ask)

    audited = measure_regret(rounds, measure)
    job.watch(Event("audit", len(rounds), len(rounds)))
    return audited


# -- time as a budget -----------------------------------------------------------------------------------------------


def site_times_key(recipe: Recipe, teacher: Teacher) -> SiteTimesKey:
    """What the measured times of the sites depend on."""
    where = environment(teacher.place)
    machine = (where.machine, where.threads, where.torch)
    return SiteTimesKey(teacher.fingerprint, recipe.batch, recipe.context, teacher.compute_key, *machine)


def with_site_times(job: RunContext, teacher: Teacher) -> Anatomy:
    """The anatomy with the time that each site takes of a decoding step, measured once and kept."""
    recipe = job.recipe
    measure = partial(speed.site_times, teacher, recipe.batch, recipe.context, job.watch)
    times = job.store.remember(site_times_key(recipe, teacher), measure, job.run)
    sites = tuple(replace(size, ns_per_token=times[str(size.site)]) for size in teacher.anatomy.sites)
    return replace(teacher.anatomy, sites=sites, rest=replace(teacher.anatomy.rest, ns_per_token=times["rest"]))


# -- as much as a margin allows -------------------------------------------------------------------------------------


def _largest_within_margin(
    job: RunContext, teacher: Teacher, search: Callable[[Problem], tuple[list[Plan], FinalChoice | None]],
    scores: ScoreFields, held_out: TokenSet,
) -> tuple[Problem, list[Plan], WithinReport, FinalChoice | None]:  # fmt: skip
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
    best: tuple[Problem, list[Plan], FinalChoice | None] | None = None
    trials: list[MarginTrial] = []
    share = max(FINEST, smallest)
    while share < 100 and high - low > max(FINEST, smallest):
        try:
            budget = Budget(share, "params", True)
            problem = _with_scores(problem_of(recipe, teacher, teacher.anatomy, (budget,)), scores)
        except BudgetError:
            high, share = share, (low + share) / 2
            continue
        path, final = search(problem)
        dense, student = evaluate_plans(job, teacher, [Plan(), path[-1]], validation, margin.kind)
        kept = margin.check(dense, student, recipe.seed)
        spent = Fraction(problem.removed_cost(path[-1])[0] * 100, everything)
        trials.append(MarginTrial(float(spent), kept.within, kept.in_units(margin.kind)))
        if kept.within:
            low, best = spent, (problem, path, final)
        else:
            high = share
        share = GROWTH * max(share, low) if high == 100 else (low + high) / 2
    if not trials:
        raise BudgetError(
            "Nothing can be removed: one attention, one mlp and what is protected are kept. Protect less."
        )
    if best is None:
        unit = "percent of the perplexity" if margin.kind == "ppl" else "percentage points of accuracy"
        least = min(trials, key=lambda trial: trial.percent)
        raise UsageError(
            f"Nothing can be removed within {margin}: removing {least.percent:.2f}% of the parameters may already lose "
            f"{least.lost.high:.2f} {unit}. Allow more, or take more {option('eval_tokens')}."
        )
    return best[0], best[1], WithinReport(margin, tuple(trials), validation.info()), best[2]
