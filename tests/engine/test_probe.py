"""The measuring engine gives what a plain forward pass gives: every architecture, walk and order, streamed or not."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import hooked

from billhook.core.errors import ModelError, PlanError
from billhook.core.plan import KeptGroups, MeasureRequest, Plan, Site
from billhook.core.results.measured import Loss
from billhook.data.token_sets import Document, TokenSet, pack_rows
from billhook.engine.bench import Measurer, job_batches
from billhook.engine.head import VOCABULARY_AT_A_TIME
from billhook.engine.losses import LOSSES, loss_facts
from billhook.engine.measurements import DocumentIds, Known, NoCache
from billhook.engine.prefix_trie import StreamCache
from billhook.engine.probe import Probe, RacingOptions, logits
from billhook.engine.racing import Quality, Sums
from billhook.methods.export.checkpoint import save
from billhook.models.accelerator.bfloat16 import LEAST_WIDTH, bfloat16_copy
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply
from billhook.report.run.search_words import work_in_words
from billhook.runs.executor import Executor

Folder = Callable[[str], Path]


def token_set(seed: int = 0, prefix: tuple[int, ...] = ()) -> TokenSet:
    """Three texts, four documents, rows of different lengths."""
    draw = random.Random(seed)
    found = [Document(text, tuple(draw.choices(range(3, 64), k=n))) for text, n in ((0, 30), (1, 9), (1, 21), (2, 14))]
    return pack_rows(found, 70, 16, list(prefix), "made up")


@torch.no_grad()
def plain(teacher: Teacher, tokens: TokenSet, plan: Plan, loss: str) -> Loss:
    """One row at a time through the stock model with hooks, losses written out in float64."""
    sums, counts = [0.0] * len(tokens.clusters), [0] * len(tokens.clusters)
    for row, length, document in zip(tokens.rows, tokens.lengths, tokens.documents, strict=True):
        ids = row[None, :length]
        z_p = teacher.model(input_ids=ids, use_cache=False).logits[0].double()
        with hooked(teacher, plan):
            z_q = teacher.model(input_ids=ids, use_cache=False).logits[0].double()
        p, q = z_p.softmax(-1), z_q.softmax(-1)
        if loss == "kl":
            value = (p * (p / q).log()).sum()
        elif loss == "js":
            m = (p + q) / 2
            value = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        elif loss == "finercut_js":
            m = (p + q) / 2
            value = ((m * (m / p).log()).sum() + (m * (m / q).log()).sum()) / 2
        elif loss == "topk_kl":  # the likelier half of the words, at most 512, and all others together
            likeliest = p.argsort(1, descending=True)[:, : min(512, p.shape[1] // 2)]
            top = torch.zeros_like(p, dtype=torch.bool).scatter_(1, likeliest, True)
            others = (p * ~top).sum(1), (q * ~top).sum(1)
            value = (p * (p / q).log() * top).sum() + (others[0] * (others[0] / others[1]).log()).sum()
        elif loss == "angular":
            cosine = (z_p * z_q).sum(1) / (z_p.square().sum(1) * z_q.square().sum(1)).sqrt()
            value = cosine.clamp(0, 1).arccos().sum()
        elif loss == "norm":
            value = (z_p - z_q).square().sum(1).sqrt().sum()
        else:
            assert loss == "nll"
            value = -q[torch.arange(length - 1), ids[0, 1:]].log().sum()
        sums[document] += float(value)
        counts[document] += length - (loss == "nll")
    return Loss(loss, tuple(sums), tuple(counts))


def close(a: Loss, b: Loss) -> None:
    assert (a.name, a.counts) == (b.name, b.counts)
    assert a.sums == pytest.approx(b.sums, rel=1e-4, abs=1e-6 * max(a.counts))


PLANS = [
    Plan.parse(["attention.0", "mlp.2", *more])
    for more in ([], ["mlp.3"], ["attention.1"], ["attention.2", "attention.3"], ["mlp.0"])
]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_losses_equal_the_plain_pass(variant: str, checkpoint: Folder) -> None:
    """Both walks, in memory and streamed, several plans removed beforehand, every loss."""
    teacher, tokens = load(checkpoint(variant)), token_set()
    streamed = load(checkpoint(variant), memory=0)
    assert streamed.weights is not None
    for loss in LOSSES:
        reference = [plain(teacher, tokens, plan, loss) for plan in PLANS]
        for which in (teacher, streamed):
            for walk in ("layers", "depth-first"):
                for measured, expected in zip(
                    Probe(which, tokens, loss, walk=walk).losses(PLANS), reference, strict=True
                ):
                    close(measured, expected)


@pytest.mark.parametrize("variant", ["phi", "gemma2", "cohere"])
def test_a_vocabulary_that_is_read_in_pieces(variant: str, tmp_path: Path) -> None:
    """Three pieces, the last one small; heads with a bias, with a soft cap, and with a scale."""
    tiny.saved(tmp_path, variant, vocab_size=2 * VOCABULARY_AT_A_TIME + 5)
    teacher, streamed, tokens = load(tmp_path), load(tmp_path, memory=0), token_set()
    for loss in LOSSES:
        reference = [plain(teacher, tokens, plan, loss) for plan in PLANS[:1]]
        for which in (teacher, streamed):
            for measured, expected in zip(Probe(which, tokens, loss).losses(PLANS[:1]), reference, strict=True):
                close(measured, expected)


@pytest.mark.parametrize("variant", ["llama", "phi"])
def test_a_head_of_less_than_full_rank(variant: str, tmp_path: Path) -> None:
    """Lengths and angles of its logits come from a matrix that is singular."""
    model = tiny.build(variant)
    with torch.no_grad():
        model.lm_head.weight[:, 5] = 0
        model.lm_head.weight[:, 7] = model.lm_head.weight[:, 3]
    model.save_pretrained(tmp_path)
    teacher, tokens = load(tmp_path), token_set()
    for loss in (name for name in LOSSES if loss_facts(name).rotation_free):
        for plan, measured in zip(PLANS, Probe(teacher, tokens, loss).losses(PLANS), strict=True):
            close(measured, plain(teacher, tokens, plan, loss))


@pytest.mark.parametrize("variant", ["llama", "phi", "falcon", "gpt_oss"])
def test_a_model_that_was_pruned_before(variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    """Positions stay those of the unpruned model, in memory and streamed."""
    dense, gone = load(checkpoint(variant)), Plan.parse(["attention.0", "mlp.0", "attention.2"])
    save(apply(dense, gone), None, gone, tmp_path / "once", teacher=dense)
    plan = Plan.parse(["mlp.1", "mlp.2"])
    tokens = token_set()
    expected = Probe(load(tmp_path / "once"), tokens, "nll").losses([plan])[0]
    close(expected, plain(dense, tokens, Plan(gone.removed | plan.removed), "nll"))
    close(Probe(load(tmp_path / "once", memory=0), tokens, "nll").losses([plan])[0], expected)


@functools.cache
def _reference(folder: Path, loss: str) -> Callable[[Plan], Loss]:
    teacher = load(folder)
    return functools.cache(lambda plan: plain(teacher, token_set(), plan, loss))


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("variant", ["llama", "phi", "falcon", "gemma2", "mixtral"])
def test_random_batches_of_plans(variant: str, checkpoint: Folder, data: st.DataObject) -> None:
    """Whatever is asked, in whatever batches, and however little may be kept from one to the next."""
    teacher = load(checkpoint(variant))
    sites = st.sets(st.sampled_from(teacher.anatomy.sites_present()), max_size=6).map(lambda s: Plan(frozenset(s)))
    loss = data.draw(st.sampled_from(sorted(LOSSES)))
    probe = Probe(teacher, token_set(), loss, walk=data.draw(st.sampled_from(["layers", "depth-first"])))
    probe._measurer._limit = data.draw(st.sampled_from([0, 20_000, 200_000, 10**9]))
    for batch in data.draw(st.lists(st.lists(sites, min_size=1, max_size=6), min_size=1, max_size=4)):
        for plan, measured in zip(batch, probe.losses(batch), strict=True):
            close(measured, _reference(checkpoint(variant), loss)(plan))


def random_plan(teacher: Teacher, draw: random.Random) -> Plan:
    """A plan that removes some sites, and keeps half of the groups of others in one of two ways."""
    removed, narrowed = set[Site](), set[KeptGroups]()
    sizes = [size for size in teacher.anatomy.sites if size.site.block]  # of the first block something stays
    for size in draw.sample(sizes, 5):
        half = size.groups[: len(size.groups) // 2], size.groups[len(size.groups) // 2 :]
        if draw.random() < 0.4 or len(size.groups) < 2:
            removed.add(size.site)
        else:
            narrowed.add(KeptGroups(size.site, draw.choice(half)))
    return Plan(frozenset(removed), frozenset(narrowed))


@pytest.mark.parametrize("walk", ["layers", "depth-first"])
@pytest.mark.parametrize("variant", ["llama", "phi", "gpt_neox", "gpt2", "gemma2"])
def test_batches_of_narrower_plans_are_measured_as_their_students(variant: str, walk: str, checkpoint: Folder) -> None:
    """Half of a batch again, with other plans: what is kept between batches fits."""
    teacher, tokens, draw = load(checkpoint(variant)), token_set(), random.Random(variant + walk)
    plans = [random_plan(teacher, draw) for _ in range(6)]
    probe = Probe(teacher, tokens, "kl", walk=walk)
    for batch in (plans[:4], plans[2:]):
        for plan, measured in zip(batch, probe.losses(batch), strict=True):
            student = apply(teacher, plan)
            sums = [0.0] * len(tokens.clusters)
            for row, length, document in zip(tokens.rows, tokens.lengths, tokens.documents, strict=True):
                ids = row[None, :length]
                with torch.no_grad():
                    p, q = (m(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1) for m in
                            (teacher.model, student))  # fmt: skip
                sums[document] += float((p.exp() * (p - q)).sum())
            assert measured.sums == pytest.approx(sums, rel=2e-4, abs=2e-5)


# -- how much is computed -------------------------------------------------------------------------------------------


def histories(plans: Sequence[Plan], sites: Sequence[Site], parallel: bool) -> Counter[str]:
    """By brute force: how many distinct histories every site is computed after, in each of its own states."""
    seen: set[tuple[Site, frozenset[Site | KeptGroups]]] = set()
    for plan in plans:
        for site in sites:
            if site not in plan.removed:
                before = {s for s in plan.removed if s < site}
                narrower = {narrow for narrow in plan.narrowed if narrow.site <= site}
                if parallel:  # both parts of a block read the same stream
                    before = {s for s in before if s.block < site.block}
                    narrower = {narrow for narrow in narrower if narrow.site.block < site.block or narrow.site == site}
                seen.add((site, frozenset({*before, *narrower})))
    return Counter(site.part for site, _ in seen)


@pytest.mark.parametrize("walk", ["layers", "depth-first"])
@pytest.mark.parametrize("variant", ["llama", "phi", "gpt_neox", "qwen3_moe"])
def test_every_distinct_prefix_is_computed_once(variant: str, walk: str, checkpoint: Folder) -> None:
    teacher, draw = load(checkpoint(variant)), random.Random(variant + walk)
    sites = teacher.anatomy.sites_present()
    tokens = pack_rows([Document(0, tuple(range(3, 35)))], 32, 32, [], "one row")
    coalitions = [Plan(frozenset(draw.sample(sites, draw.randrange(7)))) for _ in range(20)]
    narrower = [random_plan(teacher, draw) for _ in range(20)]
    for plans in ([Plan(), *(Plan(frozenset([site])) for site in sites)], coalitions, narrower):
        counted: Counter[str] = Counter()
        names = {"attention": teacher.architecture.attention, "mlp": teacher.architecture.mlp[-1]}
        handles = [
            getattr(teacher.block(s.block), names[s.part]).register_forward_hook(counter(counted, s.part))
            for s in sites
        ]
        bench = Measurer(teacher, tokens, "nll", walk=walk)
        with torch.inference_mode():
            list(bench.walk.run([(0, mask) for mask in bench.masks(list(dict.fromkeys(plans)))], walk == "layers"))
        for handle in handles:
            handle.remove()
        assert counted == histories(plans, sites, bench.runner.parallel)
        assert bench.runner.computed == counted.total() * 32


def counter(counted: Counter[str], part: str) -> Callable[..., None]:
    """A hook that counts the rows that go through a sublayer."""

    def hook(module: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        counted[part] += len(output[0] if isinstance(output, tuple) else output)

    return hook


@pytest.mark.parametrize("variant", ["llama", "phi"])
def test_a_greedy_round_costs_half_of_all_sites_squared(variant: str, checkpoint: Folder) -> None:
    """n(n+1)/2 sites with the dense path; blocks with parallel parts save one of the two in their own block."""
    teacher = load(checkpoint(variant))
    sites = teacher.anatomy.sites_present()
    n = len(sites)
    tokens = token_set()
    bench = Measurer(teacher, tokens, "kl")
    masks = bench.masks([Plan(), *(Plan(frozenset([site])) for site in sites)])
    jobs = [(g, mask) for g in range(len(bench.groups)) for mask in masks]
    with torch.inference_mode():
        list(bench.walk.run(jobs, True))
    rounds = bench.runner.computed / sum(group.ids.numel() for group in bench.groups)
    assert rounds == n * (n + 1) / 2 - (n / 2 if bench.runner.parallel else 0)


def test_a_branch_before_the_removed_site_resumes_after_it(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    sites, tokens = teacher.anatomy.sites_present(), token_set()
    probe = Probe(teacher, tokens, "kl")
    probe.losses([Plan(frozenset([site])) for site in sites])
    before = probe.site_evaluations
    again = [Plan(frozenset([Site(2, "mlp"), site])) for site in sites if site != Site(2, "mlp")]
    found = probe.losses(again)
    # Every branch has only blocks 2 and 3 to go at most: attention.2 and both of block 3, and none is walked from 0.
    assert probe.site_evaluations - before <= 3 * len(again)
    for plan, loss in zip(again, found, strict=True):
        close(loss, plain(teacher, tokens, plan, "kl"))


def test_removed_sublayers_are_not_computed(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), token_set()
    calls: list[str] = []
    probe = Probe(teacher, tokens, "kl")
    probe.losses([Plan()])
    for name, module in teacher.model.named_modules():
        if name.endswith(("self_attn", "mlp")):
            module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
    probe.losses([Plan.parse(["attention.1", "mlp.2"])])
    assert "model.layers.1.self_attn" not in calls
    assert "model.layers.2.mlp" not in calls
    assert "model.layers.2.self_attn" in calls


# -- only the best --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved_peaked(tmp_path_factory.mktemp("peaked") / "m"))


def documents(count: int, length: int = 24, seed: int = 0) -> TokenSet:
    draw = random.Random(seed)
    found = [Document(i, tuple(draw.choices(range(3, 64), k=length))) for i in range(count)]
    return pack_rows(found, count * length, length, [], "made up")


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("streamed", [False, True])
def test_the_best_are_those_of_a_full_search_and_the_others_bounds(loss: str, streamed: bool, peaked: Teacher) -> None:
    teacher = load(peaked.folder, memory=0) if streamed else peaked
    tokens = documents(12)
    plans = [Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]
    full = Probe(peaked, tokens, loss).losses(plans)
    probe = Probe(teacher, tokens, loss)
    found = probe.losses(plans, best=2)
    order = sorted(range(len(plans)), key=lambda i: full[i].mean)
    for i in order[:2]:
        assert not found[i].bound
        close(found[i], full[i])
    dropped = [i for i in order if found[i].bound]
    assert dropped or loss == "nll" or streamed, "nothing was abandoned"
    for i in dropped:
        assert full[order[1]].mean * (1 - 1e-4) <= found[i].mean <= full[i].mean * (1 + 1e-5) + 1e-6
    assert probe.tally == [Counter(full=len(plans) - len(dropped), bound=len(dropped))]


def test_the_cheap_bound_of_kl_is_below_it_and_close(peaked: Teacher) -> None:
    bench = Measurer(peaked, documents(6), "kl")
    sites = peaked.anatomy.sites_present()
    masks = bench.masks([Plan(frozenset([site])) for site in sites])
    jobs = [(g, mask) for g in range(len(bench.groups)) for mask in masks]
    with torch.inference_mode():
        assert bench.bounds
        assert bench._head._rows is not None
        assert len(bench._head._rows) < bench._head.words / 2
        full, cheap = bench.measure("full", jobs), bench.measure("bound", jobs)
    for job in jobs:
        assert sum(cheap[job]) <= sum(full[job]) + 1e-5
        assert sum(cheap[job]) >= 0.5 * sum(full[job])


def test_racing_keeps_a_planted_winner_and_says_how_it_decided(peaked: Teacher) -> None:
    model = tiny.build("llama", num_hidden_layers=6)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1e-3)  # hardly missed
    tokens = documents(32)
    folder = peaked.folder.with_name("planted")
    model.save_pretrained(folder)
    teacher = load(folder)
    probe = Probe(teacher, tokens, "kl", fast=RacingOptions(shortlist=3, risk=0.05))
    plans = [Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]
    found = probe.losses(plans, best=2)
    best = min((loss.mean, i) for i, loss in enumerate(found) if not loss.bound)[1]
    assert plans[best] == Plan.parse(["mlp.3"])
    assert probe.tally[0]["raced"] > 0
    then = [Plan.parse(["mlp.3"]).without(site) for site in teacher.anatomy.sites_present() if str(site) != "mlp.3"]
    found = probe.losses(then, best=2)
    assert probe.tally[1]["skipped"] == len(then) - 3, "the shortlist comes from the round before"
    reference = Probe(teacher, tokens, "kl").losses(then)
    for plan, loss, full in zip(then, found, reference, strict=True):
        if not loss.bound:
            close(loss, full)
        assert plan.removed


# -- killed and resumed ---------------------------------------------------------------------------------------------


class Diary(NoCache):
    """Remembers pieces; dies at a chosen moment."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.pieces: dict[tuple[Plan, Quality, DocumentIds], Sums] = {}
        self.written: Counter[tuple[Plan, Quality, DocumentIds]] = Counter()
        self.left = dies_after

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        told = []
        for plan in plans:
            own: dict[Quality, dict[DocumentIds, Sums]] = {"full": {}, "bound": {}, "sample": {}}
            for (which, quality, documents), sums in self.pieces.items():
                if which == plan:
                    own[quality][documents] = sums
            told.append(Known(pieces=own))
        return told

    def add_partial(self, quality: Quality, found: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        for (plan, documents), sums in found.items():
            self.pieces[plan, quality, documents] = sums
            self.written[plan, quality, documents] += 1


@pytest.mark.parametrize("fast", [None, RacingOptions(shortlist=4)])
def test_what_was_measured_before_a_kill_is_not_measured_again(fast: RacingOptions | None, peaked: Teacher) -> None:
    tokens, sites = documents(16), peaked.anatomy.sites_present()

    def search(diary: Diary) -> list[tuple[Plan, float]]:
        probe = Probe(peaked, tokens, "kl", fast=fast, cache_factory=lambda *of: diary)
        plan, path = Plan(), list[tuple[Plan, float]]()
        for _ in range(3):
            plans = [plan.without(site) for site in sites if site not in plan.removed]
            found = dict(probe.iter_losses(plans, 2))
            plan = min((loss.mean, str(p), p) for p, loss in found.items() if not loss.bound)[2]
            path.append((plan, found[plan].mean))
        return path

    whole = Diary()
    expected = search(whole)
    for moment in range(0, whole.written.total(), 7):
        diary = Diary(moment)
        try:
            search(diary)
        except KeyboardInterrupt:
            diary.left = None
            resumed = search(diary)
        else:
            break
        assert [plan for plan, _ in resumed] == [plan for plan, _ in expected]
        assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in expected], rel=1e-5)
        assert max(diary.written.values()) == 1, "a piece was measured twice"
        assert diary.pieces.keys() == whole.pieces.keys()


def test_what_is_in_the_store_does_not_change_how_a_race_is_run(peaked: Teacher) -> None:
    """Full losses of plans that the race skips or drops stay out of it, until they are asked for."""
    tokens, sites = documents(16), peaked.anatomy.sites_present()
    plans = [Plan(frozenset([site])) for site in sites]
    empty, full = Diary(), Diary()
    list(Probe(peaked, tokens, "kl", cache_factory=lambda *of: full).iter_losses(plans))
    found = [
        dict(
            Probe(peaked, tokens, "kl", fast=RacingOptions(), cache_factory=lambda *of, diary=diary: diary).iter_losses(
                plans, 2
            )
        )  # type: ignore[misc]
        for diary in (empty, full)
    ]
    assert {plan: loss.bound for plan, loss in found[0].items()} == {
        plan: loss.bound for plan, loss in found[1].items()
    }
    assert any(loss.bound for loss in found[0].values())


def test_the_work_of_other_losses_and_fewer_tokens_counts(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), documents(8)
    probe = Probe(teacher, tokens, "kl")
    probe.losses([Plan()])
    dense = probe.site_evaluations
    assert dense == 8
    probe.with_objective("nll").losses([Plan()])
    assert probe.site_evaluations == 2 * dense
    probe.with_objective("kl", documents(2)).losses([Plan()])
    assert probe.site_evaluations == pytest.approx(2.25 * dense)
    assert probe.with_objective("kl") is probe


# -- memory ---------------------------------------------------------------------------------------------------------


def test_the_layout_follows_the_memory(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("gemma2")), token_set()
    plans = [Plan.parse([name]) for name in ("attention.0", "mlp.1", "attention.3")]
    roomy, tight = Probe(teacher, tokens, "kl"), Probe(teacher, tokens, "kl", memory=1)
    for a, b in zip(roomy.losses(plans), tight.losses(plans), strict=True):
        close(a, b)
    assert (roomy.layout.walk, roomy.layout.checkpoint_every) == ("layers", 1)
    assert (tight.layout.walk, tight.layout.checkpoint_every, tight.layout.kept) == ("depth-first", 0, 0)
    assert "layer by layer" in work_in_words(roomy.layout)
    assert "depth-first" in work_in_words(tight.layout)
    assert "no streams kept" in work_in_words(tight.layout)


def test_kept_streams_stay_within_their_bytes(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    bench = Measurer(teacher, token_set(), "kl")
    limit = bench.walk.streams.limit = 30_000
    with torch.inference_mode():
        for mask in bench.masks([Plan(frozenset([site])) for site in teacher.anatomy.sites_present()]):
            list(bench.walk.run([(0, mask)], True))
            assert bench.walk.streams.size <= limit
            kept = bench.walk.streams
            assert kept.size == sum(x.nbytes for part in (kept._streams, kept._roots) for x in part.values())


def test_streams_that_are_evicted_meanwhile_are_no_crash(peaked: Teacher) -> None:
    """Losses that do not ask the teacher begin some groups late, in a race with hardly any memory."""
    probe = Probe(peaked, documents(16), "nll", fast=RacingOptions(shortlist=3))
    plans = [Plan(frozenset([site])) for site in peaked.anatomy.sites_present()]
    reference = Probe(peaked, documents(16), "nll").losses(plans)
    for limit in (3_100, 9_300, 40_000):
        probe._measurer._limit = limit
        for loss, full in zip(probe.losses(plans, best=2), reference, strict=True):
            if not loss.bound:
                close(loss, full)


def test_activations_that_overflow_in_a_statistic_are_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="NaN or infinite from block 1 on"):
        Probe(load(tmp_path / "m"), token_set(), "kl").mean_over_tokens({"sum": lambda x, y: x.sum(-1)})


def test_blocks_that_every_plan_removes_are_not_read(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"), memory=0)
    assert teacher.weights is not None
    read = []
    honest = teacher.weights._read
    teacher.weights._read = lambda index: read.append(index) or honest(index)  # type: ignore[func-returns-value]
    gone = Plan.parse(["attention.1", "mlp.1", "attention.2", "mlp.2"])
    Probe(teacher, token_set(), "nll").losses([gone, gone.without(Site(3, "mlp"))])
    assert read == [0, 3]


def test_waves_hold_whole_groups() -> None:
    jobs = [(g, mask) for g in range(4) for mask in range(3)]
    for split, expected in ((True, [[0, 1], [2], [2], [2], [3]]), (False, [[0, 1], [2], [3]])):
        told = list(job_batches(jobs, [10, 10, 40, 10], 60, split=split))
        assert [job for wave in told for job in wave] == jobs
        assert [sorted({g for g, _ in wave}) for wave in told] == expected


# -- losses ---------------------------------------------------------------------------------------------------------


def test_no_divergence_from_oneself_and_the_symmetry_of_js(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("qwen3")), token_set()
    for loss in set(LOSSES) - {"nll"}:
        assert abs(Probe(teacher, tokens, loss).losses([Plan()])[0].mean) < 1e-6
    logits = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) * 3
    none = torch.zeros(50, dtype=torch.int64)
    forth, back = LOSSES["js"](logits[0], logits[1], none), LOSSES["js"](logits[1], logits[0], none)
    torch.testing.assert_close(forth, back)
    assert (forth > 0).all()
    assert (forth < 0.6932).all()
    torch.testing.assert_close(LOSSES["kl"](logits[0], logits[1] + 7, none), LOSSES["kl"](logits[0], logits[1], none))


def test_an_overflowing_block_is_named(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "m")
    for teacher in (load(tmp_path / "m"), load(tmp_path / "m", memory=0)):
        with pytest.raises(ModelError, match=r"NaN or infinite from block 2 on, in float32.*download it again"):
            Probe(teacher, token_set(), "kl").losses([Plan()])


# -- two threads, one teacher -------------------------------------------------------------------------------------


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns after a hundredth of the usual time."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 100)
    yield
    sys.setswitchinterval(usual)


def together(*works: Callable[[], object]) -> list[object]:
    """What all works give, each in a thread, begun at once."""
    start = threading.Barrier(len(works))

    def begun(work: Callable[[], object]) -> object:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begun, works))


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("memory", [None, 0], ids=["loaded", "streamed"])
def test_two_threads_measure_one_teacher_as_one_after_the_other(memory: int | None, checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"), memory=memory)
    sites, tokens = teacher.anatomy.sites_present(), documents(6, 12)
    halves = [[Plan(frozenset({s})) for s in sites if s.part == part] for part in ("attention", "mlp")]

    def losses(plans: list[Plan]) -> list[Loss]:
        return [loss for _ in range(4) for loss in Probe(teacher, tokens, "kl").losses(plans)]

    alone = [losses(plans) for plans in halves]
    assert alone[0] != alone[1]
    assert together(*(functools.partial(losses, plans) for plans in halves)) == alone


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("variant", ["llama", "phi"])  # parts in turn, and side by side
def test_the_teacher_runs_whole_while_another_thread_measures(variant: str, checkpoint: Folder) -> None:
    teacher = load(checkpoint(variant))
    tokens, ids = documents(6, 12), tiny.tokens(2, 8)
    plans = [Plan(frozenset({site})) for site in teacher.anatomy.sites_present()]

    def losses() -> list[Loss]:
        return [loss for _ in range(4) for loss in Probe(teacher, tokens, "kl").losses(plans)]

    def written() -> list[list[int]]:
        found = []
        for _ in range(12):
            with teacher.lock:
                found += teacher.model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
        return found

    def seen() -> list[list[float]]:
        return [logits(teacher, plans[0], ids).flatten().tolist() for _ in range(6)]

    def copied() -> list[list[float]]:
        student = [apply(teacher, Plan()) for _ in range(6)]
        return [each(ids).logits.flatten().tolist() for each in student]

    works = (losses, written, seen, copied)
    with torch.no_grad():
        alone = [work() for work in works]
    for name, found, expected in zip(("losses", "written", "seen", "copied"), together(*works), alone, strict=True):
        assert found == expected, name


def test_the_lock_of_a_teacher_is_its_copies_too_and_free_after_a_failure(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    assert replace(teacher, name="again").lock is teacher.lock
    with pytest.raises(PlanError):
        apply(teacher, Plan(frozenset({Site(99, "mlp")})))
    assert together(lambda: teacher.lock.acquire(blocking=False)) == [True]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 4)), max_size=60), st.integers(0, 12))
def test_streams_that_were_not_used_for_longest_are_dropped_first(steps: list[tuple[int, int, int]], most: int) -> None:
    """Against a list that is searched from its oldest entry on; streams before the first block are never dropped."""
    cache, order, sizes = StreamCache(most * 4), list[tuple[int, int, int]](), dict[tuple[int, int, int], int]()
    for depth, mask, size in steps:
        node = (0, depth, mask)
        assert (node in cache) == (node in sizes)
        if node in sizes:
            cache.get(node)
            order.append(order.pop(order.index(node)))
        elif depth == 0 or size <= most:
            order.append(node)
            sizes[node] = size
            while sum(sizes.values()) > most and (oldest := next((n for n in order if n[1]), None)):
                order.remove(oldest)
                del sizes[oldest]
        cache.put(node, torch.zeros(size))
        assert cache.size == 4 * sum(sizes.values())
    assert all((node in cache) == (node in sizes) for node in {(0, depth, mask) for depth, mask, _ in steps})


# -- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [None, RacingOptions(shortlist=1)])
def test_estimates_are_lower_bounds_of_all_plans(peaked: Teacher, fast: RacingOptions | None) -> None:
    """None is dropped, whatever else a probe would skip, and the best is among the lowest."""
    tokens, draw = documents(6), random.Random(3)
    plans = [*(Plan(frozenset([site])) for site in peaked.anatomy.sites_present()), random_plan(peaked, draw)]
    full = Probe(peaked, tokens, "kl").losses(plans)
    found = dict(Probe(peaked, tokens, "kl", fast=fast).iter_losses(plans, 1, estimate=True))
    for plan, loss in zip(plans, full, strict=True):
        assert found[plan].bound
        assert 0.5 * loss.mean <= found[plan].mean <= loss.mean + 1e-5
    best = min(zip(full, plans, strict=True), key=lambda pair: pair[0].mean)[1]
    assert best in sorted(plans, key=lambda plan: found[plan].mean)[:3]


@pytest.fixture
def wide(tmp_path: Path) -> Teacher:
    """A teacher as wide as a model must be to be copied in bfloat16."""
    return load(tiny.saved_peaked(tmp_path / "wide", hidden_size=LEAST_WIDTH))


def test_a_cpu_that_multiplies_bfloat16_estimates_in_it(wide: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy shares nothing that changes; other losses stay in float32."""
    before = {name: tensor.clone() for name, tensor in wide.model.state_dict().items()}
    plans = [Plan(frozenset([site])) for site in wide.anatomy.sites_present()]
    exact = Probe(wide, token_set(), "kl").losses(plans)
    estimates = dict(Probe(wide, token_set(), "kl").iter_losses(plans, estimate=True))
    for has, alike in (({"avx512_bf16": True}, False), ({"avx512_f": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        measure = Executor(Probe(wide, token_set(), "kl", bfloat16=True))
        rough = measure(MeasureRequest(tuple(plans), estimate=True))
        assert [loss.mean for loss in rough] == pytest.approx([loss.mean for loss in exact], rel=0.2)
        assert [loss.mean for loss in measure(MeasureRequest(tuple(plans)))] == [loss.mean for loss in exact]
        assert (rough == [estimates[plan] for plan in plans]) == alike
    assert all(torch.equal(tensor, before[name]) for name, tensor in wide.model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in wide.model.parameters())


@pytest.mark.parametrize("fast", [None, RacingOptions(shortlist=6)])
def test_plans_are_excluded_in_bfloat16_and_the_best_is_measured_in_float32(
    wide: Teacher, monkeypatch: pytest.MonkeyPatch, fast: RacingOptions | None
) -> None:
    """What is excluded is no better, what is full is the same number, and each is cached as what it is.

    Even where bounds exceed losses by far more than is expected.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    tokens, plans = documents(8), [Plan(frozenset([site])) for site in wide.anatomy.sites_present()]
    mlp = next(size for size in wide.anatomy.sites if size.site.part == "mlp")
    plans += [Plan(frozenset(), frozenset({KeptGroups(mlp.site, mlp.groups[:kept])})) for kept in (3, 9)]
    exact = dict(zip(plans, Probe(wide, tokens, "kl").losses(plans), strict=True))
    diaries: dict[str, Diary] = defaultdict(Diary)
    probe = Probe(wide, tokens, "kl", fast=fast, bfloat16=True, cache_factory=lambda _, __, compute: diaries[compute])
    other = plans.pop()  # narrows a site, and is measured before any is dropped
    assert probe.losses([other]) == [exact.pop(other)]
    found = dict(probe.iter_losses(plans, 1))
    best = min(exact, key=lambda plan: exact[plan].mean)
    assert found[best] == exact[best]
    assert any(loss.bound for loss in found.values())
    assert all(loss == exact[plan] for plan, loss in found.items() if not loss.bound)
    kept = {compute.split()[0]: {quality for _, quality, _ in diary.pieces} for compute, diary in diaries.items()}
    assert kept == {"float32": {"full"}, "bfloat16": {"bound"}}
    again = Probe(wide, tokens, "kl", fast=fast, bfloat16=True, cache_factory=lambda _, __, compute: diaries[compute])
    assert dict(again.iter_losses(plans, 1)) == found
    assert {times for diary in diaries.values() for times in diary.written.values()} == {1}


def test_no_copy_is_made_without_room_for_it(wide: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert bfloat16_copy(wide, 4 * wide.weight_bytes) is not None
    assert bfloat16_copy(wide, 2 * wide.weight_bytes) is None
    assert bfloat16_copy(replace(wide, model=wide.model.bfloat16()), None) is None
