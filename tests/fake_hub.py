"""A small fake of the Hugging Face Hub's server: repositories in memory, regular files and large ones."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".gguf")
TOKENS = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained"}


@dataclass
class FakeRepo:
    """Files by branch; `commits` counts them."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class FakeHub:
    """What the server holds. The account is alice, of the organisation club; `forbidden`: repositories of others."""

    address: str = ""
    repos: dict[str, FakeRepo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    forbidden: set[str] = field(default_factory=set)
    broken: bool = False  # takes no large file
    asked: list[str] = field(default_factory=list)

    @property
    def written(self) -> list[str]:
        """Requests that changed something."""
        return [each for each in self.asked if each.split()[0] == "PUT" or "/create" in each or "/commit/" in each]


def answer(hub: FakeHub, method: str, path: str, role: str | None, body: bytes) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON, headers) of one request."""
    parts = [unquote(part) for part in path.split("?")[0].strip("/").split("/")]
    repo = "/".join(parts[2:4])
    if method == "PUT" and parts[0] == "stored":
        if hub.broken:
            return 507, {"error": "No room"}, {}
        assert hashlib.sha256(body).hexdigest() == parts[1]
        hub.stored[parts[1]] = body
        return 200, {}, {}
    if parts == ["api", "validate-yaml"]:
        errors = [{"message": '"license" must be a string'}] if "license: 1" in json.loads(body)["content"] else []
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}
    if role is None:
        return 401, {"error": "Invalid user token."}, {}
    if parts == ["api", "whoami-v2"]:
        auth = {"accessToken": {"role": role}}
        return 200, {"name": "alice", "type": "user", "orgs": [{"name": "club"}], "auth": auth}, {}
    if parts == ["api", "repos", "create"]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'alice'}/{asked['name']}"
        if name in hub.forbidden:
            return 403, {"error": "You have no rights here"}, {}
        private = asked.get("private") is True or asked.get("visibility") == "private"
        hub.repos.setdefault(name, FakeRepo(private))
        return 200, {"url": f"{hub.address}/{name}"}, {}
    if parts[-4:] == ["info", "lfs", "objects", "batch"]:
        objects = json.loads(body)["objects"]
        upload = [{"upload": {"href": f"{hub.address}/stored/{each['oid']}"}} for each in objects]
        return 200, {"objects": [each | {"actions": u} for each, u in zip(objects, upload, strict=True)]}, {}
    if repo not in hub.repos:
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
    return _of_repo(hub, repo, parts[4:], body)


def _of_repo(hub: FakeHub, name: str, parts: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
    repo, revision = hub.repos[name], parts[-1] if parts else "main"
    if parts and parts[0] != "revision" and name in hub.forbidden:
        return 403, {"error": "Forbidden"}, {}
    if parts and parts[0] == "branch":
        repo.branches.setdefault(revision, dict(repo.branches["main"]))
        return 200, {}, {}
    if revision not in repo.branches:
        return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
    if parts and parts[0] == "preupload":
        files = [each["path"] for each in json.loads(body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if p.endswith(LARGE) else "regular"} for p in files]
        return 200, {"files": [mode | {"shouldIgnore": False} for mode in modes]}, {}
    files = repo.branches[revision]
    if parts and parts[0] == "commit":
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif value.get("parentCommit", repo.sha) != repo.sha:
                return 412, {"error": "A commit has happened since"}, {}
        repo.commits += 1
        url = f"{hub.address}/{name}/commit/{repo.sha}"
        return 200, {"success": True, "commitOid": repo.sha, "commitUrl": url}, {}
    siblings = [{"rfilename": file} for file in files]
    return 200, {"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings}, {}


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A fake on a free port of this machine, until the end of the `with`."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, value, headers = answer(hub, self.command, self.path, TOKENS.get(token), body)
            raw = json.dumps(value).encode()
            self.send_response(status)
            for name, each in {**headers, "Content-Type": "application/json", "Content-Length": len(raw)}.items():
                self.send_header(name, str(each))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - the names of http.server

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
