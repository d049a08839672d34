"""What the first version wrote is still read: a store with a run of every kind, and four pruned checkpoints.

`fixtures/v0/home.tar.xz` is the folder it worked in (without pages), `billhook.db.gz` its store, `facts.json` what was
true of both then.
"""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import golden_runs
import pytest
import torch
from test_cli import billhook as typed

import billhook
from billhook.core.errors import ResultError

V0 = Path(__file__).parent / "fixtures" / "v0"
FACTS: dict[str, Any] = json.loads((V0 / "facts.json").read_text(encoding="utf-8"))
CHECKPOINTS: dict[str, Any] = FACTS["checkpoints"]
RUNS: dict[str, Any] = FACTS["runs"]
OPTIONS: dict[str, Any] = FACTS["options"]
INTERRUPTED = next(run for run, about in RUNS.items() if about["state"] == "running")
RUNS[INTERRUPTED]["state"] = "interrupted"  # nobody holds it
DONE = next(run for run, about in RUNS.items() if about["out"] == "sites")
KINDS = {"greedy", "sweep", "trade", "stability", "compare", "baseline", "gate", "eval", "threshold"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it was, and the store as if its runs had been begun here."""
    with tarfile.open(V0 / "home.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "billhook.db").write_bytes(gzip.decompress((V0 / "billhook.db.gz").read_bytes()))
    with closing(sqlite3.connect(tmp_path / "billhook.db")) as db, db:
        db.execute("UPDATE runs SET environment = json_set(environment, '$.folder', ?)", (str(tmp_path),))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(result: Any) -> dict[str, Any]:
    """What a function returned, as JSON holds it."""
    told: dict[str, Any] = json.loads(json.dumps(result if isinstance(result, dict) else result.to_json()))
    return told


def stored(store: str, run: str) -> list[Any]:
    """The losses that one run measured itself."""
    with closing(sqlite3.connect(store)) as db:
        return db.execute("SELECT loss, plan, sums, counts FROM losses WHERE run = ? ORDER BY plan", (run,)).fetchall()


# -- the store ---------------------------------------------------------------------------------------------------------


def test_the_fixture_holds_a_run_of_every_kind() -> None:
    assert {about["search"] for about in RUNS.values()} == KINDS
    assert sum(about["search"] == "greedy" for about in RUNS.values()) == 2
    assert sum(file.stat().st_size for file in V0.iterdir()) < 300_000


def test_the_runs_are_listed(home: Path) -> None:
    told = {run["run"]: run for run in map(plain, billhook.list_runs("billhook.db"))}
    assert list(told) == list(RUNS), "the newest first"
    for run, about in RUNS.items():
        for name in ("state", "out", "losses"):
            assert told[run][name] == about[name]
    listed = typed("runs", "--store", "billhook.db")
    assert listed.exit_code == 0, listed.output
    assert all(run in listed.output for run in RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_shown(run: str, home: Path) -> None:
    told = plain(billhook.show(run, "billhook.db"))
    assert (told["id"], told["state"], told["losses"]) == (run, RUNS[run]["state"], RUNS[run]["losses"])
    shown = typed("show", run, "--store", "billhook.db")
    assert shown.exit_code == 0, shown.output
    assert run in shown.output


def test_the_done_run_is_shown_with_what_it_found(home: Path) -> None:
    result = plain(billhook.show(DONE, "billhook.db"))["result"]
    assert result["plan"]["removed"] == CHECKPOINTS["sites"]["removed"]
    assert [[step["sites"], step["loss"]] for step in result["steps"]] == FACTS["steps"]
    assert {name: result["perplexity"][name] for name in FACTS["perplexity"]} == FACTS["perplexity"]


def test_a_page_of_an_old_result_is_refused_with_what_to_do(home: Path) -> None:
    old = next(run for run, about in RUNS.items() if about["search"] == "sweep")
    with pytest.raises(ResultError, match=rf"Billhook 0\.1 stored the result of run {old}.*Run the command again"):
        billhook.make_report(old, store="billhook.db")
    assert not (home / "reports").exists()


def test_the_interrupted_run_goes_on_and_measures_nothing_again(home: Path) -> None:
    before = stored("billhook.db", INTERRUPTED)
    assert len(before) == RUNS[INTERRUPTED]["losses"] > 0
    resumed = plain(billhook.resume(store="billhook.db"))
    whole = plain(billhook.prune("llama", remove="4sites", loss="js", out="whole", store="whole.db", **OPTIONS))
    assert resumed["run"] == INTERRUPTED
    assert plain(billhook.show(INTERRUPTED, "billhook.db"))["state"] == "done"
    assert set(before) < set(stored("billhook.db", INTERRUPTED))
    alike = [[row[:2] for row in stored(*of)] for of in (("billhook.db", INTERRUPTED), ("whole.db", whole["run"]))]
    assert alike[0] == alike[1], "the same losses as a run that nothing interrupted"
    assert resumed["search"]["site_evaluations"] < whole["search"]["site_evaluations"]
    assert resumed["plan"] == whole["plan"]
    assert [step["sites"] for step in resumed["steps"]] == [step["sites"] for step in whole["steps"]]


def test_what_was_measured_is_found_again(home: Path) -> None:
    again = plain(billhook.prune("llama", remove="3sites", finalists=0, out="again", store="billhook.db", **OPTIONS))
    assert {run["run"]: run["losses"] for run in map(plain, billhook.list_runs("billhook.db"))}[again["run"]] == 0
    assert [[step["sites"], step["loss"]] for step in again["steps"]] == FACTS["steps"]
    assert golden_runs.of_change(again["perplexity"], *FACTS["perplexity"]) == FACTS["perplexity"]
    with closing(sqlite3.connect("billhook.db")) as db:
        assert db.execute("SELECT count(*) FROM evaluations WHERE run = ?", (again["run"],)).fetchone() == (0,)


def test_a_stored_baseline_still_gates(home: Path) -> None:
    assert [each.name for each in billhook.baselines("billhook.db")] == ["v1"]
    kept = next(run for run, about in RUNS.items() if about["search"] == "gate")
    before = plain(billhook.show(kept, "billhook.db"))["result"]
    now = billhook.gate("sites", "v1", store="billhook.db")
    assert now.verdict == before["verdict"]
    for was, check in zip(before["checks"], now.checks, strict=True):
        found = {"set": check.source, "verdict": check.verdict, "baseline": check.baseline, "student": check.student}
        found |= {"lost": check.lost.value, "low": check.lost.low, "high": check.lost.high}
        assert found == {name: was[name] for name in found}


def test_a_threshold_takes_the_steps_of_a_stored_run(home: Path) -> None:
    before = json.loads(Path("lab/threshold/result.json").read_text(encoding="utf-8"))
    billhook.threshold(margins=["60%ppl"], run=DONE, out="now", store="billhook.db", eval_tokens=480)
    now = json.loads(Path("now/result.json").read_text(encoding="utf-8"))
    assert (now["step"], now["steps"], now["losses"]) == (before["step"], before["steps"], before["losses"])
    assert sum(about["losses"] for about in RUNS.values()) == sum(
        plain(run)["losses"] for run in billhook.list_runs("billhook.db")
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def same(found: Any, name: str, which: str = "logits") -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(CHECKPOINTS[name][which]), atol=1e-5, rtol=1e-5)


def last_logits(model: Any) -> Sequence[Sequence[float]]:
    with torch.inference_mode():
        logits: list[list[float]] = model(input_ids=torch.tensor(FACTS["ids"])).logits[:, -1].tolist()
    return logits


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads(name: str, home: Path) -> None:
    teacher = billhook.load(name)
    about = CHECKPOINTS[name]
    same(last_logits(teacher.model), name)
    assert sorted(teacher.removed_earlier.names()) == sorted(about["removed"])
    assert teacher.model.config.model_type == about["kind"]
    assert about["removed"] or about["narrowed"]
    assert teacher.anatomy.total("parameters") < billhook.load("llama").anatomy.total("parameters")


def test_the_adapter_belongs_to_its_checkpoint(home: Path) -> None:
    same(last_logits(billhook.load_with_adapter("adapter")), "adapter", "with_adapter")


CHILD = """
import json, sys
trust, names, ids = json.loads(sys.argv[1])
if trust:
    sys.modules["billhook"] = None  # what the checkpoint brings must do
else:
    import billhook
    billhook.register()
import torch, transformers
found = {}
for name in names:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust).eval()
    with torch.inference_mode():
        found[name] = model(input_ids=torch.tensor(ids)).logits[:, -1].tolist()
print(json.dumps(found))
"""


@pytest.mark.parametrize("trust", [True, False], ids=["by its own code", "by billhook.register"])
def test_plain_transformers_loads_the_checkpoints(trust: bool, home: Path) -> None:
    root = str(Path(billhook.__file__).parents[1])
    env = os.environ | {"HF_MODULES_CACHE": str(home / "modules"), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps([trust, list(CHECKPOINTS), FACTS["ids"]])]
    done = subprocess.run(command, env=env, cwd=home, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        same(found, name)
