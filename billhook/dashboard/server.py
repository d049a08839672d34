"""The server of the dashboard: on the loopback address alone, read-only, and to browsers of this machine alone."""

from __future__ import annotations

import errno
import json
import socket
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billhook.core.errors import BillhookError, MissingExtra, RunError, UsageError, in_python, option
from billhook.dashboard.listing import Listing
from billhook.runs.store import Store

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")
ASSETS = Path(__file__).parent / "assets"
SHARED = Path(__file__).parents[1] / "report" / "assets"
ASSET_PATHS = ("/assets/", "/shared/")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def serve(store: Path, port: int, started: Callable[[str], None]) -> None:
    """Serve the pages of a store until an interrupt. `started` gets the address; `port` 0: any that is free.

    Raises MissingExtra without the extra, UsageError for what is no store or a port that is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("The dashboard", "dashboard") from error
    with closing(Store(store, read_only=True)) as opened:  # refuses what is no store
        path = opened.path.resolve()
    with _listen(port, path) as listening:
        ending: list[Callable[[], bool]] = []
        listing = Listing(path)
        listing.runs()  # so that the first page need not read the results
        app = make_app(listing, lambda: any(ended() for ended in ending))
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", ws="none", http="h11",
                                loop="asyncio", server_header=False)  # fmt: skip
        server = uvicorn.Server(config)
        ending.append(lambda: server.should_exit)
        started(f"http://{LOOPBACK}:{listening.getsockname()[1]}/")
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            server.run(sockets=[listening])


def _listen(port: int, store: Path) -> socket.socket:
    """A socket on the loopback address. Raises UsageError for a port that is taken, or not to be had."""
    try:
        return socket.create_server((LOOPBACK, port), backlog=64)
    except OSError as error:
        other = f"Choose another port: billhook dashboard --port {port + 1 if port < 65535 else 0}"
        if error.errno != errno.EADDRINUSE:
            raise UsageError(f"{option('port', port)} cannot be had ({error.strerror}). {other}") from error
        there = f"http://{LOOPBACK}:{port}/"
        shown = _store_shown_at(there)
        if shown == str(store):
            raise UsageError(f"A dashboard of {store} runs already. Open {there}") from error
        who = "another program" if shown is None else f"the dashboard of {shown}"
        raise UsageError(f"Port {port} is taken by {who}. {other}") from error


def _store_shown_at(address: str) -> str | None:
    """The store whose dashboard answers at an address; None where something else does."""
    open_ = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with suppress(OSError, ValueError, AttributeError), open_(f"{address}about", timeout=1) as answer:
        return str(json.loads(answer.read(4096))["store"])
    return None


def make_app(listing: Listing, ended: Callable[[], bool] = lambda: False) -> Starlette:
    """The pages of a store as an ASGI application. `ended`: whether the server ends, which ends streams of events."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    from billhook.dashboard import compare_page, explore_page, live, run_page, runs_page
    from billhook.dashboard.layout import problem_page

    def page(make: Callable[[Listing, Request], str]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                return HTMLResponse(await run_in_threadpool(make, listing, request))
            except BillhookError as error:
                missing = isinstance(error, RunError)
                return HTMLResponse(problem_page(listing.store, in_python(error.message)), 404 if missing else 500)

        return answer

    async def about(request: Request) -> Response:
        from billhook import __version__

        return JSONResponse({"billhook": __version__, "store": str(listing.store)})

    async def events(request: Request) -> Response:
        return live.stream(listing, request, ended)

    routes = [
        Route("/", page(runs_page.runs_page)),
        Route("/rows", page(runs_page.more_rows)),
        Route("/runs/{run}", page(run_page.run_page)),
        Route("/compare", page(compare_page.compare_page)),
        Route("/explore", page(explore_page.explore_page)),
        Route("/about", about),
        Route("/events", events),
        Route("/events/{run}", events),
        Mount("/assets", StaticFiles(directory=ASSETS)),
        Mount("/shared", StaticFiles(directory=SHARED)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard)])


class Guard:
    """Refuses what does not come from a browser of this machine, and what would change something."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                kept = scope["path"].startswith(ASSET_PATHS)  # by their etag, so that a browser asks whether it is new
                headers.setdefault("cache-control", "no-cache" if kept else "no-store")
            await send(message)

        host = Headers(scope=scope).getlist("host")
        answer: ASGIApp = self.app
        if len(host) != 1 or not is_local(host[0]):
            answer = PlainTextResponse("This dashboard answers to 127.0.0.1, localhost and [::1] alone.\n", 421)
        elif scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("The dashboard is read-only.\n", 405, {"allow": "GET, HEAD"})
        await answer(scope, receive, guarded)


def is_local(host: str) -> bool:
    """Whether a Host header names this machine, whatever its port: others may have forwarded it."""
    name, colon, port = host.lower().rpartition(":") if not host.endswith("]") else (host.lower(), "", "")
    name, port = (name, port) if colon else (host.lower(), "")
    return name in HOSTS and (not colon or (port.isascii() and port.isdigit()))
