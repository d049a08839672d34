"""Any task of lm-evaluation-harness on a model that is in memory: its scores, item by item, through the run store."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from billhook.core.errors import DataError, MissingExtra, option
from billhook.core.events import Event
from billhook.core.files.cache_keys import HarnessKey
from billhook.core.files.foreign_files import read_bytes, reading
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.results.comparisons import ItemResponse
from billhook.core.results.json_form import JsonObject
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import without_layout
from billhook.models.load import Teacher
from billhook.runs.job import EvalContext

HARNESS_BATCH_REQUESTS = 400  # requests, stored together
HARNESS_BATCH_SIZE = 8
Scores = dict[str, EvalResult]

FUNCTION = "!function"  # the tag of the harness for a function of a Python file
_FETCHES_CODE = "hf_evaluate"  # a key: the metric is a script of the Hub's
_TEMPLATE = re.compile(r"\{[{%]")
_INSIDES = re.compile(r"__|\|\s*attr\b")  # in a template, which the harness runs without a sandbox
_ADVICE = "Give another file."


def run_task(
    job: EvalContext, teacher: Teacher, task: str, items: int | None, shots: int | None
) -> tuple[Scores, list[ItemResponse]]:
    """Every score of a task that is one number an item and better when higher, and what the model made of each item.

    `task`: a task or group that the harness knows, or the .yaml of one. Scores of a filter are called `score,filter`.
    What the model answered is stored in batches. Raises MissingExtra without the harness, DataError for
    a task that it does not know or that has no such score.

    Source: Gao et al., lm-evaluation-harness 0.4.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra(f"lmeval:{task}", "eval") from error
    file = find_path(task) or Path(task)
    own = file.suffix in (".yaml", ".yml")
    if own and not file.is_file():
        raise DataError(f"The task file {task} is missing. Give the name of a task of the harness, or its .yaml.")
    if own:
        require_no_code(file, job.options.trust_remote_code)
    manager = TaskManager(include_path=str(file.parent) if own else None)
    name = _named(file) if own else task
    if name not in manager.all_tasks:
        raise DataError(f"lm-evaluation-harness has no task {name!r}. `lm_eval ls tasks` lists what it has.")
    output = lm_eval.simple_evaluate(
        _cached_model(job, teacher, task), tasks=[name], task_manager=manager, num_fewshot=shots, limit=items,
        bootstrap_iters=0, log_samples=True, verbosity="ERROR", random_seed=job.options.seed,
        fewshot_random_seed=job.options.seed,
    )  # fmt: skip
    return _by_item(output["samples"], output["higher_is_better"], task)


def _named(file: Path) -> str:
    """The name that a task's file gives it; the rest of the file may hold tags that only the harness reads."""
    with reading(f"{file} cannot be read as a task", DataError, "Give the .yaml of a task."):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("task:"):
                return str(yaml.safe_load(line)["task"])
    raise DataError(f"{file} names no task. Give it a line such as `task: my_task`.")


def _cached_model(job: EvalContext, teacher: Teacher, task: str) -> Any:
    """The harness's own view of a model, whose answers go through the store."""
    from lm_eval.models.huggingface import HFLM

    def through(kind: str, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(requests), HARNESS_BATCH_REQUESTS):
            part = requests[start : start + HARNESS_BATCH_REQUESTS]
            asked = json.dumps([request.args for request in part], default=str, ensure_ascii=False)
            key = HarnessKey(teacher.fingerprint, Plan(), teacher.compute_key, kind, _digest(asked))
            known = job.store.remember(key, partial(answer, part, disable_tqdm=True), job.run)
            answers += [tuple(each) if isinstance(each, list) else each for each in known]
            job.watch(Event("evaluate", len(answers), len(requests), {"set": task}))
        return answers

    class Filed(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return through("loglikelihood", super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return through("loglikelihood_rolling", super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            return through("generate_until", super().generate_until, requests)

    return Filed(pretrained=teacher.model, tokenizer=teacher.tokenizer, batch_size=HARNESS_BATCH_SIZE)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _by_item(
    samples: dict[str, list[JsonObject]], better: dict[str, JsonObject], task: str
) -> tuple[Scores, list[ItemResponse]]:
    """Samples of one or more tasks, each once a filter, as scores over items."""
    items: dict[tuple[str, int], dict[str, float]] = {}
    responses: dict[tuple[str, int], ItemResponse] = {}
    asked: list[Any] = []
    for name in sorted(samples):
        for sample in sorted(samples[name], key=lambda each: (each["doc_id"], each["filter"])):
            place = (name, sample["doc_id"])
            if place not in items:
                items[place], responses[place] = {}, _item_response(sample, len(responses) + 1)
                asked.append([*place, sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]])
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            for metric in sample["metrics"]:
                value = sample[metric]
                if better[name].get(metric) and isinstance(value, int | float) and math.isfinite(value):
                    items[place][metric + suffix] = float(value)
    common = _common(items.values())
    if not common:
        raise DataError(
            f"The task {task} has no score of single items that is better when it is higher, so it cannot be paired."
        )
    key = _digest(json.dumps(asked))
    texts = [(without_layout(each.query), each.choices) for each in responses.values()]
    ones, clusters = (1,) * len(items), tuple(texts.index(text) + 1 for text in texts)
    scores = {
        name: EvalResult(name, key, tuple(values[name] for values in items.values()), ones, clusters) for name in common
    }
    return scores, list(responses.values())


def _common(items: Iterable[dict[str, float]]) -> list[str]:
    """Names of scores that every item has."""
    rows = list(items)
    return [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]


def _item_response(sample: JsonObject, number: int) -> ItemResponse:
    """An item with its choices and their log-probabilities, or with what was written, from a log of the harness."""
    arguments, answers = sample["arguments"], sample["resps"]
    query = str(arguments[0][0])
    if isinstance(answers[0][0], tuple | list) and len(answers) > 1 and isinstance(sample["target"], int):
        same = len({str(pair[1]) for pair in arguments}) == 1  # a gap: what differs stands before it
        choices = tuple(str(pair[0 if same else 1]).strip() for pair in arguments)
        values = tuple(float(each[0][0]) for each in answers)
        return ItemResponse(number, query, choices, sample["target"], values, tuple(map(len, choices)))
    answer = answers[0][0]
    shown = str(answer[0] if isinstance(answer, tuple | list) else answer)
    return ItemResponse(number, query, target=str(sample["target"]), answer=shown)


# -- what would run ---------------------------------------------------------------------------------------------------


class _Code:
    """What a tag would have made of a value."""

    def __init__(self, tag: str) -> None:
        self.tag = tag


class _TaggedYaml(yaml.SafeLoader):
    """Safe YAML in which every other tag is noted, and nothing is made of it."""


_TaggedYaml.add_multi_constructor("!", lambda loader, suffix, node: _Code(f"!{suffix}"))
_TaggedYaml.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: _Code(f"!!python/{suffix}"))


def require_no_code(file: Path, trusted: bool) -> None:
    """Raises DataError if the harness would run code for the task in `file` that nobody has said to trust.

    It is looked for in the file, in those that it includes, in the tasks beside it that bear its names, and, of the
    tags that run when a file is read, in all files beside it.
    """
    if trusted:
        return
    beside = {path: list(_values(_read(path))) for path in sorted(file.parent.rglob("*.yaml")) if path != file}
    for path, values in beside.items():
        for value in values:
            if isinstance(value, _Code) and value.tag != FUNCTION:
                raise _refusal(path, value.tag)
    names: set[str] = set()
    waiting, seen = [file], set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        told = _read(path)
        if (code := next(filter(None, map(_code, _values(told))), None)) is not None:
            raise _refusal(path, code)
        names |= _names(told)
        waiting += [path.parent / str(each) for each in _values(_of(told, "include")) if isinstance(each, str)]
        waiting += [
            other for other in beside if names & {str(_of(_read(other), key)) for key in ("task", "group", "tag")}
        ]


def _names(told: Any) -> set[str]:
    """What a file calls its tasks, and those that it groups."""
    values = (value for key in ("task", "group", "tag") for value in _values(_of(told, key)))
    return {value for value in values if isinstance(value, str)}


def _of(told: Any, key: str) -> Any:
    return told.get(key) if isinstance(told, dict) else None


def _read(path: Path) -> Any:
    with reading(f"{path} cannot be read as YAML", DataError, _ADVICE):
        return yaml.load(read_bytes(path, DataError, _ADVICE), Loader=_TaggedYaml)


def _values(value: Any) -> Iterator[Any]:
    """Every value and every key inside a value, and that itself."""
    yield value
    if isinstance(value, dict):
        if value.get(_FETCHES_CODE):
            yield _Code(_FETCHES_CODE)
        yield from (each for pair in value.items() for part in pair for each in _values(part))
    elif isinstance(value, list):
        yield from (each for part in value for each in _values(part))


def _code(value: Any) -> str | None:
    """What of a value would run: a tag, or a template that reaches into Python."""
    if isinstance(value, _Code):
        return value.tag
    if isinstance(value, str) and _TEMPLATE.search(value) and (inside := _INSIDES.search(value)):
        return f"{inside[0]} in a template"
    return None


def _refusal(path: Path, code: str) -> DataError:
    return DataError(
        f"{path} holds {code}, by which the harness runs code of whoever wrote the file. If you trust it, add "
        f"{option('trust_remote_code', True)}."
    )
