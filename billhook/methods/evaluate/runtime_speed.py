"""Speed and memory of exported models in the runtime that serves them, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from billhook.core.errors import UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import Timing, TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.core.results.run import PredictedSpeed
from billhook.methods.evaluate.served import count_vocabulary, open_runtime
from billhook.methods.evaluate.speed import counters_of, rates, speed_ratio, timing_of
from billhook.models.device import environment
from billhook.runtimes import RuntimeNumbers
from billhook.runtimes.artefacts import Artefact, read_weights
from billhook.runtimes.energy import Phases, rapl_counters


def speed_in_runtime(
    names: Sequence[str], artefacts: Sequence[Artefact], protocol: TimingProtocol, watch: EventListener = ignore_events
) -> SpeedReport:
    """Return the speed of the files of one or two models in their runtime. Raises RuntimeFailed."""
    timed = time_artefacts(artefacts, protocol, watch=watch)
    runtime = f"{artefacts[0].engine} {timed[0][1].version}"
    return SpeedReport(
        tuple(ModelRates(n, rates(each), told.kv_bytes) for n, (each, told) in zip(names, timed, strict=True)),
        protocol, environment(runtime), speed_ratio(timed[0][0], timed[1][0]) if len(timed) > 1 else None, runtime,
        predicted_ratio(*artefacts) if len(timed) > 1 else None, counters_of(rapl_counters()),
    )  # fmt: skip


def predicted_ratio(first: Artefact, second: Artefact) -> PredictedSpeed | None:
    """Return how many times faster the second is by its weights alone: the bytes that a token reads, the products.

    None where the files do not list their tensors.
    """
    before, after = read_weights(first), read_weights(second)
    if before is None or after is None:
        return None
    return PredictedSpeed(before.elements / after.elements, before.bytes / after.bytes)


def check_protocol(protocol: TimingProtocol) -> None:
    """Raise UsageError for a batch: a runtime answers one prompt at a time."""
    if protocol.batch != 1:
        raise UsageError(f"A runtime is timed with one prompt at a time. Leave {option('batch')} out.")


def time_artefacts(
    artefacts: Sequence[Artefact], protocol: TimingProtocol, seed: int = 0, watch: EventListener = ignore_events
) -> list[tuple[Timing, RuntimeNumbers]]:
    """Time each artefact in its runtime, in the order A B A B …, after one warm-up each; with what the runtime says.

    All are open at once, each in a process of its own, whose peak memory counts. Raises as `check_protocol`.
    """
    check_protocol(protocol)
    prompt, new = protocol.prompt_tokens, protocol.new_tokens
    with ExitStack() as stack:
        opened = [stack.enter_context(open_runtime(each, prompt + new)) for each in artefacts]
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, min(map(count_vocabulary, opened)), (prompt,), generator=draw).tolist()
        runs: list[list[Phases]] = [[] for _ in opened]
        total = (protocol.repeats + 1) * len(opened)
        for repeat in range(protocol.repeats + 1):
            for i, served in enumerate(opened):
                taken = served.time(ids, new)
                if repeat:
                    runs[i].append(taken)
                watch(Event("speed", repeat * len(opened) + i + 1, total))
        numbers = [served.numbers() for served in opened]
    return [(timing_of(each, protocol, told.peak_bytes), told) for each, told in zip(runs, numbers, strict=True)]
