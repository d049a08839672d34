"""Methods of other packages: an entry point each, found and used by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from billhook.core.errors import ModelError
from billhook.core.registry import Entries, Registry
from billhook.core.results.comparisons import TaskScores
from billhook.engine.losses import ITEM_LOSSES, LOSSES
from billhook.methods.evaluate import EVALUATIONS
from billhook.methods.export import EXPORTS
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.recover import RECOVERIES
from billhook.methods.search import SEARCHES
from billhook.models.architectures import ARCHITECTURES
from billhook.models.load import load
from billhook.runs.trackers import TRACKERS

ROOT = Path(__file__).resolve().parents[1]

OTHERS = '''
from dataclasses import replace
from pathlib import Path

import torch

from billhook.core.plan import KeptGroups, MeasureRequest, Plan
from billhook.core.results.measured import EvalResult, Score
from billhook.engine.losses import item_loss, loss
from billhook.methods.evaluate import evaluation
from billhook.methods.export import EXPORTS, Exported, export
from billhook.methods.export.targets import Form
from billhook.methods.metrics import metric
from billhook.methods.recover import recovery
from billhook.methods.search import search
from billhook.models.architectures import Architecture
from billhook.models.repair import Patch


@metric
def lateness(probe, *, slope: float = 1.0):
    """The later a site, a block or a run of blocks, the more it matters."""
    alive, blocks = probe.teacher.anatomy.sites_present(), probe.teacher.anatomy.blocks
    found = {site: Score(slope * (site.block + 0.5 * (site.part == "mlp"))) for site in alive}
    found |= {block: Score(slope * block) for block in range(blocks)}
    return found | {(i, j): Score(slope * i) for i in range(blocks) for j in range(i, blocks)}


def heaviest(probe, *, power: float = 1.0):
    """Absolute weights of every channel group."""
    return probe.groups_of_weights(lambda w: w.abs() ** power)


@loss(unit="halves of nats", never_negative=True)
def double_kl(teacher, student, targets):
    """Twice the KL divergence."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return 2 * (p.exp() * (p - q)).sum(-1)


@item_loss(unit="shares", never_negative=True)
def doubt(log_probabilities, gold):
    """The probability, among the choices, of those that are wrong."""
    return 1 - log_probabilities.softmax(-1)[..., gold]


@evaluation
def length(model, tokens, *, scale: float = 1.0):
    """Tokens of every row, times a scale: asks nothing of the model."""
    sums = tuple(scale * float(n) for n in tokens.lengths)
    return EvalResult("length", tokens.hash, sums, (1,) * len(sums), tuple(range(len(sums))))


def lopsided(model, tokens):
    """Forgets its texts."""
    return EvalResult("lopsided", tokens.hash, (1.0, 0.0), (1, 1), ())


def first_ones(problem):
    """Whatever comes first, once measured; says nothing of how many losses that takes."""
    plan = Plan()
    while not problem.is_met(plan):
        plan = plan.without(*problem.moves(plan)[0])
    yield MeasureRequest((plan,))
    return [plan]


@search(losses=lambda problem: 1, channel_groups=True)
def thinnest(problem):
    """Half of the groups of every site, those of the lowest scores."""
    narrow = []
    for size in problem.anatomy.sites:
        scores = problem.group_scores[size.site]
        order = sorted(range(len(size.groups)), key=lambda i: -scores[i])[: (len(size.groups) + 1) // 2]
        narrow.append(KeptGroups(size.site, tuple(size.groups[i] for i in sorted(order))))
    plan = Plan(frozenset(), frozenset(narrow))
    yield MeasureRequest((plan,))
    return [plan]


@recovery
def nudge(task, train, valid, *, by: float = 0.0):
    """A constant, the same in every channel, in the place of each removed site."""
    width = task.teacher.model.config.hidden_size
    return task.repair.with_patches({site: Patch(bias=torch.full((width,), by)) for site in task.plan.sites()})


@export(Form(sites="none", inserts=False, architectures=("llama", "olmo")))
def labelled(student, folder):
    """A checkpoint with a label beside it."""
    written = EXPORTS["transformers"](student, folder)
    (folder / "label.txt").write_text(str(student.plan))
    return replace(written, files=(*written.files, folder / "label.txt"))


class Diary:
    """A line for everything that happens."""

    def __init__(self, run):
        self.note("open", run.kind, run.params["plan"])

    def note(self, *words):
        with Path(__file__).with_name("diary.txt").open("a") as file:
            print(*words, file=file)

    def log(self, step, values):
        self.note("log", *values)

    def finish(self, rows, page):
        self.note("finish", rows[0]["plan"], page.name)

    def close(self, failed):
        self.note("close", failed)


OLMO = Architecture()
'''
ENTRIES = """
[billhook.metric]
lateness = others:lateness

[billhook.group_metric]
heaviest = others:heaviest

[billhook.loss]
double_kl = others:double_kl

[billhook.task_loss]
doubt = others:doubt

[billhook.search]
first_ones = others:first_ones
thinnest = others:thinnest

[billhook.recovery]
nudge = others:nudge

[billhook.evaluation]
length = others:length
lopsided = others:lopsided

[billhook.export]
labelled = others:labelled

[billhook.tracker]
diary = others:Diary

[billhook.architecture]
olmo = others:OLMO
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package of other people's methods."""
    home = tmp_path_factory.mktemp("site-packages")
    about = home / "others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    (home / "others.py").write_text(OTHERS)
    return home


RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from billhook.cli.main import app
from billhook.methods.evaluate import speed
speed.peak_bytes = lambda *_: 1  # as tests/conftest.py does: not by two more processes a command
done = {}
for name, arguments in json.load(sys.stdin).items():
    got = CliRunner().invoke(app, arguments, env={"COLUMNS": "80", "TERM": "dumb"}, prog_name="billhook")
    done[name] = [got.exit_code, got.stdout, got.stderr]
json.dump(done, sys.stdout)
"""


@dataclass(frozen=True)
class Answer:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return dict(json.loads(self.out))

    @property
    def words(self) -> str:
        return " ".join((self.out + self.err).split())


@pytest.fixture(scope="module")
def olmo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a type that transformers knows and Billhook has no row for."""
    folder = tmp_path_factory.mktemp("olmo")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "olmo", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def answers(
    others: Path, model: Path, olmo: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answer]:
    """Commands in one process of their own, which has the package installed: this one stays as it is."""
    home = tmp_path_factory.mktemp("answers")
    task = home / "colours.jsonl"
    items = [{"query": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", "w3 w4"], "gold": i % 2} for i in range(12)]
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    data = ("--data", text, "--tokens", "96", "--length", "16")
    ask = ("eval", model, "--data", text, "--eval-tokens", "256", "--eval-length", "16")
    on_task = ("eval", model, "--tasks", task, "--store", home / "tasks.db", "--json")
    prune = ("prune", model, "--eval-tokens", "256", "--store", home / "runs.db", *data)
    narrow = ("--remove", "20%params", "--search", "rank_channels", "--metric", "heaviest", "--out", home / "narrow")
    first = ("--remove", "2sites", "--search", "first_ones", "--out", home / "first")
    learn = ("--recover-tokens", "256", "--recover-length", "16")
    commands: dict[str, tuple[Any, ...]] = {
        "methods": ("methods", "--json"),
        "score": ("score", model, "--metric", "heaviest", "--set", "power=2", *data, "--json"),
        "narrow": (*prune, *narrow, "--json"),
        "eval": (*ask, "--evaluations", "length,perplexity", "--set", "scale=0.5", "--json"),
        "plain": (*ask, "--json"),
        "shown": (*ask, "--evaluations", "length"),
        "misspelt": (*ask, "--evaluations", "lenght"),
        "lopsided": (*ask, "--evaluations", "lopsided"),
        "unfit": (*ask, "--evaluations", "acc"),
        "every": on_task,
        "some": (*on_task, "--evaluations", "acc_norm,length"),
        "dry": (*prune, *first, "--dry-run", "--json"),
        "dry shown": (*prune, *first, "--dry-run"),
        "first": (*prune, *first, "--json"),
        "late": ("score", model, "--metric", "lateness", "--set", "slope=2", *data, "--json"),
        "ranked": (*prune, "--remove", "2sites", "--search", "oneshot", "--metric", "lateness", "--json"),
        "doubled": (*prune, "--remove", "1sites", "--search", "greedy", "--loss", "double_kl", "--json"),
        "once": (*prune, "--remove", "1sites", "--search", "greedy", "--loss", "kl", "--json"),
        "doubt": (*prune, "--remove", "1sites", "--search", "greedy", "--loss", f"doubt:{task}", "--json"),
        "thin": (*prune, "--remove", "20%params", "--search", "thinnest", "--metric", "heaviest", "--json"),
        "nudge": (*prune, "--plan", "mlp.1", "--recover", "nudge", "--recover-set", "by=0.01", *learn, "--json"),
        "labelled": (*prune, "--plan", "attention.1,mlp.1", "--export", "labelled", "--json"),
        "unlabelled": (*prune, "--plan", "mlp.1", "--export", "labelled"),
        "two exports": (*prune, "--plan", "mlp.1", "--export", "labelled", "--stock"),
        "no export": (*prune, "--plan", "mlp.1", "--export", "lablled"),
        "followed": (*prune, "--plan", "mlp.1", "--track", "diary", "--json"),
        "misfollowed": (*prune, "--plan", "mlp.1", "--track", "dairy"),
        "olmo": ("prune", olmo, *prune[2:], "--plan", "mlp.1", "--json"),
    }
    for name, command in commands.items():
        if command[0] == "prune" and "--out" not in command:
            commands[name] = (*command, "--out", home / name)
    given = json.dumps({name: [str(piece) for piece in command] for name, command in commands.items()})
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(others)))}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=given, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: Answer(*told) for name, told in json.loads(done.stdout).items()}


def test_methods_of_another_package_are_listed(answers: dict[str, Answer]) -> None:
    listed = {row["name"]: row for row in answers["methods"].told["methods"]}
    assert listed["heaviest"]["summary"] == "Absolute weights of every channel group."
    mine = {line.split(" = ")[0] for line in ENTRIES.splitlines() if " = " in line}
    assert mine - {"olmo", "diary"} <= set(listed)
    assert "transformers" in listed


def test_a_group_metric_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    groups = answers["score"].told["scores"]["heaviest"]["groups"]
    assert len(groups) == 8
    assert all(min(row["values"]) > 0 for row in groups)
    assert answers["narrow"].told["plan"]["narrowed"]


def test_a_tracker_of_another_package_follows_a_run(answers: dict[str, Answer], others: Path) -> None:
    assert answers["followed"].told["plan"]["removed"] == ["mlp.1"]
    first, *lines, finished, last = (others / "diary.txt").read_text().splitlines()
    assert (first, finished, last) == ("open prune mlp.1", "finish mlp.1 report.html", "close False")
    assert {"log load/seconds load/done", "log save/seconds save/done"} <= set(lines)
    assert answers["misfollowed"].code == 2
    assert "Did you mean 'diary'" in answers["misfollowed"].words


def test_an_evaluation_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    told, plain = answers["eval"].told, answers["plain"].told
    row = told["evaluations"]["length"]
    assert row["value"] * row["n"] == pytest.approx(0.5 * told["data"]["tokens"])
    assert row["low"] <= row["value"] <= row["high"]
    for name in ("value", "low", "high"):
        assert told["evaluations"]["perplexity"][name] == pytest.approx(plain["perplexity"][name])
    assert "length" in answers["shown"].words
    assert "95% interval" in answers["shown"].words


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misspelt", "Did you mean 'length'?"),
        ("lopsided", "2 outcomes, 2 counts and 0 texts. It must give one"),
        ("unfit", "accuracy needs multiple-choice items"),
    ],
)
def test_an_evaluation_that_cannot_be_asked_says_why(answers: dict[str, Answer], name: str, message: str) -> None:
    assert answers[name].code == 2
    assert message in answers[name].words


def test_a_registered_evaluation_is_asked_for_by_name_on_a_task(answers: dict[str, Answer]) -> None:
    every, some = (TaskScores.from_json(answers[name].told).scores for name in ("every", "some"))
    assert [each.score for each in every] == ["acc", "acc_norm"]
    assert [each.score for each in some] == ["acc_norm", "length"]
    assert some[0] == every[1]


def test_a_search_without_an_estimate_runs_without_an_end_in_sight(answers: dict[str, Answer]) -> None:
    told = answers["dry"].told
    assert (told["losses"], told["seconds"]["search"]) == (None, None)
    assert "search unknown" in answers["dry shown"].words
    assert answers["first"].told["plan"]["removed"] == ["attention.0", "mlp.0"]


def test_a_metric_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    told = answers["late"].out
    assert answers["late"].code == 0
    assert all(name in told for name in ("attention.0", "mlp.3"))
    assert answers["ranked"].told["plan"]["removed"] == ["attention.0", "mlp.0"]


def test_losses_of_another_package_are_used_by_name(answers: dict[str, Answer]) -> None:
    doubled, once, doubt = (answers[name].told for name in ("doubled", "once", "doubt"))
    assert doubled["loss"] == "double_kl"
    assert doubled["plan"] == once["plan"]
    assert doubled["steps"][-1]["loss"] == pytest.approx(2 * once["steps"][-1]["loss"], rel=1e-4)
    assert doubt["loss"].startswith("doubt")
    assert 0 < doubt["steps"][-1]["loss"] < 1


def test_a_search_of_another_package_may_narrow(answers: dict[str, Answer]) -> None:
    plan = answers["thin"].told["plan"]
    assert plan["removed"] == []
    assert len(plan["narrowed"]) == 8


def test_a_recovery_of_another_package_is_used_by_name(answers: dict[str, Answer], tmp_path: Path) -> None:
    told = answers["nudge"].told
    assert told["recoveries"][0]["recovery"] == "nudge"
    added = load(Path(told["out"])).model.model.layers[1].mlp.bias
    torch.testing.assert_close(added, torch.full((32,), 0.01))


def test_an_export_of_another_package_is_used_by_name(answers: dict[str, Answer]) -> None:
    out = Path(answers["labelled"].told["out"])
    assert (out / "label.txt").read_text() == "attention.1,mlp.1"
    assert load(out).anatomy.blocks == 4
    assert len(load(out).positions) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unlabelled", "The export labelled has no place for a block without its mlp; remove whole blocks, or take "
         "another export: adapter, deci, gguf, onnx, openvino, stock, transformers."),
        ("two exports", "--stock writes the export stock, and --export labelled another. Leave one out."),
        ("no export", "Did you mean 'labelled'?"),
    ],
)  # fmt: skip
def test_an_export_that_cannot_be_had_says_why_and_writes_nothing(
    answers: dict[str, Answer], name: str, message: str
) -> None:
    assert answers[name].code in (2, 3)
    assert message in answers[name].words
    assert not (Path(answers["labelled"].told["out"]).parent / name).exists()


def test_an_architecture_of_another_package_is_pruned(answers: dict[str, Answer], olmo: Path) -> None:
    told = answers["olmo"].told
    assert told["model"]["type"] == "olmo"
    assert (Path(told["out"]) / "config.json").read_text().count('"billhook-olmo"') == 1
    with pytest.raises(ModelError, match=r"no row for the architecture 'olmo'.*probably missing"):
        load(olmo)


def broken(tmp_path: Path, text: str) -> str:
    """What `billhook methods` says where a package offers the search `odd` from a module with this text."""
    about = tmp_path / "odd_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[billhook.search]\nodd = odd:odd\n")
    (tmp_path / "odd.py").write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-m", "billhook", "methods"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    return " ".join(done.stderr.split())


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    told = broken(tmp_path, "import no_such_module\n")
    assert (
        "The package odd-package offers the search odd as odd:odd, and importing it failed (ModuleNotFoundError" in told
    )
    assert "pip uninstall odd-package" in told


def test_what_is_no_method_is_named(tmp_path: Path) -> None:
    assert "and that is 7, no search. Repair it" in broken(tmp_path, "odd = 7\n")


def test_a_group_of_entry_points_has_a_name_that_packages_can_write() -> None:
    families: tuple[Entries[Any], ...] = (METRICS, GROUP_METRICS, LOSSES, ITEM_LOSSES, SEARCHES, RECOVERIES)
    families += (EVALUATIONS, EXPORTS, ARCHITECTURES, TRACKERS)
    assert [each.group.removeprefix("billhook.") for each in families] == [
        "metric", "group_metric", "loss", "task_loss", "search", "recovery", "evaluation", "export", "architecture",
        "tracker",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not an entry-point group"):
        Registry("metric of channel groups")
