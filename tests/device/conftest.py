"""Fixtures of the tests of devices."""

from __future__ import annotations

from functools import partial

import pytest

from billhook.core.results.measured import TimingProtocol
from billhook.runs import evaluation


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with answers and timings of a few tokens."""
    monkeypatch.setattr(evaluation, "TimingProtocol", partial(TimingProtocol, 6, 2, 1, 1))
    monkeypatch.setattr(evaluation, "PROMPTS", evaluation.PROMPTS[:2])
    monkeypatch.setattr(evaluation, "SAMPLE_TOKENS", 2)
