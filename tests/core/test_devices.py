"""Names of devices, and the division of a model among them."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.devices.division import ModelBytes, divide_blocks
from billhook.core.devices.names import format_devices, parse_devices
from billhook.core.errors import ResourceError, UsageError


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("cuda:0-7", range(8)), ("cuda:0,2", (0, 2)), ("cuda:0-1,3", (0, 1, 3)), ("cuda:3,0-1", (3, 0, 1)),
     ("cuda:5", (5,)), ("cuda:2-2", (2,))],
)  # fmt: skip
def test_several_devices_have_one_name(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_devices(text) == tuple(f"cuda:{number}" for number in numbers)


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "mps"])
def test_one_device_is_itself(text: str) -> None:
    assert parse_devices(text) == (text,)
    assert format_devices([text]) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu:0-1", "only those of cuda have numbers: Billhook takes one cpu. Type device='cpu'"),
        ("mps:0-1", "Type device='mps'"),
        ("auto:1", "Type device='auto'"),
        ("gpu:0-1", "There is no kind of device 'gpu'. Did you mean cuda or mps"),
        ("", "There is no kind of device ''. Write auto, cpu"),
        ("cuda:0-1,1", "names cuda:1 twice. Type device='cuda:0-1'."),
        ("cuda:3-1", "3-1 in device='cuda:3-1' goes down. Write 1-3."),
        ("cuda:", "are no numbers of devices"),
        ("cuda:0,", "are no numbers of devices"),
        ("cuda:0,cuda:1", "cuda:0,2 or cuda:0-1,3"),
        ("cuda:-1", "are no numbers of devices"),
        ("cuda:1000", "are no numbers of devices"),
    ],
)
def test_other_names_are_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_devices(text)
    assert message in str(refused.value)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_names_read_back(numbers: list[int]) -> None:
    names = tuple(f"cuda:{number}" for number in numbers)
    assert parse_devices(format_devices(names)) == names


SIZES = st.integers(1, 9)


@given(
    st.lists(SIZES, min_size=3, max_size=6),
    SIZES,
    st.integers(0, 9),
    st.lists(st.integers(20, 90), min_size=2, max_size=4),
)
def test_the_fullest_device_is_the_least_full_of_all_divisions(
    blocks: list[int], first: int, last: int, room: list[int]
) -> None:
    sizes, names = ModelBytes(tuple(blocks), first, last), [f"cuda:{i}" for i in range(len(room))]

    def fullest(of_block: tuple[int, ...]) -> float:
        held = [sum(b for b, device in zip(blocks, of_block, strict=True) if device == d) for d in range(len(room))]
        held[0] += first
        held[-1] += last
        return max(each / have for each, have in zip(held, room, strict=True))

    divisions = list(combinations_with_replacement(range(len(room)), len(blocks)))
    try:
        found = divide_blocks(sizes, room, names)
    except UsageError:  # a device would be empty in the best division
        assert not last or len(room) > 2
        return
    except ResourceError:
        assert min(map(fullest, divisions)) > 1
        return
    assert list(found) == sorted(found)
    assert fullest(found) == min(map(fullest, divisions))


def test_figures_of_what_does_not_fit() -> None:
    sizes = ModelBytes((2 * 10**9,) * 70, 10**9, 3 * 10**9)
    with pytest.raises(ResourceError) as refused:
        divide_blocks(sizes, [60 * 10**9, 70 * 10**9], ["cuda:0", "cuda:1"])
    for figure in (
        "144.0 GB",
        "70 blocks of up to 2.00 GB",
        "1.00 GB before",
        "3.00 GB after",
        "cuda:0 60.0 GB, cuda:1",
    ):
        assert figure in str(refused.value)
    assert "device='cuda:0' reads the blocks from disk" in str(refused.value)
    assert divide_blocks(sizes, [80 * 10**9] * 2, ["cuda:0", "cuda:1"]).count(0) in (35, 36)


def test_a_device_without_a_part_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cuda:1 would hold no part of the model. Type device='cuda:0'"):
        divide_blocks(ModelBytes((5, 5), 5, 0), [1000, 1], ["cuda:0", "cuda:1"])
