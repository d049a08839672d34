"""What is wrong is told before anything heavy is imported, loaded or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook.api import EXPORTS, GROUP_METRICS, ITEM_LOSSES, LOSSES, METRICS, RECOVERIES, SEARCHES
from billhook.core.errors import DataError, ModelError, PlanError, UsageError
from billhook.core.events import ignore_events
from billhook.core.files.target_folder import check_target, named_folder
from billhook.runs import STORE, check_inputs, list_runs
from billhook.runs.prepare import tokens_for
from billhook.runs.recipe import Recipe
from billhook.runs.store import Store

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "scipy", "datasets")
MISTAKES: dict[str, tuple[int, str]] = {
    "prune demo --remove 25": (2, "has no unit"),
    "prune demo": (2, "neither remove nor plan nor within"),
    "prune demo --remove 25% --data none.jsonl": (3, "none.jsonl is missing"),
    "prune demo --remove 25% --data pydoc+none.csv": (3, "none.csv is missing"),
    "prune demo --remove 25% --eval-data .": (3, "is a folder"),
    "prune demo --remove 25% --recover fold --recover-data none.txt": (3, "none.txt is missing"),
    "prune demo --remove 25% --loss task:none.jsonl": (3, "none.jsonl is missing"),
    "prune demo --within 1pp:none.jsonl": (3, "none.jsonl is missing"),
    "prune demo --plan none.json": (2, "no plan file none.json"),
    "prune demo --recipe nonesuch": (2, "no recipe nonesuch"),
    "prune demo --remove 25% --search swp": (2, "Did you mean 'swap'"),
    "prune demo --remove 25% --recover fodl": (2, "Did you mean 'fold'"),
    "prune demo --remove 25% --export transfomers": (2, "Did you mean 'transformers'"),
    "prune demo --remove 25% --device gpu": (2, "no kind of device 'gpu'. Did you mean cuda or mps?"),
    "prune demo --resume --run rabcdef": (2, "There is no store"),
    "score demo --metric cosin": (2, "Did you mean 'cosine'"),
    "score demo --loss klx": (2, "Did you mean 'kl'"),
    "eval demo --data none.txt": (3, "none.txt is missing"),
    "eval demo --tasks none.jsonl": (3, "none.jsonl is missing"),
    "sweep demo --remove 10%,20": (2, "'20' has no unit"),
    "sweep demo --recipes billhook,nonesuch": (2, "no recipe nonesuch"),
    "transfer demo --remove 10% --tasks none.jsonl": (3, "none.jsonl is missing"),
    "compare demo demo --data pydoc,none.txt": (3, "none.txt is missing"),
    "gate demo --baseline demo --margin 3": (2, "is not a margin"),
    "stability demo --remove 10% --sizes many": (2, "many is no number"),
    "threshold demo --memory lots": (2, "not an amount of memory"),
    "factor demo": (2, "Missing option '--remove'"),
    "factor demo --remove 3sites": (2, "factors save parameters"),
    "factor demo --remove 10% --ranks size": (2, "--ranks size is no way to choose ranks"),
    "factor demo --remove 10% --data none.txt": (3, "none.txt is missing"),
    "prune demo --remove 60%vocabulary": (3, "needs text of the kind that the model is for: --data my.jsonl"),
    "prune demo --remove 60%vocabulary,10% --data none.txt": (3, "none.txt is missing"),
    "prune demo --remove 60%vocabulary --within 3%ppl": (2, "To cut the vocabulary first: billhook vocabulary"),
    "sweep demo --remove 10%,60%vocabulary": (2, "which prune alone does. Cut it first"),
    "threshold demo --remove 60%vocabulary": (2, "which prune alone does. Cut it first"),
    "vocabulary demo": (2, "Missing option '--data'"),
    "vocabulary demo --data none.txt": (3, "none.txt is missing"),
    "vocabulary demo --data pydoc --eval-data pydoc,none.txt": (3, "none.txt is missing"),
    "vocabulary demo --data self": (3, "does not say what it is for"),
    "vocabulary demo --data pydoc --remove 20%mlp": (2, "is no share of a vocabulary"),
    "slice demo": (2, "Missing option '--width'"),
    "slice demo --width narrow": (2, "is no width. Write channels, such as 448"),
    "slice demo --width 75% --data none.txt": (3, "none.txt is missing"),
    "slice demo --width 75% --eval-data pydoc,none.txt": (3, "none.txt is missing"),
    "runs": (2, "There is no store"),
    "show rabcdef": (2, "There is no store"),
    "runs --store s.db": (0, "rabc"),
    "show RUN --store s.db": (0, "prune, interrupted"),
    "recipes --nonesuch": (2, "No such option"),
    **{
        f"{command.format('./none')}": (3, "There is no folder ./none")
        for command in (
            "inspect {}",
            "score {}",
            "prune {} --remove 25%",
            "prune {} --remove 25% --dry-run",
            "eval {}",
            "eval {} --tasks lmeval:piqa",
            "speed {}",
            "speed m {}",
            "sweep {}",
            "transfer {} --tasks lmeval:piqa",
            "stability {}",
            "threshold {}",
            "compare {} m",
            "compare m m {}",
            "gate {} --baseline m",
            "gate m --baseline {}",
            "baseline save mine {}",
            "export {} --to gguf",
        )
    },
    "eval lama.cpp:none.gguf": (2, "Did you mean 'llama.cpp'?"),
    "compare m llama.cpp:none.gguf": (3, "There is no file or folder none.gguf"),
    "gate m --baseline llama.cpp:none.gguf": (3, "There is no file or folder none.gguf"),
    "prune llama.cpp:none.gguf --remove 25%": (2, "Name the checkpoint that was exported"),
    "speed llama.cpp:none.gguf": (2, "and speed with --engine llama.cpp"),
    "speed --engine llama.cpp none.gguf": (3, "There is no file or folder none.gguf"),
    "push none alice/mine": (2, "none is not there"),
    "push m alice/my/model": (2, "is no name of a repository"),
    "prune none.gguf --remove 25%": (3, "There is no file none.gguf"),
    "prune . --remove 25%": (3, "has no config.json"),
    "prune s.db --remove 25%": (3, "neither a folder nor a .gguf file"),
    "score nonesuch": (3, "the Hugging Face Hub does not give it"),
    "compare m RUM --store s.db": (2, "Did you mean RUN?"),
    **{
        f"{command} --out {out}": (2, words)
        for command in (
            "prune m --remove 25%",
            "sweep m",
            "stability m",
            "threshold m",
            "compare m m",
            "transfer m --tasks lmeval:piqa",
            "prune --resume --store s.db",
            "report RUN --store s.db",
        )
        for out, words in (
            ("full", "is not empty"),
            ("-", "names no folder"),
            ("s.db", "is a file"),
            (".", "you are in"),
            ("s.db/x", "cannot be written"),
        )
    },
    "prune --resume --run RUM --store s.db": (2, "Did you mean RUN?"),
}
CHILD = """
import json, sys
from typer.testing import CliRunner
from billhook.cli.main import app
told = []
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line.split(" "), prog_name="billhook")
    told.append([result.exit_code, result.output, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))])
print(json.dumps(told))
"""


def test_a_mistake_is_told_before_anything_heavy_is_imported(model: Path, tmp_path: Path) -> None:
    with closing(Store(tmp_path / "s.db")) as store:
        run = store.new_run("prune", {"model": "demo", "remove": "25%"}, {}, "out")
    (tmp_path / "m").symlink_to(model)
    (tmp_path / "full" / "x").mkdir(parents=True)
    wrong = run[:-1] + ("0" if run[-1] != "0" else "1")
    asked = {
        line.replace("RUN", run).replace("RUM", wrong): (code, words.replace("RUN", run))
        for line, (code, words) in MISTAKES.items()
    }
    asked["runs --store s.db"] = (0, run)
    command = [sys.executable, "-c", CHILD, json.dumps(list(asked)), json.dumps(HEAVY)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    child = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    for (line, (code, words)), (exit_code, output, heavy) in zip(
        asked.items(), json.loads(child.stdout.splitlines()[-1]), strict=True
    ):
        assert (exit_code, heavy) == (code, []), (line, output)
        assert words in output, (line, output)
    assert not (tmp_path / STORE).exists(), "no run of it is left"


def test_methods_are_known_without_being_imported() -> None:
    told = (
        "import json\nfrom billhook import runs\n"
        "print(json.dumps({family: sorted(runs.method_names(family)) for family in runs.WRITTEN}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    known = json.loads(subprocess.run([sys.executable, "-c", told], env=env, check=True, capture_output=True).stdout)
    assert known == {
        "metric": sorted([*METRICS, *GROUP_METRICS]),
        "loss": sorted([*LOSSES, *ITEM_LOSSES]),
        "search": sorted(SEARCHES),
        "recovery": sorted(RECOVERIES),
        "export": sorted(EXPORTS),
    }


@pytest.mark.parametrize("text", ["x" * 5000, "~nobody-here/x", "a\0b", "a/" * 3000])
def test_a_text_that_cannot_be_a_path_is_refused_wherever_one_is_read(text: str) -> None:
    for option in ("data", "eval_data", "recover_data"):
        given: dict[str, Any] = {"remove": "1sites", option: text}
        with pytest.raises(DataError, match="is missing"):
            check_inputs(Recipe(**given))
    with suppress(UsageError):  # or it is a name that no file has yet
        check_inputs(Recipe(remove="1sites"), store=text)
    with suppress(UsageError):
        check_target(named_folder(text))
    for read in (list_runs, billhook.load):
        with pytest.raises((UsageError, ModelError), match="There is no"):
            read(text)
    with suppress(PlanError):  # or it is taken for names of sites, which the model's anatomy judges
        check_inputs(Recipe(plan=text))
    with pytest.raises(DataError, match="is missing"):
        check_inputs(Recipe(remove="1sites", loss=f"task:{text}"))


def test_everything_is_read_before_the_model_writes(tmp_path: Path) -> None:
    teacher = billhook.load(tiny.with_tokenizer(tmp_path / "m"))
    teacher.model.generate = None  # it would fail
    text, short = tiny.write_texts(tmp_path / "a.jsonl", 120), tiny.write_texts(tmp_path / "b.jsonl", 1, words=9)
    task = tmp_path / "t.jsonl"
    task.write_text('{"query": "w1", "choices": ["w2"], "gold": 0}\n')
    base: dict[str, Any] = {"data": str(text), "tokens": 400, "length": 24, "eval_tokens": 200, "eval_length": 24}
    for given, words in (
        ({"remove": "1sites", "tokens": 100_000}, "too short"),
        ({"remove": "1sites", "eval_data": str(short)}, "Too little is left"),
        ({"remove": "1sites", "field": "body"}, "no text field 'body'"),
        ({"remove": "1sites", "recover": "fold", "recover_data": str(short)}, "too short"),
        ({"within": f"1pp:{task}"}, "has 1 choices"),
    ):
        with pytest.raises(DataError, match=words):
            tokens_for(Recipe(**base | given), teacher, ignore_events)
