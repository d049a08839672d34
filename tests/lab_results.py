"""Results of the laboratory with numbers of their own for every seed, made up: what its pages and tables are shown."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

OURS = (
    "billhook", "blockpruner", "deeper-look", "deeper-look-logits", "deeper-look-loss", "deeper-look-relative-l1",
    "deeper-look-relative-l2", "evopress", "finercut", "llm-drop", "shortened-llama", "shortened-llama-magnitude",
    "shortened-llama-taylor", "shortgpt", "sleb", "sprint", "uidl",
)  # fmt: skip
SITES = [f"{part}.{block}" for block in range(30) for part in ("attention", "mlp")]
TEACHER = {"parameters": 134_515_008, "bytes": 538_060_032, "kv_bytes_per_token": 46080, "flops_per_token": 269_030_016}


def described(source: str, items: int | None = None) -> dict[str, Any]:
    told = {"source": source, "tokens": 16384, "sequences": 40, "documents": 40, "texts": 38, "hash": "aa"}
    return told if items is None else told | {"items": items}


def outcome(kind: str, value: float, rng: random.Random) -> dict[str, Any]:
    """As `lab._interval`: of a text `value` is in nats."""
    spread = (0.02 if kind == "perplexity" else 0.03) * (1 + rng.random())
    ends = [value, value - spread, value + 1.2 * spread]
    if kind == "perplexity":
        ends = [math.exp(min(x, 700.0)) for x in ends]
    return dict(zip(("value", "low", "high"), ends, strict=True)) | {
        "kind": kind, "nats": value if kind == "perplexity" else None
    }  # fmt: skip


def changed(value: float, before: float, spread: float, reliable: bool = True) -> dict[str, Any]:
    gap = value - before
    return {"change": gap, "change_low": gap - spread, "change_high": gap + 1.3 * spread, "reliable": reliable}


def a_sweep(
    seed: int = 0,
    recipes: Sequence[str] = OURS,
    removes: Sequence[str] = ("15%sites", "25%sites", "35%sites"),
    texts: Sequence[str] = ("/data/wiki.jsonl", "/data/c4.jsonl"),
    tasks: Sequence[str] = ("/tasks/arc.jsonl", "/tasks/piqa.jsonl", "/tasks/boolq.jsonl"),
    *,
    datas: Sequence[str] = ("/data/wiki.jsonl",),
    time: bool = True,
    blown: Sequence[str] = (),
    refused: int = 0,
) -> dict[str, Any]:
    """A sweep. `blown`: recipes whose perplexity is beyond exp(700); `refused`: so many combinations were."""
    rng = random.Random(seed)
    sizes = TEACHER | {"ns_per_token": 33_000_000 if time else 0}
    before = {name: 2.5 + rng.random() if name in texts else 0.4 + 0.3 * rng.random() for name in (*texts, *tasks)}
    kinds = {name: "perplexity" if name in texts else "accuracy" for name in before}
    skill = {recipe: 0.4 + 1.5 * rng.random() for recipe in recipes}
    rows: list[dict[str, Any]] = []
    for data in datas:
        for recipe in recipes:
            for number, remove in enumerate(removes):
                share = 0.12 + 0.1 * number + 0.02 * rng.random()
                heads = rng.randint(3, 9)
                row: dict[str, Any] = {
                    "recipe": recipe, "remove": remove, "data": data, "removed": rng.sample(SITES, 12),
                    "attention": heads, "mlp": 12 - heads, "search_seconds": round(10 ** (4 * rng.random()), 1),
                    "sizes": {key: int(n * (1 - share * (0.8 + 0.4 * rng.random()))) for key, n in sizes.items()},
                    "site_evaluations": rng.randint(10, 60000), "results": {}, "front": [],
                }  # fmt: skip
                for name, value in before.items():
                    if name in texts:
                        lost = skill[recipe] * (4 * share) ** 2 * (0.9 + 0.2 * rng.random())
                        lost = 1000.0 if recipe in blown else lost
                    else:
                        lost = -0.6 * share * skill[recipe] * rng.random()
                    row["results"][name] = outcome(kinds[name], value + lost, rng) | changed(value + lost, value, 0.03)
                rows.append(row)
    for text in texts:
        for place in {(row["remove"], row["data"]) for row in rows}:
            alike = [row for row in rows if (row["remove"], row["data"]) == place]
            best = min(alike, key=lambda row: row["results"][text]["nats"])["results"][text]["nats"]
            for row in alike:
                gap = row["results"][text]["nats"] - best
                ends = (0.0, 0.0) if gap == 0 else (gap - 0.05, gap + 0.06)
                row["results"][text]["above_best"] = {"value": gap, "low": ends[0], "high": ends[1]}
    for row in rows:
        row["front"] = [size for size in sizes if not any(dominates(other, row, size) for other in rows)]
    why = "A run of 3 blocks does not fit 35%sites: it would be the whole model. Ask for less."
    return {
        "model": "SmolLM2-135M", "fingerprint": "0123456789abcdef",
        "teacher": {name: outcome(kinds[name], value, rng) for name, value in before.items()},
        "sizes": sizes, "rows": rows,
        "refused": [{"recipe": "uidl", "remove": f"{i}blocks", "data": datas[0], "why": why} for i in range(refused)],
        "calibration": [described(data) for data in datas],
        "evaluation": {name: described(name, None if name in texts else 200) for name in before},
        "batch": 1, "context": 128, "page": "lab/r3fa9c1/index.html",
    }  # fmt: skip


def dominates(a: dict[str, Any], b: dict[str, Any], size: str) -> bool:
    nats = [math.fsum(r["nats"] or 0 for r in row["results"].values()) for row in (a, b)]
    sizes = [row["sizes"][size] for row in (a, b)]
    better = nats[0] <= nats[1] and sizes[0] <= sizes[1] and (nats[0], sizes[0]) != (nats[1], sizes[1])
    return a["data"] == b["data"] and better


def a_trade(seed: int = 0, tasks: Sequence[str] = ("arc", "piqa", "boolq")) -> dict[str, Any]:
    rng = random.Random(seed)
    before = {task: 0.4 + 0.3 * rng.random() for task in tasks}
    rows: list[dict[str, Any]] = []
    for name in ("text", *tasks):
        told: dict[str, Any] = {}
        for task, value in before.items():
            now = value - 0.2 * rng.random() + (0.15 if name == task else 0)
            told[task] = outcome("accuracy", now, rng) | changed(now, value, 0.04)
            text = now - rows[0]["results"][task]["value"] if rows else 0.0
            ends = (text - 0.05, text + 0.05) if rows else (0.0, 0.0)
            told[task]["against_text"] = {"value": text, "low": ends[0], "high": ends[1]}
        sizes = {key: int(0.75 * n) for key, n in TEACHER.items()} | {"ns_per_token": 0}
        rows.append(
            {"recipe": name, "pruned_for": name, "remove": "25%sites", "data": "pydoc",
             "removed": rng.sample(SITES, 15),
             "attention": 9, "mlp": 6, "sizes": sizes, "search_seconds": 300 * rng.random(), "site_evaluations": 9000,
             "results": told}
        )  # fmt: skip
    return {
        "model": "SmolLM2-135M", "remove": "25%sites", "rows": rows, "page": "lab/r3fa9c1/index.html",
        "teacher": {task: outcome("accuracy", value, rng) for task, value in before.items()},
        "evaluation": {task: described(f"/tasks/{task}.jsonl", 200) for task in tasks},
    }  # fmt: skip


def a_stability(seed: int = 0, sizes: Sequence[int] = (256, 1024, 4096, 16384), sets: int = 8) -> dict[str, Any]:
    rng = random.Random(seed)
    order, told = rng.sample(SITES, len(SITES)), []
    for number, size in enumerate(sizes):
        sure = 6 + 2 * number
        plans = [sorted([*order[:sure], *rng.sample(order[sure:30], 15 - sure)]) for _ in range(sets)]
        alike, overlap = 1 - 0.5 / (number + 1), 1 - 0.6 / (number + 1)
        spreads = [{"mean": x, "low": x - 0.2 / (number + 1), "high": x + 0.3 * (1 - x)} for x in (alike, overlap)]
        told.append(
            {"tokens": size, "sets": sets, "rank_correlation": spreads[0], "overlap": spreads[1], "plans": plans}
        )
    return {
        "model": "SmolLM2-135M", "metric": "cosine", "search": "oneshot", "remove": "25%sites",
        "data": described("/data/wiki.jsonl"), "sizes": told, "page": "lab/r3fa9c1/index.html",
    }  # fmt: skip
