"""The folder that a run or a study writes: tried at the start, built aside, then given its name."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from billhook.core.errors import ResourceError, UsageError, cannot_write, option

RESERVED = ("", "-")  # of a run that writes no files


def named_folder(out: str | Path) -> Path:
    """The folder that `out` names, with `~` written out. Raises UsageError for a name that none can have."""
    text = str(out)
    try:
        text.encode()
        folder = Path(text).expanduser()
        folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, NUL, no such user, links in a circle
        reason = "is not UTF-8" if isinstance(error, UnicodeEncodeError) else f"names no folder ({error})"
        raise UsageError(f"{option('out', ascii(text)[1:-1])} {reason}. Choose another folder.") from error
    if text in RESERVED:
        raise UsageError(
            f"{option('out', text)} names no folder. Choose one that is not there yet, such as pruned/mine."
        )
    return folder


def check_target(folder: Path, source: Path | None = None, needed_bytes: int = 0) -> None:
    """Raises UsageError or ResourceError unless a folder can be written at `folder`, which it tries, links followed."""
    told, target = option("out", str(folder)), named_folder(folder).resolve()
    if source is not None and source.is_dir() and source.resolve().is_relative_to(target):
        raise UsageError(f"{told} is the input model's own folder. Choose another one.")
    if Path.cwd().is_relative_to(target):
        raise UsageError(
            f"{told} is the folder that you are in, or one above it. Choose a new one in it, such as mine."
        )
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            what = "is not empty" if target.is_dir() else "is a file" if target.is_file() else "is not a folder"
            other = folder.with_name(f"{folder.name}-pruned")
            raise UsageError(f"{told} {what}. Choose a folder that is not there yet, such as {other}.")
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent), suppress(FileNotFoundError):  # without a name that a kill would leave
            (parent / staging_folder(target, f"r{secrets.token_hex(3)}").name).lstat()  # which may be too long
    except OSError as error:
        kind = ResourceError if cannot_write(error) else UsageError
        raise kind(f"{told} cannot be written ({error.strerror}). Choose another folder.") from error
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ResourceError(
            f"{told} needs {needed_bytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left. Free some space, or "
            "choose a folder on another disk."
        )


def staging_folder(folder: Path, run: str) -> Path:
    """Where a folder is built before it appears; a run finds what an earlier attempt of its own left there."""
    return folder.resolve().with_name(f".{folder.resolve().name}.{run}.partial")


def give_usual_modes(folder: Path) -> None:
    """Give every file in a folder the mode that the umask says; safetensors writes files for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def publish(aside: Path, target: Path) -> None:
    """Give a finished folder its name. An empty folder may stand there; anything else is kept and raises OSError."""
    target = target.resolve()
    give_usual_modes(aside)
    if target.exists():
        target.rmdir()
    aside.rename(target)
