"""Measured latency, throughput and memory. Two models are timed in turn, so that drift affects both."""

from __future__ import annotations

import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from billhook.core.anatomy import Anatomy
from billhook.core.errors import ResourceError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import Plan, Site
from billhook.core.results.measured import EnergyCounters, Estimate, Timing, TimingProtocol
from billhook.core.results.run import Phase, PredictedSpeed, Rates, SpeedGap, SpeedRatio
from billhook.core.statistics import median_interval, student_quantile
from billhook.methods.evaluate.graphed_decoding import graphed_seconds
from billhook.models.accelerator.memory import peak_of
from billhook.models.accelerator.sizes import warm_up_runs
from billhook.models.device import DTYPES, child_environment, device_uuid, dtype_name, peak_memory, synchronised_time
from billhook.models.load import Teacher, undisturbed
from billhook.models.pruned_config import register
from billhook.models.surgery import apply
from billhook.models.transformers_internals import cache_name
from billhook.runtimes.energy import Laps, Meter, Phases, machine_meter

FEWEST_RUNS = 6  # whose median has a 95% interval

FAR = 0.15  # from the predicted speed, above which the reason is looked for


def max_positions(models: Sequence[Any]) -> int | None:
    """Return the positions that all models have; None if no model sets a limit."""
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


@torch.inference_mode()
def time_interleaved(
    models: Sequence[Any], folders: Sequence[Path], protocol: TimingProtocol, *,
    seed: int = 0, meter: Meter | None = None, watch: EventListener = ignore_events,
) -> list[Timing]:  # fmt: skip
    """Time each model, in the order A B A B …: wall seconds on a synchronised device, after warm-ups of each.

    `meter`: energy counters that are read beside the clock; None: those of this machine.

    On CUDA a decoding step is a replayed graph, as in a serving engine, and the eager one is timed beside it.
    `folders[i]` holds the checkpoint of model i: on a CPU, peak memory is that of a fresh process that loads it and
    answers one prompt; on a GPU that of its allocator, less what others hold.
    """
    prompt = protocol.prompt_tokens
    draw = torch.Generator().manual_seed(seed)
    vocabulary = min(model.config.vocab_size for model in models)
    ids = torch.randint(0, vocabulary, (protocol.batch, prompt), generator=draw)
    meter = meter_of(models[0].device) if meter is None else meter
    runs: list[list[Phases]] = [[] for _ in models]
    graphed: list[list[float]] = [[] for _ in models]
    warm_ups = max(warm_up_runs(m.device) for m in models)
    total = (protocol.repeats + warm_ups) * len(models)
    for repeat in range(protocol.repeats + warm_ups):
        for i, model in enumerate(models):
            phases = run_phases(model, ids.to(model.device), protocol.new_tokens, meter)
            if repeat >= warm_ups:
                runs[i].append(phases)
                replayed = graphed_seconds(model, ids.to(model.device), protocol.new_tokens)
                graphed[i] += [] if replayed is None else [replayed]
            watch(Event("speed", repeat * len(models) + i + 1, total))
    peaks = [_peak(m, folder, protocol) for folder, m in zip(folders, models, strict=True)]
    both = min(map(len, graphed)) == protocol.repeats  # a ratio compares two graphs or none
    found = [timing_of(each, protocol, peak) for each, peak in zip(runs, peaks, strict=True)]
    return [
        replace(timing, decode_s=tuple(replayed), eager_decode_s=timing.decode_s) if both else timing
        for timing, replayed in zip(found, graphed, strict=True)
    ]


def meter_of(device: torch.device) -> Meter:
    """Return the energy counters of this machine and of the device."""
    return machine_meter(device_uuid(device))


def counters_of(meter: Meter) -> EnergyCounters:
    """Return the names of the counters of a meter."""
    return EnergyCounters(tuple(each.name for each in meter.counters), meter.unreadable)


def timing_of(runs: Sequence[Phases], protocol: TimingProtocol, peak: int | None) -> Timing:
    """Return runs of one model as a timing; without joules where a run has none."""
    pairs = [(each.prefill_j, each.decode_j) for each in runs]
    counted = [(p, d) for p, d in pairs if p is not None and d is not None]
    counted = counted if len(counted) == len(runs) else []
    return Timing(
        tuple(each.prefill_s for each in runs), tuple(each.decode_s for each in runs), protocol.prompt_tokens,
        protocol.new_tokens, protocol.batch, peak, prefill_j=tuple(p for p, _ in counted),
        decode_j=tuple(d for _, d in counted),
    )  # fmt: skip


def _peak(model: Any, folder: Path, protocol: TimingProtocol) -> int | None:
    """Return the peak memory of one answer: in this process where the device counts it, else in one of its own."""
    prompt, new = protocol.prompt_tokens, protocol.new_tokens
    ids = torch.zeros(1, prompt, dtype=torch.int64).to(model.device)
    counted = peak_of(lambda: time_steps(model, ids, new), model)
    return peak_bytes(folder, str(model.device), dtype_name(model.dtype), prompt, new) if counted is None else counted


def time_steps(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill of `ids` [batch, time] and of `new_tokens` decoding steps."""
    found = run_phases(model, ids, new_tokens, Meter())
    return found.prefill_s, found.decode_s


def run_phases(model: Any, ids: torch.Tensor, new_tokens: int, meter: Meter) -> Phases:
    """Return seconds and joules of a prefill of `ids` [batch, time] and of `new_tokens` decoding steps."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = cache_name(model)
    laps = Laps(meter, lambda: synchronised_time(model.device))
    out = model(input_ids=ids, use_cache=True, **last_only)
    laps.lap()
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, use_cache=True, **{cache: out[cache]})
    laps.lap()
    return laps.phases()


def peak_bytes(folder: Path, device: str, dtype: str, prompt: int, new_tokens: int) -> int | None:
    """Return the peak memory of a fresh process that loads `folder` and answers: resident on a CPU, allocated on a GPU.

    None if the process fails, for example because the memory does not hold a second copy.
    """
    arguments = [str(folder.resolve()), device, dtype, str(prompt), str(new_tokens)]
    command = [sys.executable, "-P", "-m", "billhook.methods.evaluate.speed", *arguments]
    watched, held = os.pipe()  # nothing is written: it closes with this process, and the other one ends
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, stdin=watched, timeout=900,
            env=child_environment(folder),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    finally:
        os.close(watched)
        os.close(held)
    return int(json.loads(done.stdout)["peak_bytes"]) if done.returncode == 0 else None


def _end_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _child(folder: str, device: str, dtype: str, prompt: str, new_tokens: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    register()
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True).to(device)
    with torch.inference_mode():
        time_steps(model.eval(), torch.zeros(1, int(prompt), dtype=torch.int64, device=device), int(new_tokens))
    print(json.dumps({"peak_bytes": peak_memory(model.device)}))


@undisturbed
@torch.inference_mode()
def site_times(
    teacher: Teacher, batch: int, context: int, watch: EventListener = ignore_events, *,
    steps: int = 8, repeats: int = 9,
) -> dict[str, int]:  # fmt: skip
    """Return each site's nanoseconds of a decoding step of `batch` sequences after `context` tokens, and the `rest`.

    Sites of one kind (part and size) cost the same: the median over `repeats` of the step with all of them minus the
    step with as few as possible, timed in turn, divided by the number of removed ones. Raises ResourceError for a
    streamed teacher.

    Source: Park et al. 2025, SPRINT (arXiv 2506.03510), its latency of a sublayer. Deviation: measured by kind, with
    all sites of a kind removed.
    """
    if teacher.weights is not None:
        raise ResourceError("A model larger than its memory cannot be timed here. Count the budget in flops instead.")
    kinds: dict[tuple[str, int, int], list[Site]] = {}
    for size in teacher.anatomy.sites:
        kinds.setdefault((size.site.part, size.parameters, size.kv_bytes_per_token), []).append(size.site)
    present = teacher.anatomy.sites_present()
    removed = {
        kind: sites[int(len(sites) == sum(s.part == kind[0] for s in present)) :] for kind, sites in kinds.items()
    }
    models = [teacher.model, *(apply(teacher, Plan(frozenset(sites))) for sites in removed.values())]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, teacher.model.config.vocab_size, (batch, context), generator=draw).to(teacher.device)
    seconds: list[list[float]] = [[] for _ in models]
    graphs = all(graphed_seconds(model, ids, steps) is not None for model in models)
    warm_ups = warm_up_runs(ids.device)
    for repeat in range(repeats + warm_ups):
        for i, model in enumerate(models):
            watch(Event("cost", repeat * len(models) + i, (repeats + warm_ups) * len(models), {"step": "decode"}))
            replayed = graphed_seconds(model, ids, steps) if graphs else None
            decode = (time_steps(model, ids, steps)[1] if replayed is None else replayed) / steps
            if repeat >= warm_ups:
                seconds[i].append(decode)
    table: dict[str, int] = {}
    for (kind, sites), without in zip(removed.items(), seconds[1:], strict=True):
        saved = statistics.median(a - b for a, b in zip(seconds[0], without, strict=True)) / max(1, len(sites))
        table |= dict.fromkeys(map(str, kinds[kind]), max(1, round(saved * 1e9)))
    return table | {"rest": max(0, round(statistics.median(seconds[0]) * 1e9) - sum(table.values()))}


def rates(timing: Timing) -> Rates:
    """Tokens per second, median and 95% interval of the median, and the peak memory."""
    prompt, new = timing.prompt_tokens * timing.batch, timing.new_tokens * timing.batch
    eager = [new / s for s in timing.eager_decode_s]
    return Rates(
        _median([prompt / s for s in timing.prefill_s]), _median([new / s for s in timing.decode_s]),
        timing.peak_bytes, _median(eager) if eager else None, _mean_joules(timing.prefill_j, prompt),
        _mean_joules(timing.decode_j, new),
    )  # fmt: skip


def _mean_joules(joules: Sequence[float], tokens: int) -> Estimate | None:
    """Return joules per token, the mean with its 95% interval by Student's t; of fewer than 6 runs their range.

    A counter advances in steps, which a mean evens out and a median does not.
    """
    if not joules or not any(joules):
        return None
    return _of_sums([each / tokens for each in joules], [1.0] * len(joules))


def _of_sums(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Return the ratio of two sums over runs with its 95% interval by Student's t; of fewer than 6 its range."""
    n, total = len(above), sum(below)
    value, reliable = sum(above) / total, n >= FEWEST_RUNS
    if reliable:
        squares = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
        half = student_quantile(0.975, n - 1) * (squares * n / (n - 1)) ** 0.5 / total
        return Estimate(value, value - half, value + half, n, n, True)
    each = [a / b for a, b in zip(above, below, strict=True) if b > 0]
    return Estimate(value, min(each), max(each), n, n, False, "few_runs")


def speed_ratio(teacher: Timing, student: Timing) -> SpeedRatio:
    """How many times faster the student is, from the pairs that ran one after the other."""

    def phase(before: Sequence[float], after: Sequence[float]) -> Estimate:
        return _median([a / b for a, b in zip(before, after, strict=True)])

    joules = teacher.decode_j, student.decode_j
    return SpeedRatio(
        phase(teacher.prefill_s, student.prefill_s), phase(teacher.decode_s, student.decode_s),
        _of_sums(joules[1], joules[0]) if all(map(any, joules)) else None,
    )  # fmt: skip


def _median(values: Sequence[float]) -> Estimate:
    """Return the median with its 95% interval; of fewer than 6 values their range."""
    median, low, high = median_interval(tuple(values))
    reliable = len(values) >= FEWEST_RUNS
    return Estimate(median, low, high, len(values), len(values), reliable, "" if reliable else "few_runs")


def predicted_speed(anatomy: Anatomy, plan: Plan, given: Anatomy | None = None) -> PredictedSpeed:
    """Predict the speed-up from the anatomy: in proportion to the weights that each token uses.

    Prefill computes the head for one token of the prompt only, decoding for each token. `given`: the anatomy of the
    model that the student is compared with, where that is another one than it was pruned from.
    """
    given = given or anatomy
    heads = given.rest.flops_per_token, anatomy.rest.flops_per_token
    whole, left = given.total("flops_per_token"), anatomy.total("flops_per_token", plan)
    return PredictedSpeed((whole - heads[0]) / max(left - heads[1], 1), whole / left)


def predicted_by_weights(first: Anatomy, second: Anatomy) -> PredictedSpeed:
    """Predict how many times faster the second model is, as `predicted_speed`, from the anatomies of both."""
    before, after = (each.total("flops_per_token") for each in (first, second))
    heads = first.rest.flops_per_token, second.rest.flops_per_token
    return PredictedSpeed((before - heads[0]) / max(after - heads[1], 1), before / after)


def explain_gap(
    timings: tuple[Timing, Timing], anatomy: Anatomy, promised: PredictedSpeed, itemsize: int,
    bandwidth: Callable[[], float],
) -> SpeedGap | None:  # fmt: skip
    """Explain why measured and predicted speed differ by more than 15%; None if they do not.

    Reading the weights once per token at the measured memory bandwidth is the least that decoding takes. The
    rest is the fixed cost of the calls, which depends on the number of sublayers, not on their size.

    timings: of teacher and student, in turn
    bandwidth: bytes per second that the device reads, measured only if needed
    """
    teacher, ratio = timings[0], speed_ratio(*timings)
    pairs: dict[Phase, float] = {
        "prefill": ratio.prefill.value / promised.prefill,
        "decode": ratio.decode.value / promised.decode,
    }
    far = tuple(phase for phase, off in pairs.items() if abs(off - 1) > FAR)
    if not far:
        return None
    step = statistics.median(teacher.decode_s) / teacher.new_tokens
    return SpeedGap(far, teacher.batch, step, anatomy.total("flops_per_token") / 2 * itemsize / bandwidth())


if __name__ == "__main__":
    _child(*sys.argv[1:])
