"""Plans from files: Billhook's, and the drop lists of LLM-Drop and EvoPress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.errors import FingerprintError, PlanError, option
from billhook.core.plan import Plan, Site
from billhook.core.results.json_form import JsonObject


def read_plan(text: str, anatomy: Anatomy, fingerprint: str) -> Plan:
    """Read a plan: sites such as `attention.7,mlp.16`, a file of Billhook, or a drop list of another tool.

    - Billhook: billhook.json, report.json, or result.json of a threshold.
    - LLM-Drop: JSON with `drop_attn_list` and `drop_mlp_list` (indices, or a boolean per block).
    - EvoPress: a line per block, none, attn, mlp or attn+mlp.

    Raises PlanError if it cannot be read or does not fit, FingerprintError if it was made for another model.
    """
    path = find_path(text)
    if path is None or not path.is_file():
        if "/" in text or Path(text).suffix in (".json", ".txt", ".yaml"):
            raise PlanError(f"There is no plan file {text}. Give a file, or sites: attention.7,mlp.16.")
        return anatomy.check(Plan.parse(piece for piece in text.split(",") if piece.strip()))
    content = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        return anatomy.check(_from_lines(content, path, anatomy))
    if isinstance(value, list):
        return anatomy.check(Plan.parse(map(str, value)))
    if not isinstance(value, dict):
        raise PlanError(f"{path} holds no plan. Give a billhook.json, a report.json or a drop list.")
    if "drop_attn_list" in value or "drop_mlp_list" in value:
        attention = _indices(value.get("drop_attn_list") or [], path, anatomy)
        mlp = _indices(value.get("drop_mlp_list") or [], path, anatomy)
        sites = {Site(i, "attention") for i in attention} | {Site(i, "mlp") for i in mlp}
        return anatomy.check(Plan(frozenset(sites)))
    made_for = _made_for(value)
    plan = value["plan"] if isinstance(value.get("plan"), dict) else value
    if not isinstance(plan.get("removed"), list):
        raise PlanError(
            f"{path} holds no plan: neither `removed` nor drop lists. Name sites instead: attention.7,mlp.16."
        )
    names = [str(name) for name in [*plan["removed"], *plan.get("narrowed", ())]]
    if made_for is not None and made_for != fingerprint:
        raise FingerprintError(
            f"{path} was made for another model (fingerprint {made_for}, this one is {fingerprint}). To use its sites "
            "all the same, name them: "
            f"{option('plan', ','.join(names[:3]))}{' …' if len(names) > 3 else ''}"
        )
    return anatomy.check(Plan.parse(names))


def find_path(text: str | Path) -> Path | None:
    """Return what a text names if there is such a file or folder; of any other text, however long, None."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # no name of a file, or no such user
        return None


def _made_for(value: JsonObject) -> Any:
    """Return a plan file's fingerprint: under `fingerprint`, `model.fingerprint`, or `model`."""
    model = value.get("model")
    return value.get("fingerprint") or (model.get("fingerprint") if isinstance(model, dict) else model)


def _from_lines(content: str, path: Path, anatomy: Anatomy) -> Plan:
    words = {"none": (), "attn": ("attention",), "mlp": ("mlp",), "attn+mlp": ("attention", "mlp")}
    lines = content.splitlines()
    wrong = next((line for line in lines if line.strip() not in words), None)
    if wrong is not None or len(lines) != anatomy.blocks:
        what = f"the line {wrong!r}" if wrong is not None else f"{len(lines)} lines"
        raise PlanError(
            f"{path} holds no plan: {what}. A drop list has {anatomy.blocks} lines, one per block, each none, attn, "
            "mlp or attn+mlp."
        )
    return Plan.parse(f"{part}.{i}" for i, line in enumerate(lines) for part in words[line.strip()])


def _indices(entries: Any, path: Path, anatomy: Anatomy) -> list[int]:
    """Read block indices from a list of indices, or of one boolean per block."""
    if not isinstance(entries, list):
        raise PlanError(
            f"{path} has a drop list that is not a list: {entries!r}. Give indices, or a boolean per block."
        )
    if entries and all(isinstance(e, bool) for e in entries):
        if len(entries) != anatomy.blocks:
            raise PlanError(f"{path} lists {len(entries)} blocks, the model has {anatomy.blocks}.")
        return [i for i, removed in enumerate(entries) if removed]
    if not all(isinstance(e, int) and e >= 0 for e in entries) or len(set(entries)) != len(entries):
        raise PlanError(f"{path} has a drop list with negative, repeated or non-integer entries: {entries}.")
    return list(entries)
