"""Plans from files: Billhook's, and the drop lists of LLM-Drop and EvoPress."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.errors import FingerprintError, PlanError, option
from billhook.core.plan import Plan, Site, shorten
from billhook.core.results.json_form import JsonObject

MOST_BYTES = 64 * 2**20  # of a plan file; a report.json has a few at most


def read_plan(text: str, anatomy: Anatomy, fingerprint: str) -> Plan:
    """Read a plan: sites such as `attention.7,mlp.16`, a file of Billhook, or a drop list of another tool.

    - Billhook: billhook.json, report.json, or result.json of a threshold.
    - LLM-Drop: JSON with `drop_attn_list` and `drop_mlp_list` (indices, or a boolean per block).
    - EvoPress: a line per block, none, attn, mlp or attn+mlp.

    Raises PlanError if it cannot be read or does not fit, FingerprintError if it was made for another model.
    """
    path = require_plan(text)
    if path is None:
        return anatomy.parse(_names(text))
    content = _content(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _from_lines(content, path, anatomy)
    if isinstance(value, list):
        return anatomy.parse(map(str, value))
    if not isinstance(value, dict):
        raise PlanError(f"{path} holds no plan. Give a billhook.json, a report.json or a drop list.")
    if "drop_attn_list" in value or "drop_mlp_list" in value:
        attention = _indices(value.get("drop_attn_list") or [], path, anatomy)
        mlp = _indices(value.get("drop_mlp_list") or [], path, anatomy)
        sites = {Site(i, "attention") for i in attention} | {Site(i, "mlp") for i in mlp}
        return anatomy.check(Plan(frozenset(sites)))
    made_for = _made_for(value)
    plan = value["plan"] if isinstance(value.get("plan"), dict) else value
    lists = [plan.get("removed"), plan.get("narrowed", [])]
    if not all(isinstance(names, list) for names in lists):
        raise PlanError(
            f"{path} holds no plan: neither `removed` nor drop lists. Name sites instead: attention.7,mlp.16."
        )
    names = [str(name) for name in (*lists[0], *lists[1])]  # type: ignore[misc]
    if made_for is not None and made_for != fingerprint:
        raise FingerprintError(
            f"{path} was made for another model (fingerprint {shorten(str(made_for))}, this one is {fingerprint}). To "
            f"use its sites all the same, name them: {option('plan', ','.join(names[:3]))}"
            f"{' …' if len(names) > 3 else ''}"
        )
    return anatomy.parse(names)


def require_plan(text: str) -> Path | None:
    """Return the file of a plan, or None for one that names sites. Raises PlanError for a file that is not there."""
    path = find_path(text)
    if path is not None and path.is_file():
        return path
    if "/" in text or Path(text).suffix in (".json", ".txt", ".yaml"):
        raise PlanError(f"There is no plan file {shorten(text, 200)}. Give a file, or sites: attention.7,mlp.16.")
    return None


def find_path(text: str | Path) -> Path | None:
    """Return what a text names if there is such a file or folder; of any other text, however long, None."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # no name of a file, or no such user
        return None


def _names(text: str) -> list[str]:
    return [piece for piece in text.split(",") if piece.strip()]


def _content(path: Path) -> str:
    """Return the text of a plan file. Raises PlanError for one that is too large, or cannot be read."""
    try:
        large = path.stat().st_size > MOST_BYTES
        raw = b"" if large else path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}). Name sites instead: attention.7,mlp.16.") from error
    if large:
        raise PlanError(f"{path} has more than {MOST_BYTES // 2**20} MB, which no plan has. Give a billhook.json.")
    return raw.decode("utf-8-sig", errors="replace")


def _made_for(value: JsonObject) -> Any:
    """Return a plan file's fingerprint: under `fingerprint`, `model.fingerprint`, or `model`."""
    model = value.get("model")
    return value.get("fingerprint") or (model.get("fingerprint") if isinstance(model, dict) else model)


def _from_lines(content: str, path: Path, anatomy: Anatomy) -> Plan:
    words = {"none": (), "attn": ("attention",), "mlp": ("mlp",), "attn+mlp": ("attention", "mlp")}
    lines = content.splitlines()
    wrong = next((line for line in lines if line.strip() not in words), None)
    if wrong is not None and re.match(r"\s*(attention|mlp)[.:]", content):
        return anatomy.parse(name for line in lines for name in _names(line))
    if wrong is not None or len(lines) != anatomy.blocks:
        what = f"the line {shorten(wrong)!r}" if wrong is not None else f"{len(lines)} lines"
        raise PlanError(
            f"{path} holds no plan: {what}. A drop list has {anatomy.blocks} lines, one per block, each none, attn, "
            "mlp or attn+mlp."
        )
    return anatomy.parse(f"{part}.{i}" for i, line in enumerate(lines) for part in words[line.strip()])


def _indices(entries: Any, path: Path, anatomy: Anatomy) -> list[int]:
    """Read block indices from a list of indices, or of one boolean per block."""
    if not isinstance(entries, list):
        raise PlanError(
            f"{path} has a drop list that is not a list: {shorten(str(entries))}. Give indices, or a boolean per block."
        )
    if entries and all(isinstance(e, bool) for e in entries):
        if len(entries) != anatomy.blocks:
            raise PlanError(f"{path} lists {len(entries)} blocks, the model has {anatomy.blocks}.")
        return [i for i, removed in enumerate(entries) if removed]
    if not all(type(e) is int and e >= 0 for e in entries) or len(set(entries)) != len(entries):
        shown = shorten(str(entries[:20]))
        raise PlanError(f"{path} has a drop list with negative, repeated or non-integer entries: {shown}.")
    return list(entries)
