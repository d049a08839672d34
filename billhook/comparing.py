"""A against B over the same items: what each loses and gains, how sure that is, and how alike the two are.

The first model is A, every other one is held against it. What the store holds is not measured again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from billhook import proof, speed, stats, verdict
from billhook.data import TokenSet
from billhook.data import first as first_of
from billhook.errors import DataError, RunError, UsageError
from billhook.evalsets import HARNESS, EvalSet, Tested, named, read_task, read_text, tested
from billhook.evaluate import batches, words_of
from billhook.loading import Teacher
from billhook.losses import exact, kl
from billhook.margin import Margin
from billhook.plan import Plan
from billhook.proof import Job
from billhook.records import EvalResult, Event
from billhook.searching import teacher_of
from billhook.speed import Protocol
from billhook.store import Store
from billhook.tasks import Part

SCORES = ("acc", "acc_norm", "strict_match", "flexible_match")
CLOSE_TOKENS = 4096  # on which two models are held against each other, word by word


@dataclass(frozen=True)
class Asked:
    """What to compare on. `items`: of each task, all if None; `points`, `percent`: margins of accuracy and perplexity.

    `scores`: those that the verdicts are about, by preference; `shots`: solved items before each one of a task, from
    `shots_from`, or from the task itself; `timed`: speed and memory too; `seen`: also on data that a search has seen,
    which is marked. `evaluations`: by name, in the place of the scores of the tasks, of one model `alone`.
    """

    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    items: int | None = None
    scores: tuple[str, ...] = ("acc",)
    points: float = 1.0
    percent: float = 3.0
    timed: bool = True
    seen: bool = False
    shots: int = 0
    shots_from: str = ""
    evaluations: tuple[str, ...] = ()

    def check(self) -> Asked:
        """Itself. Raises UsageError."""
        if not self.texts and not self.tasks:
            raise UsageError("There is nothing to compare on. Give --data, or --tasks a.jsonl,b.jsonl.")
        if self.shots_from and not self.shots:
            raise UsageError("--shots-from says where solved items come from, and --shots how many. Add --shots 5.")
        if not any(task.startswith(HARNESS) for task in self.tasks):  # whose scores are known once it has run
            for name in self.scores:
                if name not in SCORES:
                    raise UsageError(f"--score {name} is no score of a task. Write one of {', '.join(SCORES)}.")
        return self

    def limit(self, kind: str) -> float:
        """The margin of a kind of evaluation in its units: nats per token, or a share of the items."""
        margin = Margin.parse(f"{self.percent}%ppl" if kind == "perplexity" else f"{self.points}pp:x")
        return margin.limit


@dataclass
class Side:
    """One model and what it got on every set; `results`: the scores that verdicts are about."""

    teacher: Teacher
    sets: dict[str, EvalSet]
    tested: dict[str, Tested]
    results: dict[str, EvalResult]
    seen: tuple[str, ...]  # sets that a search has seen some of


def folder_of(name: str, store: Store) -> str:
    """The model that a name means: a stored run stands for its folder."""
    if Path(name).exists() or name == "demo" or not name.startswith("r") or len(name) != 7:
        return name
    try:
        return store.run(name).out
    except RunError:
        return name


def _loaded(job: Job, name: str) -> Teacher:
    return teacher_of(job.recipe.model_copy(update={"model": folder_of(name, job.store)}), job.watch)


def sets_of(job: Job, teacher: Teacher, asked: Asked, part: Part | None = "evaluation") -> dict[str, EvalSet]:
    """Evaluation sets by name: the held-out half of every text, and of every task the half that no search looks at."""
    given: dict[str, Any] = {"items": asked.items, "seed": job.recipe.seed, "shots": asked.shots}
    tasks = {t: read_task(teacher, t, part=part, shots_from=asked.shots_from, **given) for t in asked.tasks}
    return {text: read_text(job, teacher, text) for text in asked.texts} | tasks


def measured(job: Job, name: str, asked: Asked) -> Side:
    """Load one model and evaluate it on everything that is asked for."""
    teacher = _loaded(job, name)
    sets = sets_of(job, teacher, asked)
    seen = seen_by(teacher, sets)
    if seen and not asked.seen:
        raise DataError(
            f"{teacher.name} was pruned, or recovered, on text that is in {' and '.join(seen)} too, so what it is "
            "compared on would flatter it. Give other text, or add --seen: then every output says so."
        )
    told = {source: tested(job, teacher, each) for source, each in sets.items()}
    return Side(teacher, sets, told, {source: each.main(asked.scores) for source, each in told.items()}, seen)


def alone(job: Job, name: str, asked: Asked) -> dict[str, Any]:
    """One model on all items of its tasks: every score with its interval over items."""
    teacher = _loaded(job, name)
    sets, rows = sets_of(job, teacher, asked, part=None), []
    for source, each in sets.items():
        names = asked.evaluations
        found = named(job, teacher, each, names) if names else tested(job, teacher, each).scores
        for score, result in found.items():
            spread = stats.mean_interval(result, job.recipe.seed)
            rows.append({"set": source, "score": score, "value": spread.value, "low": spread.low, "high": spread.high,
                         "n": spread.n, "reliable": spread.reliable, "note": spread.note})  # fmt: skip
    return {
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "rows": rows,
        "sets": {source: each.describe() for source, each in sets.items()},
        "seen": {teacher.name: list(seen)} if (seen := seen_by(teacher, sets)) else {},
        "environment": asdict(proof.environment(str(teacher.device))),
    }


def seen_by(teacher: Teacher, sets: Mapping[str, EvalSet]) -> tuple[str, ...]:
    """The sets that share a document with what a pruning of this model has looked at."""
    seen = set(proof.seen_before(teacher.folder))
    return tuple(name for name, each in sets.items() if seen & set(each.digests))


def compare(job: Job, models: Sequence[str], asked: Asked) -> dict[str, Any]:
    """One table: every model on every set, the others paired with the first."""
    first = measured(job, models[0], asked)
    sides, pairs, close, times = [first], [], [], []
    for name in models[1:]:
        other = measured(job, name, asked)
        sides.append(other)
        pairs.append({source: _pair(first, other, source, job.recipe.seed) for source in first.sets})
        close.append(closeness(job, first, other, asked))
        times.append(_timed(job, first.teacher, other.teacher) if asked.timed else None)
        other.teacher = replace(other.teacher, model=None, weights=None)  # its memory is for the next
    verdicts = [_verdicts(first, pair, asked) for pair in pairs]
    return {
        "models": [_about(side) for side in sides],
        "sets": {source: each.describe() for source, each in first.sets.items()},
        "margins": {"points": asked.points, "percent": asked.percent},
        "rows": [_row(source, sides, verdicts, job.recipe.seed) for source in first.sets],
        "close": close,
        "speed": times,
        "flips": {task: flips(task, sides) for task in asked.tasks},
        "seen": {side.teacher.name: list(side.seen) for side in sides if side.seen},
        "environment": asdict(proof.environment(str(first.teacher.device))),
    }


def _about(side: Side) -> dict[str, Any]:
    teacher = side.teacher
    sizes = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "removed": teacher.removed.names(),
        **{size: teacher.anatomy.total(size) for size in sizes},
    }


def _pair(first: Side, other: Side, source: str, seed: int) -> verdict.Pair | None:
    """Both on one set; None where their items are not the same, as those of text by two tokenizers."""
    a, b = first.results[source], other.results[source]
    if a.tokens != b.tokens and first.sets[source].kind != "text" and (a.name, a.clusters) == (b.name, b.clusters):
        b = replace(b, tokens=a.tokens)  # the same questions, by another tokenizer
    same = first.teacher.fingerprint == other.teacher.fingerprint
    return verdict.paired(a, b, seed, same=same) if (a.tokens, a.counts) == (b.tokens, b.counts) else None


def _verdicts(first: Side, pairs: Mapping[str, verdict.Pair | None], asked: Asked) -> dict[str, dict[str, Any] | None]:
    """What every pair says, with p adjusted for all of them."""
    known = [source for source, pair in pairs.items() if pair is not None]
    adjusted = dict(zip(known, verdict.holm([pairs[s].p for s in known]), strict=True))  # type: ignore[union-attr]
    told: dict[str, dict[str, Any] | None] = dict.fromkeys(pairs)
    for source in known:
        pair = pairs[source]
        assert pair is not None
        limit = asked.limit(first.results[source].name)
        word = verdict.verdict(pair, limit, adjusted[source])
        told[source] = {
            "change": pair.change.value, "low": pair.change.low, "high": pair.change.high,
            "near_low": pair.near.low, "near_high": pair.near.high,
            "p": pair.p, "p_holm": adjusted[source], "gained": pair.gained, "lost": pair.lost,
            "limit": limit, "verdict": word, "reliable": pair.change.reliable, "note": pair.change.note,
            "more": verdict.still_needed(pair, limit) if word == "undecided" else None,
        }  # fmt: skip
    return told


def _row(
    source: str, sides: Sequence[Side], verdicts: Sequence[Mapping[str, dict[str, Any] | None]], seed: int
) -> dict[str, Any]:
    """One set: the value of every model with its interval, and the verdict on every one but the first."""
    values = []
    for side in sides:
        spread = stats.mean_interval(side.results[source], seed)
        text = side.sets[source].kind == "text"
        value, low, high = (stats.exp(x) if text else x for x in (spread.value, spread.low, spread.high))
        scores = {} if text else {name: result.mean for name, result in side.tested[source].scores.items()}
        values.append({"value": value, "low": low, "high": high, "scores": scores})
    kind = sides[0].results[source].name
    n = len(sides[0].results[source].sums)
    return {"set": source, "kind": kind, "n": n, "values": values, "pairs": [told[source] for told in verdicts]}


# -- how alike two models are -----------------------------------------------------------------------------------------


def closeness(job: Job, first: Side, other: Side, asked: Asked) -> dict[str, Any] | None:
    """KL of B to A per token, and the share of tokens that both would say next, on the first text; with intervals.

    None where that cannot be had: no text, another tokenizer or width of the head, or a model that is streamed.
    """
    a, b = first.teacher, other.teacher
    text = next((source for source, each in first.sets.items() if each.kind == "text"), None)
    if text is None or a.weights is not None or b.weights is not None:
        return None
    tokens, theirs = first.sets[text].tokens, other.sets[text].tokens
    assert tokens is not None
    assert theirs is not None
    if tokens.hash != theirs.hash or words_of(a.model) != words_of(b.model):
        return None
    tokens = first_of(tokens, CLOSE_TOKENS)
    names = (f"kl to {a.fingerprint} {a.compute}", f"agreement with {a.fingerprint} {a.compute}")
    found = [job.store.evaluation(b.fingerprint, Plan(), name, tokens.hash, b.compute) for name in names]
    if None in found:
        fresh = _side_by_side(job, (a.model, b.model), tokens)
        found = [replace(each, name=name) for each, name in zip(fresh, names, strict=True)]
        for each in found:
            assert each is not None
            job.store.add_evaluation(b.fingerprint, Plan(), b.compute, each, job.run)
    told = {}
    for name, each in zip(("kl", "agreement"), found, strict=True):
        assert each is not None
        spread = stats.mean_interval(each, job.recipe.seed)
        told[name] = {"value": spread.value, "low": spread.low, "high": spread.high}
    return told | {"text": text, "tokens": sum(found[0].counts)}  # type: ignore[union-attr]


@torch.inference_mode()
def _side_by_side(job: Job, models: tuple[Any, Any], tokens: TokenSet) -> list[EvalResult]:
    """KL and agreement by document; both models read each row."""
    sums, counts = ([0.0] * len(tokens.clusters), [0.0] * len(tokens.clusters)), [0] * len(tokens.clusters)
    done = 0
    for batch in batches(tokens, words_of(models[0]), models[0].device):
        p, q = (model(input_ids=batch.ids, use_cache=False).logits for model in models)
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            ours, theirs, document = p[i, :n].float(), q[i, :n].float(), tokens.documents[row]
            sums[0][document] += float(exact(kl(ours, theirs, batch.ids[i, :n])).sum())
            sums[1][document] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            counts[document] += n
        done += sum(batch.lengths)
        job.watch(Event("compare", done, tokens.tokens, "side by side"))
    return [EvalResult("", tokens.hash, tuple(each), tuple(counts), tokens.clusters) for each in sums]


def _timed(job: Job, a: Teacher, b: Teacher) -> dict[str, Any] | None:
    """Speed of both, timed in turn, and peak memory; None where one is streamed."""
    if a.weights is not None or b.weights is not None:
        return None
    protocol = Protocol()
    most = speed.room((a.model, b.model))
    if most is not None and most < protocol.prompt_tokens + protocol.new_tokens:
        protocol = replace(protocol, prompt_tokens=most // 2, new_tokens=most // 2)
    timings = speed.time_in_turn((a.model, b.model), (a.folder, b.folder), protocol, watch=job.watch)
    rates = [speed.rates(timing) for timing in timings]
    return {"models": rates, "ratio": speed.ratio(*timings), "protocol": asdict(protocol)}


# -- items that flipped -----------------------------------------------------------------------------------------------


def flips(task: str, sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Items that A and some other model do not answer alike: what each gives to every choice, or what each wrote."""
    told: list[dict[str, Any]] = []
    results = [side.results[task] for side in sides]
    if not {value for result in results for value in result.sums} <= {0.0, 1.0}:
        return told  # a score between right and wrong flips nothing
    for d, of in enumerate(zip(*(side.tested[task].said for side in sides), strict=True)):
        rights = [bool(result.sums[d]) for result in results]
        if len(set(rights)) == 1:
            continue
        item = {key: of[0][key] for key in ("number", "query", "choices", "gold", "target") if key in of[0]}
        if "choices" in item:
            normed = results[0].name == "acc_norm"
            given: dict[str, Any] = {"probabilities": [probabilities(mine, normed) for mine in of]}
        else:
            given = {"answers": [mine["answer"] for mine in of]}
        told.append(item | {"right": rights} | given)
    return told


def probabilities(said: Mapping[str, Any], normed: bool) -> list[float]:
    """What a model gives to the choices of an item, of 1 together; `normed`: by acc_norm, as that counts them."""
    per = said["characters"] if normed else (1,) * len(said["values"])
    values = [value / count for value, count in zip(said["values"], per, strict=True)]
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / math.fsum(weights) for weight in weights]
