"""The metric apt: against autograd over the whole model, on planted outliers, and on parts of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from scipy import stats

from billhook.core.errors import ResourceError, UsageError
from billhook.core.plan import Plan, Site
from billhook.data.splits import select_documents
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.engine.statistics.gradient_pass import InputSlopes
from billhook.methods.export.checkpoint import save
from billhook.methods.metrics import GROUP_METRICS
from billhook.methods.metrics.salience import kurtosis, outlier_size, salience
from billhook.models import channel_groups
from billhook.models.load import Teacher, load
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
Sums = dict[Site, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # of h, |h| and |dL/dh|, per channel


def uneven(seed: int = 1) -> TokenSet:
    """Rows of different lengths, so that there is padding."""
    ids = tiny.tokens(6, 12, seed).tolist()
    rows = [tuple(row[: 12 - 2 * i]) for i, row in enumerate(ids)]
    return token_set(rows, range(6), range(6), list(map(str, range(6))), "rows")


def layout(teacher: Teacher, site: Site) -> tuple[torch.nn.Module, channel_groups.ChannelLayout]:
    block = teacher.block(site.block)
    of = channel_groups.find_layout(block, site.part, teacher.architecture, teacher.model.config)
    assert not isinstance(of, str)
    return block, of


def by_hand(teacher: Teacher, tokens: TokenSet, sites: list[Site]) -> tuple[int, Sums]:
    """By hooks on the whole model, row by row, of the summed loss."""
    model, sums, counted = teacher.model, Sums(), 0
    heard: dict[Site, torch.Tensor] = {}
    handles = []
    for site in sites:
        block, of = layout(teacher, site)
        module = block.get_submodule(of.output.name.removesuffix(".weight"))

        def hear(m: torch.nn.Module, args: tuple[torch.Tensor, ...], site: Site = site) -> None:
            heard[site] = args[0]

        handles.append(module.register_forward_pre_hook(hear))
    for row, length in zip(tokens.rows, tokens.lengths, strict=True):
        ids = row[:length]
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].log_softmax(-1)
            loss = -logits[range(length - 1), ids[1:]].sum()
        slopes = torch.autograd.grad(loss, [heard[site] for site in sites])
        counted += int(length) - 1
        for site, g in zip(sites, slopes, strict=True):
            h, g = (x.detach().reshape(int(length), -1)[:-1].double() for x in (heard[site], g))
            found = (h.sum(0), h.abs().sum(0), g.abs().sum(0))
            sums[site] = tuple(a + b for a, b in zip(sums[site], found, strict=True)) if site in sums else found  # type: ignore[assignment]
    for handle in handles:
        handle.remove()
    return counted, sums


def collected(teacher: Teacher, tokens: TokenSet) -> dict[Site, InputSlopes]:
    """What the engine sums, as the functions of a metric see it."""
    found: list[InputSlopes] = []

    def see(x: InputSlopes, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return torch.full((len(channels),), float(len(found) - 1), dtype=torch.float64)

    places = Probe(teacher, tokens, "nll").groups_of_slopes({"seen": see})["seen"]
    return {site: found[int(values[0])] for site, values in places.items()}


@pytest.mark.parametrize("variant", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "falcon", "gemma2"])
def test_salience_and_outliers_are_those_of_autograd_on_the_whole_model(checkpoint: Folder, variant: str) -> None:
    """With padding, grouped heads, fused and turned weights; kurtosis by scipy, a head at a time."""
    teacher, tokens = load(checkpoint(variant)), uneven()
    sites = [site for site in (Site(1, "attention"), Site(2, "mlp")) if site in teacher.anatomy.sites_present()]
    counted, expected = by_hand(teacher, tokens, sites)
    probe = Probe(teacher, tokens, "kl")
    found = probe.groups_of_slopes({"salience": salience, "outliers": outlier_size})
    for site in sites:
        block, of = layout(teacher, site)
        total, size, slope = expected[site]
        w = block.get_parameter(of.output.name).detach().double()
        w = w.T if of.output.axis == 0 else w
        for group in range(0, of.groups, max(1, of.groups // 6)):
            channels = of.output.index[group]
            one = float((size * slope)[channels].sum())
            assert float(found["salience"][site][group]) == pytest.approx(one, rel=2e-4), (site, group)
            heads = channels.view(max(1, of.heads), -1)
            roots = [
                max(0.0, float(stats.kurtosis((w * total / counted)[:, head].flatten().numpy()))) ** 0.5
                for head in heads
            ]
            assert float(found["outliers"][site][group]) == pytest.approx(sum(roots), rel=2e-3, abs=2e-3)


def test_one_token_has_the_size_of_activation_times_gradient(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    tokens = token_set([(3, 7)], [0], [0], ["0"], "rows")
    sites = [Site(1, "attention"), Site(2, "mlp")]
    counted, sums = by_hand(teacher, tokens, sites)
    assert counted == 1
    found = Probe(teacher, tokens, "nll").groups_of_slopes({"salience": salience})["salience"]
    for site in sites:
        _, of = layout(teacher, site)
        product = sums[site][0].abs() * sums[site][2]  # one token: the sums are its own values
        assert found[site].tolist() == pytest.approx(product[of.output.index].sum(1).tolist(), rel=2e-4)


def test_sums_over_parts_of_a_text_are_those_of_the_whole(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), uneven()
    whole = collected(teacher, tokens)
    parts = [collected(teacher, select_documents(tokens, some)) for some in (range(2), range(2, 6))]
    for site, x in whole.items():
        assert x.tokens == sum(part[site].tokens for part in parts)
        means = sum(part[site].mean * part[site].tokens for part in parts) / x.tokens
        assert torch.allclose(torch.as_tensor(means), x.mean, rtol=1e-4, atol=1e-7)
        for name in ("absolute", "slopes"):
            together = sum(getattr(part[site], name) for part in parts)
            assert torch.allclose(torch.as_tensor(together), getattr(x, name), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_streamed_or_pruned_model_has_the_same_sums(checkpoint: Folder, tmp_path: Path, streamed: bool) -> None:
    dense, gone = load(checkpoint("llama")), Plan.parse(["attention.0", "mlp.3"])
    save(apply(dense, gone), None, gone, tmp_path / "cut", teacher=dense)
    teacher = load(tmp_path / "cut", memory=0 if streamed else None)
    found = collected(teacher, uneven())
    assert Site(0, "attention") not in found
    sites = [Site(1, "attention"), Site(2, "mlp")]
    _, sums = by_hand(load(tmp_path / "cut"), uneven(), sites)
    for site in sites:
        assert torch.allclose(found[site].absolute, sums[site][1], rtol=1e-4)
        assert torch.allclose(found[site].slopes, sums[site][2], rtol=1e-3, atol=1e-6)


def test_a_planted_outlier_head_has_the_largest_kurtosis_and_the_others_none() -> None:
    """One weight in one of four heads, among evenly spread ones, whose own kurtosis is below 0."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.rand(64, 32, generator=draw, dtype=torch.float64) - 0.5
    weight[5, 19] = 12.0  # in head 2
    x = InputSlopes(10, torch.ones(32, dtype=torch.float64), *torch.ones(2, 32, dtype=torch.float64))
    heads = outlier_size(x, weight, torch.arange(32).view(4, 1, 8))
    assert heads.argmax() == 2
    assert heads[2] > 10
    assert heads[[0, 1, 3]].abs().max() == 0
    grouped = outlier_size(x, weight, torch.arange(32).view(2, 2, 8))  # two heads share keys and values
    assert grouped.tolist() == pytest.approx([0.0, float(heads[2])])
    together = outlier_size(x, weight, torch.arange(32).view(1, 1, 32))  # as if all were one head
    assert together.item() != pytest.approx(float(heads.sum()), rel=0.1)


def test_kurtosis_is_that_of_scipy_and_0_of_what_does_not_vary() -> None:
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(5, 40, generator=draw, dtype=torch.float64).pow(3)
    assert kurtosis(values).tolist() == pytest.approx(stats.kurtosis(values.numpy(), axis=1).tolist())
    assert kurtosis(torch.zeros(2, 7, dtype=torch.float64)).tolist() == [0, 0]
    assert kurtosis(1e-200 * values).tolist() == [0] * 5, "too small to be told from none"


def test_both_terms_count_alike_whatever_their_scale_and_by_parameter(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    probe = Probe(teacher, uneven(), "nll")
    parts = probe.groups_of_slopes({"salience": salience, "outliers": outlier_size})
    groups = {size.site: size.group for size in teacher.anatomy.sites}
    means = {name: float(torch.cat(list(values.values())).mean()) for name, values in parts.items()}
    plain, alone = GROUP_METRICS["apt"](probe), GROUP_METRICS["apt"](probe, outliers=0.0)
    for site, values in plain.items():
        group = groups[site]
        assert group is not None
        s, k = (parts[name][site] / means[name] for name in ("salience", "outliers"))
        assert values.tolist() == pytest.approx(((s + k) / group.parameters).tolist())
        assert alone[site].tolist() == pytest.approx((s / group.parameters).tolist())
    mass = [sum(float(v.sum()) * groups[s].parameters for s, v in x.items()) for x in (alone, plain)]  # type: ignore[union-attr]
    assert mass[1] == pytest.approx(2 * mass[0]), "each term is half of all"
    with pytest.raises(UsageError, match="outliers=0 or more, not -1"):
        GROUP_METRICS["apt"](probe, outliers=-1)


def test_it_leaves_the_teacher_as_it_is(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    before = copy.deepcopy(teacher.model.state_dict())
    wanted = {name: p.requires_grad for name, p in teacher.model.named_parameters()}
    first, again = (GROUP_METRICS["apt"](Probe(teacher, uneven(), "nll")) for _ in range(2))
    assert all(torch.equal(first[site], again[site]) for site in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.model.state_dict().items())
    assert {name: p.requires_grad for name, p in teacher.model.named_parameters()} == wanted
    assert {p.grad for p in teacher.model.parameters()} == {None}
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())


def test_mixtures_of_experts_are_left_out(checkpoint: Folder) -> None:
    teacher = load(checkpoint("mixtral"))
    assert {site.part for site in GROUP_METRICS["apt"](Probe(teacher, uneven(), "nll"))} == {"attention"}


def test_streams_that_do_not_fit_are_refused(checkpoint: Folder) -> None:
    probe = Probe(load(checkpoint("llama")), uneven(), "nll", memory=1)
    with pytest.raises(ResourceError, match="Gradients take"):
        GROUP_METRICS["apt"](probe)
