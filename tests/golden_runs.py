"""Small runs whose results are kept in golden/golden.json, so that a change of the house changes no number.

Every way to search, recover, score and compare is in one of them. Models are drawn by integers, so that their bytes are
the same on every machine. `python tests/golden_runs.py NAME …` records those that are named anew, `all` all of them: do
so where a number is meant to change, and say why.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

import billhook
from billhook.core.plan import PARTS
from billhook.core.results.comparisons import (
    Agreement,
    Baseline,
    Comparison,
    GateReport,
    PairVerdict,
    SetValue,
    TaskScores,
)
from billhook.core.results.measured import Estimate

GOLDEN = Path(__file__).parent / "golden" / "golden.json"
SHORT: dict[str, Any] = {"data": "texts.jsonl", "self_share": 0.0, "tokens": 240, "length": 24, "eval_tokens": 480,
                         "eval_length": 24, "finalists": 0}  # fmt: skip
LEARN: dict[str, Any] = {"recover_tokens": 640, "recover_length": 24}
TEXT: dict[str, Any] = {"eval_tokens": 480, "eval_length": 24}
FEW: dict[str, Any] = {"generations": 2, "offspring": 4, "tokens": 64}  # of the search evolve

# name: (variant of `tiny`, its flags, options of `prune`)
PRUNES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "greedy_js_self": ("llama_tied", {}, {
        "remove": "3sites", "search": "greedy", "loss": "js", "self_share": 0.5, "protect": "attention.0"}),
    "swap_bytes": ("qwen3", {}, {"remove": "25%", "search": "swap", "recover": "mean"}),
    "oneshot_cosine_blocks": ("gemma2", {}, {"remove": "2blocks", "search": "oneshot", "metric": "cosine"}),
    "oneshot_taylor": ("mistral", {}, {
        "remove": "2mlp", "search": "oneshot", "metric": "taylor", "loss": "nll", "recover": "scale"}),
    "ilp_two_budgets": ("gemma3_text", {}, {
        "remove": "20%,25%kv", "search": "ilp", "metric": "shapley_nll", "set": {"pairs": 2}}),
    "contiguous_fused": ("llama", {}, {
        "remove": "1blocks", "search": "contiguous", "metric": "angular_span", "recover": "linear",
        "recover_set": {"where": "fused"}}),
    "channels_flap": ("llama", {}, {
        "remove": "20%", "search": "rank_channels", "metric": "flap", "set": {"standardise": False},
        "recover": "compensate"}),
    "channels_uniform": ("qwen3_moe", {}, {
        "remove": "15%", "search": "rank_channels", "metric": "taylor_mix", "uniform": True, "multiple": 2}),
    "experts_uniform": ("mixtral", {}, {
        "remove": "15%", "search": "rank_channels", "metric": "reap", "uniform": True, "set": {"experts": True}}),
    "joint_taylor": ("qwen3", {}, {
        "remove": "30%", "search": "joint", "metric": "taylor_element1",
        "set": {"levels": 4, "rounds": 3, "tokens": 96, "start": "greedy"}}),
    "joint_fold": ("gpt_neox", {}, {
        "remove": "25%", "search": "joint", "metric": "wanda_sp",
        "set": {"levels": 2, "rounds": 1, "tokens": 96, "start": "none"}, "recover": "fold"}),
    "two_stage": ("llama", {}, {
        "remove": "35%", "search": "two_stage", "metric": "activation", "loss": "nll",
        "set": {"p": 2, "alpha": 3.0, "tokens": 96}}),
    "beam_topk": ("phi3", {}, {
        "remove": "2attention,1mlp", "search": "beam", "set": {"width": 2}, "loss": "topk_kl", "recover": "linear"}),
    "evolve_finercut": ("stablelm", {}, {
        "remove": "25%attention,25%mlp", "search": "evolve", "loss": "finercut_js",
        "set": {"start": "random", "split": "fixed", **FEW}}),
    "exhaustive_stock": ("gpt2", {}, {"remove": "2sites", "search": "exhaustive", "loss": "norm", "stock": True}),
    "fast_audit": ("llama", {"num_hidden_layers": 6}, {
        "remove": "4sites", "search": "greedy", "fast": True, "shortlist": 4, "audit": True}),
    "finalists": ("llama", {"num_hidden_layers": 6}, {"remove": "4sites", "search": "greedy", "finalists": 5}),
    "fast_swap": ("llama", {"num_hidden_layers": 6}, {
        "remove": "30%kv", "search": "swap", "fast": True, "loss": "angular"}),
    "fold_in_search": ("llama", {}, {
        "remove": "2sites", "search": "greedy", "fold_in_search": True, "recover": "fold"}),
    "task_loss": ("llama", {}, {"remove": "2sites", "search": "greedy", "loss": "task:first_test.jsonl"}),
    "within_margin": ("llama", {}, {"within": "60%ppl", "search": "greedy", "eval_tokens": 960}),
    "streamed_channels": ("llama", {}, {
        "remove": "15%", "search": "rank_channels", "metric": "activation", "memory": "0.1MB"}),
    "streamed_greedy": ("llama", {}, {"remove": "2sites", "search": "greedy", "memory": "0.1MB"}),
    "closed_forms": ("llama", {}, {
        "plan": "attention.1,mlp.2", "recover": "mean,scale,lowrank", "recover_set": {"rank": 3}}),
    "trained_in_parts": ("phi", {}, {
        "plan": "mlp.1", "recover": "lowrank,patches,bias,partial",
        "recover_set": {"lowrank.rank": 2, "epochs": 1, "partial.loss": "mse"}}),
    "trained": ("llama", {}, {
        "plan": "mlp.1", "recover": "full,lora,qa_lora",
        "recover_set": {"rank": 2, "group": 8, "full.loss": "nll", "lora.batch": 8}}),
    "apt": ("llama", {}, {
        "remove": "20%", "search": "rank_channels", "metric": "apt", "recover": "apt",
        "recover_set": {"rounds": 2, "rank": 2, "batch": 8}}),
    "adapter": ("llama", {}, {
        "plan": "mlp.1", "recover": "lora", "recover_set": {"rank": 2, "merge": False, "batch": 8}}),
}  # fmt: skip
METRICS = {
    "sites": "cca,cosine,l1,l2,relative_l1,relative_l2,angular_span,magnitude,sprint_local,taylor",
    "losses": "loo_js,loo_kl,loo_logits,loo_nll,loo_ppl,shapley_kl,shapley_nll,present_absent",
    "task": "loo_task,shapley_task",
    "groups": "activation,apt,cfsp,flap,group_magnitude,obs,saap,taylor_element1,taylor_element2,taylor_mix,"
    "taylor_vector,wanda_sp",
    "experts": "reap",
}
SCORED: dict[str, tuple[str, dict[str, Any]]] = {
    "sites": ("qwen3", {}),
    "losses": ("llama", {"set": {"pairs": 2, "draws": 8}}),
    "task": ("llama", {"set": {"pairs": 2}, "loss": "task:first_test.jsonl"}),
    "groups": ("llama", {"set": {"batches": 2}}),
    "experts": ("mixtral", {}),
}

# -- what is needed ----------------------------------------------------------------------------------------------------


def model(variant: str, **flags: Any) -> str:
    """A checkpoint in the working folder, its weights drawn by integers: the same bytes on every machine."""
    folder = Path("-".join([variant, *(str(value) for value in flags.values())]))
    if not folder.exists():
        flags = {"max_position_embeddings": 96 if variant == "gpt2" else 26} | flags
        tiny.with_tokenizer(folder, variant, **flags)
        redraw(folder / "model.safetensors")
    return str(folder)


def redraw(file: Path) -> None:
    """Every tensor of a checkpoint anew: 0.3 is the standard deviation of weights, 0.15 of biases and of norms."""
    draw, tensors = torch.Generator().manual_seed(7), load_file(file)
    for name in sorted(tensors):
        shape = tensors[name].shape
        whole = torch.randint(-512, 513, shape, generator=draw).float() / 1024
        norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = whole / 2 + float(norm) if len(shape) == 1 else whole
    save_file(tensors, file, metadata={"format": "pt"})


def texts() -> None:
    """Texts, and two files of multiple-choice items, in the working folder."""
    if Path("second_test.jsonl").exists():
        return
    tiny.write_texts(Path("texts.jsonl"), 160)
    tiny.write_texts(Path("other.jsonl"), 80, seed=9)
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=count))

    for name in ("first", "second"):
        rows = [
            {"query": words(5), "choices": [words(draw.randint(1, 3)) for _ in range(3)], "gold": draw.randrange(3)}
            for _ in range(40)
        ]
        Path(f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- what is kept of a result: one function a kind ---------------------------------------------------------------------


def plain(result: Any) -> dict[str, Any]:
    """What a function returned, as JSON holds it."""
    told: dict[str, Any] = json.loads(json.dumps(result if isinstance(result, dict) else result.to_json()))
    return told


def written(out: str, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((Path(out) / name).read_text(encoding="utf-8"))
    return told


def digest(values: Sequence[str]) -> str:
    return f"{len(values)} {hashlib.sha256(' '.join(values).encode()).hexdigest()[:16]}"


def only(told: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: told[name] for name in names if name in told}


def of_prune(report: Mapping[str, Any], losses: int) -> dict[str, Any]:
    """`report`: report.json."""
    steps, search, sizes = report["steps"], report["search"] or {}, report["sizes"]
    kinds = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {
        "kind": report["checkpoint"] + (", zeroed: no speed-up" if "zeroed" in report["reasons"] else ""),
        "plan": only(report["plan"], "removed", "narrowed", "key"),
        "steps": [only(step, "sites", "narrowed", "loss", "gap", "gap_se") for step in steps],
        "decided": search.get("decided"),
        "site_evaluations": search.get("site_evaluations"),
        "audit": [
            only(each, "regret", "regret_se") | {name: of_plan(each[name]) for name in ("chosen", "best")}
            for each in search.get("audit") or []
        ],
        "within": of_within(report["within"]),
        "perplexity": of_change(report["perplexity"], "teacher", "student", "ratio", "ci95", "n", "clusters",
                                "reliable"),
        "tasks": [of_change(each, "file", "teacher", "student", "change", "ci95", "n", "reliable")
                  for each in report["tasks"]],
        "sizes": {kind: {side: sizes[side][kind] for side in ("teacher", "student")} for kind in kinds},
        "recoveries": [
            only(each, "recovery", "parameters", "tokens")
            | {"on": {use: of_change(gain, "teacher", "before", "after", "ratio", "ci95", "reliable", "closed")
                      for use, gain in each["on"].items()}}
            for each in report["recoveries"]
        ],
        "seen": digest(report["seen"]),
        "data": {use: only(about, "tokens", "documents", "hash") for use, about in report["data"].items()},
        "losses": losses,
    }  # fmt: skip


def of_plan(told: Mapping[str, Any]) -> list[str]:
    return [*told["removed"], *told["narrowed"]]


def of_change(told: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A change as golden.json has it: the interval of its one estimate beside its value."""
    ((key, estimate),) = [(key, value) for key, value in told.items() if isinstance(value, dict)]
    flat = {key: estimate["value"], "ci95": [estimate["low"], estimate["high"]]}
    return only({**told, **only(estimate, "n", "clusters", "reliable"), **flat}, *names)


def of_within(told: Mapping[str, Any] | None) -> list[Any] | None:
    if told is None:
        return None
    return [only(trial, "percent", "within") | {"lost": trial["lost"]["value"]} | only(trial["lost"], "low", "high")
            for trial in told["trials"]]  # fmt: skip


def of_checkpoint(folder: Path, exact: bool) -> dict[str, Any]:
    """Of every tensor its digest; where a recovery changed some, its shape, sum and norm."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            shape = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            where = name if file.parent == folder else f"{file.parent.name}/{name}"
            if exact:
                data = shape.encode() + tensor.view(torch.uint8).numpy().tobytes()
                found[where] = hashlib.sha256(data).hexdigest()[:16]
            else:
                found[where] = [shape, float(tensor.double().sum()), float(tensor.double().norm())]
    return found


def of_scores(told: Mapping[str, Any]) -> dict[str, Any]:
    """Values of sites and blocks, some standard errors, spans, and sums over groups."""
    kept: dict[str, Any] = {}
    for name, rows in told["scores"].items():
        kept[name] = {
            "values": [row["value"] for kind in ("sites", "blocks") for row in rows[kind]],
            "errors": [row["se"] for kind in ("sites", "blocks") for row in rows[kind]][:3],
            "spans": [row["value"] for row in rows["spans"]],
            "groups": {row["site"]: [len(row["values"]), *extremes(row["values"])] for row in rows["groups"]},
        }
    return {"data": told["data"]["hash"], "scores": kept}


def extremes(values: Sequence[float]) -> tuple[int, int, float]:
    """Which is the lowest, which the highest, and their sum."""
    return values.index(min(values)), values.index(max(values)), sum(values)


def of_trials(told: Mapping[str, Any]) -> dict[str, Any]:
    """`told`: result.json of a sweep or a transfer."""
    rows = []
    for trial in told["trials"]:
        sizes = {name: size for name, size in trial["sizes"].items() if name != "ns_per_token"}
        removed = trial["plan"]["removed"] + trial["plan"]["narrowed"]
        row = {part: sum(site.startswith(f"{part}.") for site in trial["plan"]["removed"]) for part in PARTS}
        row |= {"removed": removed, "site_evaluations": trial["site_evaluations"], "sizes": sizes}
        row["results"] = {name: of_outcome(outcome) for name, outcome in trial["results"].items()}
        if told["kind"] == "sweep":
            row["front"] = [name for name in trial["front"] if name != "ns_per_token"]
        rows.append(row)
    teacher = {name: of_outcome(outcome) for name, outcome in told["teacher"].items()}
    return {"teacher": teacher, "rows": rows, "refused": len(told.get("refused", ()))}


ENDS = ("value", "low", "high")


def of_outcome(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What a model got on a set, with the gaps that there are."""
    found = only(outcome, "kind", "nats") | only(outcome["estimate"], *ENDS)
    if change := outcome.get("change"):
        names = {"change": "value", "change_low": "low", "change_high": "high", "reliable": "reliable"}
        found |= {name: change[key] for name, key in names.items()}
    gaps = ("above_best", "above_first_text", "against_text")
    return found | {gap: only(outcome[gap], *ENDS) for gap in gaps if outcome.get(gap)}


def of_stability(told: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for size in told["sizes"]:
        plans = [plan["removed"] + plan["narrowed"] for plan in size["plans"]]
        rows.append(only(size, "tokens", "sets", "rank_correlation", "overlap") | {"plans": plans})
    return {"sizes": rows}


def of_threshold(told: Mapping[str, Any]) -> dict[str, Any]:
    def judged(each: Mapping[str, Any]) -> dict[str, Any]:
        lost = each["lost"]
        return only(each, "limit", "within") | only(lost, "low", "high", "n", "reliable") | {"lost": lost["value"]}

    trials = [only(t, "step", "share", "within") | {"of": list(map(judged, t["losses"]))} for t in told["trials"]]
    facts = only(told, "step", "steps", "share", "confirmed", "shares", "losses", "knee")
    facts["removed"] = told["plan"]["removed"]
    return facts | {"trials": trials, "test": [judged(each) for each in told["test"]]}


def of_compare(told: Comparison) -> dict[str, Any]:
    def value(each: SetValue) -> dict[str, Any]:
        return ends(each.estimate) | {"scores": each.scores}

    def pair(each: PairVerdict | None) -> dict[str, Any]:
        assert each is not None
        near = {"near_low": each.interval90.low, "near_high": each.interval90.high, "limit": each.margin.limit}
        names = ("p", "p_holm", "gained", "lost", "verdict", "more")
        change = {
            "change": each.change.value,
            **only(ends(each.change), "low", "high"),
            "reliable": each.change.reliable,
        }
        return change | near | {name: getattr(each, name) for name in names}

    def alike(each: Agreement | None) -> dict[str, Any]:
        assert each is not None
        return {"kl": ends(each.kl), "agreement": ends(each.same), "text": each.text, "tokens": each.tokens}

    sizes = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {
        "models": [{"removed": each.earlier.names()} | {name: getattr(each.sizes, name) for name in sizes}
                   for each in told.models],
        "rows": [{"set": each.source, "kind": each.score, "n": each.n, "values": [*map(value, each.values)],
                  "pairs": [*map(pair, each.pairs)]} for each in told.sets],
        "close": [*map(alike, told.agreement)],
        "flips": {each.source: [{"number": flip.number, "right": flip.right, "probabilities": flip.probabilities}
                                for flip in each.flips] for each in told.sets if each.info.kind != "text"},
    }  # fmt: skip


def ends(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def of_gate(told: GateReport) -> dict[str, Any]:
    checks = [
        {"set": check.source, "kind": "perplexity" if check.is_text else "accuracy", "score": check.score, "n": check.n,
         "verdict": check.verdict, "baseline": check.baseline, "student": check.student, "lost": check.lost.value,
         "low": check.lost.low, "high": check.lost.high, "margin": float(check.margin.amount),
         "reliable": check.lost.reliable}
        for check in told.checks
    ]  # fmt: skip
    return {"verdict": told.verdict, "checks": checks}


def of_baseline(told: Baseline) -> dict[str, Any]:
    return {"sets": told.stored()["sets"], "values": {each.source: each.value for each in told.sets}}


def of_tasks(told: TaskScores) -> dict[str, Any]:
    return {"rows": [{"set": each.source, "score": each.score, **ends(each.estimate), "n": each.estimate.n,
                      "reliable": each.estimate.reliable} for each in told.scores]}  # fmt: skip


def of_perplexity(told: Mapping[str, Any]) -> dict[str, Any]:
    names = ("perplexity", "ci95", "n", "clusters", "reliable", "bits_per_byte", "word_perplexity", "protocol")
    return of_change({**told, "data": None, "evaluations": None}, *names) | {"data": told["data"]["hash"]}


def losses_of(store: str) -> int:
    """How many losses all runs of a store measured."""
    return sum(run["losses"] for run in map(plain, billhook.list_runs(store)))


# -- the runs ----------------------------------------------------------------------------------------------------------


def pruned(name: str) -> dict[str, Any]:
    """One of `PRUNES`, with its checkpoint."""
    variant, flags, options = PRUNES[name]
    texts()
    options = SHORT | (LEARN if "recover" in options else {}) | options
    billhook.prune(model(variant, **flags), out=name, store=f"{name}.db", **options)
    report = of_prune(written(name, "report.json"), losses_of(f"{name}.db"))
    return report | {"checkpoint": of_checkpoint(Path(name), exact=not options.get("recover"))}


def scored(name: str) -> dict[str, Any]:
    variant, options = SCORED[name]
    texts()
    given = {"data": "texts.jsonl", "self_share": 0.0, "tokens": 120, "length": 24}
    return of_scores(plain(billhook.score(model(variant), METRICS[name], **given, **options)))


def swept() -> dict[str, Any]:
    """Two recipes at two sizes on two texts, and a task."""
    texts()
    billhook.sweep(model("llama"), ["shortgpt", "sleb"], remove=["10%", "90%", "2blocks"],
                   data=["texts.jsonl", "other.jsonl"], tasks=["first_test.jsonl"], items=15, out="swept",
                   store="swept.db", tokens=240, length=24, **TEXT)  # fmt: skip
    return of_trials(written("swept", "result.json")) | {"losses": losses_of("swept.db")}


def transferred() -> dict[str, Any]:
    texts()
    billhook.transfer(model("llama"), ["first_test.jsonl", "second_test.jsonl"], remove="25%sites", search="greedy",
                   items=15, out="transfer", store="transfer.db", **SHORT)  # fmt: skip
    return of_trials(written("transfer", "result.json")) | {"losses": losses_of("transfer.db")}


def stable() -> dict[str, Any]:
    texts()
    billhook.stability(model("llama"), "cosine", sizes=[48, 240], draws=3, remove="25%sites", search="oneshot",
                       out="stable", store="stable.db", data="texts.jsonl", length=24, self_share=0.0)  # fmt: skip
    return of_stability(written("stable", "result.json")) | {"losses": losses_of("stable.db")}


def judged() -> dict[str, Any]:
    """One pruned model in a threshold, a comparison, a gate with a baseline, and evaluations."""
    texts()
    teacher, store = model("llama"), "judged.db"
    found = plain(billhook.prune(teacher, remove="4sites", search="greedy", out="judged", store=store, **SHORT))
    billhook.threshold(margins=["60%ppl"], run=found["run"], out="threshold", store=store, eval_tokens=960)
    billhook.threshold(teacher, margins=["200%ppl", "100pp:first_test.jsonl"], remove="2sites", search="greedy",
                       out="searched", store=store, **SHORT)  # fmt: skip
    on: dict[str, Any] = {"data": "texts.jsonl", "tasks": "first_test.jsonl"}
    billhook.compare(teacher, "judged", teacher, out="compared", store=store, timed=False, **on, **TEXT)
    kept = billhook.save_baseline("v1", teacher, store=store, **on, **TEXT)
    gates = [
        billhook.gate("judged", "v1", store=store, margins=given) for given in (("1pp", "3%ppl"), ("60pp", "90%ppl"))
    ]
    tasks = billhook.evaluate_tasks("judged", ["first_test.jsonl", "second_test.jsonl"], shots=1, store=store)
    return {
        "threshold": of_threshold(written("threshold", "result.json")),
        "searched": of_threshold(written("searched", "result.json")),
        "compared": of_compare(Comparison.from_json(written("compared", "result.json"))),
        "baseline": of_baseline(kept),
        "gates": [of_gate(told) for told in gates],
        "tasks": of_tasks(tasks),
        "losses": losses_of(store),
    }


def measured() -> dict[str, Any]:
    """Perplexity of a model on held-out text, streamed, and on all of a text as papers do."""
    texts()
    short, long = model("llama"), model("llama", max_position_embeddings=128)
    given: dict[str, Any] = {"data": "texts.jsonl", **TEXT}
    told = [billhook.evaluate(short, **given), billhook.evaluate(short, memory="0.1MB", **given),
            billhook.evaluate(long, protocol="shortened-llama", data="texts.jsonl")]  # fmt: skip
    return {"told": [of_perplexity(plain(each)) for each in told]}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: (lambda name=name: pruned(name)) for name in PRUNES},
    **{f"score_{name}": (lambda name=name: scored(name)) for name in SCORED},
    "sweep": swept,
    "transfer": transferred,
    "stability": stable,
    "judged": judged,
    "evaluation": measured,
}  # fmt: skip

# -- recording -------------------------------------------------------------------------------------------


def kept_results() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return told


def record(names: Sequence[str]) -> None:
    """Run some anew, and keep what they give."""
    told = kept_results() if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        for name in RUNS if "all" in names else names:
            told[name] = json.loads(json.dumps(RUNS[name]()))
    lines = [f"{json.dumps(name)}:{json.dumps(told[name], separators=(',', ':'))}" for name in RUNS if name in told]
    GOLDEN.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    import conftest  # noqa: F401 - offline, one thread

    record(sys.argv[1:])
