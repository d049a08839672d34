"""Scores of sites, blocks and spans: for every architecture those of hooks on the stock model, streamed or not."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from test_checkpoints import hooked
from test_probe import documents, token_set

import billhook
from billhook.cli import session
from billhook.core.errors import ModelError, ResourceError, UnknownName, UsageError
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.core.results.model import MetricScores
from billhook.data.token_sets import TokenSet
from billhook.engine.probe import Probe
from billhook.engine.statistics.activation_passes import Covariances
from billhook.methods.export.checkpoint import save
from billhook.methods.metrics import METRICS
from billhook.methods.metrics.correlations import linearisation_bound
from billhook.models import architectures, structure
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
SHARED = ("cosine", "l1", "l2", "relative_l1", "relative_l2")  # one pass for all of them
Streams = Callable[[Plan], list[torch.Tensor]]


def streams_of(teacher: Teacher, row: torch.Tensor) -> Streams:
    """streams(plan): the residual stream [time, width] before each block and after the last, in float64, with hooks
    that make zeros of the plan's sites."""

    @functools.cache
    @torch.no_grad()
    def streams(plan: Plan) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not found:
                found.append((args[0] if args else kwargs["hidden_states"])[0].double())
            found.append((output[0] if isinstance(output, tuple) else output)[0].double())

        with hooked(teacher, plan):
            blocks = structure.blocks_of(teacher.model, teacher.architecture)
            handles = [block.register_forward_hook(look, with_kwargs=True) for block in blocks]
            teacher.model(input_ids=row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return found

    return streams


def rows_of(tokens: TokenSet) -> list[tuple[torch.Tensor, int]]:
    """(token ids, document) of every row, without padding."""
    return [(r[:n], d) for r, n, d in zip(tokens.rows, tokens.lengths, tokens.documents, strict=True)]


def pairs(teacher: Teacher, streams: Streams) -> Iterator[tuple[ScoredUnit, torch.Tensor, torch.Tensor]]:
    """(site or block, stream before, stream after)."""
    parallel = teacher.architecture.parallel(teacher.model.config)
    for i, position in enumerate(teacher.positions):
        attention, mlp = (Plan(frozenset([Site(position, part)])) for part in PARTS)
        x, y = streams(Plan())[i], streams(Plan())[i + 1]
        yield position, x, y
        yield Site(position, "attention"), x, streams(mlp)[i + 1]
        yield (
            Site(position, "mlp"),
            (x if parallel else streams(mlp)[i + 1]),
            (streams(attention)[i + 1] if parallel else y),
        )


def statistics(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every statistic of the shared pass, written out: [tokens] each."""
    change = y - x
    return {
        "cosine": 1 - (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt(),
        "l1": change.abs().sum(-1),
        "l2": change.square().sum(-1).sqrt(),
        "relative_l1": change.abs().sum(-1) / x.abs().sum(-1),
        "relative_l2": (change.square().sum(-1) / x.square().sum(-1)).sqrt(),
    }


def values_of(scores: dict[ScoredUnit, Score]) -> dict[ScoredUnit, float]:
    return {unit: score.value for unit, score in scores.items()}


def mean(values: list[torch.Tensor]) -> float:
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_statistics_are_those_of_hooks(variant: str, checkpoint: Folder) -> None:
    tokens = token_set()
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    seen: dict[str, dict[ScoredUnit, list[torch.Tensor]]] = {name: {} for name in SHARED}
    for row, _ in rows_of(tokens):
        for unit, x, y in pairs(teacher, streams_of(teacher, row)):
            for name, values in statistics(x, y).items():
                seen[name].setdefault(unit, []).append(values)
    probe, again = Probe(teacher, tokens, "kl"), Probe(streamed, tokens, "kl")
    for name in SHARED:
        found = METRICS[name](probe)
        expected = {unit: mean(values) for unit, values in seen[name].items()}
        assert values_of(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert set(found) == {*teacher.anatomy.sites_present(), *teacher.positions}
        assert values_of(METRICS[name](again)) == pytest.approx(values_of(found), rel=1e-5, abs=1e-6)
    assert streamed.weights is not None


# -- canonical correlations ------------------------------------------------------------------------------------------


def covariances(x: torch.Tensor, y: torch.Tensor) -> Covariances:
    """Those of numpy, of rows of x and y."""
    both, width = torch.from_numpy(np.cov(torch.cat((x, y), 1).numpy().T, bias=True)), x.shape[1]
    return Covariances(both[:width, :width], both[:width, width:], both[width:, width:])


def bound(c: Covariances, ridge: float) -> float:
    """By singular values of the whitened matrix, as the formula is written."""
    noise = np.diag(ridge * np.diag(c.xx))

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix + noise)
        return np.asarray(vectors / np.sqrt(values) @ vectors.T)

    rho = np.linalg.svd(root(c.yy.numpy()) @ (c.xy.numpy().T + noise) @ root(c.xx.numpy()), compute_uv=False)
    return float((1 - rho**2).sum())


@pytest.mark.parametrize("variant", ["llama", "phi", "gemma3_text"])
def test_cca_is_the_bound_of_hooked_streams(variant: str, checkpoint: Folder) -> None:
    tokens = documents(12)
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    seen: dict[ScoredUnit, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for row, _ in rows_of(tokens):
        for unit, x, y in pairs(teacher, streams_of(teacher, row)):
            seen.setdefault(unit, []).append((x, y))
    for ridge in (0.0, 0.05):
        expected = {
            u: bound(covariances(*(torch.cat(s) for s in zip(*xy, strict=True))), ridge) for u, xy in seen.items()
        }
        for which in (teacher, streamed):
            found = METRICS["cca"](Probe(which, tokens, "kl"), ridge=ridge)
            assert values_of(found) == pytest.approx(expected, rel=2e-3, abs=2e-4)
            assert {score.se for score in found.values()} == {None}


def test_the_bound_is_one_and_sees_only_what_is_not_linear() -> None:
    draw = torch.Generator().manual_seed(3)
    x, a, b = (torch.randn(*shape, generator=draw).double() for shape in ((500, 6), (6, 6), (500, 6)))
    assert linearisation_bound(covariances(x, 5 * x @ a + 3), 0) == pytest.approx(0, abs=1e-9)
    assert linearisation_bound(covariances(x, x), 0.1) == pytest.approx(0, abs=1e-9), "nothing is added"
    assert linearisation_bound(covariances(x, b), 0) == pytest.approx(6, abs=0.3), "independent"
    y = (x @ a).tanh() + b / 3
    found = linearisation_bound(covariances(x, y), 0)
    centred = y - y.mean(0)
    left = centred - (x - x.mean(0)) @ torch.linalg.lstsq(x - x.mean(0), centred).solution
    assert 0 < float(left.square().sum() / centred.square().sum()) <= found
    assert linearisation_bound(covariances(x @ a + 1, y @ a), 0) == pytest.approx(found), "in any coordinates"


def test_cca_says_what_it_needs(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), documents(1), "kl")
    with pytest.raises(UsageError, match="fewer directions than channels"):
        METRICS["cca"](probe, ridge=0)
    with pytest.raises(UsageError, match="ridge of 0 or more, not -1"):
        METRICS["cca"](probe, ridge=-1)
    assert METRICS["cca"](probe)


# -- spans of blocks -------------------------------------------------------------------------------------------------


def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos() / math.pi


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_angles_of_spans_are_those_of_hooks(variant: str, checkpoint: Folder) -> None:
    tokens = token_set()
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    between = [streams_of(teacher, row)(Plan()) for row, _ in rows_of(tokens)]
    spans = [(i, j) for i, j in itertools.combinations_with_replacement(range(4), 2) if j - i < 3]
    for which, at in (("last", slice(-1, None)), ("all", slice(None))):
        expected = {(i, j): mean([angle(s[i][at], s[j + 1][at]) for s in between]) for i, j in spans}
        for one in (teacher, streamed):
            found = METRICS["angular_span"](Probe(one, tokens, "kl"), tokens=which)
            assert values_of(found) == pytest.approx(expected, abs=1e-5)
            assert list(found) == list(expected)
    assert METRICS["angular_span"](Probe(teacher, tokens, "kl")) != found  # the last tokens, unless told otherwise


def test_the_spread_of_an_angle_is_over_documents(checkpoint: Folder) -> None:
    """Rows of the same length, some documents with more of them than others."""
    tokens, teacher = token_set(), load(checkpoint("llama"))
    sums, counts = [0.0] * 4, [0] * 4
    for row, document in rows_of(tokens):
        between = streams_of(teacher, row)(Plan())
        sums[document] += float(angle(between[1], between[3])[-1])
        counts[document] += 1
    assert len(set(counts)) > 1
    expected = Score.of(sums, counts)
    found = METRICS["angular_span"](Probe(teacher, tokens, "kl"))[1, 2]
    assert (found.value, found.se) == (pytest.approx(expected.value, abs=1e-5), pytest.approx(expected.se, abs=1e-5))


@pytest.mark.parametrize(
    ("blocks", "spans"), [(1, []), (2, [(0, 0), (1, 1)]), (3, [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)])]
)
def test_spans_of_small_models(blocks: int, spans: list[ScoredUnit], tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "m", "llama", num_hidden_layers=blocks))
    assert list(METRICS["angular_span"](Probe(teacher, documents(3), "kl"))) == spans


def test_streams_that_do_not_fit_are_refused(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), documents(4), "kl", memory=1)
    with pytest.raises(ResourceError, match=r"0\.00 GB for 96 tokens.*fewer tokens=, more memory=, or the last"):
        METRICS["angular_span"](probe, tokens="all")
    assert METRICS["angular_span"](probe, tokens="last")
    with pytest.raises(UnknownName, match=r"There is no choice of tokens called 'lats'. Did you mean 'last'"):
        METRICS["angular_span"](probe, tokens="lats")


# -- the error at the next MLP --------------------------------------------------------------------------------------


def local_errors(teacher: Teacher, tokens: TokenSet, gone: Plan) -> dict[ScoredUnit, float]:
    """By removing every unit with hooks: what the next MLP adds is its block with it minus its block without it."""
    parallel = teacher.architecture.parallel(teacher.model.config)
    sites = [site for site in teacher.anatomy.sites_present() if site not in gone.removed]
    blocks = sorted({site.block for site in sites})
    found: dict[ScoredUnit, list[torch.Tensor]] = {}
    for row, _ in rows_of(tokens):
        streams = streams_of(teacher, row)
        for unit in (*sites, *blocks):
            block = unit if isinstance(unit, int) else unit.block
            first = block + (parallel or unit != Site(block, "attention"))
            then = next((b for b in range(first, 4) if Site(b, "mlp") in sites), None)
            without = gone.without(*([unit] if isinstance(unit, Site) else [Site(block, part) for part in PARTS]))

            def heard(plan: Plan, then: int | None = then, streams: Streams = streams) -> torch.Tensor:
                if then is None:
                    return streams(plan)[-1]
                return streams(plan)[then + 1] - streams(plan.without(Site(then, "mlp")))[then + 1]

            error = (heard(without) - heard(gone)).norm(dim=-1) / heard(gone).norm(dim=-1)
            found.setdefault(unit, []).append(error)
    return {unit: mean(values) for unit, values in found.items()}


@pytest.mark.parametrize(
    "variant",
    ["llama", "qwen2", "phi", "gemma2", "olmo2", "cohere", "falcon", "falcon_serial", "gpt_neox", "gpt_oss", "opt",
     "qwen3_moe_mixed"],
)  # fmt: skip
def test_errors_at_the_next_mlp_are_those_of_removals(variant: str, checkpoint: Folder) -> None:
    tokens = token_set()
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    expected = local_errors(teacher, tokens, Plan())
    found = METRICS["sprint_local"](Probe(teacher, tokens, "kl"))
    assert values_of(found) == pytest.approx(expected, rel=1e-4)
    assert list(found) == [*teacher.anatomy.sites_present(), *teacher.positions]
    assert values_of(METRICS["sprint_local"](Probe(streamed, tokens, "kl"))) == pytest.approx(
        values_of(found), rel=1e-5
    )


@pytest.mark.parametrize(
    ("variant", "gone"),
    [
        ("llama", "attention.0,mlp.2"),
        ("llama", "attention.1,mlp.1,mlp.2"),
        ("phi", "mlp.0,mlp.1,attention.3"),
        ("falcon", "mlp.1,mlp.3"),
        ("gpt_oss", "attention.0,mlp.2"),
        ("opt", "mlp.1,mlp.3"),
    ],
)
def test_scores_of_a_model_that_was_pruned_before(variant: str, gone: str, checkpoint: Folder, tmp_path: Path) -> None:
    """Positions are those of the unpruned model; an MLP that is gone, or holds zeros, is not the next one."""
    dense, plan, tokens = load(checkpoint(variant)), Plan.parse(gone.split(",")), token_set()
    save(apply(dense, plan), None, plan, tmp_path / "cut", teacher=dense)
    save(apply(dense, plan, stock=True), None, plan, tmp_path / "stock", teacher=dense)
    cut, streamed, stock = load(tmp_path / "cut"), load(tmp_path / "cut", memory=0), load(tmp_path / "stock")
    expected = local_errors(dense, tokens, plan)
    for teacher in (cut, streamed, stock):
        found = values_of(METRICS["sprint_local"](Probe(teacher, tokens, "kl")))
        assert {unit: found[unit] for unit in expected} == pytest.approx(expected, rel=1e-4)
    assert set(METRICS["sprint_local"](Probe(cut, tokens, "kl"))) == set(expected)
    assert set(METRICS["cosine"](Probe(cut, tokens, "kl"))) == set(expected)
    assert set(METRICS["magnitude"](Probe(cut, tokens, "kl"))) == set(expected)
    blocks = cut.positions
    spans = {(a, b) for a, b in itertools.combinations_with_replacement(blocks, 2) if (a, b) != (blocks[0], blocks[-1])}
    assert set(METRICS["angular_span"](Probe(cut, tokens, "kl"))) == spans


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_magnitudes_are_sums(variant: str, checkpoint: Folder) -> None:
    teacher, streamed = load(checkpoint(variant)), load(checkpoint(variant), memory=0)
    expected: dict[ScoredUnit, float] = {}
    for position in teacher.positions:
        block = teacher.block(position)
        for part in PARTS:
            modules = structure.site_modules(block, part, teacher.architecture, teacher.model.config)
            weights = [p.detach().double().abs().sum() for module in modules for p in module.parameters()]
            expected[Site(position, part)] = float(sum(weights))
        expected[position] = float(sum(p.detach().double().abs().sum() for p in block.parameters()))
    for which in (teacher, streamed):
        found = METRICS["magnitude"](Probe(which, token_set(), "kl"))
        assert values_of(found) == pytest.approx(expected, rel=1e-6)
        assert {score.se for score in found.values()} == {None}


# -- what all of them have in common --------------------------------------------------------------------------------

OUTPUTS = {"llama": ("o_proj", "down_proj"), "phi": ("dense", "fc2"), "gpt2": ("c_proj", "c_proj")}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", OUTPUTS)
def test_a_site_that_adds_nothing_scores_nothing(variant: str, part: Any, tmp_path: Path) -> None:
    """Its output matrix is zero; its other weights are not."""
    model = tiny.build(variant)
    row = architectures.architecture_of(model.config)
    block = structure.blocks_of(model, row)[2]
    site = getattr(block, row.attention if part == "attention" else row.mlp[-1])
    with torch.no_grad():
        for parameter in getattr(site, OUTPUTS[variant][PARTS.index(part)]).parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "m")
    probe = Probe(load(tmp_path / "m"), documents(4), "kl")
    for metric in (*SHARED, "sprint_local", "taylor"):
        scores = METRICS[metric](probe)
        assert scores[Site(2, part)].value == pytest.approx(0, abs=1e-6), metric
        for other in (Site(2, "mlp" if part == "attention" else "attention"), Site(1, "attention"), 2):
            assert scores[other].value > 0.01, metric
    assert METRICS["magnitude"](probe)[Site(2, part)].value > 1


@pytest.mark.parametrize("metrics", [SHARED, ("cca",), ("sprint_local",), ("angular_span",), ("magnitude",)])
def test_a_pass_reads_every_block_once(metrics: tuple[str, ...], checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"), memory=0)
    assert teacher.weights is not None
    probe = Probe(teacher, documents(4), "kl")
    before = teacher.weights.bytes_read
    found = [METRICS[metric](probe) for metric in metrics]
    blocks = sum(size.bytes for size in teacher.anatomy.sites) + sum(shared.bytes for shared in teacher.anatomy.shared)
    embedding = len(torch.unique(documents(4).rows)) * 32 * 4
    assert blocks <= teacher.weights.bytes_read - before <= blocks + 8 * embedding
    assert len({str(scores) for scores in found}) == len(metrics)


def test_statistics_of_ones_own_are_taken_in_one_pass(checkpoint: Folder) -> None:
    """And are computed again where another function has the name."""
    probe = Probe(load(checkpoint("phi")), documents(4), "kl")
    found = probe.mean_over_tokens({"one": lambda x, y: torch.ones(len(x)), "l2": lambda x, y: (y - x).norm(dim=-1)})
    assert {score.value for score in found["one"].values()} == {1.0}
    assert values_of(found["l2"]) == pytest.approx(values_of(METRICS["l2"](probe)))
    again = probe.mean_over_tokens({"one": lambda x, y: 2 * torch.ones(len(x))})
    assert {score.value for score in again["one"].values()} == {2.0}


def test_a_score_that_divides_by_zero_is_refused_and_spoils_no_other(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :] = 0
    model.save_pretrained(tmp_path / "m")
    probe = Probe(load(tmp_path / "m"), documents(4), "kl")
    with pytest.raises(ModelError, match=r"score of attention\.0 is NaN or infinite.*Take another metric"):
        METRICS["relative_l2"](probe)
    assert METRICS["l2"](probe)


# -- as users meet them ---------------------------------------------------------------------------------------------


def test_score_gives_values_with_their_spread(model: Path, text: Path) -> None:
    told = billhook.score(str(model), "cosine", data=str(text), tokens=240, length=24)
    assert [str(row.site) for row in told.sites] == [f"{part}.{i}" for i in range(4) for part in ("attention", "mlp")]
    assert [row.block for row in told.blocks] == [0, 1, 2, 3]
    assert all(0 < row.value < 2 and row.se > 0 for row in told.sites + told.blocks)
    assert told.scores["cosine"] == MetricScores(told.sites, told.blocks, told.spans, told.groups)
    assert (told.streamed, told.bytes_read) == (False, 0)
    streamed = billhook.score(str(model), "cosine", data=str(text), tokens=240, length=24, memory="1MB")
    assert streamed.streamed or model.stat().st_size < 750_000
    with pytest.raises(UnknownName, match="Did you mean 'cosine'"):
        billhook.score(str(model), "cosin")


def test_score_of_several_metrics_with_options(model: Path, text: Path) -> None:
    text_options = {"data": str(text), "tokens": 240, "length": 24}
    told = billhook.score(str(model), "cosine, taylor,cosine", set={"kind": "vector"}, **text_options)
    assert (list(told.scores), told.set) == (["cosine", "taylor"], {"kind": "vector"})
    with pytest.raises(UsageError, match=r"scores by cosine, taylor\. Choose one"):
        told.sites  # noqa: B018 - the look-up is the test
    for name, options in (("cosine", {}), ("taylor", {"kind": "vector"})):
        alone = billhook.score(str(model), name, set=options, **text_options)
        assert told.scores[name] == alone.scores[name]
    for metric, options, message in (
        ("cosine,taylor", {"knid": 1}, "no option 'knid' of cosine and taylor. Did you mean kind.* Known: kind"),
        ("cosine", {"kind": "vector"}, "no option 'kind' of cosine. It has none: leave it out"),
        ("taylor", {"kind": "third"}, "There is no kind of taylor called 'third'.*element, second, vector"),
        ("cosine,", {}, "There is no metric called ''"),
    ):
        with pytest.raises(UsageError, match=message):
            billhook.score(str(model), metric, set=options, **text_options)


def test_spans_of_blocks_are_told_by_their_ends(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has the least important span of every length."""
    told = billhook.score(str(model), "angular_span,relative_l2,magnitude", data=str(text), tokens=240, length=24)
    spans = told.scores["angular_span"].spans
    assert {(row.first, row.last, row.length) for row in spans} == {
        (i, j, j - i + 1) for i in range(4) for j in range(i, 4) if j - i < 3
    }
    monkeypatch.setenv("COLUMNS", "80")
    session.print_result(told)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    least = min((row for row in spans if row.length == 2), key=lambda row: row.value)
    assert f"{least.first}-{least.last}" in shown
    assert shown.count("Least important sites") == 2
    magnitude = shown.split("magnitude of")[1]
    assert "±" not in magnitude


def test_the_spread_of_a_mean_over_documents() -> None:
    """The standard error of a ratio of sums: that of the mean where all documents are as long."""
    values = [0.1, 0.4, 0.2, 0.7, 0.3]
    score = Score.of([10 * v for v in values], [10.0] * 5)
    mean = sum(values) / 5
    assert score.value == pytest.approx(mean)
    assert score.se == pytest.approx((sum((v - mean) ** 2 for v in values) / 4 / 5) ** 0.5)
    assert Score.of([3.0], [10.0]).se is None
