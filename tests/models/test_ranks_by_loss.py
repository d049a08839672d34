"""Ranks of factors by the change of the loss in first order: what is predicted, and what is cut first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from billhook.core.plan import Plan, Site
from billhook.data.token_sets import TokenSet, token_set
from billhook.models.factors.ranks import most_saved, ranks_by_energy, ranks_by_loss
from billhook.models.factors.spectrum import spectrum
from billhook.models.load import Teacher, load
from billhook.models.repair import Repair
from billhook.models.surgery import apply
from billhook.studies.factors.fitting import Place, all_energies, all_loss_changes, factored, linear_sizes

Folder = Callable[[str], Path]


def documents(rows: int = 6, length: int = 12) -> TokenSet:
    ids = tiny.tokens(rows, length, 1)
    return token_set([tuple(r) for r in ids.tolist()], range(rows), range(rows), list(map(str, range(rows))), "rows")


class Exact:
    """A teacher's model in float64, by transformers and autograd alone."""

    def __init__(self, teacher: Teacher, tokens: TokenSet) -> None:
        self.model: Any = copy.deepcopy(teacher.model).double()
        self.rows, self.blocks = tokens.rows, self.model.get_submodule(teacher.architecture.blocks)

    def loss(self) -> torch.Tensor:
        """Mean negative log-likelihood of a token that has one before it."""
        logits = self.model(self.rows, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), self.rows[:, 1:].flatten())

    def map(self, place: Place) -> tuple[Any, bool]:
        """A linear map, and whether its weight is [inputs, outputs]."""
        module = self.blocks[place[0].block].get_submodule(place[1])
        return module, type(module).__name__ == "Conv1D"

    def inputs(self, place: Place) -> torch.Tensor:
        heard: list[torch.Tensor] = []
        handle = self.map(place)[0].register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            self.loss()
        handle.remove()
        return heard[0]


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
def test_what_is_predicted_is_the_slope_of_the_loss_along_each_direction(checkpoint: Folder, variant: str) -> None:
    """Against finite differences of the loss for a small part of a direction, and in whitened coordinates."""
    teacher, tokens = load(checkpoint(variant)), documents()
    changes, exact = all_loss_changes(teacher, tokens), Exact(teacher, tokens)
    assert changes.keys() == linear_sizes(teacher).keys()
    last = max(site.block for site, _ in changes)
    for place in [place for place in changes if place[0].block in (1, last)]:
        module, turned = exact.map(place)
        (slope,) = torch.autograd.grad(exact.loss(), module.weight)
        weight, gradient = (each.detach().T if turned else each.detach() for each in (module.weight, slope))
        x = exact.inputs(place)
        of, predicted = spectrum(weight, x.T @ x), changes[place]
        assert float(predicted.sum()) == pytest.approx(-float((gradient * weight).sum()), rel=1e-3, abs=1e-6)
        assert float(predicted.abs().max()) > 1e-5
        root = torch.linalg.cholesky(x.T @ x + 1e-6 * (x.T @ x).diagonal().mean() * torch.eye(x.shape[1]))
        u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
        slopes = torch.einsum("ok,oi,ki->k", u, gradient @ torch.linalg.inv(root).T, v)
        apart = (s[:-1] - s[1:]) > 1e-3 * s[0]  # others are any basis of a plane
        sure = torch.cat([apart, apart[-1:]]) & torch.cat([apart[:1], apart])
        torch.testing.assert_close((-s * slopes)[sure], predicted[sure], rtol=1e-2, atol=1e-5)
        largest = int((predicted.abs() * sure).argmax())
        direction, step, losses = of.directions[:, largest : largest + 1], 0.01, []
        whole = module.weight.detach().clone()
        for sign in (1, -1):
            taken = step * sign * direction @ (direction.T @ weight)
            with torch.no_grad():
                module.weight.copy_(whole - (taken.T if turned else taken))
                losses.append(float(exact.loss()))
        with torch.no_grad():
            module.weight.copy_(whole)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(predicted[largest]), rel=2e-2, abs=1e-5)


def test_directions_that_do_not_reach_the_loss_go_first_though_their_energy_is_large(
    checkpoint: Folder, tmp_path: Path
) -> None:
    """A block whose attention nobody reads: queries, keys and values of any energy are worth nothing."""
    teacher, tokens = load(checkpoint("llama")), documents()
    mute = "model.layers.1.self_attn."
    weights = {f"{mute}o_proj.weight": torch.zeros_like(teacher.model.get_parameter(f"{mute}o_proj.weight"))}
    weights |= {
        f"{mute}{name}.weight": 3 * teacher.model.get_parameter(f"{mute}{name}.weight").detach()
        for name in ("q_proj", "k_proj", "v_proj")
    }
    apply(teacher, Plan(), repair=Repair(weights=weights)).save_pretrained(tmp_path / "planted")
    planted = load(tmp_path / "planted")
    sizes, energies = linear_sizes(planted), all_energies(planted, tokens)
    free = {place: size for place, size in sizes.items() if place[0] == Site(1, "attention")}
    changes = all_loss_changes(planted, tokens)
    for place in free:
        assert not changes[place].any()
        if place[1] != "self_attn.o_proj":
            other = energies[Site(2, "attention"), place[1]]
            assert float(energies[place].sum()) > float(other.sum())
    needed = most_saved(free)
    ranks = ranks_by_loss(sizes, changes, needed)
    assert ranks == dict.fromkeys(free, 1)
    others = ranks_by_energy(sizes, energies, needed)
    assert others.keys() != ranks.keys()
    with torch.no_grad():
        expected = planted.model(tokens.rows).logits
        by_loss, by_energy = (
            float((factored(planted, tokens, each)[0](tokens.rows).logits - expected).abs().max())
            for each in (ranks, others)
        )
    assert by_loss < 1e-4
    assert by_energy > 1e-2


def test_the_budget_is_met_by_ranks_that_save_and_nothing_is_cut_for_nothing(checkpoint: Folder) -> None:
    teacher, tokens = load(checkpoint("llama")), documents()
    sizes, changes = linear_sizes(teacher), all_loss_changes(teacher, tokens)
    assert ranks_by_loss(sizes, changes, 0) == {}
    for needed in (1, 500, most_saved(sizes) // 2, most_saved(sizes)):
        ranks = ranks_by_loss(sizes, changes, needed)
        saved = [o * i - rank * (o + i) for (o, i), rank in ((sizes[place], rank) for place, rank in ranks.items())]
        assert min(saved) > 0
        assert sum(saved) >= needed
    assert set(ranks.values()) == {1}
