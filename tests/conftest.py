"""Fixtures: tiny checkpoints, made once a test run, and a tokenizer for them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, which run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
# Of this process and those that tests start, before torch looks for devices: none, or two for `make test-gpu`.
os.environ["CUDA_VISIBLE_DEVICES"] = (
    os.environ.get("CUDA_VISIBLE_DEVICES", "0,1") if os.environ.get("BILLHOOK_TEST_DEVICE") else ""
)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import browser
import places
import pretended
import tiny
import torch
import transformers
from hypothesis import HealthCheck, settings

from billhook.methods.evaluate import speed
from billhook.models import device

torch.set_num_threads(1)  # the tests themselves run side by side
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
# A property holds however busy the machine is, and fixtures that are only read may serve every example.
settings.register_profile(
    "billhook",
    parent=settings.default,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("billhook")


def pytest_configure() -> None:
    """Refuse `make test-gpu` on a machine without a GPU, and say what to do; pin the CPU for all other tests."""
    if places.ASKED:
        places.real_device()
    else:
        torch.backends.mps.is_available = lambda: False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of the whole, which are the longest: no process waits for one at the end."""
    items.sort(key=lambda item: item.path.parent.name != "tests")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Pretend a device before any test runs, where one needs it: torch counts devices at its first backward pass."""
    if not places.ASKED and any(item.path.parent.name == "device" for item in session.items):
        pretended.register()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(variant): the folder of a tiny random model, written once. Read only."""
    home = tmp_path_factory.mktemp("models")

    def folder(variant: str) -> Path:
        path = home / variant
        return path if path.exists() else tiny.saved(path, variant)

    return folder


@pytest.fixture(scope="session", autouse=True)
def peak_of_this_process() -> Iterator[None]:
    """Peak memory is this process's, not that of two more which import torch for it; test_cli's are as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "peak_bytes", lambda *_: device.peak_memory(torch.device("cpu")))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer: what `billhook prune` takes. Read only."""
    return tiny.with_tokenizer(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 80 short texts for calibration and evaluation."""
    return tiny.write_texts(tmp_path_factory.mktemp("text") / "texts.jsonl", 80)


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    """One tab of a headless Chromium."""
    if browser.CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    with browser.opened(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab
