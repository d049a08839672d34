"""What a model needs of a machine, and how fast it can be there at best: the roofline of its anatomy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from billhook.core.anatomy import Anatomy, GroupSize
from billhook.core.outlook.machines import Machine
from billhook.core.plan import Plan

Bound = Literal["memory", "compute"]

USABLE = 0.9  # share of the memory that weights and KV cache may take: what vLLM takes by default


@dataclass(frozen=True, slots=True)
class Workload:
    """How a model is used: `batch` sequences at a time, each of `prompt_tokens` up to `context` tokens.

    `bytes_per_parameter`: of the weights as they are served, 0.5 of 4 bits; None: as in the checkpoint.
    `kv_bytes`: per element of the KV cache; None: as in the checkpoint.
    """

    context: int = 2048
    batch: int = 1
    prompt_tokens: int = 512
    bytes_per_parameter: float | None = None
    kv_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """A model under a workload on a machine. Rates and seconds are the best that the machine's figures allow.

    - `weight_bytes`, `kv_cache_bytes`: of the whole batch at the full context.
    - `fits`: with the share `USABLE` of the memory; `largest_batch`: that does at this context; None without KV cache.
    - `decode_seconds`: a step that decodes a token for each sequence, at the full context; `decode_bound`: by what.
    - `decode_tokens_per_s`, `prefill_tokens_per_s`: of the whole batch.
    - `joules_per_token`: decoded, at the machine's full power; None where that is not known.
    """

    machine: Machine
    workload: Workload
    weight_bytes: int
    kv_cache_bytes: int
    fits: bool
    largest_batch: int | None
    decode_seconds: float
    decode_bound: Bound
    decode_tokens_per_s: float
    prefill_seconds: float
    prefill_bound: Bound
    prefill_tokens_per_s: float
    joules_per_token: float | None


def resources(
    anatomy: Anatomy,
    machine: Machine,
    workload: Workload = Workload(),
    plan: Plan = Plan(),  # noqa: B008 - an immutable value
) -> Resources:
    """Return what the model that `plan` leaves needs and gives on `machine` under `workload`.

    A phase takes as long as the slower of two: reading its bytes at the machine's bandwidth, or computing its FLOPs.
    A decoding step reads the weights that its tokens touch and the KV cache at the full context; a prefill reads the
    weights once. On top comes `machine.call_seconds` for each site. FLOPs of attention scores are not counted.

    Source: Williams et al. 2009, Roofline (Communications of the ACM 52), doi 10.1145/1498765.1498785.
    """
    sizes, batch = anatomy.sizes(plan), workload.batch
    stored = sizes.bytes / sizes.parameters
    each = stored if workload.bytes_per_parameter is None else workload.bytes_per_parameter
    weights = round(sizes.parameters * each)
    per_token = sizes.kv_bytes_per_token * (1 if workload.kv_bytes is None else workload.kv_bytes / stored)
    cache = round(per_token * workload.context * batch)
    room = USABLE * machine.memory_bytes - weights
    largest = None if not per_token else max(0, int(room / (per_token * workload.context)))
    calls = machine.call_seconds * sum(size.site not in plan.removed for size in anatomy.sites)
    decode = _seconds(machine, _touched(anatomy, plan, batch) * each + cache, sizes.flops_per_token * batch)
    tokens = workload.prompt_tokens * batch
    head = anatomy.rest.flops_per_token  # of a prompt computed once, for its last token
    prefill = _seconds(
        machine, _touched(anatomy, plan, tokens) * each,
        (sizes.flops_per_token - head) * tokens + head * batch,
    )  # fmt: skip
    step, prompt = decode[0] + calls, prefill[0] + calls
    return Resources(
        machine, workload, weights, cache, room >= cache, largest,
        step, decode[1], batch / step, prompt, prefill[1], tokens / prompt,
        None if machine.watts is None else machine.watts * step / batch,
    )  # fmt: skip


def shrunk(anatomy: Anatomy, share: float) -> Anatomy:
    """Return the anatomy of a student that lacks a share of the parameters, taken evenly from all sites."""
    inside = sum(size.parameters for size in anatomy.sites)
    factor = max(0.0, 1 - share * anatomy.total("parameters") / inside)
    sites = tuple(
        replace(
            size, parameters=round(size.parameters * factor), bytes=round(size.bytes * factor),
            kv_bytes_per_token=round(size.kv_bytes_per_token * factor),
            flops_per_token=round(size.flops_per_token * factor), ns_per_token=round(size.ns_per_token * factor),
        )
        for size in anatomy.sites
    )  # fmt: skip
    return replace(anatomy, sites=sites)


def _seconds(machine: Machine, read_bytes: float, flops: float) -> tuple[float, Bound]:
    memory, compute = read_bytes / machine.bandwidth, flops / machine.flops
    return (memory, "memory") if memory >= compute else (compute, "compute")


def _touched(anatomy: Anatomy, plan: Plan, tokens: int) -> float:
    """Return how many weights so many tokens touch, on average: of experts, which each token picks anew, a share."""
    whole = anatomy.total("flops_per_token", plan) / 2
    lost = {size.site: each for size, each in anatomy.lost(plan)}
    for size in anatomy.sites:
        if size.experts > 1 and size.site not in plan.removed:
            less = lost.get(size.site, GroupSize(0, 0, 0, 0))
            parameters, active = size.parameters - less.parameters, (size.flops_per_token - less.flops_per_token) / 2
            whole += parameters * (1 - (1 - active / parameters) ** tokens) - active
    return whole
