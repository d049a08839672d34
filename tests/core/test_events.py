"""Events: every listener gets each one, and the terminal says in words what their values say."""

from __future__ import annotations

from pathlib import Path

import pytest

from billhook.cli.progress import event_words
from billhook.core.events import Event, EventValue, begin_run, fan_out, hear_all, scaled_events


def test_a_fan_out_hands_every_event_to_every_listener_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    listen = fan_out(*(lambda event, name=name: heard.append((name, event)) for name in "ab"))  # type: ignore[misc]
    first, second = Event("load"), Event("search", 1, 2, {"lowest": 0.5})
    listen(first)
    scaled_events(listen, before=3, total=9)(second)
    assert heard == [(name, event) for event in (first, Event("search", 4, 9, second.values)) for name in "ab"]


WORDS: list[tuple[str, dict[str, EventValue], str]] = [
    ("load", {"model": "demo"}, "demo"),
    ("search", {"removed_sites": 2, "target_sites": 3, "objective": "kl", "lowest": 0.12345},
     "2 of 3 sites removed, lowest kl 0.1235"),
    ("search", {"removed_sites": 9, "target_sites": 9, "phase": "exchanges", "objective": "kl", "lowest": 0.12345},
     "9 of 9 sites removed, now exchanging, lowest kl 0.1235"),
    ("search", {"removed_params": 12345, "target_params": 20000, "removed_ms": 0.25, "target_ms": 1.5},
     "12,345 of 20,000 params removed, 0.250 of 1.500 ms removed"),
    ("round", {"removed": "attention.1,mlp.2", "narrowed": "mlp.0=1200", "loss": 0.5},
     "attention.1, mlp.2, mlp.0 keeps 1,200: 0.500000"),
    ("round", {"removed": "", "narrowed": "", "loss": 0.0}, "nothing: 0.000000"),
    ("recover", {"objective": "kl", "loss": 0.25, "best": 0.2}, "kl 0.2500, best on validation 0.2000"),
    ("recover", {"step": "teacher_outputs"}, "the teacher's side"),
    ("calibrate", {"alone_on": "a.txt", "because": "No BOS."}, "on a.txt alone: No BOS."),
    ("sweep", {"recipe": "billhook", "remove": "10%", "data": "a.txt"}, "billhook, 10%, a.txt"),
    ("threshold", {"steps_taken": 3, "steps": 8}, "3 of 8 steps"),
    ("save", {"tensors": 1200}, "1,200 tensors"),
    ("search", {"seconds": 1.25}, "1.2 s"),
    ("search", {"note": "attention.3: 0.151611"}, "attention.3: 0.151611"),
    ("speed", {}, ""),
    ("budget", {"unit": "params", "asked": 10.0, "of_sites": 27.027, "elsewhere": 63.0, "smaller": 3.7,
                "vocabulary": 16.0},
     "10% of all params is 27% of what attentions and MLPs hold, since 63% lies elsewhere, mostly in embeddings. "
     "10% of theirs: --remove 3.7%. Fewer tokens instead: --remove 16%vocabulary --data FILE"),
    ("budget", {"unit": "flops", "asked": 10.0, "of_sites": 20.0, "elsewhere": 50.0, "smaller": 5.0},
     "10% of all flops is 20% of what attentions and MLPs hold, since 50% lies elsewhere, mostly in embeddings. "
     "10% of theirs: --remove 5%flops"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "values", "words"), WORDS)
def test_values_are_worded(stage: str, values: dict[str, EventValue], words: str) -> None:
    assert event_words(stage, values) == words


def test_who_follows_a_run_is_told_which_however_deep(tmp_path: Path) -> None:
    class Follows:
        def __init__(self) -> None:
            self.runs: list[tuple[Path, str]] = []

        def __call__(self, event: Event) -> None: ...

        def run_begins(self, store: Path, run: str) -> None:
            self.runs.append((store, run))

    first, second = Follows(), Follows()
    begin_run(fan_out(print, fan_out(first, fan_out(second))), tmp_path, "r000001")
    begin_run(first, tmp_path, "r000002")
    begin_run(print, tmp_path, "r000003")
    assert first.runs == [(tmp_path, "r000001"), (tmp_path, "r000002")]
    assert second.runs == [(tmp_path, "r000001")]


def test_what_no_terminal_shows_reaches_those_who_hear_all_however_deep() -> None:
    class Hears:
        hears_all = True

        def __init__(self) -> None:
            self.heard: list[Event] = []

        def __call__(self, event: Event) -> None:
            self.heard.append(event)

    shown: list[Event] = []
    first, second, event = Hears(), Hears(), Event("round", 1, 2, {"loss": 0.5})
    hear_all(fan_out(shown.append, fan_out(first, fan_out(second))), event)
    hear_all(first, event)
    hear_all(shown.append, event)
    assert (shown, first.heard, second.heard) == ([], [event, event], [event])
