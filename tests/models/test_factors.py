"""Linear maps as two factors: the best for a text, ranks under a budget, and a checkpoint that is what was computed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from billhook.core.errors import ModelError, PlanError
from billhook.core.plan import Plan, Site
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.probe import Probe
from billhook.methods.export import EXPORTS
from billhook.methods.export.checkpoint import save
from billhook.methods.export.targets import student_shape
from billhook.models.factors.ranks import most_saved, ranks_by_energy
from billhook.models.factors.spectrum import lost_share, output_energies, spectrum
from billhook.models.factors.student import largest_rank, put_factors
from billhook.models.load import Teacher, load, student_as_teacher
from billhook.models.repair import Repair
from billhook.models.surgery import apply
from billhook.studies.factors.fitting import Place, all_energies, factored, linear_sizes

Folder = Callable[[str], Path]
SHAPES = [(7, 12), (12, 7), (9, 9)]


def documents(rows: int = 8, length: int = 12) -> TokenSet:
    ids = tiny.tokens(rows, length, 1)
    return token_set([tuple(r) for r in ids.tolist()], range(rows), range(rows), list(map(str, range(rows))), "rows")


def half(teacher: Teacher, tokens: TokenSet) -> tuple[Any, dict[Place, int], dict[Place, float]]:
    """A student that has lost half of what factors can save, its ranks, and the shares lost."""
    sizes = linear_sizes(teacher)
    ranks = ranks_by_energy(sizes, all_energies(teacher, tokens), most_saved(sizes) // 2)
    student, lost = factored(teacher, tokens, ranks)
    return student, ranks, lost


# -- one map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_factors_are_the_truncated_svd_of_the_outputs(outputs: int, inputs: int) -> None:
    """W G^½, cut at rank r and brought back, by numpy; what is lost is the tail of its squares; nothing is nearer."""
    draw = np.random.default_rng(outputs)
    x, w = draw.normal(size=(50, inputs)) * draw.exponential(size=inputs), draw.normal(size=(outputs, inputs))
    gram, weight = torch.from_numpy(x.T @ x), torch.from_numpy(w)
    values, vectors = np.linalg.eigh(x.T @ x)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    u, s, v = np.linalg.svd(w @ root, full_matrices=False)
    of = spectrum(weight, gram)
    assert of.energies.tolist() == pytest.approx((s**2).tolist(), rel=1e-4, abs=1e-4 * s[0] ** 2)
    assert output_energies(weight, gram).tolist() == pytest.approx(of.energies.tolist(), rel=1e-9, abs=1e-9)
    for rank in range(1, min(outputs, inputs) + 1):
        up, down = of.factors(weight, rank)
        product = (up @ down).numpy()
        expected = u[:, :rank] @ np.diag(s[:rank]) @ v[:rank] @ np.linalg.inv(root)
        assert np.abs(product - expected).max() < 1e-4 * np.abs(w).max()
        error = float(((product - w) @ x.T).__pow__(2).sum())
        assert error == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-4, abs=1e-6)
        assert lost_share(of.energies, rank) == pytest.approx(error / float((s**2).sum()), rel=1e-3, abs=1e-6)
        again_up, again_down = spectrum(up @ down, gram).factors(up @ down, rank)
        assert np.abs((again_up @ again_down).numpy() - product).max() < 1e-6, "what is of this rank stays"


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_map_of_the_rank_itself_is_kept_whatever_the_text(outputs: int, inputs: int, tokens: int) -> None:
    """Also of few tokens, which say nothing of most inputs."""
    draw = torch.Generator().manual_seed(tokens)
    low = torch.randn(outputs, 2, generator=draw).double() @ torch.randn(2, inputs, generator=draw).double()
    x = torch.randn(tokens, inputs, generator=draw).double()
    up, down = spectrum(low, x.T @ x).factors(low, 2)
    assert torch.allclose(up @ down, low, atol=1e-6)
    full = torch.randn(outputs, inputs, generator=draw).double()
    up, down = spectrum(full, x.T @ x).factors(full, min(outputs, inputs))
    assert torch.allclose(up @ down, full, atol=1e-4)


def test_inputs_or_weights_that_are_zero_have_factors_too() -> None:
    weight = torch.randn(5, 9).double()
    of = spectrum(weight, torch.zeros(9, 9).double())
    assert lost_share(of.energies, 5) == 0
    assert torch.allclose(of.directions.T @ of.directions, torch.eye(5).double(), atol=1e-9)
    dead = spectrum(torch.zeros(9, 5).double(), torch.eye(5).double())
    assert lost_share(dead.energies, 1) == 0
    assert not torch.cat([part.flatten() for part in dead.factors(torch.zeros(9, 5).double(), 2)]).isnan().any()


# -- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (2, 2), (2, 3), (3, 3), (7, 12), (32, 32), (48, 32), (1, 90)])
def test_no_rank_that_saves_nothing_is_allowed(outputs: int, inputs: int) -> None:
    most = largest_rank(outputs, inputs)
    assert most * (outputs + inputs) < outputs * inputs <= (most + 1) * (outputs + inputs)


@pytest.mark.parametrize("seed", range(12))
def test_ranks_meet_the_budget_at_nearly_the_least_loss(seed: int) -> None:
    """By brute force: no choice that saves the largest map more loses less."""
    draw = np.random.default_rng(seed)
    sizes = {name: (int(draw.integers(3, 9)), int(draw.integers(3, 9))) for name in "abcd"}
    energies = {
        name: torch.from_numpy(np.sort(draw.exponential(size=min(size)) ** 2)[::-1].copy())
        for name, size in sizes.items()
    }

    def options(name: str) -> list[tuple[int, float]]:
        """Parameters saved and share lost: whole, and by rank."""
        o, i = sizes[name]
        cut = [(o * i - r * (o + i), lost_share(energies[name], r)) for r in range(1, largest_rank(o, i) + 1)]
        return [(0, 0.0), *cut]

    def loss(ranks: Mapping[str, int]) -> tuple[int, float]:
        chosen = [options(name)[ranks.get(name, 0)] for name in sizes]
        return sum(saved for saved, _ in chosen), sum(lost for _, lost in chosen)

    every = [
        (sum(saved for saved, _ in some), sum(lost for _, lost in some))
        for some in itertools.product(*map(options, sizes))
    ]
    largest = max(o * i for o, i in sizes.values())
    most = most_saved(sizes)
    assert most == max(saved for saved, _ in every)
    for needed in range(1, most + 1, 5):
        saved, lost = loss(ranks_by_energy(sizes, energies, needed))
        assert saved >= needed
        dearer = [other for enough, other in every if enough >= needed + largest]
        assert lost <= min(dearer, default=float("inf")) + 1e-12
        assert lost >= min(other for enough, other in every if enough >= needed) - 1e-12


def test_maps_of_low_rank_pay_for_the_others() -> None:
    """One map whose outputs lie in two directions: it is cut to them before another loses anything."""
    flat = torch.ones(20).double()
    planted = torch.tensor([5.0, 4.0, *[0.0] * 18]).double()
    sizes = {"planted": (20, 20), "flat": (20, 20)}
    assert ranks_by_energy(sizes, {"planted": planted, "flat": flat}, 320) == {"planted": 2}


# -- a student ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama_tied", "phi3", "gpt2", "falcon", "mixtral"])
def test_a_checkpoint_is_the_model_with_the_products_in_place(checkpoint: Folder, variant: str, tmp_path: Path) -> None:
    """Mask = delete; what was saved; loaded by transformers from the folder alone, with and without the KV cache."""
    teacher, tokens = load(checkpoint(variant)), documents()
    student, ranks, lost = half(teacher, tokens)
    assert ranks.keys() == lost.keys()
    weights: dict[str, torch.Tensor] = {}
    for (site, name), rank in ranks.items():
        place = f"{teacher.architecture.blocks}.{teacher.positions.index(site.block)}.{name}"
        pair = student.get_submodule(place)
        assert pair.up.weight.shape[1] == pair.down.weight.shape[0] == rank
        product = pair.up.weight @ pair.down.weight
        whole = teacher.model.get_parameter(f"{place}.weight")
        weights[f"{place}.weight"] = (
            product if type(teacher.model.get_submodule(place)).__name__ != "Conv1D" else product.T
        )
        assert weights[f"{place}.weight"].shape == whole.shape
    masked = apply(teacher, Plan(), repair=Repair(weights=weights))
    sizes = linear_sizes(teacher)
    saved = sum(o * i - rank * (o + i) for (o, i), rank in ((sizes[place], rank) for place, rank in ranks.items()))
    assert saved >= most_saved(sizes) // 2
    assert sum(p.numel() for p in teacher.model.parameters()) - sum(p.numel() for p in student.parameters()) == saved
    assert (
        teacher.anatomy.total("parameters") - student_as_teacher(teacher, student).anatomy.total("parameters") == saved
    )
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = masked(tokens.rows).logits
        torch.testing.assert_close(student(tokens.rows).logits, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(again(tokens.rows).logits, student(tokens.rows).logits)
        texts = [
            again.generate(
                tokens.rows[:2, :6], attention_mask=torch.ones(2, 6, dtype=torch.int64), max_new_tokens=5,
                do_sample=False, use_cache=cached, pad_token_id=0,
            )
            for cached in (True, False)
        ]  # fmt: skip
    assert torch.equal(*texts)
    assert load(tmp_path / "out", memory=0).pruned == student_as_teacher(teacher, student).pruned


def test_each_map_is_fitted_to_what_the_factors_before_it_give(checkpoint: Folder) -> None:
    """The last map of the last block, from its inputs in the finished student."""
    teacher, tokens = load(checkpoint("llama")), documents()
    sizes = linear_sizes(teacher)
    ranks = {place: largest_rank(*size) // 2 for place, size in sizes.items()}
    student, lost = factored(teacher, tokens, ranks)
    site, name = list(sizes)[-1]
    heard: list[torch.Tensor] = []
    module = student.get_submodule(f"{teacher.architecture.blocks}.{site.block}.{name}")
    module.register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        student(tokens.rows)
    weight = teacher.block(site.block).get_parameter(f"{name}.weight").detach().double()
    of = spectrum(weight, heard[0].T @ heard[0])
    up, down = of.factors(weight, ranks[site, name])
    product = (module.up.weight @ module.down.weight).detach()  # type: ignore[union-attr,operator]
    torch.testing.assert_close(product.double(), up @ down, atol=1e-4, rtol=1e-3)
    assert lost[site, name] == pytest.approx(lost_share(of.energies, ranks[site, name]), rel=1e-3)
    whole = heard[0] @ weight.T
    left = ((heard[0] @ product.double().T - whole) ** 2).sum() / (whole**2).sum()
    assert lost[site, name] == pytest.approx(float(left), rel=1e-2)


def test_a_model_whose_maps_are_of_low_rank_loses_nothing(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("llama"))
    weights = {}
    for block in (1, 2):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        u, s, v = torch.linalg.svd(teacher.model.get_parameter(name).detach(), full_matrices=False)
        weights[name] = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    apply(teacher, Plan(), repair=Repair(weights=weights)).save_pretrained(tmp_path / "planted")
    planted, tokens = load(tmp_path / "planted"), documents()
    sizes = linear_sizes(planted)
    gain = sum(
        o * i - 3 * (o + i) for (site, name), (o, i) in sizes.items() if name == "mlp.up_proj" and site.block in (1, 2)
    )
    ranks = ranks_by_energy(sizes, all_energies(planted, tokens), gain)
    assert ranks == {(Site(block, "mlp"), "mlp.up_proj"): 3 for block in (1, 2)}
    student, lost = factored(planted, tokens, ranks)
    assert max(lost.values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(student(tokens.rows).logits, planted.model(tokens.rows).logits, atol=1e-4, rtol=1e-3)


def test_factors_stay_when_sites_are_removed_and_go_with_their_site(checkpoint: Folder, tmp_path: Path) -> None:
    teacher, tokens = load(checkpoint("llama")), documents()
    sizes = linear_sizes(teacher)
    everywhere = {place: 4 for place in sizes if place[1] in ("mlp.down_proj", "self_attn.q_proj")}
    student, _ = factored(teacher, tokens, everywhere)
    save(student, None, Plan(), tmp_path / "factors", teacher=teacher)
    again, plan = load(tmp_path / "factors"), Plan.parse(["attention.0", "mlp.0", "mlp.2"])
    assert again.removed_earlier == Plan()
    smaller = apply(again, plan)
    save(smaller, None, plan, tmp_path / "both", teacher=again)
    both = load(tmp_path / "both")
    assert both.removed_earlier == plan
    assert both.pruned.factors.keys() == {Site(b, p) for b in (1, 2, 3) for p in ("attention", "mlp")} - {
        Site(2, "mlp")
    }  # type: ignore[comparison-overlap]
    removed, left = Probe(again, tokens, "kl").losses([plan]), Probe(both, tokens, "nll").losses([Plan()])
    assert removed[0].mean > 0
    assert left[0].mean == pytest.approx(Probe(again, tokens, "nll").losses([plan])[0].mean, rel=1e-5)
    assert linear_sizes(both).keys() == set(), "a part with factors is not factored again"
    with pytest.raises(PlanError, match=r"no place for two factors of a weight, as attention\.0 has"):
        apply(again, Plan(), stock=True)
    with pytest.raises(PlanError, match="cannot be narrowed"):
        again.anatomy.check(Plan.parse(["mlp.1[0-15]"]))
    shape = student_shape(again, Plan())
    for name, fits in (("transformers", True), ("stock", False), ("gguf", False), ("deci", False)):
        faults = [form.fault(shape) for form in EXPORTS.facts(name)]
        assert (None in faults) == fits, name
        assert fits or "factors" in {fault.reason for fault in faults if fault is not None}


def test_factors_that_save_nothing_are_refused(checkpoint: Folder) -> None:
    student = apply(load(checkpoint("llama")), Plan())
    block = student.model.layers[0]
    outputs, inputs = block.mlp.up_proj.weight.shape
    rank = largest_rank(outputs, inputs) + 1
    with pytest.raises(PlanError, match=rf"rank {rank} in the place of mlp.up_proj save nothing.*rank of {rank - 1}"):
        put_factors(block, "mlp.up_proj", torch.zeros(outputs, rank), torch.zeros(rank, inputs))
    assert type(block.mlp.up_proj) is torch.nn.Linear


def test_the_factors_are_those_of_the_checkpoints_dtype(tmp_path: Path) -> None:
    """So that what is measured is what is saved."""
    tiny.saved(tmp_path / "half", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half16")
    teacher, tokens = load(tmp_path / "half16"), documents()
    student, ranks, _ = half(teacher, tokens)
    assert teacher.model.dtype == torch.float32
    for site, name in ranks:
        pair = student.get_submodule(f"model.layers.{site.block}.{name}")
        assert torch.equal(pair.up.weight, pair.up.weight.bfloat16().float())
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong", [7, {"mlp.1": {"mlp.up_proj": 0}}, {"mlp.9": {"mlp.up_proj": 3}}, {"mlp.1": {"mlp.none": 3}},
              {"mlp.1": {"mlp.up_proj": 5}}, {"mlp.1": {"mlp": 3}}, {"head.1": {}}]
)  # fmt: skip
def test_a_config_that_says_other_factors_is_refused(checkpoint: Folder, tmp_path: Path, wrong: Any) -> None:
    teacher = load(checkpoint("llama"))
    student, _ = factored(teacher, documents(), {(Site(1, "mlp"), "mlp.up_proj"): 4})
    save(student, None, Plan(), tmp_path / "out", teacher=teacher)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["billhook"]["factors"] == {"mlp.1": {"mlp.up_proj": 4}}
    config["billhook"]["factors"] = wrong
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load(tmp_path / "out")
