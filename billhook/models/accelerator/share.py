"""The share that one process has in work that several do together, with sums over all of them.

accelerate forms the group of processes: nccl carries the sums between CUDA GPUs, gloo between CPUs. One process alone
needs neither.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from billhook.core.errors import UsageError, option
from billhook.models.accelerator.memory import is_out_of_memory
from billhook.models.device import synchronised_time

BUCKET = 2**24  # numbers that are summed by one message
POLL = 0.02  # seconds between two looks for processes that have not come
PATIENCE = timedelta(days=7)  # for a slower process; that one is lost is noticed at once
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the network interface of processes of one machine
T = TypeVar("T")


class ProcessLost(Exception):
    """Another process of the group is gone: what it was doing is lost, and nobody can go on."""


@dataclass(frozen=True, slots=True)
class Share:
    """Process number `rank` of `processes`. Every method is called by all of them, in the same order.

    - `device`: where this process computes.
    - `lost`: set once another process is known to be gone.

    Methods raise ProcessLost where another process is gone.
    """

    rank: int = 0
    processes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lost: threading.Event = field(default_factory=threading.Event)

    def part(self, count: int) -> slice:
        """Return which of `count` rows are this process's: parts differ by one row, and the first is the largest."""
        start, stop = (-(-count * rank // self.processes) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in float32; all of them get the same bits."""
        if self.processes == 1:
            return
        for some in _buckets(tensors):
            total = self._reduced(torch.cat([tensor.detach().flatten().float() for tensor in some]))
            for tensor, part in zip(some, total.split([tensor.numel() for tensor in some]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum of each number over the processes, in float64."""
        if self.processes == 1:
            return list(numbers)
        summed: list[float] = self._reduced(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
        return summed

    def gather(self, own: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """Return all `count` rows, of which each process has computed its part: pieces of [rows, ...] in order."""
        if self.processes == 1:
            return torch.cat(list(own))
        shape, dtype = self.of_first((own[0].shape[1:], own[0].dtype) if own else ((), torch.float32))
        rows = torch.zeros(count, *shape, dtype=dtype, device=self.device)
        if own:
            rows[self.part(count)] = torch.cat(list(own))
        self.sum([rows])
        return rows

    def of_first(self, value: T) -> T:
        """Return the value that the first process has."""
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        (first,) = self._together(lambda: broadcast_object_list([value]))
        return first  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Return once every process has come here."""
        self.add([0.0])  # a barrier would take the device of an accelerator that is there and not used

    def _reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import reduce

        summed: torch.Tensor = self._together(lambda: reduce(tensor, reduction="sum"))
        return summed

    def _together(self, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, once the device has done it."""
        try:
            done = work()
            synchronised_time(self.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ProcessLost(str(error)) from error
        if self.lost.is_set():
            raise ProcessLost
        return done


ALONE = Share()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield tensors together as long as they have at most BUCKET numbers; a larger one is alone."""
    some: list[torch.Tensor] = []
    for tensor in tensors:
        if some and sum(each.numel() for each in some) + tensor.numel() > BUCKET:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@contextmanager
def joined(share: Share, file: Path) -> Iterator[None]:
    """Form, inside the context, the group of a share's processes, which meet in a `file` that they make.

    Raises ProcessLost where one is gone before it comes, and UsageError where accelerate refuses the machine, or this
    process is in a group already.
    """
    from accelerate import PartialState

    if distributed.is_initialized():
        raise UsageError(
            f"This process belongs to a group of torch.distributed, and cannot form another one. Type "
            f"{option('workers', 1)}, or leave that group first."
        )
    earlier, values = _emptied(PartialState)  # another library's: one state serves all of a process
    hook = sys.excepthook
    try:
        _meet(share, file)
        yield
    finally:
        with suppress(RuntimeError):  # of a group that has lost a process
            if distributed.is_initialized():
                distributed.destroy_process_group()
        _emptied(PartialState)
        earlier.update(values)
        sys.excepthook = hook


def _meet(share: Share, file: Path) -> None:
    """Form the group, once all processes have come."""
    from accelerate import PartialState

    store = distributed.FileStore(str(file), share.processes)  # type: ignore[attr-defined]
    store.set(f"here {share.rank}", "")
    while not store.check([f"here {rank}" for rank in range(share.processes)]):
        if share.lost.is_set():
            raise ProcessLost
        time.sleep(POLL)
    try:
        with _environment(share):
            cpu = share.device.type == "cpu"
            PartialState(cpu, store=store, rank=share.rank, world_size=share.processes, timeout=PATIENCE)
    except NotImplementedError as error:  # of some GPUs with old drivers
        raise UsageError(f"{error} Or type {option('workers', 1)}.") from error
    except RuntimeError as error:
        raise ProcessLost(str(error)) from error


def _emptied(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state that all objects of a `kind` share, emptied, and what was in it; without one, two others."""
    if not kind.__new__(kind).initialized:
        return {}, {}
    shared = vars(kind())
    values = dict(shared)
    shared.clear()
    return shared, values


@contextmanager
def _environment(share: Share) -> Iterator[None]:
    """Give this process, inside the context, the variables from which accelerate reads the group."""
    given = {
        "RANK": share.rank, "WORLD_SIZE": share.processes, "LOCAL_RANK": share.device.index or 0,
        "LOCAL_WORLD_SIZE": share.processes, "OMP_NUM_THREADS": torch.get_num_threads(),
        "MASTER_PORT": 0,  # which accelerate sets, and nobody reads
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or LOOPBACK.get(sys.platform, ""),
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in given}
    os.environ.update({name: str(value) for name, value in given.items() if value != ""})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def abort() -> None:
    """End what waits for a lost process, from another thread. gloo ends it by itself."""
    if distributed.is_initialized() and distributed.get_backend() != "gloo" and distributed.group.WORLD is not None:
        distributed.group.WORLD.abort()
