"""Billhook's scores of multiple-choice tasks against lm-evaluation-harness: item for item, and how long each takes.

    python benchmarks/harness.py --items 100 DATA/piqa_validation.jsonl.gz DATA/winogrande_validation.jsonl.gz

Both score the same loaded model on the same items, one after the other in one process with equal threads: the harness
by its HFLM from a task config that is written for the file. Times are of tokenising and scoring, without loading and
without the harness's own set-up. One JSON object a file on stdout; a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from billhook.data.choice_tasks import task_tokens
from billhook.data.rows import file_text
from billhook.methods.evaluate.multiple_choice import log_probabilities, score_choices
from billhook.models.device import keep_freed_memory
from billhook.models.load import Teacher, load

SUBJECT = "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"


def main() -> None:
    """Score every file twice."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    teacher = load(given.model)
    with torch.inference_mode():
        teacher.model(torch.zeros(given.batch, 64, dtype=torch.int64))  # the first pass of a process is slower
    for file in given.files:
        lines = _lines(file)[: given.items]
        if given.shots is not None:
            lines = _after_shots(lines, _lines(given.shots))
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HF_DATASETS_CACHE"] = folder
            told = {"file": Path(file).name, "items": len(lines), "batch": given.batch, "threads": given.threads}
            told |= _compared(teacher, lines, Path(folder), given.batch)
        print(json.dumps(told), flush=True)
        columns = ("file", "acc", "acc_norm", "differ", "largest_difference_nats", "seconds", "ratio_cpu")
        print(" | ".join(str(told[name]) for name in columns), file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="task files")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--items", type=int, help="the first so many of each file")
    parser.add_argument("--shots", help="a task file: its items of the same subject stand solved before each query")
    parser.add_argument("--batch", type=int, default=8, help="of the harness; Billhook chooses by tokens")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _lines(file: str) -> list[str]:
    return [line for line in file_text(Path(file)).split("\n") if line.strip()]


def _after_shots(lines: list[str], shots: list[str]) -> list[str]:
    solved: dict[str, str] = {}
    for shot in map(json.loads, shots):
        answer = f"{shot['query']} {shot['choices'][shot['gold']]}\n\n"
        solved[shot["subject"]] = solved.get(shot["subject"], "") + answer
    rows = map(json.loads, lines)
    return [json.dumps(row | {"query": solved[row["subject"]] + row["query"]}) for row in rows]


def _compared(teacher: Teacher, lines: list[str], folder: Path, batch: int) -> dict[str, Any]:
    """Outcomes of both sides, how many items differ, and the times."""
    path = folder / "items.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours, theirs = _ours(teacher, path), _theirs(teacher, path, batch)
    names = [name for name in ("acc", "acc_norm") if name in theirs]
    pairs = [(a, b) for x, y in zip(ours["nats"], theirs["nats"], strict=True) for a, b in zip(x, y, strict=True)]
    return {
        **{name: [_mean(side[name]) for side in (ours, theirs)] if name in names else None for name in
           ("acc", "acc_norm")},
        "differ": {name: sum(a != b for a, b in zip(ours[name], theirs[name], strict=True)) for name in names},
        "largest_difference_nats": max(abs(a - b) for a, b in pairs),
        "seconds": [ours["wall"], theirs["wall"]],
        "cpu_seconds": [ours["cpu"], theirs["cpu"]],
        "ratio_wall": round(theirs["wall"] / ours["wall"], 2),
        "ratio_cpu": round(theirs["cpu"] / ours["cpu"], 2),
    }  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ours(teacher: Teacher, path: Path) -> dict[str, Any]:
    """Outcomes and log-probabilities by Billhook, in the order of the file."""
    start = time.perf_counter(), time.process_time()
    tokens = task_tokens(path, teacher.tokenizer, positions=teacher.model.config.max_position_embeddings)
    sums = log_probabilities(teacher.model, tokens)
    told: dict[str, Any] = _spent(start)
    order = sorted(range(len(tokens.clusters)), key=lambda d: tokens.clusters[d])
    for name, result in score_choices(tokens, sums).items():
        told[name] = [result.sums[d] for d in order]
    rows: list[list[float]] = [[] for _ in order]
    for document, value in zip(tokens.documents, sums, strict=True):
        rows[document].append(value)
    return told | {"nats": [rows[d] for d in order]}


def _spent(start: tuple[float, float]) -> dict[str, float]:
    return {"wall": round(time.perf_counter() - start[0], 1), "cpu": round(time.process_time() - start[1], 1)}


def _theirs(teacher: Teacher, path: Path, batch: int) -> dict[str, Any]:
    """The same by the harness."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    spent: dict[str, float] = {}

    class Timed(HFLM):
        def loglikelihood(self, requests: Any, *of: Any, **options: Any) -> Any:
            start = time.perf_counter(), time.process_time()
            told = super().loglikelihood(requests, *of, **options)
            spent.update(_spent(start))
            return told

    (path.parent / "of_a_file.yaml").write_text(json.dumps(_config(path)), encoding="utf-8")  # JSON is YAML
    model = Timed(pretrained=teacher.model, tokenizer=teacher.tokenizer, batch_size=batch)
    found = lm_eval.simple_evaluate(
        model, tasks=["of_a_file"], task_manager=TaskManager(include_path=str(path.parent)), bootstrap_iters=0,
        log_samples=True, verbosity="ERROR",
    )  # fmt: skip
    samples = sorted(found["samples"]["of_a_file"], key=lambda sample: sample["doc_id"])
    told = {name: [float(s[name]) for s in samples] for name in ("acc", "acc_norm") if name in samples[0]}
    return spent | told | {"nats": [[float(resp[0]) for resp in s["filtered_resps"]] for s in samples]}


def _config(path: Path) -> dict[str, Any]:
    """A task of the harness for a file of items; gaps are scored by what follows them, as for WinoGrande."""
    row = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    gap = bool(row.get("contexts"))
    fields = ("gold", "contexts", "continuation") if gap else ("query", "choices", "gold")
    names = ["acc"] if gap else ["acc", "acc_norm"]
    told = {
        "task": "of_a_file", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0,
        **dict(zip(("doc_to_text", "doc_to_choice", "doc_to_target"), fields, strict=True)),
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
    }  # fmt: skip
    return told | ({"description": SUBJECT} if row.get("subject") else {})


if __name__ == "__main__":
    main()
