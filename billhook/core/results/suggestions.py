"""What to try next, and what it brought: suggestions as values. No sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from billhook.core.outlook.suggestions import Found, Gain
from billhook.core.results.json_form import JsonObject, Result, Row
from billhook.core.results.measured import estimate_columns


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One thing to try. `what`: the first line of the function that suggests it; `command`: to type.

    - `gain`: nats per token that it is expected to win back; None where nothing measured says so.
    - `seconds`: that it takes, by earlier runs of the store; None where none tells.
    - `facts`: the numbers that it rests on, by name.
    - `found`: what it brought, where a later run of the store did it.
    """

    name: str
    what: str
    command: tuple[str, ...]
    gain: Gain | None
    seconds: float | None
    facts: JsonObject
    found: Found | None = None


@dataclass(frozen=True, repr=False)
class SuggestionReport(Result):
    """What to try next with a run, by expected gain. `nats`: that its student loses; None if not measured."""

    kind: ClassVar[str] = "suggest"

    model: str
    run: str
    nats: float | None
    suggestions: tuple[Suggestion, ...]

    def rows(self) -> list[Row]:
        """A row for each suggestion."""
        return [
            {
                "suggestion": each.name, "command": " ".join(each.command), "seconds": each.seconds,
                **_columns("gain", each.gain), "source": None if each.gain is None else each.gain.source,
                "found_run": None if each.found is None else each.found.run, **_columns("found", each.found),
                "found_seconds": None if each.found is None else each.found.seconds,
            }
            for each in self.suggestions
        ]  # fmt: skip


def _columns(name: str, told: Gain | Found | None) -> Row:
    if told is None:
        return dict(estimate_columns(name, None))
    return {name: told.value, f"{name}_low": told.low, f"{name}_high": told.high}
