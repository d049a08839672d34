"""What the hostile suite shares: strange values, a budget for each example, and what an example may end in."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from billhook.core.errors import BillhookError

SECONDS, BYTES = 10, 2**30  # of one example, and that it may add to the process


def examples(count: int) -> settings:
    """So many examples, the same in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ten seconds and a gigabyte. Success and errors of Billhook end an example, nothing else does."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except BillhookError as error:
        if error.exit_code not in (2, 3) or not 0 < len(str(error)) < 3000:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


# -- strange values -------------------------------------------------------------------------------------------------

NAMES = ("a", "0", "-1", "mlp.1", "attention.0", "head.3", "mlp.2[0-7]", "mlp.2[0-999999999999]", "../a", "/dev/zero",
         "\x1b[31m", "\u202e", "\ud800", "", "a" * 300, "~nobody/x", "\0")  # fmt: skip
NUMBERS = (0, -1, 1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(NAMES),
    st.integers(-5, 100),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
odd_json = st.sampled_from(
    [b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"1" * 5000, b"null", b'{"a": 1e999}', b"\0" * 64]
)
json_bytes = odd_json | values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value, as the keys that lead to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inside for place in ((*prefix, key), *places(each, (*prefix, key)))]


def changed(value: Any, edits: list[tuple[tuple[Any, ...], Any]]) -> Any:
    """A copy of a JSON value with other values in some places; ... takes one away."""
    copy = json.loads(json.dumps(value))
    for place, new in edits:
        at = copy
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier edit took the place away
            for key in place[:-1]:
                at = at[key]
            if new is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = new
    return copy


def edits(value: Any, new: st.SearchStrategy[Any] = values) -> st.SearchStrategy[Any]:
    """Copies of a JSON value that differ in one to three places."""
    one = st.tuples(st.sampled_from(places(value)), new | st.just(...))
    return st.lists(one, min_size=1, max_size=3).map(lambda told: changed(value, told))


def damaged(content: bytes, head: int = 4096) -> st.SearchStrategy[bytes]:
    """Copies of a file that are cut, or have other bytes at one to four places near their beginning."""
    end = min(len(content), head) - 1
    byte = st.tuples(st.integers(0, end), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))

    def poke(places: list[tuple[int, int]]) -> bytes:
        copy = bytearray(content)
        for place, new in places:
            copy[place] = new
        return bytes(copy)

    return st.lists(byte, min_size=1, max_size=4).map(poke) | st.integers(0, end).map(lambda size: content[:size])
