"""Take the pictures of the docs again: `python docs/screenshots.py build/demo/report.json` writes docs/report.png.

It draws the page of a result in a headless Chromium, as the tests do.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import opened  # noqa: E402

from billhook.core.results.stored import read_result  # noqa: E402
from billhook.report.pages import page_of  # noqa: E402

WIDTH, HEIGHT = 1200, 1500


def screenshot(html: str, picture: Path, width: int = WIDTH, height: int = HEIGHT, scheme: str = "light") -> None:
    """Write the upper part of a page as PNG."""
    with tempfile.TemporaryDirectory() as home, opened(Path(home) / "profile") as tab:
        page = Path(home) / "page.html"
        page.write_text(html, encoding="utf-8")
        tab.show(page, width, scheme)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = tab.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        picture.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    value = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    screenshot(page_of(value["kind"])(read_result(value["kind"], value)), ROOT / "docs" / "report.png")
