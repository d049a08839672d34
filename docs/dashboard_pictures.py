"""Takes the pictures of docs/guides/dashboard.md: a dashboard of a store, in a headless Chromium.

    python docs/dashboard_pictures.py build/billhook.db

The store is that of `make demo`, or any with a finished pruning. Pictures are PNG files in docs/guides.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402

from billhook.dashboard.listing import Listing  # noqa: E402
from billhook.dashboard.server import serve  # noqa: E402

WIDE, TALL = 1100, 720


def main(store: Path) -> None:
    """Take every picture."""
    runs = [run for run in Listing(store).runs() if run.figures and run.figures.perplexity]
    longest = max(runs, key=lambda run: run.search == "greedy")
    every = "&".join(f"run={run.id}" for run in runs[:4])
    pictures = {
        "dashboard-runs": ("/", "light", ""),
        "dashboard-run": (f"/runs/{longest.id}", "light", "#path"),
        "dashboard-compare": (f"/compare?{every}", "light", "#fronts"),
        "dashboard-explore": (f"/explore?run={runs[-1].id}&amount=14", "dark", ""),
    }
    address: list[str] = []
    threading.Thread(target=serve, args=(store, 0, address.append), daemon=True).start()
    while not address:
        time.sleep(0.05)
    with urllib.request.urlopen(f"{address[0]}about", timeout=30):
        pass
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, browser.opened(Path(home)) as tab:
        for name, (path, scheme, part) in pictures.items():
            tab.open(address[0].rstrip("/") + path, WIDE, scheme)
            time.sleep(0.5)
            top = tab.run(f"document.querySelector('{part}').getBoundingClientRect().top + scrollY - 12") if part else 0
            tall = tab.run("document.documentElement.scrollHeight") - top
            clip = {"x": 0, "y": top, "width": WIDE, "height": min(TALL, tall), "scale": 1}
            shot = tab.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            (ROOT / "docs" / "guides" / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
            print(f"docs/guides/{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
