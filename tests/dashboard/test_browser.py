"""Every page in Chromium, narrow and wide, light and dark: what charts draw, what keys do, and that nothing leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTILE, OVERFLOW, Tab
from dashboards import Served, clones, edited, faults, served, until

from billhook.core.results.run import RunResult
from billhook.dashboard.listing import Listing
from billhook.runs import tag
from billhook.runs.store import Store

CHART = "echarts.getInstanceByDom(document.querySelectorAll('.plot')[%d])"
SERIES = """[...document.querySelectorAll('%s .plot')].map(box => echarts.getInstanceByDom(box).getOption().series
  .filter(each => each.type === 'custom' && each.data.length && each.data[0].tip)
  .map(each => [each.name, each.data.map(item => item.value)]))"""


@pytest.fixture(scope="module")
def here(pruned_store: Path) -> Iterator[Served]:
    with served(pruned_store) as dashboard:
        yield dashboard


@pytest.fixture(scope="module")
def runs(pruned_store: Path) -> dict[str, RunResult]:
    """Results by the name of their folder."""
    with closing(Store(pruned_store, read_only=True)) as store:
        return {Path(run.out).name: RunResult.from_json(run.result) for run in store.runs() if run.result}


def address_of(kind: str, runs: dict[str, RunResult]) -> str:
    every = "&".join(f"run={result.run}" for result in runs.values())
    return {
        "runs": "/", "run": f"/runs/{runs['four'].run}", "narrow": f"/runs/{runs['narrow'].run}",
        "compare": f"/compare?{every}", "choose": "/compare", "explore": f"/explore?run={runs['four'].run}",
        "missing": "/runs/r000000",
    }[kind]  # fmt: skip


def key(tab: Tab, name: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        tab.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


@pytest.mark.parametrize("kind", ["runs", "run", "narrow", "compare", "choose", "explore", "missing"])
def test_every_page_is_calm_and_fits(tab: Tab, here: Served, runs: dict[str, RunResult], kind: str) -> None:
    for width in (390, 1440):
        for scheme in ("light", "dark"):
            tab.open(f"{here.address}{address_of(kind, runs)}", width, scheme)
            assert tab.run(OVERFLOW) <= 0, (width, scheme)
            plots = tab.run("[...document.querySelectorAll('.plot')].map(b => !!echarts.getInstanceByDom(b))")
            assert all(plots)
            assert len(plots) >= {"run": 3, "narrow": 1, "compare": 2, "explore": 1}.get(kind, 0)
            ground = tab.run("getComputedStyle(document.documentElement).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
            missing = [e for e in faults(tab) if kind == "missing" and "404" in str(e)]
            assert faults(tab) == missing
            assert all(url.startswith((here.address, "data:")) for url in tab.requests())


def test_the_curve_draws_the_path(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    result = runs["four"]
    tab.open(f"{here.address}{address_of('run', runs)}", 1440, "light")
    ((name, points), (held_name, held)) = tab.run(SERIES % "#path")[0]
    assert name == "Calibration: kl"
    assert [point[1] for point in points] == [step.loss for step in result.steps]
    whole = result.anatomy.total("parameters")
    last = 100 * (1 - result.anatomy.total("parameters", result.plan) / whole)
    assert points[-1][0] == pytest.approx(last, abs=1e-3)
    assert held_name.startswith("Held-out")
    assert result.perplexity is not None
    ratio = result.perplexity.ratio
    assert held[0][1:] == pytest.approx([math.log(x) for x in (ratio.value, ratio.low, ratio.high)])


def test_the_drawing_is_saved_under_the_policy(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    """No script or style is inline, and no image comes from elsewhere: a canvas of the page makes the file."""
    tab.open(f"{here.address}{address_of('run', runs)}", 1440, "light")
    size = tab.run("""new Promise(done => {
        const make = URL.createObjectURL.bind(URL);
        URL.createObjectURL = blob => { done([blob.type, blob.size]); return make(blob); };
        document.querySelector('[data-save=png]').click();
    })""")
    assert size[0] == "image/png"
    assert size[1] > 1000
    assert faults(tab) == []


def test_the_handle_moves_along_the_path_by_keys(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    result = runs["four"]
    tab.open(f"{here.address}{address_of('run', runs)}", 390, "light")
    shown = "[...document.querySelectorAll('.point')].filter(each => !each.hidden).map(each => each.innerText)"
    (panel,) = tab.run(shown)
    assert "as in this run" in panel
    tab.run("document.querySelector('#handle').focus()")
    for steps in (3, 2, 1):
        key(tab, "ArrowLeft", 37)
        (panel,) = tab.run(shown)
        gone = [str(site) for step in result.steps[:steps] for site in step.sites]
        assert all(site in panel for site in gone)
        assert str(result.steps[steps].sites[0]) not in panel.partition("billhook prune")[2]
        cursor = f"{CHART % 0}.getOption().series.find(each => each.id === 'cursor').markLine.data[0].xAxis"
        x = tab.run("[...document.querySelectorAll('.point')].find(each => !each.hidden).dataset.x")
        assert until(lambda cursor=cursor, x=x: tab.run(cursor) == float(x))
    key(tab, "ArrowLeft", 37)
    assert "this is the teacher" in tab.run(shown)[0]


def test_dragging_on_the_chart_moves_the_handle(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    tab.open(f"{here.address}{address_of('run', runs)}", 1440, "light")
    place = f"""(() => {{ const plot = document.querySelector('#path .plot');
      plot.scrollIntoView();  // how far down it is depends on the texts above it
      const box = plot.getBoundingClientRect();
      const at = {CHART % 0}.convertToPixel({{xAxisIndex: 0}}, +document.querySelectorAll('.point')[2].dataset.x);
      return [box.left + at, box.top + 40] }})()"""
    x, y = tab.run(place)
    for kind in ("mousePressed", "mouseReleased"):
        tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
    assert tab.run("document.querySelector('#handle').value") == "2"


def test_a_student_is_singled_out_in_every_chart(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    tab.open(f"{here.address}{address_of('compare', runs)}", 1440, "light")
    faint = """[...document.querySelectorAll('.linked .plot')].map(box => echarts.getInstanceByDom(box).getOption()
      .series.filter(each => each.type === 'custom' && each.opacity < 1).map(each => each.name))"""
    assert not any(tab.run(faint))
    name = tab.run("document.querySelector('.linked [data-series]').focus(), document.activeElement.dataset.series")
    charts = tab.run(faint)
    assert len(charts) >= 2
    assert all(name not in chart and chart for chart in charts)
    tab.run("document.activeElement.blur()")
    assert not any(tab.run(faint))
    drawn = tab.run(SERIES % "#fronts")[0]
    names = {label: values[0] for label, values in drawn}
    for result in runs.values():
        (own,) = (values for label, values in names.items() if label.startswith(result.run))
        left = 100 * result.sizes.student.parameters / result.sizes.teacher.parameters
        assert result.perplexity is not None
        assert own[:2] == pytest.approx([left, math.log(result.perplexity.ratio.value)], abs=1e-3)


def test_the_slider_forecasts_without_a_reload(tab: Tab, here: Served, runs: dict[str, RunResult]) -> None:
    tab.open(f"{here.address}{address_of('explore', runs)}", 1440, "dark")
    tab.run("window.same = true, document.querySelector('[name=amount]').focus()")
    before = tab.run("document.querySelector('#quality strong').textContent")
    key(tab, "ArrowRight", 39)
    told = "document.querySelector('#quality strong').textContent"
    until(lambda: tab.run(told) != before)
    share = float(tab.run("document.querySelector('[name=amount]').value"))
    assert f"With {share:.1f}% of the parameters removed" in tab.run(told)
    assert f"amount={share:g}" in tab.run("location.search")
    asked = tab.run(SERIES % "#quality")[0][-1]
    assert asked[0] == "Asked"
    assert asked[1][0][0] == pytest.approx(share, abs=1e-6)
    assert tab.run("window.same")
    tab.run("const list = document.querySelector('[name=unit]'); list.value = 'sites'; "
            "list.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    until(lambda: tab.run("location.search").startswith("?run=") and "unit=sites" in tab.run("location.search"))
    assert until(lambda: tab.run("document.querySelector('[name=amount]')?.value")) == "4"
    assert faults(tab) == []


# -- the table of runs ------------------------------------------------------------------------------------------------

SHOWN = "[...document.querySelector('#rows').rows].filter(row => !row.hidden).map(row => row.id.slice(4))"


def fill(tab: Tab, name: str, value: str) -> None:
    field = f"document.querySelector('[data-filter={name}]')"
    tab.run(f"{field}.value = {json.dumps(value)}, {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_the_table_is_filtered_sorted_and_marked(tab: Tab, store: Path) -> None:
    listed = Listing(store).runs()
    tag(listed[0].id, ["good"], store=store)
    with served(store) as here:
        tab.open(f"{here.address}/", 1440, "light")
        assert tab.run(SHOWN) == [run.id for run in listed]
        fill(tab, "text", f"{listed[1].id} done")
        assert tab.run(SHOWN) == [listed[1].id]
        fill(tab, "text", "")
        fill(tab, "tag", "good")
        assert tab.run(SHOWN) == [listed[0].id]
        assert "tag=good" in tab.run("location.search")
        fill(tab, "tag", "")
        fill(tab, "state", "done")
        assert len(tab.run(SHOWN)) == 3
        head = "[...document.querySelectorAll('#runs thead button')].find(each => each.textContent === 'Perplexity')"
        tab.run(f"{head}.focus()")
        key(tab, "Enter", 13)
        tab.run(f"{head}.click()")
        ratios = {
            run.id: run.figures.perplexity.ratio.value for run in listed if run.figures and run.figures.perplexity
        }
        assert tab.run(SHOWN) == sorted(ratios, key=lambda run: ratios[run])
        best = "[...document.querySelectorAll('td.best[data-name=Perplexity]')].map(each => each.closest('tr').id)"
        assert tab.run(best) == [f"row-{min(ratios, key=lambda run: ratios[run])}"]
        assert tab.run("document.querySelector('#compare').disabled")
        tab.run("document.querySelectorAll('#rows input').forEach((box, i) => i < 2 && box.click())")
        assert "2 selected" in tab.run("document.querySelector('#count').textContent")
        tab.run("document.querySelector('#compare').click()")
        until(lambda: tab.run("document.querySelector('h1')?.textContent") == "2 students compared")


def test_a_hostile_name_does_nothing(tab: Tab, store: Path) -> None:
    runs = [run.id for run in Listing(store).runs()]

    def change(recipe: dict[str, Any], result: dict[str, Any]) -> None:
        recipe["model"] = HOSTILE
        result["model"]["name"] = HOSTILE
        result["answers"] = [{"prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE}]

    edited(store, runs[0], change)
    with served(store) as here:
        for path in ("/", f"/runs/{runs[0]}", f"/compare?run={runs[0]}&run={runs[1]}", f"/explore?run={runs[0]}"):
            tab.open(f"{here.address}{path}", 390, "light")
            assert "owned" not in tab.run("document.title")
            assert tab.run(OVERFLOW) <= 0, path
            assert faults(tab) == []
            assert all(url.startswith((here.address, "data:")) for url in tab.requests())
        tab.open(f"{here.address}/", 1440, "light")
        with closing(Store(store)) as opened:
            opened.tag(runs[0], ["new"])
        until(lambda: tab.run("document.querySelectorAll('.tag').length"))  # put in place by a script
        assert "owned" not in tab.run("document.title")
        assert faults(tab) == []


def test_of_a_thousand_runs_the_first_are_there_at_once(tab: Tab, store: Path) -> None:
    clones(store, next(run.id for run in Listing(store).runs() if run.out.endswith("four")), 997)
    with served(store) as here:
        tab.open(f"{here.address}/", 1440, "light")
        assert len(tab.run(SHOWN)) == 100
        until(lambda: "1000 of 1000" in tab.run("document.querySelector('#count').textContent"))
        fill(tab, "text", "r00000a")
        assert tab.run(SHOWN) == ["r00000a"], "one of the last"
        fill(tab, "text", "")
        tab.run("document.querySelector('#more').click()")
        assert len(tab.run(SHOWN)) == 1000


def test_who_wants_no_motion_gets_none(tab: Tab, here: Served) -> None:
    tab.open(f"{here.address}/", 1440, "light")
    calm = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    tab.send("Emulation.setEmulatedMedia", features=calm)
    moving = "[...document.querySelectorAll('*')].filter(each => each.getAnimations().length).length"
    assert tab.run(moving) == 0
