"""Live parts of pages as server-sent events: each event holds HTML of parts that changed, by the id of the element.

An event's id says what its reader has seen: the last event of the store, and a number for the states and tags of all
runs. A browser that lost its line says the id, and gets what changed since; the server keeps nothing of its readers.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import TYPE_CHECKING

from billhook.core.files.store_tables import connect_to_read
from billhook.dashboard.listing import Listing, Parts, Seen, changed, seen_in

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOOK_SECONDS = 0.5  # between two looks at the store
LOOK_AGAIN = 4  # of which one is thorough: a killed process changes nothing in the store
HEARTBEAT = 20  # looks without news, after which a line says that the server lives


def stream(listing: Listing, request: Request, ended: Callable[[], bool]) -> Response:
    """The events of all runs, or of one, as a response that lasts until the reader goes or the server ends."""
    from starlette.responses import Response, StreamingResponse

    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    since = Seen.parse(request.headers.get("last-event-id") or request.query_params.get("since", ""))
    lines = _lines(listing, request.path_params.get("run"), since, ended)
    return StreamingResponse(lines, media_type="text/event-stream")


async def _lines(listing: Listing, run: str | None, since: Seen, ended: Callable[[], bool]) -> AsyncIterator[str]:
    import anyio
    from starlette.concurrency import run_in_threadpool

    known: dict[str, str] = {}
    quiet, looks, before = 0, 0, -1
    yield "retry: 1000\n\n"
    with closing(connect_to_read(listing.store)) as db:
        while not ended():
            now = _data_version(db)
            if now != before or looks % LOOK_AGAIN == 0:
                parts, since, known = await run_in_threadpool(_news, listing, run, since, known)
                before, quiet = now, 0 if parts else quiet
                if parts:
                    yield f"id: {since}\nevent: parts\ndata: {json.dumps(parts)}\n\n"
            looks, quiet = looks + 1, quiet + 1
            if quiet % HEARTBEAT == 0:
                yield ": here\n\n"
            await anyio.sleep(LOOK_SECONDS)


def _data_version(db: sqlite3.Connection) -> int:
    """A number that changes when another process has changed the store."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def _news(listing: Listing, run: str | None, since: Seen, known: dict[str, str]) -> tuple[Parts, Seen, dict[str, str]]:
    """The parts that changed, what was seen with them, and the stamps of all runs, for the next time."""
    from billhook.dashboard import run_page, runs_page

    runs = listing.runs()
    stamps = {each.id: each.stamp for each in runs}
    if known:
        fresh = [each for each in runs if stamps[each.id] != known.get(each.id)]
    else:
        fresh = changed(runs, since)
    parts = runs_page.parts(listing, fresh) if run is None else run_page.parts(listing, run, fresh)
    return parts, seen_in(runs), stamps
