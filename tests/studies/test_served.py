"""Models in the runtime that serves them: the same items and statistics, on the files that users get."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import torch
from typer.testing import CliRunner

import billhook
from billhook.cli import main, session
from billhook.core.errors import BillhookError
from billhook.core.events import Event
from billhook.data.choice_tasks import task_tokens
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.methods.evaluate.runtime_speed import predicted_ratio
from billhook.methods.evaluate.served import ServedModel, ServedTokenizer
from billhook.report.compare_words import size_rows
from billhook.runtimes import RUNTIMES, Runtime
from billhook.runtimes.artefacts import ReadWeights, find_artefact, is_served, read_weights

pytest.importorskip("xllamacpp")
TEXTS = ("w1 w12, w3.", " two  blanks\n\n1. x", "Käfer 敏捷 🦊", "")


@dataclass(frozen=True)
class Home:
    """A checkpoint, its GGUF file, and that of another model; text, a task of choices and one of questions."""

    folder: Path
    file: str
    other: str
    text: str
    task: str
    questions: str

    @property
    def options(self) -> dict[str, object]:
        return {"eval_tokens": 600, "eval_length": 48}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    place = tmp_path_factory.mktemp("served")
    folder, other = tiny_gguf.folder(place / "checkpoint"), tiny_gguf.folder(place / "other", seed=1)
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=n))

    items = [{"query": words(4), "choices": [words(2) for _ in range(3)], "gold": draw.randrange(3)} for _ in range(60)]
    (place / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    (place / "questions.jsonl").write_text(json.dumps({"query": "w1", "target": "2"}) + "\n")
    text = tiny.write_texts(place / "texts.jsonl", 60, words=8)
    return Home(
        folder, f"llama.cpp:{tiny_gguf.file(folder, place / 'student.gguf')}",
        f"llama.cpp:{tiny_gguf.file(other, place / 'other.gguf')}", str(text), str(place / "task.jsonl"),
        str(place / "questions.jsonl"),
    )  # fmt: skip


def test_tokens_are_those_of_the_checkpoint(home: Home) -> None:
    tokenizer = billhook.load(home.folder).tokenizer
    served = ServedTokenizer(ServedModel(find_artefact(home.file)))
    assert tokenizer is not None
    for special in (True, False):
        mine, theirs = tokenizer(list(TEXTS), add_special_tokens=special), served(TEXTS, add_special_tokens=special)
        assert theirs["input_ids"] == mine["input_ids"]
    assert served.bos_token_id == tokenizer.bos_token_id


def test_a_runtime_is_opened_anew_for_a_longer_row(home: Home) -> None:
    model = ServedModel(find_artefact(home.file))
    short = model(tiny.tokens(2, 20))
    first = model.opened()
    long = model(torch.cat([tiny.tokens(2, 20), tiny.tokens(2, 600)], 1))
    assert model.opened() is not first
    torch.testing.assert_close(long.logits[:, :20], short.logits, atol=0.05, rtol=0)  # a cache of float16
    torch.testing.assert_close(long.logits.exp().sum(-1), torch.ones(2, 620), atol=1e-4, rtol=0)


def test_perplexity_is_that_of_the_checkpoint(home: Home) -> None:
    mine, theirs = (
        billhook.evaluate(model, eval_data=home.text, **home.options)  # type: ignore[arg-type]
        for model in (home.folder, home.file)
    )
    assert theirs.data == mine.data, "the same tokens, documents and hash"
    assert mine.perplexity is not None
    assert theirs.perplexity is not None
    for end in ("value", "low", "high"):
        assert getattr(theirs.perplexity, end) == pytest.approx(getattr(mine.perplexity, end), rel=2e-3)
    assert theirs.bits_per_byte is None
    session.print_result(theirs)


def test_choices_have_the_log_probabilities_of_the_checkpoint(home: Home, tmp_path: Path) -> None:
    teacher, model = billhook.load(home.folder), ServedModel(find_artefact(home.file))
    tokens = task_tokens(home.task, teacher.tokenizer, positions=96)
    theirs = task_tokens(home.task, ServedTokenizer(model), positions=96)
    assert theirs.hash == tokens.hash
    mine = log_probabilities(teacher.model, tokens)
    assert log_probabilities(model, theirs) == pytest.approx(
        mine, abs=0.1
    )  # nats of 7 tokens and more; a cache of float16
    store = tmp_path / "store.db"
    scores = [billhook.evaluate_tasks(m, [home.task], store=store).scores for m in (home.folder, home.file)]
    assert [(s.score, s.estimate.n) for s in scores[0]] == [(s.score, s.estimate.n) for s in scores[1]]
    for a, b in zip(*scores, strict=True):
        assert a.estimate.value == pytest.approx(b.estimate.value, abs=1 / 60)


def test_compare_pairs_a_checkpoint_with_its_file(home: Home, tmp_path: Path) -> None:
    given = {"data": home.text, "tasks": home.task, "store": tmp_path / "store.db", "out": tmp_path / "page"}
    found = billhook.compare(home.folder, home.file, margins=["5pp", "1%ppl"], **given, **home.options)  # type: ignore[arg-type]
    verdicts = {each.info.source: each.pairs[0] for each in found.sets}
    assert verdicts[home.text].verdict == "equivalent"
    assert verdicts[home.task] is not None
    assert found.agreement[0].kl.value == pytest.approx(0, abs=1e-4)
    assert found.agreement[0].same.value > 0.99
    assert found.speed == (None,), "they run in different software"
    rows = {row[0]: row for row in size_rows(found)}
    assert rows["Parameters"][1] == rows["Parameters"][2]
    assert "FLOPs / token" not in rows, "a file does not say them"


def test_two_files_are_timed_in_their_runtime_while_compared(home: Home, tmp_path: Path) -> None:
    given = {"data": home.text, "store": tmp_path / "store.db", "out": tmp_path / "page"}
    found = billhook.compare(home.file, home.other, **given, **home.options)  # type: ignore[arg-type]
    assert found.speed[0] is not None
    assert found.speed[0].decode_ratio.n == 9
    assert found.sets[0].pairs[0] is not None


def test_the_gate_is_about_the_file(home: Home, tmp_path: Path) -> None:
    given = {"data": home.text, "margins": "3%ppl", "store": tmp_path / "store.db"} | home.options
    assert billhook.gate(home.file, home.folder, **given).verdict == "PASS"  # type: ignore[arg-type]
    assert billhook.gate(home.other, home.folder, **given).verdict == "FAIL"  # type: ignore[arg-type]
    stored = {name: value for name, value in given.items() if name != "margins"}
    billhook.save_baseline("shipped", home.file, **stored)  # type: ignore[arg-type]
    again = billhook.gate(home.folder, "shipped", margins="3%ppl", store=given["store"])  # type: ignore[arg-type]
    assert again.verdict == "PASS"


def test_an_export_inside_a_run_knows_what_its_search_has_seen(home: Home, tmp_path: Path) -> None:
    run = tmp_path / "run"
    place = run / "exports" / "gguf" / "student.gguf"
    place.parent.mkdir(parents=True)
    shutil.copyfile(home.file.partition(":")[2], place)
    model = billhook.load(home.folder)
    from billhook.runs.prepare import read_held_out_half
    from billhook.runs.recipe import EvalOptions, parse_options

    options = parse_options(EvalOptions, {"model": str(home.folder), **home.options})
    seen = read_held_out_half(options, home.text, model, seed=0).digests
    (run / "report.json").write_text(json.dumps({"seen": list(seen)}))
    with pytest.raises(BillhookError, match="was pruned, or recovered, on text that is in"):
        billhook.gate(f"llama.cpp:{place}", home.folder, data=home.text, store=tmp_path / "s.db", **home.options)  # type: ignore[arg-type]


def test_speed_is_measured_in_the_runtime_in_turn(
    home: Home, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    events: list[Event] = []
    names = [each.partition(":")[2] for each in (home.file, home.other)]
    found = {
        prompt: billhook.measure_speed(
            *names, engine="llama.cpp", watch=events.append,
            protocol=billhook.TimingProtocol(prompt_tokens=prompt, new_tokens=8, repeats=6), store=tmp_path / "s.db",
        )
        for prompt in (16, 1000)
    }  # fmt: skip
    report = found[16]
    assert report.runtime == f"llama.cpp {RUNTIMES['llama.cpp'].version}"
    assert [each.model for each in report.models] == names
    assert report.ratio is not None
    assert (report.ratio.decode.n, report.ratio.decode.reliable) == (6, True)
    for each, longer in zip(report.models, found[1000].models, strict=True):
        assert each.kv_bytes is not None
        assert longer.kv_bytes is not None
        assert 0 < each.kv_bytes < longer.kv_bytes
        assert each.rates.decode_tokens_per_s.low > 0
        assert each.rates.peak_bytes is not None
        assert each.rates.peak_bytes > 2**20
    assert [event.done for event in events[:4]] == [1, 2, 3, 4]
    assert events[13].done == events[13].total == 14
    session.print_result(report)
    told = capsys.readouterr().out
    assert "KV cache" in told
    assert "By their weights alone it would be: prefill ×1.00, decode ×1.00" in told
    assert "llama.cpp" in told
    typed = ["speed", "--engine", "llama.cpp", *names, "--repeats", "2", "--new-tokens", "2", "--quiet"]
    typed += ["--store", str(tmp_path / "s.db")]
    assert ": prefill ×" in CliRunner().invoke(main.app, typed, env={"COLUMNS": "200"}).output
    assert type(report).from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_pruning_is_held_against_quantising_as_its_runtime_measured_it(home: Home, tmp_path: Path) -> None:
    """Export by llama.cpp's q8_0, time it there against the whole model, compare it on text, and ask for the cost."""
    given: dict[str, Any] = {"store": tmp_path / "s.db"}
    little: dict[str, Any] = {"tokens": 96, "length": 24, "self_share": 0.0, "data": home.text, **home.options}
    run = billhook.prune(home.folder, plan="mlp.1", out=tmp_path / "pruned", device="cpu", **given, **little)
    quantised, whole = tmp_path / "q8", home.file.partition(":")[2]
    billhook.export(home.folder, "gguf", dtype="q8_0", out=quantised, **given)
    name = f"llama.cpp:{quantised}"
    by_size = billhook.cost(run.run, price_per_hour=1.0, against=name, **given).costs[2]
    assert by_size.bytes == sum(file.stat().st_size for file in quantised.glob("*.gguf"))
    assert by_size.rate.source.startswith("bytes of the files")
    protocol = billhook.TimingProtocol(prompt_tokens=8, new_tokens=4, repeats=6)
    timed = billhook.measure_speed(whole, quantised, engine="llama.cpp", protocol=protocol, **given)  # type: ignore[arg-type]
    compared = billhook.compare(
        home.file, name, data=home.text, timed=False, out=tmp_path / "c", **given, **home.options
    )  # type: ignore[arg-type]
    teacher, _, rival = billhook.cost(run.run, price_per_hour=1.0, against=name, **given).costs
    pair = compared.sets[0].pairs[0]
    assert timed.ratio is not None
    assert pair is not None
    assert rival.saved is not None
    assert rival.ratio is not None
    assert rival.rate.value == pytest.approx(teacher.rate.value * timed.ratio.decode.value), "runtimes are not mixed"
    assert "in llama.cpp" in rival.rate.source
    assert rival.saved.value == pytest.approx(1 - 1 / timed.ratio.decode.value)
    assert rival.ratio.value == pytest.approx(math.exp(pair.change.value))
    typed = ["cost", run.run, "--price-per-hour", "0.8", "--against", name, "--store", str(given["store"])]
    done = CliRunner().invoke(main.app, typed, env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("variant", ["llama", "llama_tied"])
def test_a_speed_is_predicted_by_the_weights_that_a_token_meets(variant: str, tmp_path: Path) -> None:
    """By the parameters of the model: an embedding that is only looked up does not count. Of a folder and of a file."""
    folder = tiny.saved(tmp_path / "model", variant, intermediate_size=64)
    teacher = billhook.load(folder)
    student = tmp_path / "student"
    plan = billhook.Plan.parse(["mlp.1", "attention.1", "mlp.2[0-31]"])
    billhook.save(billhook.apply(teacher, plan), None, plan, student, teacher=teacher)
    count = {}
    for place in (folder, student):
        model = billhook.load(place).model
        count[place] = sum(p.numel() for p in model.parameters())
        if variant == "llama":
            count[place] -= model.get_input_embeddings().weight.numel()
        files = read_weights(find_artefact(f"mlx:{place}"))
        assert files == ReadWeights(4 * count[place], count[place])
        out = tmp_path / f"{place.name}-gguf"
        billhook.export(place, "gguf", out=out, dtype="f16", verify=False, store=tmp_path / "s.db")
        told = read_weights(find_artefact(f"llama.cpp:{out}"))
        assert told is not None
        assert told.elements == count[place]
        assert 2 * told.elements < told.bytes < 2.2 * told.elements, "vectors are float32"
    predicted = predicted_ratio(*(find_artefact(f"mlx:{place}") for place in (folder, student)))
    assert predicted is not None
    assert predicted.decode == predicted.prefill == pytest.approx(count[folder] / count[student])


def test_the_process_of_a_runtime_is_without_torch() -> None:
    code = "import billhook.runtimes.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "its memory would be counted"


def test_names_of_runtimes_are_told_from_those_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_served("llama.cpp:student.gguf")
    assert is_served("vllm:/models/student")
    for name in ("student.gguf", "demo", "alice/model", "C:\\models\\x", "https://host/x", "a:"):
        assert not is_served(name)
    Path("llama.cpp:student.gguf").write_text("")
    assert not is_served("llama.cpp:student.gguf"), "a file of that name is meant"


def test_a_folder_with_one_gguf_file_stands_for_it(home: Home, tmp_path: Path) -> None:
    shutil.copyfile(home.file.partition(":")[2], tmp_path / "a.gguf")
    assert find_artefact(f"llama.cpp:{tmp_path}").path == tmp_path / "a.gguf"
    assert find_artefact(f"llama.cpp:{tmp_path}").identity == find_artefact(home.file).identity
    assert find_artefact(home.other).identity != find_artefact(home.file).identity


def test_every_mistake_is_one_message_that_says_what_to_type(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES._entries, "absent", Runtime("x", "no_such_package", "x", "llama"))
    (tmp_path / "half.gguf").write_bytes(b"GGUF")
    store, file = tmp_path / "store.db", home.file.partition(":")[2]
    once = billhook.TimingProtocol(batch=2)
    for call, message in (
        (lambda: billhook.evaluate("lama.cpp:x.gguf"), "no engine called 'lama.cpp'. Did you mean 'llama.cpp'"),
        (lambda: billhook.evaluate("absent:x.gguf"), "pip install 'billhook[llama]'"),
        (lambda: billhook.evaluate("llama.cpp:no.gguf"), "no file or folder no.gguf. Give what `billhook"),
        (lambda: billhook.evaluate(f"llama.cpp:{tmp_path / 'half.gguf'}"), "half.gguf is no GGUF file"),
        (lambda: billhook.prune(home.file, remove="1sites", store=store), "Name the checkpoint that was exported"),
        (lambda: billhook.sweep(home.file, remove="1sites", store=store), "Name the checkpoint that was exported"),
        (lambda: billhook.score(home.file), "Name the checkpoint that was exported"),
        (lambda: billhook.evaluate_tasks(home.file, [home.questions], store=store), "runs in llama.cpp, where text"),
        (lambda: billhook.evaluate_tasks(home.file, ["lmeval:piqa"], store=store), "and lmeval:piqa is neither"),
        (lambda: billhook.measure_speed(home.file), "and speed with engine='llama.cpp'."),
        (lambda: billhook.measure_speed(file, engine="vlm"), "There is no engine called 'vlm'"),
        (lambda: billhook.measure_speed(file, engine="llama.cpp", device="cpu"), "Leave device= and dtype= out"),
        (lambda: billhook.measure_speed(file, engine="llama.cpp", protocol=once), "Leave batch= out"),
    ):  # fmt: skip
        with pytest.raises(BillhookError, match=re.escape(message)):
            call()
    assert not store.exists() or not [run for run in billhook.list_runs(store) if run.kind in ("prune", "sweep")]
