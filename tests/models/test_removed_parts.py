"""A removed part adds nothing and launches nothing, and whoever reads it finds zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from billhook.core.plan import Plan, Site
from billhook.models import modeling_billhook
from billhook.models.load import load
from billhook.models.modeling_billhook import Zero
from billhook.models.surgery import apply

PLAN = Plan(frozenset([Site(0, "mlp"), Site(1, "attention"), Site(2, "mlp"), Site(3, "attention")]))


def test_a_sum_with_nothing_is_its_other_term() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for outputs in (1, 2):
        nothing = Zero(outputs)(x) if outputs == 1 else Zero(outputs)(hidden_states=x)[0]
        assert all(found is y for found in (y + nothing, nothing + y, torch.add(y, nothing), y.add(nothing)))
        assert nothing + nothing + y is y
        assert torch.nn.functional.dropout(nothing, 0.1, training=True) + y is y
        z = y.clone()
        z += nothing
        assert torch.equal(z, y)


def test_what_is_no_sum_of_its_kind_reads_zeros() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    nothing, zeros = Zero(1)(x), torch.zeros_like(x)
    assert torch.equal(nothing * 2.0, zeros)
    assert torch.equal(y * nothing, zeros)
    assert torch.equal(torch.cat([y, nothing]), torch.cat([y, zeros]))
    assert (y.half() + nothing).dtype == torch.float32
    assert (y[:1] + nothing).shape == (2, 3, 4)
    assert torch.equal(nothing + 1, zeros + 1)
    assert nothing.to(torch.float16).dtype == torch.float16
    assert nothing.shape == x.shape
    with pytest.raises(AttributeError):
        _ = nothing.no_such_thing


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_outputs_are_those_with_zeros_added(
    variant: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and greedy tokens with the KV cache, bit for bit."""
    teacher, rows = load(checkpoint(variant), device="cpu", dtype="float32"), tiny.tokens(2, 9)
    student = apply(teacher, PLAN)

    def outputs() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [student(rows).logits, student.generate(rows, max_new_tokens=4, do_sample=False)]

    found = outputs()

    def zeros(self: Zero, hidden_states: torch.Tensor | None = None, *args: object, **kwargs: object) -> object:
        added = torch.zeros_like(hidden_states)
        return (added, None) if self.outputs == 2 else added

    monkeypatch.setattr(modeling_billhook.Zero, "forward", zeros)
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(), strict=True))
