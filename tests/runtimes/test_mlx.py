"""A folder in MLX, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file

from billhook.core.plan import Plan
from billhook.methods.export import Student, export_student
from billhook.models.load import load
from billhook.models.surgery import apply
from billhook.runtimes import RUNTIMES, RuntimeFailed, Served

pytestmark = pytest.mark.skipif(not RUNTIMES["mlx"].installed, reason="needs mlx-lm")


def test_a_folder_is_proven_in_mlx_and_answers(model: Path, tmp_path: Path) -> None:
    teacher, plan = load(model), Plan.parse(["attention.2", "mlp.1[0-30]"])
    rows = tiny.tokens(2, 12)
    got = export_student("deci", Student(apply(teacher, plan), teacher, plan, rows), tmp_path / "out")
    proof = got.verified
    assert proof is not None
    assert (proof.runtime, proof.positions, proof.agreement, proof.generated) == ("mlx", 12, 1.0, proof.of)
    assert proof.worst < 1e-6
    assert proof.texts
    ids = rows[0].tolist()
    with Served("mlx", got.folder) as served:
        told = served.logprobs(ids)
        np.testing.assert_allclose(np.exp(told.astype(np.float64)).sum(-1), 1, atol=1e-5)
        made = served.generate(ids, 5)
        for position, token in enumerate(made):  # greedy decoding with the cache is the most likely token without it
            assert int(served.logprobs(ids + made[:position])[-1].argmax()) == token
        taken = served.time(ids, 4)
        numbers = served.numbers()
        assert served.tokenize("w1 w2") == teacher.tokenizer("w1 w2")["input_ids"]  # type: ignore[misc]
    assert min(taken.prefill_s, taken.decode_s) > 0
    assert numbers.version
    assert numbers.weight_bytes == sum(tensor.nbytes for tensor in load_file(got.folder / "model.safetensors").values())
    assert numbers.kv_bytes
    assert numbers.peak_bytes


def test_a_folder_that_mlx_does_not_load_is_refused(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "other", "llama")
    tiny.change_json(folder / "config.json", model_type="nemotron-nas", block_configs=[])
    with pytest.raises(RuntimeFailed, match=r"mlx refuses .*block_configs"):
        Served("mlx", folder)
