"""What a run gets back: its recoveries in order, each proved on calibration and held-out text as it ends."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from billhook.core.errors import ResourceError, UsageError, either, option
from billhook.core.events import Event, EventValue
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues, options, resolve_options, wrong_return
from billhook.core.results.run import RecoveryGain, RecoveryReport
from billhook.core.statistics import exp_capped, paired_difference
from billhook.data.splits import select_documents, split_every_nth, train_validation_split
from billhook.data.token_sets import TokenSet
from billhook.engine.workers import processes
from billhook.engine.workers.crew import parse_workers
from billhook.methods.recover import RECOVERIES, RecoveryTask, trains
from billhook.methods.recover.lora import ADAPTER
from billhook.methods.recover.together import train_together
from billhook.methods.recover.training import STEP, TrainingOptions
from billhook.methods.search import narrows
from billhook.models.accelerator.memory import is_out_of_memory, release_cached
from billhook.models.accelerator.share import ProcessLost
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR, Repair, read_repair
from billhook.runs.choose_plan import RoundPlanner
from billhook.runs.evaluation import perplexity_results
from billhook.runs.job import RunContext
from billhook.runs.prepare import applicable_recoveries, counts_time, problem_of, recovery_tokens
from billhook.runs.recipe import Recipe
from billhook.runs.search import expected_losses

TRAINING_OPTIONS = {field.name for field in fields(TrainingOptions)}
TRAINING_VALIDATION_EVERY = 10  # of so many texts one validates
FITTING_EVERY = 3  # of so many texts one is for fits and the others for trainings, where both are wanted,
LEAST_FITTED = 8192  # and fits have so many tokens


@dataclass(frozen=True, slots=True)
class RecoveryResult:
    """What a run's recoveries found. `reports`: what each did to the perplexity, in pairs; `seen`: of documents.

    `base`: the repair of the checkpoint, where that is not the whole one: without the last, which is in `adapter`.
    """

    repair: Repair = NO_REPAIR
    reports: tuple[RecoveryReport, ...] = ()
    base: Repair | None = None
    adapter: Path | None = None
    seen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainedRounds:
    """What the recovery `name` made in rounds: their plans, of which the last is the run's, and the repair of that."""

    name: str
    plans: tuple[Plan, ...]
    repair: Repair
    seconds: float


def recovery_options(recipe: Recipe) -> dict[str, OptionValues]:
    """The recoveries of a recipe in order, with their options. Raises UnknownName or UsageError."""
    methods = [RECOVERIES[name] for name in recipe.recoveries]
    if not methods:
        return {}
    named = dict(zip(recipe.recoveries, resolve_options(recipe.recover_set, *methods), strict=True))
    for own in named.values():
        TrainingOptions(**{name: value for name, value in own.items() if name in TRAINING_OPTIONS}).check()
    apart = [name for name, own in named.items() if own.get("merge") is False]
    if apart and (recipe.recoveries[-1] != apart[-1] or recipe.stock):
        raise UsageError(
            f"{apart[0]} with merge=no leaves an adapter beside the checkpoint, so it must be the last recovery, and "
            f"not with {option('stock', True)}. Leave merge=no out to merge it."
        )
    return named


def recovering_tokens(recipe: Recipe, teacher: Teacher, proved: int) -> int:
    """As many tokens as a forward pass reads in the time of all recoveries, each `proved` on so many.

    A fit takes a pass of the teacher and one of the student; a training one of the teacher, and steps.
    """
    total = 0
    names = [name for name in recovery_options(recipe) if name in applicable_recoveries(recipe, teacher)]
    apart = _fits_and_trains(names) and recipe.recover_tokens >= FITTING_EVERY * LEAST_FITTED
    for name, own in recovery_options(recipe).items():
        if name in names:
            every = options(RECOVERIES[name]) | own
            passes = 1 + STEP * int(every["epochs"]) * int(every.get("rounds", 1)) if trains(name) else 2
            share = 1.0 if not apart else 1 - 1 / FITTING_EVERY if trains(name) else 1 / FITTING_EVERY
            total += int(share * passes * recipe.recover_tokens) + proved
    return total


def load_recovery_tokens(job: RunContext, teacher: Teacher, held_out: TokenSet) -> TokenSet | None:
    """What the recoveries of a run learn from. Raises UsageError if text that is held out is in there."""
    if not recovery_options(job.recipe) or not applicable_recoveries(job.recipe, teacher):
        return None
    tokens = recovery_tokens(job.recipe, teacher, job.watch)
    if set(tokens.digests) & set(held_out.digests):
        raise UsageError(f"The text to recover on is in the held-out text too. Give other {option('recover_data')}.")
    return tokens


def recovery_in_rounds(recipe: Recipe, teacher: Teacher) -> str | None:
    """Return the recovery of a recipe that prunes and trains in turn; None where the plan is known before.

    It does where the search ranks channel groups by a metric and measures nothing. Raises UsageError where it is not
    the first recovery, or a budget is in time.
    """
    names = applicable_recoveries(recipe, teacher)
    found = next((name for name in names if RECOVERIES.facts(name).in_rounds), None)
    if found is None or recipe.remove is None or recipe.metric is None or not narrows(recipe.search):
        return None
    if counts_time(recipe):
        raise UsageError(
            f"{found} prunes in rounds, and {option('remove', recipe.remove)} asks for time, which is measured once. "
            f"Write a share or a number of params, bytes, kv or flops: {option('remove', '20%params')}."
        )
    if expected_losses(recipe, problem_of(recipe, teacher, teacher.anatomy, recipe.budgets)) != 0:
        return None
    if found != names[0]:
        raise UsageError(
            f"{found} prunes in rounds, so that {names[0]} cannot come before it. Write "
            f"{option('recover', ','.join([found, *(name for name in names if name != found)]))}."
        )
    return found


def train_in_rounds(
    job: RunContext, teacher: Teacher, calibration: TokenSet, *, learn: TokenSet | None, work: Path
) -> TrainedRounds | None:
    """Prune and train in turn, if the recipe has a recovery that does; None without one, or where it is left out.

    `work`: for what a killed run resumes from: every finished round, and the checkpoint of a training.
    """
    if learn is None or (name := recovery_in_rounds(job.recipe, teacher)) is None:
        return None
    recipe, own = job.recipe, recovery_options(job.recipe)[name]
    valid, _, train = learning_texts(learn, applicable_recoveries(recipe, teacher))
    made_from = digest_of([teacher.fingerprint, teacher.compute_key, name, own, recipe.seed, train.hash])
    folder = work / f"rounds-{name}-{made_from}"
    folder.mkdir(parents=True, exist_ok=True)
    planner, began = RoundPlanner(job, teacher, calibration), time.perf_counter()
    task = RecoveryTask(
        teacher, Plan(), NO_REPAIR, recipe.memory_bytes, recipe.seed, folder, job.watch,
        bfloat16=recipe.dtype == "auto", replan=planner,
    )  # fmt: skip
    fresh = _carried_out(job, task, name, (train, valid), own)
    if fresh is None:
        return None
    if not isinstance(fresh, Repair):
        raise wrong_return("recovery", name, "a Repair", fresh)
    about = folder / "seconds.json"
    if (took := _seconds_of(about, made_from)) is None:
        took = round(time.perf_counter() - began, 1)
        about.write_text(json.dumps({"seconds": took, "made_from": made_from}))
    for file in [*folder.glob("teacher-*"), *folder.glob("training.pt")]:  # of use to unfinished rounds alone
        file.unlink()
    return TrainedRounds(name, tuple(planner.plans), fresh.cast_through(teacher.dtype), took)


def run_recoveries(
    job: RunContext, teacher: Teacher, plan: Plan, *, learn: TokenSet, texts: Mapping[str, TokenSet], work: Path,
    rounds: TrainedRounds | None = None,
) -> RecoveryResult:  # fmt: skip
    """Carry out the recoveries of a run, which `learn` from a text, and prove each on each of `texts`.

    `work`: for what a killed run resumes from: every finished repair, and the checkpoints of a training. `rounds`: what
    was recovered while the plan was made.
    """
    recipe, repair, before = job.recipe, NO_REPAIR, NO_REPAIR
    applicable = applicable_recoveries(recipe, teacher)
    chosen = {name: own for name, own in recovery_options(recipe).items() if name in applicable}
    valid, fitted, trained = learning_texts(learn, list(chosen))
    work.mkdir(parents=True, exist_ok=True)
    reports: list[RecoveryReport] = []
    for number, (name, own) in enumerate(chosen.items(), 1):
        file, began = work / f"{number}-{name}.safetensors", time.perf_counter()
        before, about = repair, file.with_suffix(".json")
        train = trained if trains(name) else fitted
        made_from = digest_of(
            [teacher.fingerprint, teacher.compute_key, plan.to_list(), name, own, recipe.seed, train.hash, repair.key()]
        )
        took = _seconds_of(about, made_from)
        if rounds is not None and name == rounds.name:
            repair, took = rounds.repair, rounds.seconds
        elif took is not None and file.is_file():
            repair = read_repair(file)
        else:
            training = work / f"{number}-{name}-{made_from}"
            training.mkdir(exist_ok=True)
            subject = RecoveryTask(
                teacher, plan, repair, recipe.memory_bytes, recipe.seed, training, job.watch,
                bfloat16=recipe.dtype == "auto",
            )  # fmt: skip
            fresh = _carried_out(job, subject, name, (train, valid), own)
            if fresh is None:
                continue
            if not isinstance(fresh, Repair):
                raise wrong_return("recovery", name, "a Repair", fresh)
            repair = fresh.cast_through(teacher.dtype)
            took = round(time.perf_counter() - began, 1)
            if (training / ADAPTER).is_dir():
                shutil.rmtree(work / ADAPTER, ignore_errors=True)
                (training / ADAPTER).rename(work / ADAPTER)
            about.unlink(missing_ok=True)
            repair.save(file)
            about.write_text(json.dumps({"seconds": took, "made_from": made_from}))
            shutil.rmtree(training)
        gains = {text: _measure_gain(job, teacher, plan, (before, repair), tokens) for text, tokens in texts.items()}
        reports.append(RecoveryReport(name, own, took, repair.parameters(), train.tokens, train.source, gains))
    apart = work / ADAPTER if (work / ADAPTER).is_dir() else None
    return RecoveryResult(repair, tuple(reports), before if apart else None, apart, learn.digests)


def _fits_and_trains(names: Iterable[str]) -> bool:
    """Return whether some of the recoveries fit in closed form, and others train."""
    return len({trains(name) for name in names}) == 2


def learning_texts(learn: TokenSet, names: Sequence[str]) -> tuple[TokenSet, TokenSet, TokenSet]:
    """Return the text that validates, the text for fits, and the text for trainings.

    A fit leaves little to learn on its own text: training there lowers the loss of other text less. So each has texts
    of its own, where there are enough.
    """
    train, valid = train_validation_split(learn, TRAINING_VALIDATION_EVERY)
    if _fits_and_trains(names):
        rest, fitted = split_every_nth(train, FITTING_EVERY)
        parts = select_documents(train, fitted), select_documents(train, rest)
        if parts[0].tokens >= LEAST_FITTED:
            return valid, *parts
    return valid, train, train


def training_processes(workers: int | str, name: str, own: OptionValues, rows: int) -> tuple[int, Event | None]:
    """Return how many processes carry out a recovery that learns from so many `rows`, and what is to be told.

    Workers of this machine train together, each at least a row of a step; those of a cluster share searches only.
    """
    crew = parse_workers(workers)
    if crew.alone or not RECOVERIES.facts(name).together:
        return 1, None
    if crew.place != "processes" or crew.others is None:
        return 1, Event("workers", 1, None, {"recovery": name, "place": crew.place})
    batch, wanted = int(str((options(RECOVERIES[name]) | own).get("batch", rows))), crew.others + 1
    count = min(wanted, batch, rows)
    values: dict[str, EventValue] = {"recovery": name, "rows": min(batch, rows), "training": count, "of": wanted}
    return count, Event("workers", count, wanted, values) if count < wanted else None


def _carried_out(
    job: RunContext, task: RecoveryTask, name: str, texts: tuple[TokenSet, TokenSet], own: OptionValues
) -> object:
    """What a recovery returns; a training that runs out of memory is tried again with gradient checkpointing.

    None where that does not help either, and the recovery is optional; else raises ResourceError, and where a process
    of a training is lost.
    """
    count, note = training_processes(job.recipe.workers, name, own, len(texts[0].rows))
    if note is not None:
        task.watch(note)
    hiring = processes.hiring(count, task.teacher) if count > 1 else None
    device, reason = task.teacher.device, ""
    frugal = [{**own, "checkpointing": True}] if trains(name) and not own.get("checkpointing") else []
    for given in (own, *frugal):
        try:
            if hiring is None:
                return RECOVERIES[name](task, *texts, **given)
            code = job.recipe.trust_remote_code
            return train_together(name, hiring, task, texts, given, trust_remote_code=code)
        except ProcessLost as lost:
            raise _lost(job, name, lost) from lost
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0].rstrip(".")
        release_cached(device)
    because = f"{name} ran out of memory on {device}: {reason}."
    if name not in job.recipe.optional_recoveries:
        raise ResourceError(
            f"{because} Use a shorter {option('recover_length')}, a smaller batch "
            f"({option('recover_set', f'{name}.batch=1')}), or {option('dtype', 'bfloat16')}."
        )
    task.watch(Event("left_out", values={"note": f"{because} It is left out."}))
    return None


def _lost(job: RunContext, name: str, lost: ProcessLost) -> ResourceError:
    """The end of a training that several processes carried out, of which one is gone."""
    again, alone = (
        either(f"billhook.resume({job.run!r}{python})", f"billhook prune --resume --run {job.run}{typed}")
        for python, typed in (("", ""), (", workers=1", " --workers 1"))
    )
    return ResourceError(
        f"A process that trained {name} was lost ({lost}), so the others stopped. What they had until the last "
        f"checkpoint is stored. Resume from there: {again}. Or in this process alone: {alone}."
    )


def digest_of(value: object) -> str:
    """16 hex digits of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _seconds_of(about: Path, made_from: str) -> float | None:
    """How long a finished recovery took; None where there is none, or it was made from something else."""
    try:
        value = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return float(value["seconds"]) if isinstance(value, dict) and value.get("made_from") == made_from else None


def _measure_gain(
    job: RunContext, teacher: Teacher, plan: Plan, repairs: tuple[Repair, Repair], tokens: TokenSet
) -> RecoveryGain:
    """Perplexity before and after one recovery, their ratio with its interval, and how much of the gap it closed."""
    results = perplexity_results(job, teacher, [(Plan(), NO_REPAIR), (plan, repairs[0]), (plan, repairs[1])], tokens)
    change = paired_difference(results[1], results[2], job.recipe.seed)
    teacher_ppl, before, after = (exp_capped(result.mean) for result in results)
    closed = (before - after) / (before - teacher_ppl) if before > teacher_ppl else None
    return RecoveryGain(teacher_ppl, before, after, change.mapped(exp_capped), closed)
