"""llama.cpp in a process of its own: what it computes, and what becomes of a file that it refuses or dies of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from billhook.core.plan import Plan
from billhook.methods.export import Student, export_student
from billhook.models.load import load
from billhook.runtimes import RUNTIMES, RuntimeFailed, Served

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
IDS = tiny.tokens(1, 40)[0].tolist()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a GGUF file in float32."""
    home = tmp_path_factory.mktemp("gguf")
    teacher = load(tiny.saved(home / "model", "llama"))
    student = Student(teacher.model, teacher, Plan(), tiny.tokens(1, 8), verify=False)
    return export_student("gguf", student, home / "out", dtype="f32").folder / "model-F32.gguf"


def test_probabilities_answers_and_numbers(file: Path) -> None:
    """Greedy decoding with the cache takes the most likely token of the whole text, and forgets earlier questions."""
    with Served("llama.cpp", file, context=64, threads=1) as served:
        first = served.logprobs(IDS)
        assert first.shape == (40, 64)
        np.testing.assert_allclose(np.exp(first.astype(np.float64)).sum(-1), 1, atol=1e-6)
        made = served.generate(IDS[:8], 12)
        after = served.logprobs([*IDS[:8], *made])
        assert made == after[7:-1].argmax(-1).tolist()
        np.testing.assert_array_equal(served.logprobs(IDS), first)
        taken = served.time(IDS, 4)
        assert min(taken.prefill_s, taken.decode_s) > 0
        numbers = served.numbers()
    assert numbers.weight_bytes is not None
    assert 0 < numbers.weight_bytes < file.stat().st_size
    assert numbers.kv_bytes is not None
    assert (numbers.peak_bytes or 0) > numbers.kv_bytes > 0
    assert (numbers.name, numbers.version) == ("llama.cpp", RUNTIMES["llama.cpp"].version)


def test_a_text_is_longer_than_one_batch(file: Path) -> None:
    ids = tiny.tokens(1, 600)[0].tolist()
    with Served("llama.cpp", file, context=640, threads=1) as served:
        whole = served.logprobs(ids)
        short = served.logprobs(ids[:40])  # with another batch, sums are rounded in another order
        assert float((np.exp(short) * (short - whole[:40])).sum(-1).max()) < 1e-3
    assert whole.shape == (600, 64)


@pytest.mark.parametrize("left", [b"", b"no such format", b"half"])
def test_a_file_that_does_not_load_is_a_message(left: bytes, file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if left == b"half" else left)
    with pytest.raises(RuntimeFailed, match=rf"llama\.cpp refuses {bad}: ValueError: .*(fail|error|invalid)"):
        Served("llama.cpp", bad)


def test_a_crash_of_the_engine_is_a_message(file: Path, tmp_path: Path) -> None:
    """Of type deci without a width of the last MLP llama.cpp computes no output, and aborts."""
    from billhook.core.events import ignore_events
    from billhook.models.formats.gguf_metadata import model_keys
    from billhook.models.formats.gguf_rows import DECI_ROWS
    from billhook.models.formats.gguf_tensors import contents
    from billhook.models.formats.gguf_writer import write_file

    model, row = tiny.build("llama"), DECI_ROWS["llama"]
    held = contents(model, row)
    held.widths[-1] = 0
    for name in [name for name in held.pieces if name.startswith("blk.3.ffn")]:
        del held.pieces[name]
    bad = tmp_path / "bad.gguf"
    keys = {**model_keys(model.config, row, held), "tokenizer.ggml.model": "no_vocab"}
    write_file(bad, row.name, keys, held, dtype="f32", watch=ignore_events)
    with pytest.raises(RuntimeFailed, match=rf"llama\.cpp ended with signal 6 on {bad}\. It wrote: .*GGML_ASSERT"):  # noqa: SIM117
        with Served("llama.cpp", bad, threads=1) as served:
            served.logprobs(IDS)


def test_the_process_of_a_runtime_imports_no_torch() -> None:
    code = "import sys, billhook.runtimes.worker, billhook.runtimes.llama_cpp; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
