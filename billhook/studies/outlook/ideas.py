"""Billhook's suggestions: what to try after a pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import itemgetter

from billhook.core.anatomy import Anatomy
from billhook.core.outlook.suggestions import (
    Gain,
    Idea,
    Situation,
    gain_here_or_shipped,
    gain_of,
    lost_nats,
    suggestion,
)
from billhook.core.plan import Plan
from billhook.core.results.comparisons import Comparison
from billhook.core.results.json_form import JsonObject, decode
from billhook.core.results.stored import Run, read_result
from billhook.core.statistics import knee

HELD_OUT = "held-out"  # the text by which recoveries are judged
BEND = 0.1  # of the loss: what stopping at a knee saves more than the share of the size that it gives up
WIDER = 2  # times as many calibration tokens
TRAINED = ("lora", "qa_lora", "full", "partial", "bias")


@suggestion
def fold_after_pruning(situation: Situation) -> Idea | None:
    """Refit what is left after the same search, by least squares (fold)."""
    if _recoveries(situation.recipe):
        return None
    closed, seconds = _recovered_by(situation, "fold")
    return Idea(
        {"recover": "fold"}, gain=gain_here_or_shipped(closed, "fold", situation.nats),
        seconds=_after_search(situation, seconds),
    )  # fmt: skip


@suggestion
def train_after_fold(situation: Situation) -> Idea | None:
    """Train low-rank updates after the refit (lora), merged so that they cost nothing at inference."""
    names = _recoveries(situation.recipe)
    if names != ("fold",) or situation.told.get("reasons") == ["streamed"]:
        return None
    closed, seconds = _recovered_by(situation, "lora")
    return Idea(
        {"recover": "fold,lora"}, gain=gain_here_or_shipped(closed, "lora after fold", situation.nats),
        seconds=_after_search(situation, seconds),
    )  # fmt: skip


@suggestion
def narrow_as_well(situation: Situation) -> Idea | None:
    """Search depth and width together (joint), instead of what the run searched."""
    recipe = situation.recipe
    if recipe.get("search") == "joint" or recipe.get("plan") or recipe.get("stock") or not _by_size(recipe):
        return None
    fields = ("search", "metric", "set", "uniform", "fast")
    defaults = (math.inf, recipe | {"metric": "cfsp", "set": {}})
    _, best = min(_joint_like(situation, fields), key=itemgetter(0), default=defaults)
    changes = {name: best.get(name) for name in fields} | {"search": "joint", "uniform": False}

    def chosen(spec: JsonObject) -> bool:
        return spec.get("search") == "joint" and spec.get("set") == changes["set"]

    took = [
        float(told["seconds"]["search"]) for run, told in situation.results()
        if chosen(run.spec) and _same_model(situation, run) and "search" in told["seconds"]
    ]  # fmt: skip
    own = list(_pairs(situation, chosen, fields))
    return Idea(
        changes, gain=gain_here_or_shipped(own, "joint", situation.nats),
        seconds=_with_search(situation, max(took)) if took else None,
    )  # fmt: skip


@suggestion
def search_longer(situation: Situation) -> Idea | None:
    """Let the joint search try more widths and go more rounds, from a depth search on (its defaults)."""
    recipe = situation.recipe
    given = dict(recipe.get("set") or {})
    if recipe.get("search") != "joint" or not {"levels", "rounds", "start"} & set(given):
        return None
    kept = {name: value for name, value in given.items() if name not in ("levels", "rounds", "start", "tokens")}
    own = list(_pairs(situation, lambda spec: spec.get("search") == "joint" and not spec.get("set"), ("set",)))
    return Idea({"set": kept}, gain=gain_of(own, situation.nats, "this store"))


@suggestion
def more_calibration(situation: Situation) -> Idea | None:
    """Search on twice as many calibration tokens: a search on few fits those."""
    recipe = situation.recipe
    tokens = int(recipe.get("tokens") or 0)
    if not tokens or not _by_size(recipe) or recipe.get("plan"):
        return None
    own = list(_pairs(situation, lambda spec: int(spec.get("tokens") or 0) >= WIDER * tokens, ("tokens",)))
    search = float(situation.told["seconds"].get("search", 0.0))
    return Idea(
        {"tokens": WIDER * tokens}, gain=gain_of(own, situation.nats, "this store"),
        seconds=_with_search(situation, WIDER * search), facts={"tokens": tokens},
    )  # fmt: skip


@suggestion
def text_of_its_own(situation: Situation) -> Idea | None:
    """Let the model write half of the calibration text."""
    recipe = situation.recipe
    if recipe.get("self_share") or "self" in str(recipe.get("data")).split("+") or not _by_size(recipe):
        return None
    if ":" in str(recipe.get("loss")) or recipe.get("plan"):
        return None
    own = list(_pairs(situation, lambda spec: bool(spec.get("self_share")), ("self_share",)))
    search = float(situation.told["seconds"].get("search", 0.0))
    return Idea(
        {"self_share": 0.5}, gain=gain_here_or_shipped(own, "text of its own", situation.nats),
        seconds=_with_search(situation, search),
    )  # fmt: skip


@suggestion
def share_for_a_task(situation: Situation) -> Idea | None:
    """Give the task that lost most a share of the calibration text."""
    tasks = situation.told.get("tasks") or []
    worst = min(tasks, key=lambda task: task["change"]["value"], default=None)
    if worst is None or worst["change"]["high"] >= 0 or worst["file"] in str(situation.recipe.get("data")):
        return None
    search = float(situation.told["seconds"].get("search", 0.0))
    return Idea(
        {"data": f"{situation.recipe['data']}+{worst['file']}"}, seconds=_with_search(situation, search),
        facts={"task": worst["file"], "points": 100 * worst["change"]["value"]},
    )  # fmt: skip


@suggestion
def stop_at_the_knee(situation: Situation) -> Idea | None:
    """Remove no more than up to the step after which the loss bends most."""
    steps, anatomy = situation.told.get("steps") or [], decode(Anatomy, situation.told["anatomy"])
    plan, shares, losses = Plan(), [0.0], [0.0]
    for step in steps:
        plan = plan.combined_with(Plan.parse([*step["sites"], *step.get("narrowed", ())]))
        shares.append(1 - anatomy.total("parameters", plan) / anatomy.total("parameters"))
        losses.append(float(step["loss"]))
    bend = knee(shares, losses) if len(steps) > 2 else None
    if bend is None or bend in (0, len(steps)) or losses[-1] <= 0:
        return None
    saved = 1 - losses[bend] / losses[-1]
    if saved - (1 - shares[bend] / shares[-1]) < BEND:
        return None
    won = saved * situation.nats
    gain = Gain(won, won, won, 1, f"the steps of run {situation.run.id}, no interval")
    facts = {"share": shares[bend], "given up": shares[-1] - shares[bend]}
    size = f"{math.floor(1000 * shares[bend]) / 10:g}%params"
    return Idea({"remove": size, "within": None}, gain=gain, facts=facts)


@suggestion
def serve_it(situation: Situation) -> Idea | None:
    """Search within what the software that refuses the student can express."""
    recipe = situation.recipe
    faults = {fit["target"]: fit["fault"] for fit in situation.told.get("targets") or () if fit["fault"]}
    refused = next((name for name, fault in faults.items() if fault != "model"), None)
    if refused is None or recipe.get("target") or recipe.get("plan"):
        return None
    search = float(situation.told["seconds"].get("search", 0.0))
    return Idea(
        {"target": refused}, seconds=_with_search(situation, search),
        facts={"target": refused, "fault": faults[refused]},
    )  # fmt: skip


@suggestion
def more_items(situation: Situation) -> Idea | None:
    """Decide a comparison that is undecided, by more items."""
    for run in situation.everything:
        if run.kind != Comparison.kind or run.result is None or situation.run.out not in run.spec.get("others", ()):
            continue
        found = read_result(run.kind, run.result)
        for each in found.sets if isinstance(found, Comparison) else ():
            more = max((pair.more or 0 for pair in each.pairs if pair is not None), default=0)
            if more:
                name, items = each.source, each.n + more
                command = ("billhook", "compare", str(run.spec["model"]), situation.run.out, "--tasks", name)
                known = () if each.is_text else (*command, "--items", str(items))
                text = ("billhook", "compare", str(run.spec["model"]), situation.run.out, "--eval-data", name)
                tokens = str(math.ceil((each.info.tokens.tokens if each.info.tokens else 0) * items / each.n))
                return Idea(command=known or (*text, "--eval-tokens", tokens), facts={"set": name, "more": more})
    return None


# -- evidence ---------------------------------------------------------------------------------------------------------


def _recoveries(recipe: JsonObject) -> tuple[str, ...]:
    return tuple(part.strip().removesuffix("?") for part in str(recipe.get("recover") or "").split(",") if part.strip())


def _by_size(recipe: JsonObject) -> bool:
    return bool(recipe.get("remove"))


def _same_model(situation: Situation, run: Run) -> bool:
    return run.fingerprints.get("model") == situation.run.fingerprints.get("model")


def _recovered(situation: Situation) -> Iterator[tuple[Run, str, float, float]]:
    """Yield (run, recovery, share of the gap that it closed on held-out text, seconds) of each of the store."""
    for run, told in situation.results():
        for report in told.get("recoveries") or ():
            gain = report["on"].get(HELD_OUT)
            if gain is not None and gain["closed"] is not None and math.isfinite(float(gain["closed"])):
                yield run, str(report["recovery"]), float(gain["closed"]), float(report["seconds"])


def _recovered_by(situation: Situation, recovery: str) -> tuple[list[float], list[float]]:
    """Return the shares that a recovery closed in the store, and its seconds with the model of the situation."""
    found = [(run, share, seconds) for run, name, share, seconds in _recovered(situation) if name == recovery]
    return [share for _, share, _ in found], [s for run, _, s in found if _same_model(situation, run)]


def _pairs(situation: Situation, changed: object, but: tuple[str, ...]) -> Iterator[float]:
    """Yield the share of the loss that a change won: of runs that are equal but for fields, and one is `changed`."""
    assert callable(changed)
    known: dict[str, list[tuple[bool, float]]] = {}
    for run, told in situation.results():
        nats = lost_nats(told)
        if nats is not None and nats > 0:
            left = {name: value for name, value in run.spec.items() if name not in (*but, "about")}
            key = repr((run.fingerprints.get("model"), told["data"]["evaluation"]["hash"], sorted(left.items())))
            known.setdefault(key, []).append((bool(changed(run.spec)), nats))
    for pairs in known.values():
        after = [nats for is_changed, nats in pairs if is_changed]
        before = [nats for is_changed, nats in pairs if not is_changed]
        if after and before:
            yield 1 - after[0] / before[0]


def _joint_like(situation: Situation, but: tuple[str, ...]) -> Iterator[tuple[float, JsonObject]]:
    """Yield (loss on held-out text, recipe) of the joint searches that are equal to the run but for some fields."""
    for run, told in situation.results():
        nats, names = lost_nats(told), {*run.spec, *situation.recipe} - {*but, "about"}
        equal = all(run.spec.get(name) == situation.recipe.get(name) for name in names)
        if run.spec.get("search") == "joint" and nats is not None and equal and _same_model(situation, run):
            yield nats, run.spec


def _after_search(situation: Situation, recovering: list[float]) -> float | None:
    """Return the seconds of a run that repeats a stored search, and recovers; None where no recovery was timed."""
    if not recovering:
        return None
    told = situation.told["seconds"]
    return sum(float(s) for stage, s in told.items() if stage not in ("search", "recover")) + max(recovering)


def _with_search(situation: Situation, search: float) -> float:
    """Return the seconds of the run, with a search that takes as long as is said."""
    return sum(float(s) for stage, s in situation.told["seconds"].items() if stage != "search") + search
