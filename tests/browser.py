"""A headless Chromium for the tests of pages, what a page consists of, and strings that attack it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>document.title='owned'</script><img src=http://x.test/a onerror=alert(1)>\"' `|$table ☃\x7f"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


class Elements(HTMLParser):
    """What a page consists of: every element with its attributes, and all of its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if len(data) < 10**6 else ""  # not the script of ECharts


class Tab:
    """One tab of a headless Chromium, driven over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.count, self.events = socket, 0, list[dict[str, Any]]()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> Any:
        """Call a method and wait for its answer; events that come before it are kept."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (told := json.loads(self.socket.recv(timeout=30))).get("id") != self.count:
            self.events.append(told)
        assert "error" not in told, told
        return told["result"]

    def look(self, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def show(self, path: Path, width: int, scheme: str) -> None:
        """Load a page at a width and in a colour scheme, and wait until it has loaded and its events are in."""
        self.open(path.as_uri(), width, scheme)

    def open(self, url: str, width: int, scheme: str) -> None:
        """Load the page of an address, in the same way."""
        self.look(width, scheme)
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv(timeout=30)))
        self.run(  # two frames, so that everything is drawn
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def run(self, script: str) -> Any:
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, console calls, log entries and failures since the page was asked for."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
        return [event for event in self.events if event["method"] in bad]

    def requests(self) -> list[str]:
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]


@contextmanager
def opened(home: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own, whose profile is `home`."""
    assert CHROMIUM is not None
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in off)]
    command = [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={home}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            port = home / "DevToolsActivePort"
            until = time.monotonic() + 30
            while not (port.exists() and port.read_text().count("\n")):
                assert browser.poll() is None, "chromium ended"
                assert time.monotonic() < until, "chromium did not start"
                time.sleep(0.02)
            number_, path = port.read_text().split()
            with connect(f"ws://127.0.0.1:{number_}{path}", max_size=None, proxy=None) as root:
                root.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
                targets = json.loads(root.recv(timeout=30))["result"]["targetInfos"]
                page = next(target["targetId"] for target in targets if target["type"] == "page")
            address = f"ws://127.0.0.1:{number_}/devtools/page/{page}"
            # Without pings: they draw from `random` in a thread, which Hypothesis takes for a strategy's doing.
            with connect(address, max_size=None, proxy=None, ping_interval=None) as socket:
                yield Tab(socket)
        finally:
            browser.terminate()
