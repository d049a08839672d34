"""Charts: ECharts draws what Python says, in both schemes, under a strict policy, and keys read it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest
from browser import HOSTILE, OVERFLOW, Elements, Tab
from hypothesis import given
from hypothesis import strategies as st

from billhook.report import charts
from billhook.report.charts import Axis, Line, Point
from billhook.report.frame import Section, page_html

ASSETS = Path(charts.__file__).parent / "assets"
DRAWN = "echarts.getInstanceByDom(document.querySelectorAll('.plot')[%d]).getOption()"


def test_echarts_is_the_one_that_was_checked() -> None:
    wanted, name = (ASSETS / "echarts.min.js.sha256").read_text().split()
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == wanted
    assert "Apache License" in (ASSETS / "echarts.LICENSE").read_text()


@pytest.mark.parametrize("name", ["charts.js", "pages.js", "echarts.min.js"])
def test_no_script_ends_its_element(name: str) -> None:
    text = (ASSETS / name).read_text(encoding="utf-8").lower()
    assert "</script" not in text
    assert "<!--" not in text


def test_names_in_python_are_those_of_the_script_and_the_style() -> None:
    script, style = (ASSETS / "charts.js").read_text(), (ASSETS / "style.css").read_text()
    outlines = dict(re.findall(r"^  (\w+): '(M[^']+)',$", script, re.MULTILINE))
    assert {**charts.OUTLINES, "arrow": outlines["arrow"]} == outlines
    assert set(charts.SYMBOLS) == set(charts.OUTLINES)
    for colour in (*charts.COLOURS, "--ink", "--dim", "--line", "--ground"):
        assert style.count(f"{colour}: #") >= 1
    for colour in (*charts.COLOURS, "--ink", "--dim"):
        assert f".tone{colour} {{" in style
    forms = set(re.findall(r"^  (\w+): x =>", script, re.MULTILINE))
    assert forms == set(get_args(charts.Form))


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e6), st.integers(2, 12))
def test_ticks_are_few_round_numbers_between_the_ends(low: float, span: float, most: int) -> None:
    ticks = charts.round_ticks(low, low + span, most)
    assert len(ticks) <= most
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    steps = {float(f"{b - a:.6g}") for a, b in itertools.pairwise(ticks)}
    assert len({f"{step:.3g}" for step in steps}) <= 1
    for step in steps:
        assert f"{step:.0e}"[0] in "125"
        assert all(abs(tick / step - round(tick / step)) < 1e-3 for tick in ticks)


@given(st.floats(1e-3, 1e3), st.floats(1.001, 1e6))
def test_ticks_of_ratios_lie_between_the_ends(low: float, times: float) -> None:
    ticks = charts.ratio_ticks(low, low * times)
    assert 0 < len(ticks) <= 8
    assert list(ticks) == sorted(set(ticks))
    assert all(low * (1 - 1e-6) <= tick <= low * times * (1 + 1e-6) for tick in ticks)


def test_a_figure_holds_its_option_and_escapes_everything() -> None:
    line = Line(HOSTILE, (Point(1, math.nan, HOSTILE, -math.inf, 2.0),), joined=True, banded=True)
    option = charts.xy_chart([line], Axis(HOSTILE), Axis("y"), marks={HOSTILE: 1.0})
    html = charts.figure(option, title=HOSTILE, label=HOSTILE, caption=HOSTILE, key=charts.key_of([line], buttons=True))
    assert HOSTILE not in html
    found = Elements(html)
    assert not {"script", "img"} & {tag for tag, _ in found.found}
    read = next(about["data-option"] or "" for _, about in found.found if "data-option" in about)
    assert json.loads(read) == option
    assert [each["data"][0] for each in option["series"][:2]] == [[1, None, 2.0], [1, None]]  # what is not finite
    assert all("style" not in about for _, about in found.found)


# -- in a browser ------------------------------------------------------------------------------------------------------

GROWTH = [math.exp(i / 3) for i in range(6)]
RISING = tuple(Point(10.0 * i, x, f"point {i}", 0.9 * x, 1.2 * x) for i, x in enumerate(GROWTH))
FIRST = Line("first", RISING, joined=True, banded=True)
SECOND = Line(f"second {HOSTILE}", RISING[::-1], "--blue", "diamond", joined=True)


def a_page() -> str:
    """A page with one chart of every kind."""
    name, x = f"very-long-name-{HOSTILE}", Axis("what is left", "percent")
    options = {
        "lines": charts.xy_chart([FIRST, SECOND], x, Axis("loss", "nats"), marks={"limit": 2.0}),
        "names": charts.names_chart([Line("", RISING[:2])], Axis("change", "points"), [name, "short"], at=0.0),
        "bars": charts.bar_chart(RISING, Axis(labels=tuple("abcdef")), Axis("rate", "bytes")),
    }
    figures = [charts.figure(option, title=name, label=name, caption="c") for name, option in options.items()]
    switched = {(str(i),): charts.xy_chart([line], x, Axis(f"y{i}")) for i, line in enumerate((FIRST, SECOND))}
    figures.append(charts.switched_figure(switched, [("On", {"0": "a", "1": "b"})], title="s", label="s", caption="c"))
    linked = f'<div class="linked">{charts.key_of([FIRST, SECOND], buttons=True)}{"".join(figures)}</div>'
    return page_html("Charts", "made", "verdict", [], [Section("charts", "Charts", linked)])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("charts") / "charts.html"
    path.write_text(a_page(), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
def test_the_charts_draw_what_they_were_given(tab: Tab, path: Path, width: int, scheme: str) -> None:
    tab.show(path, width, scheme)
    assert tab.run(OVERFLOW) <= 0
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [path.as_uri()]
    series = tab.run(f"{DRAWN % 0}.series.map(s => [s.type, s.name, s.data.map(d => d.value ?? d)])")
    kinds = [kind for kind, _, _ in series]
    assert kinds == ["custom", "line", "custom", "line", "custom", "scatter"]
    assert series[0][2] == [[p.x, p.low, p.high] for p in RISING]
    assert series[2][2] == [[p.x, p.value, None, None] for p in RISING]  # the band has the intervals
    assert series[4][2] == [[p.x, p.value, p.low, p.high] for p in RISING[::-1]]
    assert tab.run(f"{DRAWN % 2}.series[0].data.map(d => d.value[1])") == [p.value for p in RISING]
    names = "[...document.querySelectorAll('.axis.above')].map(p => p.textContent)"
    assert tab.run(names) == ["loss", "", "rate", "y0"]
    pixels = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x)"
    assert tab.run(f"[...document.querySelectorAll('.plot canvas')].every({pixels})")


def test_whiskers_are_inside_the_axes(tab: Tab, path: Path) -> None:
    tab.show(path, 390, "light")
    chart = "echarts.getInstanceByDom(document.querySelector('.plot'))"
    ends = f"{chart}.getModel().getComponent('yAxis').axis.scale.getExtent()"
    low, high = tab.run(ends)
    assert low <= min(p.low or 0 for p in RISING)
    assert high >= max(p.high or 0 for p in RISING)


def test_colours_follow_the_scheme(tab: Tab, path: Path) -> None:
    tab.show(path, 1440, "light")
    ink = f"{DRAWN % 0}.xAxis[0].axisLabel.color"
    light = tab.run(ink)
    tab.look(1440, "dark")
    tab.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert tab.run(ink) != light
    assert tab.run(f"{DRAWN % 0}.series.every(s => !JSON.stringify(s).includes('\"--'))")


def test_arrow_keys_read_every_point(tab: Tab, path: Path) -> None:
    tab.show(path, 390, "light")
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"
    said = "document.querySelector('.chart output').textContent"
    tab.run("document.querySelector('.plot').focus()")
    heard = []
    for _ in range(12):
        tab.run(press % "ArrowRight")
        heard.append(tab.run(said))
    assert heard == [f"point {i}" for i in (0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0)]
    tab.run(press % "Escape")
    assert tab.run(said) == ""
    assert tab.complaints() == []


def test_keys_and_switches_change_what_is_drawn(tab: Tab, path: Path) -> None:
    tab.show(path, 1440, "light")
    faint = f"{DRAWN % 0}.series.filter(s => s.opacity < 1).map(s => s.name)"
    assert tab.run(faint) == []
    tab.run("document.querySelectorAll('.key button')[0].click()")
    assert set(tab.run(faint)) == {SECOND.name}
    tab.run("document.querySelectorAll('.key button')[0].click()")
    assert tab.run(faint) == []
    tab.run("document.querySelectorAll('[data-switch] button')[1].click()")
    assert tab.run("document.querySelectorAll('.axis.above')[3].textContent") == "y1"
    pressed = "[...document.querySelectorAll('[data-switch] button')].map(b => b.ariaPressed)"
    assert tab.run(pressed) == ["false", "true"]


# -- under a strict policy ---------------------------------------------------------------------------------------------


POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:"


class Strict(SimpleHTTPRequestHandler):
    """Serves a folder under a policy without inline style and script."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    for name in ("style.css", "charts.js", "pages.js", "echarts.min.js"):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())
    body = a_page().partition("<body>")[2].partition("<script>")[0]
    scripts = "".join(f'<script src="{name}"></script>' for name in ("echarts.min.js", "charts.js", "pages.js"))
    links = '<link rel="icon" href="data:,"><link rel="stylesheet" href="style.css">'
    head = f'<!DOCTYPE html><meta charset="utf-8">{links}'
    (tmp_path / "page.html").write_text(f"{head}{body}{scripts}", encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Strict, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()
        thread.join()


def test_charts_need_no_inline_style_or_script(tab: Tab, served: str) -> None:
    tab.open(served, 1440, "light")
    assert tab.run("document.querySelectorAll('.plot canvas').length") == 4
    chart = "echarts.getInstanceByDom(document.querySelector('.plot'))"
    tab.run(f"{chart}.dispatchAction({{type: 'showTip', seriesIndex: 2, dataIndex: 1}})")
    assert tab.complaints() == []


BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def test_a_wheel_holds_what_pages_need(tmp_path: Path) -> None:
    root, source = ASSETS.parents[2], tmp_path / "source"
    shutil.copytree(root / "billhook", source / "billhook", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {f"billhook/report/assets/{path.name}" for path in ASSETS.iterdir()}
    assert wanted | {"billhook/report/templates/page.html"} <= names
