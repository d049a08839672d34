"""A console on which no name of somebody else's moves the cursor, colours the rest or turns the line around."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from billhook.core.errors import visible


class VisibleConsole(Console):
    """A console that shows escaped what a terminal would obey; its own colours and movements stay.

    Where nobody reads any more it raises: rich ends the process with 1.
    """

    def on_broken_pipe(self) -> None:
        """Leave the answer to the command."""
        raise  # the BrokenPipeError that rich is handling

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text, escaped, so that it is measured as it is shown."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything, their texts escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
