"""Devices that this machine does not have: their tensors lie on the CPU and refuse to meet the CPU's, as a GPU's would.

Those of two such devices, `pretended:0` and `pretended:1`, refuse to meet too. Backward passes are for the first alone:
torch counts one device of a kind whose backend is Python. Where gradients cross devices, the CPU is the other one.

It counts what costs time on a GPU: kernels, and waits of the CPU for the device, by the line of Billhook that waits. It
counts the bytes of its tensors, and is out of memory above a limit. On an Apple GPU there is no float64.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from billhook.models import device
from billhook.models import load as loading
from billhook.models.accelerator import spreading

NAME = "pretended"
HOUSE = str(Path(loading.__file__).resolve().parents[1])
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Indices may come from the CPU. Where they are a mask, the size of the result is known to the device alone.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SIZED_BY_VALUES = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.equal.default, aten.bincount.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
}  # fmt: skip
VIEWS_ONLY = {aten.detach.default, aten.alias.default}
ONE_BY_ONE = {aten.linalg_lstsq.default}  # whose default driver a GPU lacks


@dataclass
class Costs:
    """What was asked of the device: kernels, waits by line of Billhook, and bytes at most."""

    kernels: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    on: Counter[int] = field(default_factory=Counter)  # bytes that live, by device
    peak: int = 0
    limit: int | None = None  # of each device
    copied: int = 0  # bytes from the CPU to the device and back

    def reset(self) -> None:
        self.kernels, self.waits, self.peak, self.copied = 0, Counter(), self.live, 0

    @property
    def live(self) -> int:
        return self.on.total()

    @property
    def waited(self) -> int:
        return self.waits.total()


COSTS = Costs()
_users: Counter[int] = Counter()  # wrappers by address of their storage
_HERE: list[Pretending] = []  # the mode that is on


def _held(inner: torch.Tensor, made: Remote) -> None:
    """Count a storage until its last wrapper goes."""
    place, size = inner.untyped_storage().data_ptr(), inner.untyped_storage().nbytes()
    if not size:
        return
    if not _users[place]:
        COSTS.on[made.device.index] += size
        COSTS.peak = max(COSTS.peak, COSTS.live)
    _users[place] += 1
    made.share = _Share(place, size, made.device.index)


@dataclass(slots=True)
class _Share:
    """A wrapper's share in a storage, which ends with the wrapper."""

    place: int
    size: int
    index: int

    def __del__(self) -> None:
        _users[self.place] -= 1
        if not _users[self.place]:
            del _users[self.place]
            COSTS.on[self.index] -= self.size


class Remote(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: torch.Tensor
    share: _Share
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> Remote:
        with torch.inference_mode(False):  # a view of a parameter needs a version counter
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=torch.device(NAME, index), storage_size=inner.untyped_storage().nbytes(),
            )  # fmt: skip
        made.inner = inner
        _held(inner, made)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.inner!r})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a device tensor to numpy. Use Tensor.cpu() to copy it to host memory first.")

    def tolist(self) -> Any:
        _wait()
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _HERE, f"{func} outside the device"
        return _computed(func, args, kwargs or {}, _HERE[-1])


class Pretending(TorchDispatchMode):
    """Inside, the device is there. `float64`: whether it computes in that."""

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self)


def _wait() -> None:
    """Count a wait for the line of Billhook that asked."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(HOUSE):
        frame = frame.f_back  # type: ignore[assignment]
    where = "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
    COSTS.waits[where] += 1


def _is_mask(index: Any) -> bool:
    return isinstance(index, Remote) and index.dtype in (torch.bool, torch.uint8)


def _refuse(
    func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any], remote: list[Remote], lands: int | None
) -> None:
    """Raise what a GPU raises: AssertionError where tensors of two devices meet."""
    if func not in COPIES and remote:
        assert len({x.device for x in remote}) == 1, f"tensors of {len(remote)} devices meet in {func}"
        indices = args[1] if func in INDEXED and isinstance(args[0], Remote) else ()
        here = [x for x in flat if not isinstance(x, Remote) and x.dim() and not any(x is i for i in indices)]
        assert not here, f"tensors of two devices meet in {func}"
    generator = kwargs.get("generator")
    assert not (lands is not None and generator is not None), f"a generator of the CPU draws on the device in {func}"
    assert not (remote and func in ONE_BY_ONE), f"{func} has another driver on a GPU"


def _count(func: Any, args: Any) -> None:
    """Count the kernel, and the wait that the operation is."""
    COSTS.kernels += func not in VIEWS_ONLY and not func.is_view
    masks = func in INDEXED and any(_is_mask(index) for index in args[1])
    if func in SIZED_BY_VALUES or masks:
        _wait()


@cache
def _is_composite(func: Any) -> bool:
    """Return whether an operation is made of others."""
    named = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return bool(func._can_decompose() and named)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the arguments or results of an operation, each leaf changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, x) for x in value])
    return change(value)


def _tensors(value: Any, found: list[torch.Tensor]) -> None:
    for x in value:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            _tensors(x, found)


def _computed(func: Any, args: Any, kwargs: dict[str, Any], mode: Pretending) -> Any:
    """Compute one operation. Raises AssertionError or TypeError where a device would raise."""
    if _is_composite(func):
        with mode:  # in inference mode operations arrive whole
            return func.decompose(*args, **kwargs)
    flat: list[torch.Tensor] = []
    _tensors((*args, *kwargs.values()), flat)
    remote, asked = [x for x in flat if isinstance(x, Remote)], kwargs.get("device")
    lands = _index(flat[0] if func is aten.copy_.default else next(iter(remote), None) if asked is None else asked)
    if not remote and lands is None:
        return func(*args, **kwargs)
    _refuse(func, args, kwargs, flat, remote, lands)
    if func in COPIES and _index(flat[-1]) != lands:  # from one device to the other
        COSTS.copied += flat[-1].nbytes
        at_once = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if not at_once:
            _wait()
    else:
        _count(func, args)
    plain = _mapped(_inner, args)
    options = {key: _mapped(_inner, x) for key, x in kwargs.items()}
    options |= {} if asked is None else {"device": asked if lands is None else torch.device("cpu")}
    found = _emulated(func, plain, options)
    if func._schema.is_mutable and lands is not None:
        named = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(func._schema.arguments)}
        written = [named[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return None if not func._schema.returns else written[0] if len(func._schema.returns) == 1 else tuple(written)
    return found if lands is None else _mapped(lambda x: _arrived(x, mode, lands), found)


def _index(place: Any) -> int | None:
    """Return the number of the pretended device of a tensor, or of a device by name; None for the CPU's."""
    found = getattr(place, "device", place)
    found = None if found is None else torch.device(found)
    return None if found is None or found.type != NAME else found.index or 0


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Remote) else x


def _emulated(func: Any, plain: Any, options: dict[str, Any]) -> Any:
    """Compute on the CPU, in another way where only a GPU has the operation."""
    if func is aten.histc.default and not plain[0].is_floating_point():
        return func(plain[0].float(), *plain[1:], **options).to(plain[0].dtype)
    if func is aten.mm.dtype:
        return plain[0].to(plain[2]) @ plain[1].to(plain[2])
    return func(*plain, **options)


def _arrived(x: Any, mode: Pretending, index: int) -> Any:
    """Return a tensor as one of a device, where that has room and the dtype."""
    if not isinstance(x, torch.Tensor) or isinstance(x, Remote):
        return x
    if x.dtype == torch.float64 and not mode.float64:
        raise TypeError("the device has no float64")
    new = not _users.get(x.untyped_storage().data_ptr(), 0)
    size = x.untyped_storage().nbytes()
    if COSTS.limit is not None and new and COSTS.on[index] + size > COSTS.limit:
        raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {size} bytes")
    return Remote(x, index)


class _Module(_DummyBackendModule):
    """What `torch.cuda` is for CUDA: the functions that Billhook and torch call."""

    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_rng_state = staticmethod(lambda device=None: torch.empty(0))
    set_rng_state = staticmethod(lambda state, device=None: None)
    synchronize = staticmethod(lambda device=None: None)
    memory_allocated = staticmethod(lambda device=None: COSTS.on[_index(device) or 0])
    memory_reserved = staticmethod(lambda device=None: COSTS.on[_index(device) or 0])
    max_memory_allocated = staticmethod(lambda device=None: COSTS.peak)

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        total = COSTS.limit or 2**40
        return total - COSTS.on[_index(device) or 0], total

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        COSTS.peak = COSTS.live

    @staticmethod
    def empty_cache() -> None:
        gc.collect()


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    one, other = (x.inner if isinstance(x, Remote) else x for x in (source, target))
    if source.device != target.device and not non_blocking:
        _wait()
    other.copy_(one)
    return target


_LIBRARY: list[torch.library.Library] = []  # it holds for as long as it lives


def register() -> None:
    """Make the device known to torch, once a process; before the first backward pass, which counts devices."""
    if _LIBRARY:
        return
    _ = tiny.transformers.LlamaConfig, tiny.transformers.LlamaForCausalLM  # whose lazy imports look at all devices
    _setup_privateuseone_for_python_backend(NAME, _Module())
    _LIBRARY.append(torch.library.Library("_", "IMPL", "AutocastPrivateUse1"))
    _LIBRARY[-1].fallback(torch.library.fallthrough_kernel)  # it casts nothing by itself
    _LIBRARY.append(library := torch.library.Library("aten", "IMPL"))

    def empty(size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Remote:
        return _arrived(torch.empty(size, dtype=dtype), _HERE[-1], _index(device) or 0)

    def strided(size: Any, stride: Any, dtype: Any = None, device: Any = None, **_: Any) -> Remote:
        return _arrived(torch.empty_strided(size, stride, dtype=dtype), _HERE[-1], _index(device) or 0)

    library.impl("empty_strided", strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", _copied, "PrivateUse1")


@contextmanager
def pretended(
    *, float64: bool = True, limit: int | None = None, devices: Sequence[str] = (f"{NAME}:0",)
) -> Iterator[Costs]:
    """Inside, Billhook loads models to the devices, of `limit` bytes each. Yields what is asked of them from now on."""
    register()
    found = tuple(map(torch.device, devices))
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    picks = loading.pick_devices
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    mode = Pretending(float64)
    _HERE.append(mode)
    loading.pick_devices = lambda name: found if name == "auto" else (torch.device(name),)  # type: ignore[assignment]
    frees = spreading.free_memory
    if len({place.type for place in found}) > 1:  # half of a model on each, whatever the machine has free
        spreading.free_memory = lambda device: 2**30
    device.NO_FLOAT64 |= set() if float64 else {NAME}
    COSTS.reset()
    COSTS.limit = limit
    try:
        with mode:
            yield COSTS
    finally:
        COSTS.limit = None
        device.NO_FLOAT64.discard(NAME)
        spreading.free_memory, loading.pick_devices = frees, picks
        _HERE.pop()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
