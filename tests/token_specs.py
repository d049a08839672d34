"""Texts that recipes ask for; the hashes of their tokens are kept in golden/tokens.json, as version 0.1 read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

SMALL: dict[str, Any] = {"tokens": 240, "length": 24, "eval_tokens": 300, "eval_length": 40, "self_share": 0.0,
                         "recover_tokens": 200, "recover_length": 32}  # fmt: skip

# name: options of `prune`
CALIBRATED: dict[str, dict[str, Any]] = {
    "halved_by_document": SMALL | {"data": "few.jsonl"},
    "halved_by_document_seed_3": SMALL | {"data": "few.jsonl", "seed": 3},
    "halved_by_text": SMALL | {"data": "a.jsonl"},
    "halved_by_text_seed_3": SMALL | {"data": "a.jsonl", "seed": 3},
    "longer_than_the_positions": SMALL | {"data": "a.jsonl", "eval_length": 512, "recover_length": 256},
    "other_text_held_out": SMALL | {"data": "a.jsonl", "eval_data": "b.jsonl", "seed": 1},
    "the_same_text_held_out": SMALL | {"data": "a.jsonl", "eval_data": "a.jsonl", "seed": 1},
    "mixed": SMALL | {"data": "a.jsonl+b.jsonl", "seed": 2},
    "mixed_with_one_held_out": SMALL | {"data": "b.jsonl+a.jsonl", "eval_data": "b.jsonl"},
    "mixed_with_another_held_out": SMALL | {"data": "a.jsonl+b.jsonl", "eval_data": "few.jsonl"},
    "mixed_with_its_own": SMALL | {"data": "a.jsonl+self"},
    "its_own_share": SMALL | {"data": "a.jsonl", "self_share": 0.25},
    "its_own_share_of_a_mixture": SMALL | {"data": "a.jsonl+b.jsonl", "self_share": 0.5},
    "its_own": SMALL | {"data": "self", "eval_data": "b.jsonl"},
    "another_field": SMALL | {"data": "body.jsonl", "field": "body"},
    "a_task": SMALL | {"data": "a.jsonl", "loss": "task:task.jsonl"},
    "a_task_with_a_share": SMALL | {"data": "a.jsonl+b.jsonl", "loss": "task:task.jsonl", "self_share": 0.5},
}

# name: options of `evaluate`
FEW: dict[str, Any] = {"eval_tokens": 300, "eval_length": 40}
HELD_OUT: dict[str, dict[str, Any]] = {
    "half": FEW | {"data": "a.jsonl"},
    "half_seed_4": FEW | {"data": "few.jsonl", "seed": 4},
    "all_of_another": FEW | {"data": "a.jsonl", "eval_data": "b.jsonl"},
    "mixed": FEW | {"data": "a.jsonl+b.jsonl"},
    "mixed_with_its_own": FEW | {"data": "a.jsonl+self", "seed": 1},
}


def write_files() -> None:
    """The texts and the task, in the working folder."""
    for seed, (name, count) in enumerate({"a": 120, "b": 120, "few": 40}.items()):
        tiny.write_texts(Path(f"{name}.jsonl"), count, seed=seed)
    Path("body.jsonl").write_text(Path("b.jsonl").read_text().replace('"text"', '"body"'))
    rows = [{"query": f"w{i % 50} w1", "choices": [f"w{i % 7}", f"w{i % 11} w3"], "gold": i % 2} for i in range(40)]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
