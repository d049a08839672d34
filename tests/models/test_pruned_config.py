"""What a pruned checkpoint says of itself is read as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook.core.plan import Plan, Site
from billhook.core.plan_files import read_plan
from billhook.methods.export.checkpoint import save
from billhook.models.load import load
from billhook.models.pruned_config import NarrowedSite, PrunedConfig, read_config, write_config
from billhook.models.repair import NO_REPAIR, Patch, Repair
from billhook.models.surgery import apply

Folder = Callable[[str], Path]
PATCH = Repair(patches={Site(1, "mlp"): Patch(bias=torch.ones(32))})
BIAS = {"bias": True, "gain": False, "rank": 0}
CASES: dict[str, tuple[str, bool, Repair, PrunedConfig]] = {
    "nothing": ("", False, NO_REPAIR, PrunedConfig(4, (0, 1, 2, 3))),
    "a block": ("attention.1,mlp.1", False, NO_REPAIR, PrunedConfig(4, (0, 2, 3))),
    "a site": ("attention.2,attention.1,mlp.1", False, NO_REPAIR, PrunedConfig(4, (0, 2, 3), (Site(2, "attention"),))),
    "zeros": ("mlp.3", True, NO_REPAIR, PrunedConfig(4, (0, 1, 2, 3), zeroed=(Site(3, "mlp"),))),
    "a patch": ("attention.0,mlp.0,mlp.1", False, PATCH,
                PrunedConfig(4, (1, 2, 3), (Site(1, "mlp"),), patches={Site(1, "mlp"): BIAS})),
}  # fmt: skip


def student(folder: Path, names: str, stock: bool = False, repair: Repair = NO_REPAIR) -> Any:
    return apply(load(folder), Plan.parse([n for n in names.split(",") if n]), stock=stock, repair=repair)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen3_moe"])
def test_a_config_says_what_was_pruned(case: str, variant: str, checkpoint: Folder, tmp_path: Path) -> None:
    names, stock, repair, wanted = CASES[case]
    teacher = load(checkpoint(variant))
    assert teacher.pruned == PrunedConfig(4, (0, 1, 2, 3))
    made = student(checkpoint(variant), names, stock, repair)
    assert read_config(made.config) == wanted
    plan = Plan.parse([n for n in names.split(",") if n])
    if plan:
        save(made, None, plan, tmp_path / "out", teacher=teacher)
        again = load(tmp_path / "out")
        assert again.pruned == wanted
        assert again.removed_earlier == wanted.removed == (Plan() if stock else plan)
        assert again.positions == wanted.kept_blocks
        manifest = json.loads((tmp_path / "out" / "billhook.json").read_text())
        assert (manifest["removed"], manifest["model"], manifest["blocks"]) == (plan.names(), teacher.fingerprint, 4)
        assert read_plan(str(tmp_path / "out" / "billhook.json"), teacher.anatomy, teacher.fingerprint) == plan


def test_a_narrowed_site_says_its_groups_widths_and_shapes(checkpoint: Folder) -> None:
    told = read_config(student(checkpoint("llama"), "mlp.2[0-7 16-31],attention.0,mlp.0").config)
    site = told.narrowed[Site(2, "mlp")]
    assert (len(site.groups), site.whole, site.widths) == (24, 48, {"intermediate_size": 24})
    assert site.module is not None
    assert site.module["shapes"]["mlp.down_proj.weight"] == [32, 24]
    assert told.index(Site(2, "mlp")) == 1
    assert told.group_ids(Site(2, "mlp"), 24) == (site.groups, 48)
    assert told.group_ids(Site(1, "mlp"), 48) == (tuple(range(48)), 48)


def test_widths_that_are_alike_stand_in_the_stock_config(checkpoint: Folder) -> None:
    made = student(checkpoint("llama"), ",".join(f"mlp.{i}[0-15]" for i in range(4)))
    assert made.config.intermediate_size == 16
    assert read_config(made.config).narrowed == {
        Site(i, "mlp"): NarrowedSite(tuple(range(16)), 48) for i in range(4)
    }  # fmt: skip


def test_what_is_written_is_read(checkpoint: Folder) -> None:
    """Everything at once, more than any one student has."""
    config = student(checkpoint("llama"), "mlp.1").config
    narrow = NarrowedSite((0, 2), 4, {"num_attention_heads": 2}, {"shapes": {}, "attributes": {}})
    told = PrunedConfig(9, (1, 4, 7, 8), (Site(4, "mlp"), Site(7, "mlp")), (), {Site(8, "attention"): narrow},
                        {Site(4, "mlp"): {"bias": False, "gain": True, "rank": 3}})  # fmt: skip
    write_config(config, told, "model.layers", {})
    config.num_hidden_layers = 4
    assert read_config(config) == told
    assert read_config(type(config).from_dict(json.loads(json.dumps(config.to_dict())))) == told
    assert len(told.removed.removed) == 2 * 5 + 2


def test_only_one_file_knows_how_it_is_spelt() -> None:
    house = Path(tiny.__file__).resolve().parents[1] / "billhook"
    files = {path.name: path.read_text() for path in house.rglob("*.py")}
    allowed = {"pruned_config.py", "modeling_billhook.py"}
    for word in ('"kept_blocks"', "config.billhook[", "config.billhook.get", '"per_layer_config"]'):
        assert {name for name, text in files.items() if word in text} <= allowed, word
