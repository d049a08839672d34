"""Pages and tables of studies: they tell every number, hold hostile strings, and work in a browser."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import HOSTILE, OVERFLOW, Elements, Tab
from made_studies import OURS, a_stability, a_sweep, a_threshold, a_transfer, nats_of

from billhook.cli import session
from billhook.core.plan import Plan
from billhook.core.results.json_form import PagedResult
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import RefusedTrial, StudentOutcome, SweepResult
from billhook.report import numbers, study_words
from billhook.report.trials import sweep_curves
from billhook.report.trials.stability_page import stability_page
from billhook.report.trials.sweep_curves import looks_of
from billhook.report.trials.sweep_page import sweep_page
from billhook.report.trials.threshold_page import threshold_page
from billhook.report.trials.transfer_page import transfer_page

FEW = ("shortgpt", "sleb", "übermäßig-groß")


def attacked(seed: int) -> SweepResult:
    """A sweep in which every free string is an attack."""
    recipes = [f"{HOSTILE}{i}" for i in range(3)]
    texts, tasks = (f"/a/{HOSTILE}", f"/b/{HOSTILE}", "straße.jsonl"), (f"/c/{HOSTILE}",)
    result = a_sweep(seed, recipes, (HOSTILE, "25%sites"), texts, tasks, datas=(HOSTILE, "self"))
    refused = (RefusedTrial(HOSTILE, HOSTILE, HOSTILE, HOSTILE),)
    return replace(result, refused=refused, model=HOSTILE, fingerprint=HOSTILE, page=HOSTILE)


def unknown(outcome: StudentOutcome) -> StudentOutcome:
    change = replace(outcome.change, low=-math.inf, high=math.inf, reliable=False, reason="one_text")
    return replace(outcome, estimate=replace(outcome.estimate, low=0.0, high=math.exp(700)), change=change)


def uncertain() -> SweepResult:
    """A sweep whose text has one cluster only: no interval is known."""
    result = a_sweep(5, FEW, tasks=())
    return replace(result, trials=tuple(
        replace(trial, results={name: unknown(outcome) for name, outcome in trial.results.items()})
        for trial in result.trials
    ))  # fmt: skip


def one_row() -> SweepResult:
    return a_sweep(6, FEW[2:], ("25%sites",), ("wiki.jsonl",), (), time=False)


SWEEPS = {
    "usual": a_sweep(1, refused=2),
    "two": a_sweep(2, datas=("/data/wiki.jsonl", "self+/data/c4.jsonl"), blown=("shortened-llama-magnitude",)),
    "hostile": attacked(3),
    "tasks only": a_sweep(4, FEW, texts=()),
    "uncertain": uncertain(),
    "one row": one_row(),
    "refused": a_sweep(7, (), refused=2),
}


def cells(page: str) -> list[list[str]]:
    """The text of all cells of the table of rows, row by row."""
    body = page.split('<table class="sortable">')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", body, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<.*?>", "|", cell)).strip("|") for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


# -- what is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["usual", "two", "tasks only", "one row"])
def test_the_table_of_a_sweep_has_every_row_and_number(name: str) -> None:
    result = SWEEPS[name]
    told = cells(sweep_page(result))
    assert len(told) == len(result.trials)
    for line, trial in zip(told, study_words.sorted_trials(result), strict=True):
        sizes = [size for size in ("parameters", "kv_bytes_per_token", "ns_per_token") if getattr(result.sizes, size)]
        wanted: list[str | None] = [trial.recipe, trial.remove]
        for text in study_words.texts_of(result):
            got, gap = trial.results[text].estimate, trial.results[text].above_best
            value, low, high = map(numbers.format_number, (got.value, got.low, got.high))
            wanted.append(f"{value}|{low}–{high}" if got.value < 1e300 else "over 1e304")
            assert gap is not None
            far = numbers.format_nats(gap.value) + (" |not told apart|" if gap.low <= 0 else "")
            ends = f"{numbers.format_nats(gap.low)} to {numbers.format_nats(gap.high)}"
            wanted.append("–" if name == "one row" else "best" if gap.high == 0 else f"{far}|{ends}")
        for task in study_words.tasks_of(result):
            got = trial.results[task].estimate
            wanted.append(f"{got.value:.1%}|{100 * got.low:.1f}–{got.high:.1%}")
        wanted += [f"{getattr(trial.sizes, size) / getattr(result.sizes, size):.1%}" for size in sizes]
        parts = [site.part for site in trial.plan.removed]
        wanted += [str(parts.count("attention")), str(parts.count("mlp")), None]
        wanted += [numbers.format_duration(trial.search_seconds), numbers.format_number(trial.site_evaluations)]
        assert len(line) == len(wanted)
        for cell, want in zip(line, wanted, strict=True):
            assert want is None or cell == want
        assert line[-3].rpartition("+")[2] == trial.data.rpartition("/")[2]


def narrowed_sweep() -> SweepResult:
    """A sweep whose first recipe narrows four sites, and removes none."""
    result = a_sweep(1, FEW, ("25%sites",), ("wiki.jsonl",))
    plan = Plan.parse([f"attention.{block}[0-1]" for block in range(3)] + ["mlp.4[0-7]"])
    return replace(result, trials=tuple(replace(t, plan=plan) if t.recipe == FEW[0] else t for t in result.trials))


def test_narrowed_sites_are_counted_and_their_time_is_not_known() -> None:
    result = narrowed_sweep()
    trial = next(t for t in result.trials if t.plan.narrowed)
    assert study_words.known_fraction(result, trial, "ns_per_token") is None
    assert study_words.known_fraction(result, trial, "parameters") is not None
    page = sweep_page(result)
    assert '<td data-sort="0">0<small>3 narrowed</small></td><td data-sort="0">0<small>1 narrowed</small></td>' in page
    assert '<td data-sort="2">–</td>' in page
    option = sweep_curves._option(result, looks_of(FEW), "wiki.jsonl", "ns_per_token")
    assert FEW[0] not in {series.get("name") for series in option["series"]}  # its time is not known: it is not drawn


def test_a_headline_names_those_that_tie() -> None:
    result = a_sweep(1, FEW, ("25%sites",), ("wiki.jsonl",))
    zero = Estimate(0.0, 0.0, 0.0, 40, 38, True, "")
    tied = []
    for trial in result.trials:
        on = trial.results["wiki.jsonl"]
        gap = zero if trial.recipe in FEW[:2] else replace(zero, value=1.0, low=0.5, high=1.5)
        tied.append(replace(trial, results={**trial.results, "wiki.jsonl": replace(on, above_best=gap)}))
    headline = study_words.sweep_headline(replace(result, trials=tuple(tied)))
    assert headline == f"{FEW[0]} and {FEW[1]} have the same perplexity, the lowest."


@pytest.mark.parametrize(
    ("first", "second", "ratio", "words"),
    [
        (390.0, 320.0, (1.16, 1.10, 1.21), "×0.82 (×0.82–×1.21), noise"),
        (320.0, 390.0, (1.20, 1.15, 1.25), "×1.22 (×1.15–×1.25)"),
        (320.0, 330.0, (1.02, 0.95, 1.09), "×1.03 (×0.95–×1.09), noise"),
    ],
)
def test_speed_is_compared_by_the_medians_that_are_shown(
    first: float, second: float, ratio: tuple[float, float, float], words: str
) -> None:
    of = [Estimate(value, value, value, 9, 9, True, "") for value in (first, second)]
    assert numbers.speed_change(*of, Estimate(*ratio, 9, 9, True, "")) == words


def test_the_rows_are_in_order_of_size_calibration_and_loss() -> None:
    trials = study_words.sorted_trials(SWEEPS["two"])
    order = [(t.remove, t.data != "/data/wiki.jsonl", nats_of(t, "/data/wiki.jsonl")) for t in trials]
    assert order == sorted(order)


def test_the_verdict_counts_comparisons() -> None:
    result = SWEEPS["two"]
    groups = study_words.grouped_gaps(result)
    assert len(groups) == 3 * 2 * 2
    verdict = study_words.sweep_headline(result)
    name = verdict.split(" has the lowest")[0]
    assert f"in {sum(group[0][0] == name for group in groups)} of 12 comparisons" in verdict
    alone = study_words.sweep_headline(SWEEPS["one row"])
    change = one_row().trials[0].results["wiki.jsonl"].change.value
    assert f"perplexity ×{math.exp(change):.2f} on wiki.jsonl" in alone
    assert study_words.sweep_headline(SWEEPS["refused"]).startswith("Nothing was compared: 2 combinations")
    single = study_words.sweep_headline(a_sweep(1, FEW, ("25%sites",), ("wiki.jsonl",)))
    assert re.match(
        r"Of 3 recipes, \S+ has the lowest perplexity, (clear of all others|not told apart from .*)\.", single
    )
    assert "nan" not in study_words.sweep_headline(SWEEPS["uncertain"])


def test_what_is_not_known_is_said() -> None:
    page = sweep_page(SWEEPS["uncertain"])
    assert "not known" in page
    assert "are not reliable" in page
    assert "Time per token was not measured" in sweep_page(SWEEPS["one row"])
    refused = sweep_page(SWEEPS["refused"])
    assert refused.count("it would be the whole model") == 2
    assert len(refused) < 100_000  # nothing to draw, no ECharts


def test_names_are_short_where_they_differ() -> None:
    assert study_words.short_names(["/a/wiki.jsonl", "self", "/b/c4.txt+self"]) == {
        "/a/wiki.jsonl": "wiki.jsonl", "self": "self", "/b/c4.txt+self": "c4.txt+self"
    }  # fmt: skip
    assert list(study_words.short_names(["/a/t.jsonl", "/b/t.jsonl"]).values()) == ["/a/t.jsonl", "/b/t.jsonl"]
    assert numbers.printable("a\x1b[31m\u202eb") == "a�[31m�b"


@pytest.mark.parametrize("recipes", [OURS, [f"mine-{i}" for i in range(30)], ["one"], [f"r{i}" for i in range(64)]])
def test_no_two_recipes_look_the_same(recipes: list[str]) -> None:
    looks = looks_of(recipes)
    assert list(looks) == list(recipes)
    assert len(set(looks.values())) == len(recipes)
    if "deeper-look" in looks:
        family = {look[0] for name, look in looks.items() if name.startswith("deeper-look")}
        assert len(family) == 1


@pytest.mark.parametrize("tasks", [("arc",), ("arc", "piqa", "boolq"), tuple(f"task{i}" for i in range(7))])
def test_the_page_of_a_transfer_has_every_number(tasks: tuple[str, ...]) -> None:
    result = a_transfer(len(tasks), tasks)
    page = transfer_page(result)
    pairs = [(trial, task) for trial in result.trials for task in tasks]
    pale = 0
    for trial, task in pairs:
        change, gap = trial.results[task].change, study_words.gap_to_text(trial, task)
        assert f">{numbers.format_points(change.value)}<small>" in page
        assert f"{numbers.format_points(change.low)} to {numbers.format_points(change.high)}" in page
        assert f"{trial.results[task].estimate.value:.1%}" in page
        pale += change.low <= 0 <= change.high
        if trial.recipe != "text":
            assert f">{numbers.format_points(gap.value)}<small>" in page
            pale += gap.low <= 0 <= gap.high
    kinds = [set((about.get("class") or "").split()) for tag, about in Elements(page).found if tag == "td"]
    assert sum("pale" in kind for kind in kinds) == pale
    assert sum("own" in kind for kind in kinds) == 2 * len(tasks)
    assert all(f"{outcome.estimate.value:.1%}" in page for outcome in result.teacher.values())
    own = sum(study_words.gap_to_text(trial, trial.recipe).low > 0 for trial in result.trials[1:])
    assert f"in {own} of {numbers.pluralize(len(tasks), 'case')}" in study_words.transfer_headline(result)


@pytest.mark.parametrize(("sizes", "sets"), [((256,), 2), ((256, 1024, 4096), 5)])
def test_the_page_of_a_study_of_stability_counts_sites(sizes: tuple[int, ...], sets: int) -> None:
    result = a_stability(1, sizes, sets)
    found = Elements(stability_page(result)).found
    told = {about["title"]: about["class"] for tag, about in found if tag == "i"}
    for size in result.sizes:
        sites = {site for plan in size.plans for site in plan.removed}
        for site in sites:
            n = sum(site in plan.removed for plan in size.plans)
            about = f"{site}: in {n} of {sets} plans with {size.tokens:,} tokens"
            assert told[about] == ("all" if n == sets else "some")
        kept = [kind for about, kind in told.items() if about and about.endswith(f" {size.tokens:,} tokens")]
        assert len(kept) - kept.count("none") == len(sites)
    options = [json.loads(about["data-option"] or "") for _, about in found if "data-option" in about]
    assert len(options) == (len(sizes) > 1)  # one size has no curve
    for option in options:
        ranks, overlap = (s["data"] for s in option["series"] if s["type"] == "@interval")
        for drawn, name in ((ranks, "rank_correlation"), (overlap, "overlap")):
            spreads = [getattr(size, name) for size in result.sizes]
            assert [each["value"][1:] for each in drawn] == [[s.mean, s.low, s.high] for s in spreads]
    assert study_words.stability_headline(result).count("tokens") == len(sizes[:2])


def test_sites_of_plans_that_narrow_are_counted_apart() -> None:
    """Two plans may keep other channel groups of one site: it is narrowed in both, and removed in neither."""
    plans = tuple(map(Plan.parse, (["mlp.1", "mlp.0[0-1]"], ["mlp.1", "mlp.0[0-2]"], ["attention.2"])))
    result = a_stability(1, (256,), 3)
    result = replace(result, sizes=(replace(result.sizes[0], plans=plans),))
    assert study_words.removal_counts(result.sizes[0]) == {"mlp.1": 2, "attention.2": 1}
    assert "mlp.1: in 2 of 3 plans with 256 tokens" in stability_page(result)


def test_hostile_strings_stay_strings() -> None:
    transfer = replace(a_transfer(1, (HOSTILE, "straße")), model=HOSTILE, remove=HOSTILE)
    stable = replace(a_stability(1), model=HOSTILE, metric=HOSTILE, search=HOSTILE, remove=HOSTILE)
    stable = replace(stable, data=replace(stable.data, source=HOSTILE))
    machine = replace(a_threshold().environment, machine=HOSTILE)
    pairs = [
        (sweep_page(a_sweep(3, FEW)), sweep_page(attacked(3))),
        (transfer_page(a_transfer(1, ("a", "b"))), transfer_page(transfer)),
        (stability_page(a_stability(1)), stability_page(stable)),
        (threshold_page(a_threshold()), threshold_page(a_threshold(model=HOSTILE, environment=machine))),
    ]
    for safe, page in pairs:
        assert HOSTILE not in page
        ours, theirs = Elements(safe), Elements(page)
        for tag in ("script", "img", "style", "iframe", "link", "meta"):
            assert [t for t, _ in ours.found].count(tag) == [t for t, _ in theirs.found].count(tag)
        assert numbers.printable(HOSTILE) in theirs.text


def test_few_texts_and_few_items_are_told_apart() -> None:
    result = a_sweep(1, FEW, ("25%sites",), ("/d/wiki.jsonl",), ("/d/arc.jsonl",))
    assert study_words.reliability_notes(result) == []
    few = {name: unknown(outcome) for name, outcome in result.trials[0].results.items()}
    result = replace(result, trials=(replace(result.trials[0], results=few), *result.trials[1:]))
    assert study_words.reliability_notes(result) == [
        "The intervals on wiki.jsonl rest on few texts and are not reliable.",
        "The intervals on arc.jsonl rest on few items and are not reliable.",
    ]


# -- the terminal --------------------------------------------------------------------------------------------------

SHOWN: list[PagedResult] = list(SWEEPS.values())
SHOWN += [a_transfer(n, tuple(f"task{i}" for i in range(n))) for n in (1, 3, 5)]
SHOWN += [a_stability(2), a_stability(3, (16384,), 2)]


@pytest.mark.parametrize("result", SHOWN, ids=lambda result: result.kind)
def test_a_terminal_of_80_columns_shows_it(
    result: PagedResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    session.print_result(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Page: ")) <= 80
    assert lines[-1] == f"Page: {numbers.printable(result.page)}"
    drawn = "\n".join(lines)
    if isinstance(result, SweepResult) and result.model != HOSTILE:
        for trial in result.trials:
            assert trial.recipe in drawn  # not even the longest name is broken
            for on, outcome in trial.results.items():
                text, value = on in study_words.texts_of(result), outcome.estimate.value
                assert (numbers.format_perplexity(value) if text else f"{100 * value:.1f}") in drawn
    session.print_result(replace(result, page=""))
    assert "Page:" not in capsys.readouterr().out


# -- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    pages = {name: sweep_page(result) for name, result in SWEEPS.items()}
    pages["transfer"] = transfer_page(a_transfer(1, ("arc", "piqa", "boolq", f"lang-{'x' * 60}", HOSTILE)))
    pages["stability"] = stability_page(a_stability(1))
    pages["threshold"] = threshold_page(a_threshold(task=f"/tasks/{HOSTILE}"))
    told = {name: folder / f"{name.replace(' ', '-')}.html" for name in pages}
    for name, page in pages.items():
        told[name].write_text(page, encoding="utf-8")
    return told


CHART = "echarts.getInstanceByDom"
FIRST = f"{CHART}(document.querySelector('.plot')).getOption()"


LOOKS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]
VIEWS = [(name, *look) for name in ("two", "hostile", "transfer", "stability", "threshold") for look in LOOKS]
VIEWS += [(name, *LOOKS[i % 4]) for i, name in enumerate(("usual", "tasks only", "uncertain", "one row", "refused"))]


@pytest.mark.parametrize(("name", "width", "scheme"), VIEWS)
def test_the_page_in_a_browser(tab: Tab, paths: dict[str, Path], name: str, width: int, scheme: str) -> None:
    tab.show(paths[name], width, scheme)
    assert tab.run("innerWidth") == width
    assert tab.run(OVERFLOW) <= 0
    assert tab.run("document.title") != "owned"
    counts = {"transfer": 0, "refused": 0, "hostile": 2, "tasks only": 2, "usual": 3, "two": 3, "threshold": 3}
    charts = counts.get(name, 1)
    assert tab.run("document.querySelectorAll('.plot canvas').length") == charts
    if charts:
        drawn = f"[...document.querySelectorAll('.plot')].every(box => {CHART}(box).getOption().series.length)"
        assert tab.run(drawn)
        pixels = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x)"
        assert tab.run(f"[...document.querySelectorAll('.plot canvas')].every({pixels})")
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [paths[name].as_uri()]


def test_switches_draw_another_text_and_another_size(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 1440, "light")
    titles = "['below', 'above'].map(side => document.querySelector('.axis.' + side).textContent)"
    values = f"JSON.stringify({FIRST}.series.map(s => s.data.map(d => (d.value ?? d)[%d])))"
    assert tab.run(titles) == ["% of the teacher’s parameters left", "perplexity ÷ teacher’s, wiki.jsonl"]
    x, y = tab.run(values % 0), tab.run(values % 1)
    tab.run("document.querySelectorAll('[data-switch]')[0].querySelectorAll('button')[1].click()")
    assert tab.run(titles)[1].endswith("c4.jsonl")
    assert tab.run(values % 1) != y
    assert tab.run(titles)[0].endswith("parameters left")
    tab.run("document.querySelectorAll('[data-switch]')[1].querySelectorAll('button')[2].click()")
    assert tab.run(titles)[0] == "% of the teacher’s time per token left"
    assert tab.run(values % 0) != x
    assert tab.run("document.querySelectorAll('[data-switch] [aria-pressed=true]').length") == 6
    accuracy = "document.querySelectorAll('.axis.below')[1].textContent"
    assert tab.run(accuracy) == "% of the teacher’s parameters left"  # each chart has switches of its own
    assert tab.complaints() == []


@pytest.mark.parametrize("name", ["usual", "two", "uncertain", "tasks only"])
def test_the_curves_draw_every_trial(name: str) -> None:
    result = SWEEPS[name]
    for on in result.teacher:
        for size in study_words.sizes_of(result):
            recipes = list(dict.fromkeys(trial.recipe for trial in result.trials))
            option = sweep_curves._option(result, looks_of(recipes), on, size)
            drawn = {
                (s["name"], each["value"][0]): each
                for s in option["series"]
                if s["type"] == "@interval"
                for each in s["data"]
            }
            assert len(drawn) == len(result.trials)
            top = option["yAxis"].get("max", math.inf)
            for trial in result.trials:
                point = drawn[trial.recipe, 100 * study_words.fraction_kept(result, trial, size)]
                of = trial.results[on].change if on in study_words.texts_of(result) else trial.results[on].estimate
                if point.get("symbol") == "arrow":
                    assert of.value > point["value"][1] <= top
                    continue
                ends = [x if math.isfinite(x) else None for x in (of.value, of.low, of.high)]
                assert point["value"][1:] == ends
                assert point["hollow"] == (size not in trial.front)
                assert trial.recipe in point["tip"]


def test_points_far_above_the_others_are_drawn_at_the_edge(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["two"], 1440, "light")
    above = "document.querySelector('.axis.above').textContent"
    assert "arrows: 6 points above ×" in tab.run(above)
    top = tab.run(f"Math.exp({FIRST}.yAxis[0].max)")
    assert top < 1000
    assert tab.run(f"{FIRST}.series.flatMap(s => s.data.map(d => (d.value ?? d)[1])).every(y => Math.exp(y) <= {top})")
    tab.show(paths["usual"], 1440, "light")
    assert "arrows" not in tab.run(above)


def test_the_key_singles_recipes_out_in_both_charts(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 1440, "light")
    lit = f"box => {CHART}(box).getOption().series.filter(s => s.encode && !(s.opacity < 1)).map(s => s.name)"
    bright = f"[...document.querySelectorAll('.linked .plot')].map({lit})"
    assert [len(each) for each in tab.run(bright)] == [17, 17]
    button = "[...document.querySelectorAll('.key button')].find(b => b.dataset.series === '%s')"
    tab.run(f"{button % 'sleb'}.click()")
    assert tab.run(bright) == [["sleb"], ["sleb"]]
    tab.run(f"{button % 'uidl'}.dispatchEvent(new MouseEvent('mouseenter'))")
    assert tab.run(bright) == [["sleb", "uidl"]] * 2
    tab.run("document.querySelectorAll('[data-switch] button')[1].click()")
    assert tab.run(bright) == [["sleb", "uidl"]] * 2
    tab.run(f"{button % 'uidl'}.dispatchEvent(new MouseEvent('mouseleave'))")
    tab.run(f"{button % 'sleb'}.click()")
    assert [len(each) for each in tab.run(bright)] == [17, 17]


def test_the_perplexity_of_a_sweep_is_in_sight_on_a_phone(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 390, "light")
    heads = "[...document.querySelectorAll('.sortable thead th')]"
    place = f"{heads}.find(h => h.textContent.startsWith('Perplexity')).getBoundingClientRect().right"
    assert tab.run(place) <= 390
    seen = "r => r.cells[2].getBoundingClientRect().right <= 390"
    assert tab.run(f"[...document.querySelectorAll('.sortable tbody tr')].every({seen})")


def test_ticks_of_a_threshold_are_round_and_its_whiskers_whole(tab: Tab, paths: dict[str, Path]) -> None:
    result = a_threshold(task=f"/tasks/{HOSTILE}")
    tab.show(paths["threshold"], 390, "light")
    for number in range(len(result.margins)):
        chart = f"{CHART}(document.querySelectorAll('.plot')[{number}])"
        ticks = tab.run(f"{chart}.getModel().getComponent('yAxis').axis.scale.getTicks().map(t => t.value)")
        steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
        assert len(steps) == 1
        assert f"{steps.pop():.0e}"[0] in "1235"
        low, high = tab.run(f"{chart}.getModel().getComponent('yAxis').axis.scale.getExtent()")
        for trial in result.trials:
            lost = trial.losses[number].lost
            assert low <= lost.low
            assert lost.high <= high or lost.value > high


def test_headings_sort(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 390, "dark")
    heads = tab.run("document.querySelectorAll('.sortable thead th').length")
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[%d].dataset.sort)"
    for i in range(heads):
        before = tab.run(column % i)
        for state in ("ascending", "descending"):
            tab.run(f"document.querySelectorAll('.sortable thead button')[{i}].click()")
            told = tab.run(column % i)
            assert sorted(told) == sorted(before)
            if i not in (0, 1, heads - 3):  # columns of words
                assert list(map(float, told)) == sorted(map(float, told), reverse=state == "descending")
            sorts = "[...document.querySelectorAll('.sortable [aria-sort]')].map(t => t.getAttribute('aria-sort'))"
            assert tab.run(sorts) == [state]
    tab.run("document.querySelectorAll('.sortable thead button')[0].click()")
    assert tab.run(column % 0) == sorted(tab.run(column % 0))


def test_wide_tables_scroll_by_themselves(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 390, "light")
    tab.run("document.querySelector('.scroll').scrollLeft = 5000")
    assert tab.run("document.querySelector('.scroll').scrollLeft") > 300
    assert tab.run("scrollX") == 0
    left = "document.querySelector('.sortable tbody th').getBoundingClientRect().left"
    assert 0 <= tab.run(left) < 40  # the recipe stays in sight


def test_charts_follow_the_scheme(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["stability"], 1440, "light")
    look = f"{FIRST}.xAxis[0].axisLabel.color"
    light = tab.run(look)
    tab.look(390, "dark")
    tab.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert tab.run(look) != light
    assert tab.complaints() == []
