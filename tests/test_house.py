"""The rules of the house that a machine can read: floors, budgets, names, docstrings, and a fast import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from billhook.registry import Registry, parse_docstring

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "billhook"
FILES = sorted(HOUSE.rglob("*.py"))
FLOORS = (  # each floor imports from those above it, and each name from those before it on its own floor
    ("errors", "plan", "budget", "problem", "programme", "registry", "records", "stats", "verdict", "margin"),
    ("modeling_billhook", "losses", "width", "arch", "vet", "stream", "loading", "repair", "regression", "sampling",
     "data", "portions", "protocols", "tasks", "questions", "beginnings", "mask", "probe", "surgery", "training",
     "heard", "speed"),
    ("metrics", "search", "recover", "evaluate", "export"),
    ("recipe", "store", "execute", "audit", "proof", "scoring", "searching", "recovering", "lab", "harness", "evalsets",
     "comparing", "gating", "thresholds", "summary", "report", "lab_words", "lab_curves", "lab_page", "compare_words",
     "compare_page", "threshold_page", "prompts", "endpoint", "answering", "abtest", "abtest_words", "pipeline"),
    ("api", "contests", "terminal_compare", "terminal_scores", "terminal", "face", "cli_options", "cli_contests", "cli",
     "dashboard"),
)  # fmt: skip
PLACE = {name: (floor, order) for floor, names in enumerate(FLOORS) for order, name in enumerate(names)}
METHODS = 2  # the floor whose folders never import each other
TORCHLESS = {*FLOORS[0], "search", "dashboard"}
OVER = "Over budget:"  # begins the sentence that excuses a file or function
FAMILIES = (  # that cite papers
    ("search", "SEARCHES"), ("losses", "LOSSES"), ("losses", "ITEM_LOSSES"), ("metrics", "METRICS"),
    ("metrics", "GROUP_METRICS"), ("recover", "RECOVERIES"),
)  # fmt: skip


def dotted(path: Path) -> str:
    """`search.greedy` of billhook/search/greedy.py, `search` of its __init__, "" of the root's."""
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


NAMES = {dotted(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules that a file imports anywhere in it, and the lines. `from x import y` is x.y too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def modules_imported(path: Path) -> Iterator[tuple[str, int]]:
    """Billhook's own modules among them, as `dotted`; "" for a name of the root's other than its version."""
    nodes = ast.walk(ast.parse(path.read_text()))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "billhook"}
    for name, line in imports(path):
        parts = name.split(".")
        version_only = name == "billhook.__version__" or (name == "billhook" and read == {"__version__"})
        if parts[0] == "billhook" and not version_only:
            own = [".".join(parts[1:i]) for i in range(len(parts), 0, -1)]
            yield next((module for module in own if module in NAMES), ""), line


def fault(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, or None if it may."""
    here, there = importer.split(".")[0], imported.split(".")[0]
    if importer == "" or importer == imported:
        return None
    if imported == "":
        return None if here == "cli" else "goes up to the root; import the module that defines the name"
    if here == there:
        if PLACE[here][0] == METHODS and importer != here and imported != here:
            return "imports its sibling; a method file imports its own package's __init__ only"
        return None
    if PLACE[there][0] > PLACE[here][0]:
        return "goes up"
    if PLACE[there][0] == PLACE[here][0] == METHODS:
        return "crosses from one family of methods to another"
    return "goes to a later name of its own floor" if PLACE[there] > PLACE[here] else None


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def child(code: str) -> str:
    """What a fresh interpreter prints, with this checkout first on its path."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def module(name: str) -> ModuleType:
    return importlib.import_module(f"billhook.{name}".rstrip("."))


# --- floors ------------------------------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_house() -> None:
    tops = {name.split(".")[0] for name in NAMES} - {""}
    assert tops <= set(PLACE), f"Give {sorted(tops - set(PLACE))} a floor in FLOORS."


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_go_down_only(name: str) -> None:
    path = NAMES[name]
    found = [(line, imported, fault(name, imported)) for imported, line in modules_imported(path)]
    assert not [f"{path.name}:{line} imports {imported or 'the root'}: {why}" for line, imported, why in found if why]


def test_the_rule_of_floors_tells_right_from_wrong() -> None:
    allowed = [
        "plan errors", "loading arch", "search.greedy plan", "search.greedy search", "search search.greedy", "cli ",
        "cli pipeline", "export.checkpoint loading", "probe.walk mask", "probe probe.walk", " cli",
    ]  # fmt: skip
    refused = [
        "errors plan", "arch loading", "plan search", "search.greedy search.oneshot", "search.greedy evaluate", "mask ",
        "store pipeline", "pipeline cli", "evaluate.perplexity metrics", "losses probe.walk", "recover.lora search",
    ]  # fmt: skip
    for verdict, pairs in ((True, allowed), (False, refused)):
        for pair in pairs:
            importer, imported = pair.split(" ")
            assert (fault(importer, imported) is None) == verdict, pair


def test_no_two_files_import_each_other_in_a_ring() -> None:
    """Packages' own __init__ files aside: they import their methods so that these file themselves."""
    ahead = {
        name: {m for m, _ in modules_imported(path) if m != name} for name, path in NAMES.items()
        if path.name != "__init__.py"
    }  # fmt: skip
    while free := [name for name, needs in ahead.items() if not needs & ahead.keys()]:
        for name in free:
            del ahead[name]
    assert not ahead, f"These import each other in a ring: {sorted(ahead)}"


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n == "" or n.split(".")[0] in TORCHLESS))
def test_words_searches_and_the_dashboard_do_without_torch(name: str) -> None:
    path = NAMES[name]
    heavy = [f"{what}:{line}" for what, line in imports(path) if what.split(".")[0] in ("torch", "transformers")]
    assert not heavy, f"{path} imports {heavy}"


def test_searches_and_words_load_without_torch() -> None:
    names = [f"billhook.{n}" for n in NAMES if n and n.split(".")[0] in TORCHLESS]
    loaded = child(f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint(*sys.modules)").split()
    assert set(names) <= set(loaded)
    assert not {"torch", "transformers"} & set(loaded)


# --- budgets and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_files_and_functions_keep_their_budgets(name: str) -> None:
    """File 400 lines, method file 250, function 60, positional parameters 5, folder depth 2; or `Over budget: why`."""
    path, text = NAMES[name], NAMES[name].read_text()
    lines, parts = text.splitlines(), path.relative_to(HOUSE).parts
    top = parts[0]
    most = 250 if len(parts) > 1 and PLACE[top][0] == METHODS and path.name != "__init__.py" else 400
    header = ast.get_docstring(ast.parse(text)) or ""
    over = [] if len(lines) <= most or OVER in header else [f"{len(lines)} lines, at most {most}"]
    over += [f"{len(parts)} levels deep, at most 2"] if len(parts) > 2 else []
    for function in functions(ast.parse(text)):
        first, last = function.lineno, function.end_lineno or function.lineno
        positional = [a for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
        if OVER not in "\n".join(lines[first - 1 : last]):
            over += [f"{function.name}: {last - first + 1} lines, at most 60"] if last - first >= 60 else []
            over += [f"{function.name}: {len(positional)} positional parameters, at most 5"] * (len(positional) > 5)
    assert not over, f"billhook/{'/'.join(parts)}: {over}. Shorten it, or say why after `{OVER}` in its docstring."


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "types", "misc"}
    assert not [str(path) for path in HOUSE.rglob("*") if path.stem.strip("_") in drawers]


# --- docstrings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_everything_public_says_what_it_is(name: str) -> None:
    tree = ast.parse(NAMES[name].read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    assert not [node.name for node in named if not ast.get_docstring(node)]


@pytest.mark.parametrize(("family", "name"), [pair for pair in FAMILIES if pair[0] in NAMES])
def test_every_registered_method_tells_formula_cost_and_source(family: str, name: str) -> None:
    registry: Registry = getattr(module(family), name)
    assert list(registry)
    for name in registry:
        found = parse_docstring(registry[name])
        missing = [mark for mark in ("formula", "cost", "source") if not found[mark]]
        assert not missing, f"{family} {name!r} lacks {missing} in its docstring"


# --- the front door ----------------------------------------------------------------------------------------------


def test_public_names_are_listed_by_hand_in_order_and_resolve() -> None:
    front = module("")
    tree = ast.parse(NAMES[""].read_text())
    targets = {node.targets[0].id: node.value for node in tree.body
               if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    written = ast.literal_eval(targets["__all__"])  # a literal: raises on anything computed
    assert list(written) == sorted(set(written)) == list(front.__all__)
    for name in written:
        assert getattr(front, name) is not None
        assert name in dir(front)
    private = {"annotations", "TYPE_CHECKING"}
    found = {n for n in dir(front) if not n.startswith("_") and not inspect.ismodule(getattr(front, n))} - private
    assert found <= set(written), f"public but not in __all__: {sorted(found - set(written))}"
    with pytest.raises(AttributeError):
        front.no_such_name  # noqa: B018 - the look-up is the test


def test_the_import_is_fast_and_leaves_torch_alone() -> None:
    code = """
import sys, time
start = time.perf_counter()
import billhook
print(time.perf_counter() - start, "torch" in sys.modules, "transformers" in sys.modules, billhook.__file__)
"""
    seconds, torch, transformers, file = zip(*(child(code).split() for _ in range(3)), strict=True)
    assert set(file) == {str(HOUSE / "__init__.py")}
    assert set(torch + transformers) == {"False"}
    assert min(map(float, seconds)) < 0.3


def test_the_command_line_never_asserts_what_a_user_typed() -> None:
    found = [node.lineno for node in ast.walk(ast.parse(NAMES["cli"].read_text())) if isinstance(node, ast.Assert)]
    assert not found, f"cli.py asserts in lines {found}; raise UsageError instead"
