"""What Billhook does on one GPU: equal losses, a search, decoding, streaming, memory. One JSON line a step.

    python benchmarks/gpu.py --out gpu.jsonl                       # ten minutes of one GPU with 40 GB or more
    python benchmarks/gpu.py --device cpu --small --out cpu.jsonl  # the same steps on a CPU, in about a minute

Steps come in the order of their worth, each says how long it took, and one that would not end in `--seconds` is skipped
and says so. A step that fails says why, and the next one begins. Models are random; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import make_checkpoint

from billhook.core.budget import parse_budgets
from billhook.core.plan import PARTS, MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.bench import Measurer
from billhook.engine.losses import LOSSES
from billhook.engine.probe import Probe
from billhook.methods.evaluate.graphed_decoding import graphed_seconds
from billhook.methods.evaluate.speed import time_steps as eager_seconds
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.methods.search import SEARCHES, drive
from billhook.models.accelerator.copies import SideCopies
from billhook.models.accelerator.memory import peak_of, release_cached
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.device import bandwidth, device_module, environment, free_memory, pick_device, synchronised_time
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply

Findings = dict[str, Any]  # one line of JSON
SIZES = {  # blocks, width, intermediate, heads, KV heads, vocabulary
    "tiny": (4, 64, 192, 4, 2, 512),
    "1B": (16, 2048, 8192, 32, 8, 128_256),
    "8B": (32, 4096, 14_336, 32, 8, 128_256),
}
BATCHES = (1, 8, 64)
MARGIN = 1.3  # times the seconds that a step is said to take, which must be left


@dataclass
class Session:
    """What the steps share. `model`: a name in SIZES; `folders`: the checkpoints written so far."""

    device: torch.device
    model: str
    dtype: str
    home: Path
    tokens: int
    folders: dict[str, Path]

    def folder(self, size: str) -> Path:
        """Return the folder of a random model, written when it is asked for."""
        if size not in self.folders:
            blocks, width, inner, heads, kv_heads, words = SIZES[size]
            self.folders[size] = self.home / size
            make_checkpoint.write(Namespace(
                folder=self.home / size, blocks=blocks, width=width, intermediate=inner, heads=heads, kv_heads=kv_heads,
                vocabulary=words, dtype="bfloat16", seed=0, device=str(self.device),
            ))  # fmt: skip
        return self.folders[size]

    def load(self, size: str | None = None, **options: Any) -> Teacher:
        given = {"device": str(self.device), "dtype": self.dtype} | options
        return load(self.folder(size or self.model), **given)


def random_tokens(teacher: Teacher, count: int, length: int = 128) -> TokenSet:
    """Rows of random tokens, each a text of its own."""
    rows = torch.randint(1, teacher.model.config.vocab_size, (max(1, count // length), length),
                         generator=torch.Generator().manual_seed(0)).tolist()  # fmt: skip
    numbers = range(len(rows))
    return token_set([tuple(row) for row in rows], list(numbers), list(numbers), [""] * len(rows), "random")


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Return the median seconds of some work, after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        start = synchronised_time(device)
        work()
        seconds.append(synchronised_time(device) - start)
    return statistics.median(seconds[1:])


# -- steps ----------------------------------------------------------------------------------------------------------


def ceilings(session: Session) -> Findings:
    """What the device can: bytes and operations per second, and copies from host memory."""
    device, size = session.device, 512 if session.model == "tiny" else 8192
    found: Findings = {"read_bytes_per_s": bandwidth(device, 2**22 if session.model == "tiny" else None)}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        found[f"{dtype}_flop_per_s".removeprefix("torch.")] = 2 * size**3 / timed(lambda a=a: a @ a, device)
    host, there = torch.ones(size * size), torch.empty(size * size, device=device)
    found["pageable_bytes_per_s"] = host.nbytes / timed(lambda: there.copy_(host), device)
    copies = SideCopies(device)
    found["staged_bytes_per_s"] = host.nbytes / timed(lambda: copies.copy(there, host), device)
    return found


def losses(session: Session) -> Findings:
    """The largest relative gap of each loss to the CPU's in float32, in memory and streamed; and bfloat16's drift."""
    here = session.load("tiny", device="cpu", dtype="float32")
    tokens = random_tokens(here, 512, 32)
    plans = [Plan(), *(Plan(frozenset([site])) for site in here.anatomy.sites_present())]
    found: Findings = {"allowed": 1e-4}
    for kind, options in (("float32", {}), ("streamed", {"memory": 0}), ("bfloat16", {"dtype": "bfloat16"})):
        there = session.load("tiny", **({"dtype": "float32"} | options))
        gaps = {}
        for loss in LOSSES:
            pairs = zip(Probe(there, tokens, loss).losses(plans), Probe(here, tokens, loss).losses(plans), strict=True)
            gaps[loss] = max(abs(a.mean - b.mean) / max(abs(b.mean), 1e-3) for a, b in pairs)
        found[kind] = gaps
    return found


def search(session: Session) -> Findings:
    """A default search to 20% of the sites: seconds, waves, and the device's memory at most."""
    start = time.perf_counter()
    teacher = session.load()
    loaded = time.perf_counter() - start
    probe = Probe(teacher, random_tokens(teacher, session.tokens), "kl")
    waves, measure = [0], Measurer.measure

    def counted(self: Measurer, *args: Any) -> Any:
        waves[0] += 1
        return measure(self, *args)

    def answer(request: MeasureRequest) -> list[Loss]:
        return probe.losses(list(request.plans), request.full_results)

    Measurer.measure = counted  # type: ignore[method-assign]
    module = device_module(session.device)
    try:
        begun = synchronised_time(session.device)
        problem = Problem(teacher.anatomy, parse_budgets("20%sites"))
        plan = drive(SEARCHES["swap"](problem), answer)[-1]
        seconds = synchronised_time(session.device) - begun
    finally:
        Measurer.measure = measure  # type: ignore[method-assign]
    return {
        "load_s": loaded, "search_s": seconds, "waves": waves[0], "removed": str(plan),
        "site_evaluations": probe.site_evaluations, "weight_bytes": teacher.weight_bytes,
        "peak_bytes": None if module is None else module.max_memory_allocated(session.device),
    }  # fmt: skip


def decoding(session: Session) -> Findings:
    """Milliseconds of a decoding step, eager and as a graph: the teacher, without blocks, sites, and half of widths."""
    teacher = session.load()
    count, sizes = teacher.anatomy.blocks, {size.site: size for size in teacher.anatomy.sites}
    some = range(1, count, 4)
    halves = [f"mlp.{b}[0-{len(sizes[Site(b, 'mlp')].groups) // 2 - 1}]" for b in range(count)]
    plans = {
        "teacher": Plan(),
        "a quarter of the blocks": Plan(frozenset(Site(b, part) for b in some for part in PARTS)),
        "a quarter of the sites": Plan(frozenset(Site(b, PARTS[b // 2 % 2]) for b in range(1, count, 2))),
        "half of every mlp": Plan.parse(halves),
    }
    found: Findings = {}
    steps, prompt = (4, 8) if session.model == "tiny" else (32, 128)
    for name, plan in plans.items():
        student = apply(teacher, plan)
        for batch in BATCHES:
            ids = torch.randint(1, student.config.vocab_size, (batch, prompt)).to(session.device)
            with torch.inference_mode():
                eager = min(eager_seconds(student, ids, steps)[1] for _ in range(3))
            graph = graphed_seconds(student, ids, steps)
            times = {"eager_ms": 1000 * eager / steps, "graph_ms": None if graph is None else 1000 * graph / steps}
            found[f"{name}, batch {batch}"] = times
    ids = torch.ones(1, prompt, dtype=torch.int64, device=session.device)
    with torch.inference_mode():
        found["peak_bytes"] = peak_of(lambda: eager_seconds(teacher.model, ids, steps), teacher.model)
    return found


def streaming(session: Session) -> Findings:
    """One pass of a model that is read block by block, with all single removals at once."""
    teacher = session.load(memory=0)
    assert teacher.weights is not None
    probe = Probe(teacher, random_tokens(teacher, min(1024, session.tokens)), "kl")
    probe.losses([Plan()])
    read, start = teacher.weights.bytes_read, synchronised_time(session.device)
    probe.losses([Plan(frozenset([site])) for site in teacher.anatomy.sites_present()[:8]])
    seconds = synchronised_time(session.device) - start
    size = teacher.weights.bytes_read - read
    return {"seconds": seconds, "bytes_read": size, "bytes_per_s": size / seconds}


def lora(session: Session) -> Findings:
    """A short LoRA on the shared weights: seconds, and the bytes beside the teacher."""
    teacher = session.load()
    module = device_module(session.device)
    tokens = random_tokens(teacher, min(8192, 4 * session.tokens))
    before = 0 if module is None else module.memory_allocated(session.device)
    if module is not None:
        module.reset_peak_memory_stats(session.device)
    start = synchronised_time(session.device)
    task = RecoveryTask(teacher, Plan(frozenset([Site(1, "mlp")])))
    RECOVERIES["lora"](task, tokens, random_tokens(teacher, 512), checkpointing=True)
    seconds = synchronised_time(session.device) - start
    beside = None if module is None else module.max_memory_allocated(session.device) - before
    return {"seconds": seconds, "tokens": tokens.tokens, "bytes_beside_the_teacher": beside}


STEPS: dict[str, tuple[Callable[[Session], Findings], float]] = {  # and about how many seconds
    "ceilings": (ceilings, 10), "losses": (losses, 20), "search": (search, 120), "decoding": (decoding, 90),
    "streaming": (streaming, 60), "lora": (lora, 90),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps, and write what each found at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", choices=SIZES, help="default: 8B where the device has 40 GB free, else 1B")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see whether the steps run")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--seconds", type=float, default=600.0)
    given = parser.parse_args(arguments)
    begun, device = time.perf_counter(), pick_device(given.device)
    large = device.type != "cpu" and free_memory(device) >= 40 * 10**9
    model = "tiny" if given.small else given.model or ("8B" if large else "1B")
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    found: Findings = {
        "step": "where", "where": str(environment(str(device))), "model": model, "dtype": dtype,
        "free_bytes": free_memory(device), "sizes": str(work_sizes(device)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="billhook-gpu-") as home:
        session = Session(device, model, dtype, Path(home), 256 if given.small else 4096, {})
        tell(given.out, found)
        for name in given.steps.split(","):
            step, needed = STEPS[name]
            left = given.seconds - (time.perf_counter() - begun)
            start = time.perf_counter()
            if not given.small and left < MARGIN * needed:
                found = {"skipped": f"{left:.0f} s are left, and about {MARGIN * needed:.0f} are needed"}
            else:
                try:
                    found = step(session)
                except Exception as error:  # the next step may work
                    found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            tell(given.out, {"step": name, "step_s": time.perf_counter() - start, **found})
            gc.collect()
            release_cached(device)


def tell(out: Path, found: Findings) -> None:
    """Append one line to the file, and print it."""
    line = json.dumps(found)
    with out.open("a") as file:
        file.write(f"{line}\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
