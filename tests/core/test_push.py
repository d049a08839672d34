"""A folder on the Hub: what is sent and what never is, what is asked first, and one message for each refusal."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_hub
import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import billhook
from billhook.cli import main, session
from billhook.cli.tables import push_question
from billhook.core.errors import BillhookError, EndpointError, UsageError
from billhook.core.files.hub import repository_name
from billhook.core.results.exports import PushReport

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's own client
SENT = ["README.md", "billhook.json", "config.json", "exports/gguf/model-f16.gguf", "model.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A fake Hub, with a token that may write."""
    with fake_hub.serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield served
    huggingface_hub.close_session()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with an export, and with what must stay here."""
    folder = tmp_path / "pruned" / "mine"
    report = {"run": "r123456", "out": str(folder), "model": {"name": "/data/models/base"}}
    files = {
        "README.md": "---\ntags:\n- pruned\n---\n# base, pruned\n", "config.json": "{}", "billhook.json": "{}",
        "model.safetensors": "weights", "exports/gguf/model-f16.gguf": "GGUF", "report.json": json.dumps(report),
        "report.html": str(folder), ".cache/x": "x", "run.db": "x", "run.db-wal": "x", "a.lock": "x",
        "half.partial/model.safetensors": "x", "__pycache__/m.pyc": "x",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_dry_run_lists_files_with_sizes_and_asks_nobody(run: Path, hub: fake_hub.FakeHub) -> None:
    report = billhook.push(run, "alice/mine", dry_run=True)
    assert [each.path for each in report.files] == SENT
    assert {each.path: each.bytes for each in report.files}["model.safetensors"] == len("weights")
    assert (report.url, hub.asked) == ("", [])


def test_a_new_repository_gets_card_checkpoint_and_exports_and_nothing_else(run: Path, hub: fake_hub.FakeHub) -> None:
    report = billhook.push(run, "mine", private=True)
    repo = hub.repos["alice/mine"]
    assert repo.private
    assert repo.commits == 1
    assert sorted(repo.branches["main"]) == [".gitattributes", *SENT]
    for name in SENT:
        assert repo.branches["main"][name] == (run / name).read_bytes()
    assert len(hub.stored) == 2, "large files go the way of large files"
    assert (report.repo, report.created) == ("alice/mine", True)
    assert report.url == f"{hub.address}/alice/mine/commit/{repo.sha}"


def test_a_branch_with_files_changes_only_where_somebody_agrees(run: Path, hub: fake_hub.FakeHub) -> None:
    old = {"README.md": b"old", "model.safetensors.index.json": b"old", "notes.txt": b"old",
           "model-00001-of-00002.safetensors": b"old", "other/model.safetensors": b"old"}  # fmt: skip
    hub.repos["club/mine"] = fake_hub.FakeRepo(branches={"main": dict(old)})
    stale = "model-00001-of-00002.safetensors, model.safetensors.index.json"
    told = rf"holds 5 files already on main, and this upload replaces README.md and deletes {stale}. Nothing.*yes=True"
    with pytest.raises(UsageError, match=told):
        billhook.push(run, "club/mine")
    asked: list[PushReport] = []
    with pytest.raises(UsageError, match="Nothing was uploaded"):
        billhook.push(run, "club/mine", ask=lambda report: bool(asked.append(report)))
    assert asked[0].replaced == ("README.md",)
    assert hub.repos["club/mine"].branches["main"] == old
    assert hub.written == []

    report = billhook.push(run, "club/mine", yes=True)
    there = hub.repos["club/mine"].branches["main"]
    assert sorted(there) == sorted([*SENT, "notes.txt", "other/model.safetensors"]), "stale weights would be loaded"
    assert there["README.md"] == (run / "README.md").read_bytes()
    assert not report.created


def test_a_new_branch_leaves_main_as_it_is(run: Path, hub: fake_hub.FakeHub) -> None:
    hub.repos["alice/mine"] = fake_hub.FakeRepo(branches={"main": {"README.md": b"old"}})
    billhook.push(run, "alice/mine", revision="pruned")
    assert hub.repos["alice/mine"].branches["main"] == {"README.md": b"old"}
    assert sorted(hub.repos["alice/mine"].branches["pruned"]) == SENT


def _token(name: str) -> Callable[[pytest.MonkeyPatch, fake_hub.FakeHub], None]:
    return lambda patch, hub: patch.setenv("HF_TOKEN", name)


def _no_token(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


def _forbidden(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    patch.setenv("HF_TOKEN", "hf_fine")
    hub.forbidden.add("bob/mine")


def _forbidden_there(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    _forbidden(patch, hub)
    hub.repos["bob/mine"] = fake_hub.FakeRepo()


def _public(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    hub.repos["alice/mine"] = fake_hub.FakeRepo()


def _no_server(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def _offline(patch: pytest.MonkeyPatch, hub: fake_hub.FakeHub) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("arrange", "repo", "kind", "message"),
    [
        (_no_token, "alice/mine", UsageError, "needs a token that may write. Type: hf auth login"),
        (_token("hf_wrong"), "alice/mine", EndpointError, "401.*Type: hf auth login --force"),
        (_token("hf_read"), "alice/mine", EndpointError, "may only read.*hf auth login --force"),
        (_token("hf_write"), "bob/mine", EndpointError, r"is not yours: .*alice, club. Type .*alice/mine"),
        (_forbidden, "bob/mine", EndpointError, "403.*may not write to bob/mine. Choose a repository of your own"),
        (_forbidden_there, "bob/mine", EndpointError, "403.*may not write to bob/mine"),
        (_public, "alice/mine", UsageError, "is there and public"),
        (_no_server, "alice/mine", EndpointError, "http://127.0.0.1:9 cannot be reached.*Check the network"),
        (_offline, "alice/mine", UsageError, "unset HF_HUB_OFFLINE"),
    ],
)  # fmt: skip
def test_every_refusal_is_one_message_before_anything_is_uploaded(
    arrange: Callable[[pytest.MonkeyPatch, fake_hub.FakeHub], None], repo: str, kind: type[BillhookError],
    message: str, run: Path, hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arrange(monkeypatch, hub)
    with pytest.raises(kind, match=message):
        billhook.push(run, repo, private=arrange is _public)
    assert not hub.stored
    assert not any(each.commits for each in hub.repos.values())


@pytest.mark.parametrize("repo", ["", "a/b/c", "my model", "a--b/c", "/tmp/x", "../x", "alice/x.git", "ä/x", "a" * 97])
def test_what_is_no_name_of_a_repository_is_refused(repo: str, run: Path) -> None:
    with pytest.raises(UsageError, match=r"is no name of a repository. Write OWNER/NAME"):
        billhook.push(run, repo)


def test_addresses_of_repositories_are_names() -> None:
    assert repository_name("https://huggingface.co/alice/mine/") == "alice/mine"
    for name in ("mine", "Alice/My-model_1.5", "a/_x"):
        assert repository_name(name) == name


def test_a_card_that_the_hub_refuses_stops_the_upload(run: Path, hub: fake_hub.FakeHub) -> None:
    (run / "README.md").write_text("---\nlicense: 1\n---\n")
    with pytest.raises(EndpointError, match=r"refuses a file .*README.md.*must be a string.*Nothing was"):
        billhook.push(run, "alice/mine")
    assert not hub.repos["alice/mine"].commits


def test_an_upload_that_breaks_off_publishes_nothing(
    run: Path, hub: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = True
    with pytest.raises(EndpointError, match=r"stopped the upload .*507.*type the same again"):
        billhook.push(run, "alice/mine")
    assert not hub.repos["alice/mine"].commits


@pytest.mark.parametrize("path", ["/data/models/base", "{folder}"])
def test_paths_of_this_machine_are_not_published(path: str, run: Path) -> None:
    path = path.format(folder=run)
    (run / "config.json").write_text(json.dumps({"_name_or_path": path}))
    with pytest.raises(UsageError, match=f"config.json holds '{path}', a path of this machine"):
        billhook.push(run, "alice/mine", dry_run=True)


def test_folders_that_are_no_model_are_refused(run: Path, tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path / "missing", "is not there"), (run / "config.json", "is a file. Give the folder that it is in"),
        (tmp_path, "holds no model"), (run / "half.partial", "is not finished"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            billhook.push(folder, "alice/mine", dry_run=True)


def test_links_out_of_the_folder_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (run / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UsageError, match=r"notes.txt is a link to .*secret.txt. Put a copy in its place"):
        billhook.push(run, "alice/mine", dry_run=True)
    (run / "notes.txt").unlink()
    shutil.rmtree(run / "exports")
    (run / "exports").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="exports is a link"):
        billhook.push(run, "alice/mine", dry_run=True)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command() -> Iterator[Callable[..., str]]:
    """command(*arguments): what `billhook push` prints, on both streams. Commands take SIGTERM; give it back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)

    def run(*arguments: object) -> str:
        env = {"COLUMNS": "80", "TERM": "dumb"}
        return CliRunner().invoke(main.app, ["push", *map(str, arguments)], env=env, prog_name="billhook").output

    yield run
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGHUP, before[1])


def test_the_command_prints_files_and_says_what_to_type(
    run: Path, hub: fake_hub.FakeHub, command: Callable[..., str]
) -> None:
    listed = command(run, "alice/mine", "--dry-run")
    assert "exports/gguf/model-f16.gguf" in listed
    assert "5 files, 0.0 MB for alice/mine on main. Nothing was uploaded." in listed
    assert f"main: {hub.address}/alice/mine/commit/" in command(run, "alice/mine", "--quiet")
    refused = command(run, "alice/mine", "--quiet")
    assert "Nothing was uploaded. Add --yes, or choose another name or --revision." in refused
    assert "5 replaced, 0 deleted" in command(run, "alice/mine", "--quiet", "--yes")


@pytest.mark.parametrize(
    ("typed", "agreed"), [("y\n", True), ("Yes\n", True), ("\n", False), ("no\n", False), ("", False)]
)
def test_in_a_terminal_a_question_stands_before_a_change(
    typed: str, agreed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    report = PushReport("mine", "alice/mine", "main", (), replaced=("README.md",), deleted=("old.safetensors",))
    face = session.CommandSession(False, True, False)
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    ask = face.asking(push_question)
    assert ask is not None
    assert ask(report) is agreed
    assert "alice/mine holds files on main" in shown.getvalue()
    assert "delete old.safetensors? [y/N]" in shown.getvalue()
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert face.asking(push_question) is None
