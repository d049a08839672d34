"""The server: who is answered, what is refused, and that nothing is changed."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from dashboards import edited, served
from starlette.testclient import TestClient

from billhook.core.errors import MissingExtra, UsageError
from billhook.core.files.store_tables import MIGRATIONS
from billhook.dashboard import server
from billhook.dashboard.listing import Listing
from billhook.dashboard.server import is_local, make_app, serve
from billhook.runs.store import Store

V0 = Path(__file__).parents[1] / "fixtures" / "v0" / "billhook.db.gz"
PAGES = ("/", "/compare", "/explore", "/about", "/assets/dashboard.css", "/shared/charts.js")


@pytest.fixture
def client(pruned_store: Path) -> TestClient:
    return TestClient(make_app(Listing(pruned_store)), base_url="http://127.0.0.1:1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8765", "localhost", "LOCALHOST:9", "[::1]", "[::1]:8765"])
def test_this_machine_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "[::2]", "", "127.0.0.1:x", "::1"]
)
def test_a_foreign_host_is_refused(client: TestClient, host: str) -> None:
    assert not is_local(host)
    for path in PAGES:
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 421
        assert "Billhook" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_allowed(client: TestClient, method: str) -> None:
    for path in (*PAGES, "/nothing"):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", [*PAGES, "/runs/r000000", "/nothing", "/events"])
def test_every_answer_is_locked_in(client: TestClient, path: str) -> None:
    answer = client.head(path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.text == ""


def test_scripts_are_kept_by_a_browser_and_pages_are_not(client: TestClient) -> None:
    for path in ("/shared/charts.js", "/assets/dashboard.css"):
        first = client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/").headers["cache-control"] == "no-store"


def test_what_is_not_there_is_said(client: TestClient) -> None:
    answer = client.get("/runs/r12345")
    assert answer.status_code == 404
    assert "There is no run r12345" in answer.text
    assert client.get("/assets/../server.py").status_code == 404
    assert client.get("/assets/%2e%2e/server.py").status_code == 404


def test_no_page_has_a_script_or_a_style_of_its_own(client: TestClient, pruned_store: Path) -> None:
    with closing(Store(pruned_store, read_only=True)) as store:
        runs = [run.id for run in store.runs()]
    pages = ["/", "/explore", "/compare", f"/compare?run={runs[0]}&run={runs[1]}", *(f"/runs/{run}" for run in runs)]
    for path in pages:
        text = client.get(path).text
        assert " style=" not in text, path
        assert "<style" not in text, path
        assert text.count("<script") == text.count("<script src=") > 0, path
        assert "onload=" not in text, path


def test_reading_changes_nothing_and_never_migrates(tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    old.write_bytes(gzip.decompress(V0.read_bytes()))
    before = old.read_bytes()
    client = TestClient(make_app(Listing(old)), base_url="http://127.0.0.1")
    with closing(sqlite3.connect(f"{old.as_uri()}?mode=ro", uri=True)) as db:
        runs = [run for (run,) in db.execute("SELECT id FROM runs")]
        assert db.execute("PRAGMA user_version").fetchone()[0] < len(MIGRATIONS)
    assert runs
    for path in ("/", "/compare", "/explore", *(f"/runs/{run}" for run in runs)):
        assert client.get(path).status_code == 200, path
    assert old.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.db"]


def test_no_store_and_a_foreign_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no store"):
        serve(tmp_path / "no.db", 0, print)
    (tmp_path / "text.db").write_text("nothing")
    with pytest.raises(UsageError, match="cannot be used"):
        serve(tmp_path / "text.db", 0, print)
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE runs (id TEXT)")
    with pytest.raises(UsageError, match="not a store of Billhook"):
        serve(tmp_path / "other.db", 0, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db", "text.db"]


def test_without_the_extra_the_message_says_what_to_install(
    pruned_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'billhook\[dashboard\]'"):
        serve(pruned_store, 0, print)


def test_a_hostile_name_is_text(store: Path) -> None:
    from browser import HOSTILE, Elements

    with closing(Store(store, read_only=True)) as opened:
        runs = [run.id for run in opened.runs()]

    def change(recipe: dict[str, object], result: dict[str, object]) -> None:
        recipe["model"] = HOSTILE
        result["model"]["name"] = HOSTILE  # type: ignore[index]
        result["out"] = HOSTILE
        result["answers"] = [{"prompt": HOSTILE, "teacher": HOSTILE, "student": HOSTILE}]

    edited(store, runs[0], change)
    with closing(Store(store)) as opened:
        opened.tag(runs[0], ["<img/src=x>"])
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    for path in ("/", f"/runs/{runs[0]}", f"/compare?run={runs[0]}&run={runs[1]}", f"/explore?run={runs[0]}"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        found = Elements(answer.text)
        assert not [name for name, _ in found.found if name == "img"], path
        assert all("src" in attributes for name, attributes in found.found if name == "script"), path
        assert not [a for _, attributes in found.found for a in attributes if a.startswith("on")], path


# -- processes --------------------------------------------------------------------------------------------------------


def dashboard(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "billhook", "dashboard", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_says_where_it_is_and_ends_on_ctrl_c(pruned_store: Path) -> None:
    child = dashboard("--store", pruned_store, "--port", 0, "--json")
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(4)]
    told = json.loads("".join(lines))
    assert told["store"] == str(pruned_store)
    address = told["dashboard"]
    with urllib.request.urlopen(f"{address}about", timeout=10) as answer:
        assert json.load(answer)["store"] == str(pruned_store)
    port = address.rstrip("/").rpartition(":")[2]
    again = dashboard("--store", pruned_store, "--port", port)
    assert f"Open {address}" in again.communicate(timeout=60)[1]
    assert again.returncode == 2
    stream = socket.create_connection(("127.0.0.1", int(port)))  # a page that is open
    stream.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200" in stream.recv(4096)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    stdout, stderr = child.communicate(timeout=20)
    stream.close()
    assert (child.returncode, stdout, stderr) == (0, "", "")
    assert time.monotonic() - began < 10


def test_a_port_that_another_program_has_is_said(pruned_store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=rf"taken by another program.*--port {port + 1}"):
            serve(pruned_store, port, print)


def test_another_store_at_the_port_is_named(store: Path, pruned_store: Path) -> None:
    with served(store) as here:
        port = int(here.address.rpartition(":")[2])
        with pytest.raises(UsageError, match=f"taken by the dashboard of {store}"):
            serve(pruned_store, port, print)


def test_only_the_loopback_address_is_listened_to(pruned_store: Path) -> None:
    with server._listen(0, pruned_store) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
