"""The command line: one JSON object on stdout, tables of 80 columns, exit codes, and a fast --help."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from billhook import api
from billhook.cli import main, options
from billhook.cli.options import command_line
from billhook.core.errors import ResourceError
from billhook.core.results.measured import Environment, Estimate, TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.core.results.run import Rates, SpeedRatio

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("prune", "inspect", "eval", "speed", "abtest", "runs", "show", "methods")
ENV = {"COLUMNS": "80", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
REMOVE = "attention.2,mlp.1"


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Commands take SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def billhook(*arguments: object) -> Result:
    return CliRunner().invoke(main.app, [str(a) for a in arguments], env=ENV, prog_name="billhook")


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "billhook", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | ENV, stdout=pipe, stderr=pipe, text=True, **options)


def one_object(stdout: str) -> dict[str, Any]:
    """The JSON object that is all of `stdout`."""
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value


@dataclass(frozen=True)
class Pruned:
    """A run that a child process finished."""

    result: dict[str, Any]
    stderr: str
    out: Path
    store: Path  # with a space in its name
    options: tuple[str, ...]  # data and size

    @property
    def run(self) -> str:
        return str(self.result["run"])


@pytest.fixture(scope="module")
def pruned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    home = tmp_path_factory.mktemp("cli")
    out, store = home / "out", home / "my runs.db"
    options = ("--data", str(text), "--tokens", "256", "--length", "32", "--eval-tokens", "512")
    child = process("prune", model, "--remove", "2sites", "--out", out, "--store", store, "--json", *options)
    stdout, stderr = child.communicate(timeout=200)
    assert child.returncode == 0, stderr
    return Pruned(one_object(stdout), stderr, out, store, options)


# -- prune ----------------------------------------------------------------------------------------------------------


def test_prune_says_what_it_did_in_one_object(pruned: Pruned, model: Path) -> None:
    told = pruned.result
    assert told["out"] == str(pruned.out)
    assert told["model"]["name"] == str(model)
    assert len(told["plan"]["removed"]) == 2
    assert {site for step in told["steps"] for site in step["sites"]} == set(told["plan"]["removed"])
    assert all(step["loss"] > 0 and step["gap"] > 0 for step in told["steps"])
    perplexity = told["perplexity"]
    ratio = perplexity["ratio"]
    assert ratio["value"] == pytest.approx(perplexity["student"] / perplexity["teacher"])
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    for kind in ("parameters", "kv_bytes_per_token"):
        assert told["sizes"]["teacher"][kind] >= told["sizes"]["student"][kind] > 0
    assert {"teacher", "student", "ratio"} <= set(told["speed"])
    assert {"load", "calibrate", "search", "apply", "evaluate", "save", "speed"} <= set(told["seconds"])
    written = one_object((pruned.out / "report.json").read_text())
    assert written | {"seconds": told["seconds"]} == told
    assert written["seconds"].items() <= told["seconds"].items(), "all but the report's own time"


def test_progress_goes_to_stderr(pruned: Pruned) -> None:
    stages = [line.split()[0] for line in pruned.stderr.splitlines()]
    assert [s for s in ("load", "search", "evaluate", "save", "speed") if s not in stages] == []
    assert "{" not in pruned.stderr
    assert "Warning" not in pruned.stderr


def test_a_dry_run_writes_nothing(model: Path, pruned: Pruned, tmp_path: Path) -> None:
    store, out = tmp_path / "runs.db", tmp_path / "out"
    greedy = ("prune", model, "--remove", "2sites", "--search", "greedy")
    command = (*greedy, "--dry-run", "--store", store, "--out", out, *pruned.options)
    told = one_object(billhook(*command, "--json").stdout)
    assert told["losses"] == 8 + 7
    assert told["data"]["evaluation"] == pruned.result["data"]["evaluation"]
    assert told["data"]["calibration"]["tokens"] >= 256
    assert told["data"]["calibration"]["source"] == pruned.result["data"]["calibration"]["source"]
    assert told["seconds"]["search"] >= 0
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_says_how_to_go_on_and_that_is_so(pruned: Pruned, model: Path) -> None:
    out = pruned.out.with_name("again")
    plan = ",".join(pruned.result["plan"]["removed"])
    command = ("prune", model, "--plan", plan, "--out", out, "--store", pruned.store, "--seed", "1", *pruned.options)
    child = process(*command, "--proof", "loss")
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("search"):
            break
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (130, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("Interrupted. Nothing measured is lost. Go on with: billhook prune --resume --store ")
    assert "Traceback" not in stderr
    assert not out.exists()
    assert not list(out.parent.glob(".*.partial"))
    (run,) = (r for r in api.list_runs(pruned.store) if r.out == str(out))
    assert run.state == "interrupted"

    child = process(*shlex.split(last.split("Go on with: billhook ")[1]))
    stdout, stderr = child.communicate(timeout=200)
    assert child.returncode == 0, stderr
    assert fits(stdout), stdout
    assert "Removed 2 of 8 sites" in stdout
    assert one_object((out / "report.json").read_text())["run"] == run.run


def test_a_command_to_copy_is_quoted_and_says_what_was_typed() -> None:
    line = command_line("eval", "a model", tasks="x.jsonl,it's.jsonl", items=40, shots=0, eval_tokens=512, seen=True)
    assert shlex.split(line) == [
        "billhook", "eval", "a model", "--tasks", "x.jsonl,it's.jsonl", "--items", "40", "--eval-tokens", "512",
        "--seen",
    ]  # fmt: skip


# -- every command --------------------------------------------------------------------------------------------------


def commands(pruned: Pruned, model: Path) -> dict[str, tuple[object, ...]]:
    timed = ("--repeats", "2", "--prompt-tokens", "8", "--new-tokens", "2")
    return {
        "inspect": ("inspect", model),
        "eval": ("eval", model, *pruned.options[:2], *pruned.options[-2:]),
        "speed": ("speed", model, *timed, "--store", pruned.store.with_name("speed.db")),
        "runs": ("runs", "--store", pruned.store),
        "show": ("show", pruned.run, "--store", pruned.store),
        "methods": ("methods",),
        "dry-run": ("prune", model, "--remove", "25%sites", "--dry-run", *pruned.options),
    }


HOLDS = {
    "inspect": ("anatomy", "total", "fingerprint"),
    "eval": ("perplexity", "bits_per_byte", "word_perplexity", "data"),
    "speed": ("models", "protocol", "environment"),
    "runs": ("runs",),
    "show": ("id", "state", "events", "result", "losses"),
    "methods": ("methods",),
    "dry-run": ("losses", "memory", "disk_bytes", "seconds"),
}
WATCHED = ("inspect", "eval", "speed", "dry-run")


@pytest.mark.parametrize("command", HOLDS)
def test_json_is_all_that_stdout_holds(command: str, pruned: Pruned, model: Path) -> None:
    done = billhook(*commands(pruned, model)[command], "--json")
    assert done.exit_code == 0, done.stderr
    assert set(HOLDS[command]) <= set(one_object(done.stdout))
    assert ("load" in done.stderr) == (command in WATCHED)


def fits(output: str) -> bool:
    """Whether no line is longer than a terminal of 80 columns, and there is one."""
    return 0 < max(map(len, output.splitlines()), default=0) <= 80


@pytest.mark.parametrize("command", [c for c in HOLDS if c != "speed"])
def test_tables_fit_80_columns(command: str, pruned: Pruned, model: Path) -> None:
    done = billhook(*commands(pruned, model)[command])
    assert done.exit_code == 0, done.stderr
    assert fits(done.stdout), done.stdout


def test_the_table_of_speeds_fits_80_columns(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from billhook.cli import session

    rate, times = (Estimate(*of, 9, 9, True) for of in ((123456.7, 100000.1, 150000.9), (1.3, 1.25, 1.35)))
    row = ModelRates(str(model), Rates(rate, rate, 4 * 10**11))
    where = Environment("0.1.0", "3.12", "2.9", "5.16", "cpu", "x86_64, 2 cores", 2)
    value = SpeedReport((row, row), TimingProtocol(), where, SpeedRatio(times, times))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        session.print_result(value)
    assert fits(capsys.readouterr().out)


def test_what_a_command_shows_is_what_was_measured(pruned: Pruned, model: Path) -> None:
    anatomy = one_object(billhook("inspect", model, "--json").stdout)
    assert anatomy["total"]["parameters"] == pruned.result["sizes"]["teacher"]["parameters"]
    assert f"{anatomy['total']['parameters']:,}" in billhook("inspect", model).stdout
    student = one_object(billhook("inspect", pruned.out, "--json").stdout)
    assert student["already_removed"]["removed"] == pruned.result["plan"]["removed"]
    assert student["total"]["parameters"] == pruned.result["sizes"]["student"]["parameters"]
    told = one_object(billhook("eval", model, *pruned.options[:2], *pruned.options[-2:], "--json").stdout)
    assert told["perplexity"]["value"] == pytest.approx(pruned.result["perplexity"]["teacher"])
    runs = one_object(billhook("runs", "--store", pruned.store, "--json").stdout)["runs"]
    (mine,) = (run for run in runs if run["run"] == pruned.run)
    assert (mine["state"], mine["out"]) == ("done", str(pruned.out))
    assert one_object(billhook("show", pruned.run, "--store", pruned.store, "--json").stdout)["result"] == pruned.result


# -- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = billhook(command, "--help")
    assert done.exit_code == 0
    assert fits(done.stdout)
    assert f"Usage: billhook {command}" in done.stdout
    assert "--json" in done.stdout
    assert command in billhook("--help").stdout
    if command == "prune":
        words = " ".join(done.stdout.split())
        for name, (_, text) in options.RECIPE.items():
            assert "--" + name.replace("_", "-") in words, name
            assert " ".join(text.split())[:30] in words, name


def test_the_version_is_that_of_the_package() -> None:
    done = billhook("--version")
    assert (done.exit_code, done.stdout.split()) == (0, ["billhook", importlib.metadata.version("billhook")])


def test_help_is_fast() -> None:
    """By what it takes of a core: how long that is depends on what else the machine does."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        child = process("--help")
        stdout, _ = child.communicate(timeout=30)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (child.returncode, "prune" in stdout) == (0, True)
    assert min(seconds) < 0.5, seconds


# -- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("prune", "MODEL"), 2, "neither remove nor plan"),
        (("prune", "MODEL", "--remove", "25"), 2, "has no unit"),
        (("prune", "MODEL", "--recipe", "none.yaml"), 2, "There is no recipe none.yaml"),
        (("prune", "MODEL", "--remove", "1sites", "--run", "r1"), 2, "--run r1 goes with --resume"),
        (("prune", "MODEL", "--remove", "1sites", "--out", "-"), 2, "--out - names no folder"),
        (("prune", "--resume", "--store", "none.db", "--dry-run"), 2, "Leave one of them out"),
        (("prune", "--resume", "--store", "none.db"), 2, "There is no store none.db"),
        (("prune", "MODEL", "--remove", "99sites"), 2, "cannot be met"),
        (("prune", "MODEL", "--tokens", "many"), 2, "Invalid value for '--tokens': Input should be a valid integer"),
        (("prune", "MODEL", "--serch", "greedy"), 2, "No such option: --serch"),
        (("inspect", "MODEL", "--device", "tpu"), 2, "no kind of device 'tpu'"),
        (("runs", "--store", "none.db"), 2, "There is no store none.db"),
        (("speed", "MODEL", "--repeats", "1"), 2, "--repeats"),
        (("inspect", "no/such/folder"), 3, "There is no folder"),
        (("eval", "MODEL", "--data", "none.txt"), 3, "none.txt is missing"),
    ],
)
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_refusal_is_a_message_and_a_code(
    arguments: tuple[str, ...], code: int, told: str, as_json: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = billhook(*(model if a == "MODEL" else a for a in arguments), *as_json)
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("billhook.db")] == []
    assert (done.exit_code, done.stdout) == (code, "")
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_recipe_file_is_read_and_typed_options_win(model: Path, pruned: Pruned, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nremove: 1sites\nsearch: greedy\ndata: {pruned.options[1]}\ntokens: 64\nlength: 32\n"
    )
    told = one_object(billhook("prune", "--recipe", recipe, "--tokens", "96", "--dry-run", "--json").stdout)
    assert (told["remove"], told["losses"]) == ("1sites", 8)
    assert told["data"]["calibration"]["tokens"] >= 96
    recipe.write_text("model: demo\nout: x\nremove: 1sites\n")
    done = billhook("prune", "--recipe", recipe)
    assert (done.exit_code, "unknown key 'out'" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ResourceError("No room. Free some."), 5, "No room. Free some."),
        (MemoryError("of 3 GB"), 5, "Out of memory: of 3 GB. Use fewer --tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 5, "Use fewer --tokens"),
        (OSError(28, "No space left on device"), 5, "The disk cannot be written"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (ZeroDivisionError("division by zero"), 1, "This is a bug in Billhook. Please report it"),
        (OSError(22, "Invalid argument"), 1, "This is a bug in Billhook. Please report it"),
    ],
)
def test_an_unforeseen_end_has_its_code(error: BaseException, code: int, told: str, model: Path) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "inspect", fail)
        quiet, loud = billhook("inspect", model), billhook("inspect", model, "--verbose")
    assert [done.exit_code for done in (quiet, loud)] == [code, code]
    assert told in quiet.stderr.splitlines()[-1]
    assert ("Traceback" in quiet.stderr) == (code == 1), "a bug is reported with its traceback"
    assert loud.stderr.count("Traceback") == 1


def test_who_has_seen_enough_is_no_bug(tmp_path: Path) -> None:
    """`billhook methods | head -1`, for tables that rich draws and for JSON."""
    for more in ([], ["--json"]):
        command = subprocess.Popen(
            [sys.executable, "-m", "billhook", "methods", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        told = command.stderr.read().decode()
        command.stderr.close()
        assert (command.wait(), told) == (0, "")
