"""Messages name parameters in Python, and flags on the command line."""

from __future__ import annotations

import ast
import pickle
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.core.errors import DataError, UsageError, either, in_python, on_command_line, option

OPTIONS = [
    (option("eval_data"), "eval_data=", "--eval-data"),
    (option("eval_data", "FILE"), "eval_data='FILE'", "--eval-data FILE"),
    (option("data", "my file.txt"), "data='my file.txt'", "--data 'my file.txt'"),
    (option("tokens", 512), "tokens=512", "--tokens 512"),
    (option("stock", True), "stock=True", "--stock"),
    (option("set", {"front": 0.4}), "set={'front': 0.4}", "--set front=0.4"),
    (option("tasks", ["a.jsonl", "b.jsonl"]), "tasks=['a.jsonl', 'b.jsonl']", "--tasks a.jsonl,b.jsonl"),
    (either("call prune", "type billhook prune"), "call prune", "type billhook prune"),
]


@pytest.mark.parametrize(("mark", "python", "typed"), OPTIONS)
def test_a_message_has_words_for_either_reader(mark: str, python: str, typed: str) -> None:
    error = UsageError(f"{mark} is wrong. Leave {mark} out.")
    assert str(error) == f"{python} is wrong. Leave {python} out." == in_python(error.message)
    assert on_command_line(error.message) == f"{typed} is wrong. Leave {typed} out."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_one_refusal_has_both_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval_data='self' is not allowed") as caught:
        billhook.prune("demo", remove="1sites", eval_data="self", store=tmp_path / "a.db", out=tmp_path / "out")
    assert not re.search(r"--[a-z]", str(caught.value))
    typed = ["prune", "demo", "--remove", "1sites", "--eval-data", "self", "--store", str(tmp_path / "b.db"), "--quiet"]
    refused = CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "out")])
    assert refused.exit_code == 3
    assert "--eval-data self is not allowed" in refused.stderr
    assert "eval_data=" not in refused.stderr


def test_no_message_outside_the_command_line_spells_a_flag() -> None:
    """Literal texts of calls and of what functions return; field descriptions and docstrings are help."""
    package = Path(billhook.__file__).parent
    spelled = []
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in ("cli", "report"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
        texts = [
            (node.lineno, node.value)
            for call in raised
            for node in ast.walk(call)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        marked = {"leave --resume out"}  # by `either`
        spelled += [f"{path.name}:{n}" for n, text in texts if re.search(r"(^|\s)--[a-z]", text) and text not in marked]
    assert spelled == []
