"""The folder of a run or of an export, on the Hugging Face Hub in one commit: `billhook push`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from billhook.core.errors import BillhookError, EndpointError, UsageError, either, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.exports import PushedFile, PushReport

if TYPE_CHECKING:  # it takes a second to import, which a mistake need not wait for
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

# Of one machine: a report names its paths, and the others are made anew. Dot files are left out too.
NEVER = ("report.json", "report.html", "__pycache__", "cache", "*.partial", "*.lock", "*.tmp", "*.log", "*.pyc",
         "*.db", "*.db-*", "*.sqlite*")  # fmt: skip
MODELS = ("config.json", "*.safetensors", "*.gguf", "*.onnx", "*.xml")  # one of which says that a model is here
RELOGIN = "hf auth login --force"  # a command of huggingface_hub
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.|\.git$))(?:[a-z0-9][\w.-]*/)?\w(?:[\w.-]{0,94}\w)?", re.ASCII | re.IGNORECASE)
SHOWN = 5  # names of files in a message
HEAD_BYTES = 2**20  # of a file, in which paths of this machine are looked for


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    yes: bool = False,
    dry_run: bool = False,
    ask: Callable[[PushReport], bool] | None = None,
    watch: EventListener = ignore_events,
) -> PushReport:
    """Upload the folder of a run or of an export to the Hugging Face Hub, in one commit: all of it appears, or nothing.

    `repo`: `owner/name`, or a name under your account; made, `private` or not, where it is missing. `revision`: a
    branch, made from main where it is missing. A branch that holds files is changed with `yes`, or where `ask` returns
    True; weights there that are not among the new ones, and would be loaded instead, are deleted. `dry_run`: list the
    files, and ask no server.

    Left out: reports, which hold paths of this machine, dot files, unfinished files, locks, stores and caches. Raises
    UsageError for a folder without a model, for a name that is no repository's, without a token, for paths of this
    machine in what would be published, and where nobody agrees to the change; EndpointError where the Hub refuses or
    cannot be reached. Until everything is known to be allowed, nothing is sent.
    """
    root = _model_folder(Path(folder).expanduser())
    name, branch = repository_name(repo), revision or "main"
    files = published_files(root)
    require_no_paths(root, files)
    report = PushReport(
        str(folder), name, branch, tuple(PushedFile(file, (root / file).stat().st_size) for file in files)
    )
    if dry_run:
        return report
    from huggingface_hub import HfApi

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=_token())
    with _asking(hub, name):
        name = _owned(hub, name, str(folder))
        there = _look(hub, name, revision)
    report = replace(report, repo=name, created=there is None)
    if there is not None:
        _require_visibility(there, name, private)
        report = _changes(report, there)
        _require_consent(report, there, yes, ask)
    watch(Event("push", 0, len(files), {"step": "upload", "model": name}))
    with _asking(hub, name, begun=True):
        url = _commit(hub, root, report, there, private=private)
    watch(Event("push", len(files), len(files), {"model": name}))
    return replace(report, url=url)


# -- what is published ------------------------------------------------------------------------------------------------


def _model_folder(folder: Path) -> Path:
    """Return a finished folder with a model in it. Raises UsageError."""
    if not folder.is_dir():
        what = "is a file. Give the folder that it is in" if folder.is_file() else "is not there. Give a folder"
        raise UsageError(f"{folder} {what}, which `billhook prune` or `billhook export` wrote.")
    if folder.resolve().name.endswith(".partial"):
        raise UsageError(f"{folder} is not finished. Finish it first, by billhook prune with the option resume")
    if not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in MODELS):
        raise UsageError(f"{folder} holds no model. Give the folder that `billhook prune` or `billhook export` wrote.")
    return folder.resolve()


def published_files(root: Path) -> list[str]:
    """List the files of a folder that are uploaded, by their names in the repository.

    Raises UsageError for a link that leads out of the folder, or to a folder.
    """
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(each for each in folders if not _left_out(each))
        for each in [*folders, *sorted(names)]:
            path = Path(place) / each
            if _left_out(each):
                continue
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
                raise UsageError(f"{path} is a link to {path.readlink()}. Put a copy in its place, or delete it.")
            if path.is_file():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _left_out(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name.lower(), pattern) for pattern in NEVER)


def require_no_paths(root: Path, files: Iterable[str]) -> None:
    """Raise UsageError where a file names a folder of this machine: those of the run's report, this one, the home."""
    known = {str(root), str(Path.cwd()), str(Path.home()), *_paths_of_report(root / "report.json")}
    needles = [path.encode() for path in sorted(known, key=len, reverse=True) if len(Path(path).parts) > 2]
    for file in files:
        with (root / file).open("rb") as opened:
            head = opened.read(HEAD_BYTES)
        if (leak := next((needle for needle in needles if needle in head), None)) is not None:
            raise UsageError(
                f"{root / file} holds {leak.decode()!r}, a path of this machine, and would be published. Delete that "
                "path from the file."
            )


def _paths_of_report(report: Path) -> set[str]:
    """Return the absolute paths that a report names, but for what models answered."""
    try:
        value = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    value = {key: each for key, each in value.items() if key != "answers"} if isinstance(value, dict) else value
    return {piece for text in _strings(value) for piece in re.split("[+,:]", text) if piece.startswith("/")}


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(each)


# -- the repository ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class There:
    """A repository as it is: `files` of the branch, the commit, and whether the branch is `new`, to be made of main."""

    files: frozenset[str]
    commit: str | None
    private: bool
    new: bool = False


def repository_name(repo: str) -> str:
    """Return the name of a repository without its address before it. Raises UsageError for what is none."""
    name = re.sub(r"^(https?://)?(huggingface\.co|hf\.co)/(?=.)", "", repo).rstrip("/")
    if not REPOSITORY.fullmatch(name):
        raise UsageError(
            f"{repo!r} is no name of a repository. Write OWNER/NAME of letters, digits, -, _ and ., such as "
            "alice/my-model."
        )
    return name


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UsageError(
            "The Hub needs a token that may write. Type: hf auth login, or export HF_TOKEN=… Tokens are made at "
            "https://huggingface.co/settings/tokens."
        )
    return token


def _owned(hub: HfApi, repo: str, folder: str) -> str:
    """Return the repository with its owner. Raises EndpointError for another's, or for a token that only reads.

    A fine-grained token may hide its organisations, so what it may write is left to the Hub.
    """
    about: dict[str, Any] = hub.whoami()
    me, role = str(about["name"]), about.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise EndpointError(
            f"The token of {me} may only read. Make one that may write, at https://huggingface.co/settings/tokens, "
            f"then type: {RELOGIN}, or export HF_TOKEN=…"
        )
    repo = repo if "/" in repo else f"{me}/{repo}"
    owners = [me, *(str(each["name"]) for each in about.get("orgs", ()))]
    if role != "fineGrained" and repo.split("/")[0].lower() not in map(str.lower, owners):
        mine = f"{me}/{repo.split('/')[1]}"
        again = either(f"billhook.push({folder!r}, {mine!r})", f"billhook push {folder} {mine}")
        raise EndpointError(
            f"{repo} is not yours: the token is that of {', '.join(owners)}. Type {again}, or log in as its owner with "
            f"{RELOGIN}."
        )
    return repo


def _look(hub: HfApi, repo: str, revision: str | None) -> There | None:
    """Return what a branch of a repository holds; None where there is no repository."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    new = False
    try:
        try:
            info = hub.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            info, new = hub.model_info(repo), True
    except RepositoryNotFoundError:
        return None
    names = frozenset(each.rfilename for each in info.siblings or ())
    return There(names - {".gitattributes"}, info.sha, bool(info.private), new)


def _require_visibility(there: There, repo: str, private: bool) -> None:
    if private and not there.private:
        raise UsageError(
            f"{repo} is there and public, and {option('private', True)} makes new repositories alone. Choose another "
            "name, or make it private in its settings on the Hub."
        )


def _changes(report: PushReport, there: There) -> PushReport:
    """Say which files of a branch are replaced, and which weights are deleted: loaders would take them instead."""
    ours = {file.path for file in report.files}
    places = {PurePosixPath(name).parent for name in ours if name.endswith(".safetensors")}
    stale = {
        name
        for name in there.files - ours
        if name.endswith((".safetensors", ".safetensors.index.json")) and PurePosixPath(name).parent in places
    }
    return replace(report, replaced=tuple(sorted(there.files & ours)), deleted=tuple(sorted(stale)))


def _require_consent(report: PushReport, there: There, yes: bool, ask: Callable[[PushReport], bool] | None) -> None:
    """Raise UsageError where a branch holds files and nobody agrees to change them. A new branch changes none."""
    if yes or there.new or not there.files:
        return
    if ask is not None and ask(report):
        return
    touched = [f"replaces {_some(report.replaced)}"] if report.replaced else []
    touched += [f"deletes {_some(report.deleted)}"] if report.deleted else []
    raise UsageError(
        f"{report.repo} holds {len(there.files)} files already on {report.revision}, and this upload "
        f"{' and '.join(touched) or 'adds to them'}. Nothing was uploaded. Add {option('yes', True)}, or choose "
        f"another name or {option('revision')}."
    )


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _commit(hub: HfApi, root: Path, report: PushReport, there: There | None, *, private: bool) -> str:
    """Make what is missing, upload, and return the address of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if there is None:
        hub.create_repo(report.repo, private=private, exist_ok=True)
    if report.revision != "main" and (there is None or there.new):
        hub.create_branch(report.repo, branch=report.revision, exist_ok=True)
    made = hub.create_commit(
        report.repo,
        [
            *(CommitOperationAdd(each.path, root / each.path) for each in report.files),
            *(CommitOperationDelete(name) for name in report.deleted),
        ],
        commit_message=f"Upload {root.name} with Billhook",
        revision=report.revision,
        parent_commit=None if there is None else there.commit,
    )
    return str(made.commit_url)


@contextmanager
def _asking(hub: HfApi, repo: str, begun: bool = False) -> Iterator[None]:
    """Raise EndpointError for what the Hub refuses, or where it cannot be reached. `begun`: an upload may be."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except BillhookError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError("HF_HUB_OFFLINE is set, so the Hub is not asked. Type: unset HF_HUB_OFFLINE") from error
    except HfHubHTTPError as error:
        raise EndpointError(_refusal(error, repo)) from error
    except Exception as error:  # of the client's own kinds, which differ by its release
        reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
        if begun and isinstance(error, ValueError):  # what the Hub says of the card
            said = " ".join(str(error).split())[:300].rstrip(".")
            raise EndpointError(f"The Hub refuses a file ({said}). Nothing was published. Change it first.") from error
        away = type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError | TimeoutError)
        if not away and not (begun and isinstance(error, RuntimeError)):
            raise
        what = "stopped the upload" if begun else "cannot be reached"
        kept = " No file of it is published: type the same again." if begun else ""
        raise EndpointError(
            f"{hub.endpoint} {what} ({type(error).__name__}: {reason}).{kept} Check the network, and HF_ENDPOINT if it "
            "is set."
        ) from error


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    """Return what the status of an answer means, and what to type."""
    code = error.response.status_code
    words = (error.server_message or str(error).strip().split("\n")[0])[:200].rstrip(".")
    if code == 401:
        advice = f"The token is wrong or has expired. Type: {RELOGIN}, or export HF_TOKEN=…"
    elif code in (403, 404):
        advice = (
            f"The token may not write to {repo}. Choose a repository of your own, or make a token that may write to "
            "it, at https://huggingface.co/settings/tokens."
        )
    elif code in (409, 412):
        advice = "Somebody changed the repository meanwhile. Type the same again."
    else:
        advice = "Nothing of it is published. Type the same again later."
    return f"The Hub answers {code} ({words}). {advice}"
