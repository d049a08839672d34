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
from billhook.data import truncate as first_of
from billhook.errors import DataError, RunError, UsageError
from billhook.evalsets import HARNESS, EvalSet, SetResult, evaluate_set, named, read_task, read_text
from billhook.evaluate import batches, vocabulary_size
from billhook.loading import Teacher
from billhook.losses import kl, to_float64
from billhook.margin import Margin
from billhook.plan import Plan
from billhook.proof import RunContext
from billhook.records import EvalResult, Event
from billhook.searching import load_teacher
from billhook.speed import TimingProtocol
from billhook.store import Store
from billhook.tasks import Split

SCORES = ("acc", "acc_norm", "strict_match", "flexible_match")
CLOSE_TOKENS = 4096  # on which two models are held against each other, word by word


@dataclass(frozen=True)
class ComparisonSpec:
    """What to compare on. `items`: of each task, all if None; `points`, `percent`: margins of accuracy and perplexity.

    `scores`: those that the verdicts are about, by preference; `shots`: solved items before each one of a task, from
    `shots_from`, or from the task itself; `timed`: speed and memory too; `seen`: also on data that a search has seen,
    which is marked. `evaluations`: by name, in the place of the scores of the tasks, of one model `evaluate_on_tasks`.
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

    def check(self) -> ComparisonSpec:
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
class ModelResults:
    """One model and what it got on every set; `results`: the scores that verdicts are about."""

    teacher: Teacher
    sets: dict[str, EvalSet]
    tested: dict[str, SetResult]
    results: dict[str, EvalResult]
    seen: tuple[str, ...]  # sets that a search has seen some of


def resolve_model(name: str, store: Store) -> str:
    """The model that a name means: a stored run stands for its folder."""
    if Path(name).exists() or name == "demo" or not name.startswith("r") or len(name) != 7:
        return name
    try:
        return store.run(name).out
    except RunError:
        return name


def _loaded(job: RunContext, name: str) -> Teacher:
    return load_teacher(job.recipe.model_copy(update={"model": resolve_model(name, job.store)}), job.watch)


def load_eval_sets(
    job: RunContext, teacher: Teacher, spec: ComparisonSpec, part: Split | None = "evaluation"
) -> dict[str, EvalSet]:
    """Evaluation sets by name: the held-out half of every text, and of every task the half that no search looks at."""
    given: dict[str, Any] = {"items": spec.items, "seed": job.recipe.seed, "shots": spec.shots}
    tasks = {t: read_task(teacher, t, part=part, shots_from=spec.shots_from, **given) for t in spec.tasks}
    return {text: read_text(job, teacher, text) for text in spec.texts} | tasks


def evaluate_on_sets(job: RunContext, name: str, spec: ComparisonSpec) -> ModelResults:
    """Load one model and evaluate it on everything that is asked for."""
    teacher = _loaded(job, name)
    sets = load_eval_sets(job, teacher, spec)
    seen = contaminated_sets(teacher, sets)
    if seen and not spec.seen:
        raise DataError(
            f"{teacher.name} was pruned, or recovered, on text that is in {' and '.join(seen)} too, so what it is "
            "compared on would flatter it. Give other text, or add --seen: then every output says so."
        )
    told = {source: evaluate_set(job, teacher, each) for source, each in sets.items()}
    return ModelResults(
        teacher, sets, told, {source: each.primary_score(spec.scores) for source, each in told.items()}, seen
    )


def evaluate_on_tasks(job: RunContext, name: str, spec: ComparisonSpec) -> dict[str, Any]:
    """One model on all items of its tasks: every score with its interval over items."""
    teacher = _loaded(job, name)
    sets, rows = load_eval_sets(job, teacher, spec, part=None), []
    for source, each in sets.items():
        names = spec.evaluations
        found = named(job, teacher, each, names) if names else evaluate_set(job, teacher, each).scores
        for score, result in found.items():
            spread = stats.mean_interval(result, job.recipe.seed)
            rows.append({"set": source, "score": score, "value": spread.value, "low": spread.low, "high": spread.high,
                         "n": spread.n, "reliable": spread.reliable, "note": spread.note})  # fmt: skip
    return {
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "rows": rows,
        "sets": {source: each.describe() for source, each in sets.items()},
        "seen": {teacher.name: list(seen)} if (seen := contaminated_sets(teacher, sets)) else {},
        "environment": asdict(proof.environment(str(teacher.device))),
    }


def contaminated_sets(teacher: Teacher, sets: Mapping[str, EvalSet]) -> tuple[str, ...]:
    """The sets that share a document with what a pruning of this model has looked at."""
    seen = set(proof.seen_digests(teacher.folder))
    return tuple(name for name, each in sets.items() if seen & set(each.digests))


def compare_models(job: RunContext, models: Sequence[str], spec: ComparisonSpec) -> dict[str, Any]:
    """One table: every model on every set, the others paired with the first."""
    first = evaluate_on_sets(job, models[0], spec)
    sides, pairs, close, times = [first], [], [], []
    for name in models[1:]:
        other = evaluate_on_sets(job, name, spec)
        sides.append(other)
        pairs.append({source: _pair(first, other, source, job.recipe.seed) for source in first.sets})
        close.append(measure_agreement(job, first, other, spec))
        times.append(_compared_speed(job, first.teacher, other.teacher) if spec.timed else None)
        other.teacher = replace(other.teacher, model=None, weights=None)  # its memory is for the next
    verdicts = [_verdicts(first, pair, spec) for pair in pairs]
    return {
        "models": [_about(side) for side in sides],
        "sets": {source: each.describe() for source, each in first.sets.items()},
        "margins": {"points": spec.points, "percent": spec.percent},
        "rows": [_set_row(source, sides, verdicts, job.recipe.seed) for source in first.sets],
        "close": close,
        "speed": times,
        "flips": {task: flips(task, sides) for task in spec.tasks},
        "seen": {side.teacher.name: list(side.seen) for side in sides if side.seen},
        "environment": asdict(proof.environment(str(first.teacher.device))),
    }


def _about(results: ModelResults) -> dict[str, Any]:
    teacher = results.teacher
    sizes = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "removed": teacher.removed_earlier.names(),
        **{size: teacher.anatomy.total(size) for size in sizes},
    }


def _pair(first: ModelResults, other: ModelResults, source: str, seed: int) -> verdict.Pair | None:
    """Both on one set; None where their items are not the same, as those of text by two tokenizers."""
    a, b = first.results[source], other.results[source]
    if a.tokens != b.tokens and first.sets[source].kind != "text" and (a.name, a.clusters) == (b.name, b.clusters):
        b = replace(b, tokens=a.tokens)  # the same questions, by another tokenizer
    same = first.teacher.fingerprint == other.teacher.fingerprint
    return verdict.compare_pair(a, b, seed, same=same) if (a.tokens, a.counts) == (b.tokens, b.counts) else None


def _verdicts(
    first: ModelResults, pairs: Mapping[str, verdict.Pair | None], spec: ComparisonSpec
) -> dict[str, dict[str, Any] | None]:
    """What every pair says, with p adjusted for all of them."""
    known = [source for source, pair in pairs.items() if pair is not None]
    adjusted = dict(zip(known, verdict.holm([pairs[s].p for s in known]), strict=True))  # type: ignore[union-attr]
    told: dict[str, dict[str, Any] | None] = dict.fromkeys(pairs)
    for source in known:
        pair = pairs[source]
        assert pair is not None
        limit = spec.limit(first.results[source].name)
        word = verdict.classify_pair(pair, limit, adjusted[source])
        told[source] = {
            "change": pair.change.value, "low": pair.change.low, "high": pair.change.high,
            "near_low": pair.interval90.low, "near_high": pair.interval90.high,
            "p": pair.p, "p_holm": adjusted[source], "gained": pair.gained, "lost": pair.lost,
            "limit": limit, "verdict": word, "reliable": pair.change.reliable, "note": pair.change.note,
            "more": verdict.items_needed(pair, limit) if word == "undecided" else None,
        }  # fmt: skip
    return told


def _set_row(
    source: str, models: Sequence[ModelResults], verdicts: Sequence[Mapping[str, dict[str, Any] | None]], seed: int
) -> dict[str, Any]:
    """One set: the value of every model with its interval, and the verdict on every one but the first."""
    values = []
    for side in models:
        spread = stats.mean_interval(side.results[source], seed)
        text = side.sets[source].kind == "text"
        value, low, high = (stats.exp_capped(x) if text else x for x in (spread.value, spread.low, spread.high))
        scores = {} if text else {name: result.mean for name, result in side.tested[source].scores.items()}
        values.append({"value": value, "low": low, "high": high, "scores": scores})
    kind = models[0].results[source].name
    n = len(models[0].results[source].sums)
    return {"set": source, "kind": kind, "n": n, "values": values, "pairs": [told[source] for told in verdicts]}


# -- how alike two models are -----------------------------------------------------------------------------------------


def measure_agreement(
    job: RunContext, first: ModelResults, other: ModelResults, spec: ComparisonSpec
) -> dict[str, Any] | None:
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
    if tokens.hash != theirs.hash or vocabulary_size(a.model) != vocabulary_size(b.model):
        return None
    tokens = first_of(tokens, CLOSE_TOKENS)
    names = (f"kl to {a.fingerprint} {a.compute_key}", f"agreement with {a.fingerprint} {a.compute_key}")
    found = [job.store.evaluation(b.fingerprint, Plan(), name, tokens.hash, b.compute_key) for name in names]
    if None in found:
        fresh = _side_by_side(job, (a.model, b.model), tokens)
        found = [replace(each, name=name) for each, name in zip(fresh, names, strict=True)]
        for each in found:
            assert each is not None
            job.store.add_evaluation(b.fingerprint, Plan(), b.compute_key, each, job.run)
    told = {}
    for name, each in zip(("kl", "agreement"), found, strict=True):
        assert each is not None
        spread = stats.mean_interval(each, job.recipe.seed)
        told[name] = {"value": spread.value, "low": spread.low, "high": spread.high}
    return told | {"text": text, "tokens": sum(found[0].counts)}  # type: ignore[union-attr]


@torch.inference_mode()
def _side_by_side(job: RunContext, models: tuple[Any, Any], tokens: TokenSet) -> list[EvalResult]:
    """KL and agreement by document; both models read each row."""
    sums, counts = ([0.0] * len(tokens.clusters), [0.0] * len(tokens.clusters)), [0] * len(tokens.clusters)
    done = 0
    for batch in batches(tokens, vocabulary_size(models[0]), models[0].device):
        p, q = (model(input_ids=batch.ids, use_cache=False).logits for model in models)
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            ours, theirs, document = p[i, :n].float(), q[i, :n].float(), tokens.documents[row]
            sums[0][document] += float(to_float64(kl(ours, theirs, batch.ids[i, :n])).sum())
            sums[1][document] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            counts[document] += n
        done += sum(batch.lengths)
        job.watch(Event("compare", done, tokens.tokens, "side by side"))
    return [EvalResult("", tokens.hash, tuple(each), tuple(counts), tokens.clusters) for each in sums]


def _compared_speed(job: RunContext, a: Teacher, b: Teacher) -> dict[str, Any] | None:
    """Speed of both, timed in turn, and peak memory; None where one is streamed."""
    if a.weights is not None or b.weights is not None:
        return None
    protocol = TimingProtocol()
    most = speed.max_positions((a.model, b.model))
    if most is not None and most < protocol.prompt_tokens + protocol.new_tokens:
        protocol = replace(protocol, prompt_tokens=most // 2, new_tokens=most // 2)
    timings = speed.time_interleaved((a.model, b.model), (a.folder, b.folder), protocol, watch=job.watch)
    rates = [speed.rates(timing) for timing in timings]
    return {"models": rates, "ratio": speed.speed_ratio(*timings), "protocol": asdict(protocol)}


# -- items that flipped -----------------------------------------------------------------------------------------------


def flips(task: str, models: Sequence[ModelResults]) -> list[dict[str, Any]]:
    """Items that A and some other model do not answer alike: what each gives to every choice, or what each wrote."""
    told: list[dict[str, Any]] = []
    results = [side.results[task] for side in models]
    if not {value for result in results for value in result.sums} <= {0.0, 1.0}:
        return told  # a score between right and wrong flips nothing
    for d, of in enumerate(zip(*(side.tested[task].responses for side in models), strict=True)):
        rights = [bool(result.sums[d]) for result in results]
        if len(set(rights)) == 1:
            continue
        item = {key: of[0][key] for key in ("number", "query", "choices", "gold", "target") if key in of[0]}
        if "choices" in item:
            normed = results[0].name == "acc_norm"
            given: dict[str, Any] = {"probabilities": [choice_probabilities(mine, normed) for mine in of]}
        else:
            given = {"answers": [mine["answer"] for mine in of]}
        told.append(item | {"right": rights} | given)
    return told


def choice_probabilities(said: Mapping[str, Any], normed: bool) -> list[float]:
    """What a model gives to the choices of an item, of 1 together; `normed`: by acc_norm, as that counts them."""
    per = said["characters"] if normed else (1,) * len(said["values"])
    values = [value / count for value, count in zip(said["values"], per, strict=True)]
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / math.fsum(weights) for weight in weights]
