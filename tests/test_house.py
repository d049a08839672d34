"""The rules of the house that a machine can read: floors, budgets, names, docstrings, and a fast import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from billhook.core.registry import Registry, parse_docstring

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "billhook"
FILES = sorted(HOUSE.rglob("*.py"))
PACKAGES = ("core", "models", "data", "engine", "runtimes", "methods", "runs", "report", "studies", "dashboard", "cli")
METHODS = ("metrics", "search", "recover", "evaluate", "export")  # families, which never import each other
ABOVE = ("api", "__main__")  # files beside the packages: the functions behind the commands, and the command line
TORCHLESS = ("core", "methods.search", "report", "dashboard", "runtimes", "studies.outlook")
MOST_FILES = 13  # in a folder
OVER = "Over budget:"  # begins the sentence that excuses a file or function
FAMILIES = (  # that cite papers
    ("methods.search", "SEARCHES"), ("engine.losses", "LOSSES"), ("engine.losses", "ITEM_LOSSES"),
    ("methods.metrics", "METRICS"), ("methods.metrics", "GROUP_METRICS"), ("methods.recover", "RECOVERIES"),
)  # fmt: skip


def dotted(path: Path) -> str:
    """`core.plan` of billhook/core/plan.py, `core` of its __init__, "" of the root's."""
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
    here, there = importer.split("."), imported.split(".")
    if importer in ("", "__main__") or importer == imported:
        return None
    if imported == "":
        return None if here[0] == "cli" else "goes up to the root; import the module that defines the name"
    if here[0] == there[0] == "methods":
        apart = len(here) > 1 and len(there) > 1 and here[1] != there[1]
        return "crosses from one family of methods to another" if apart else None
    if here[0] == there[0] or here[0] == "api":
        return "goes up to the command line" if there[0] == "cli" and here[0] != "cli" else None
    if there[0] in ABOVE:
        return None if here[0] == "cli" else "goes up to the functions behind the commands"
    if here[0] == "report":
        return None if there[0] == "core" else "is not core; a page takes what it shows from a result"
    return "goes up" if PACKAGES.index(there[0]) > PACKAGES.index(here[0]) else None


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def child(code: str) -> str:
    """What a fresh interpreter prints, with this checkout first on its path."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def module(name: str) -> ModuleType:
    return importlib.import_module(f"billhook.{name}".rstrip("."))


# --- packages ----------------------------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_house() -> None:
    tops = {name.split(".")[0] for name in NAMES} - {"", *ABOVE}
    assert tops <= set(PACKAGES), f"Move {sorted(tops - set(PACKAGES))} into one of the packages {PACKAGES}."


def test_no_folder_holds_more_files_than_a_person_takes_in() -> None:
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert max(folders.values()) <= MOST_FILES, {f.name: n for f, n in folders.items() if n > MOST_FILES}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_go_down_only(name: str) -> None:
    path = NAMES[name]
    found = [(line, imported, fault(name, imported)) for imported, line in modules_imported(path)]
    assert not [f"{path.name}:{line} imports {imported or 'the root'}: {why}" for line, imported, why in found if why]


def test_the_rule_of_packages_tells_right_from_wrong() -> None:
    allowed = [
        "core.plan core.errors", "models.load core.plan", "methods.search.greedy methods.search", "cli.main ",
        "methods.search methods.search.greedy", "methods.export.checkpoint models.load", "report.curves core.results",
        "runs.pipeline methods.recover", "studies.sweep report.curves", "api studies.sweep", "cli.main api",
        "methods.recover.fold engine.bench", " cli.main",
    ]  # fmt: skip
    refused = [
        "core.plan models.load", "models.load engine.bench", "methods.search.greedy methods.evaluate", "core.plan ",
        "runs.store studies.sweep", "runs.pipeline report.frame", "report.curves models.load", "studies.sweep api",
        "methods.evaluate.perplexity methods.metrics", "engine.probe methods.metrics", "api cli.main",
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


def torchless(name: str) -> bool:
    return name.startswith(TORCHLESS)


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n == "" or torchless(n)))
def test_words_searches_and_the_dashboard_do_without_torch(name: str) -> None:
    path = NAMES[name]
    heavy = [f"{what}:{line}" for what, line in imports(path) if what.split(".")[0] in ("torch", "transformers")]
    assert not heavy, f"{path} imports {heavy}"


def test_searches_and_words_load_without_torch() -> None:
    names = [f"billhook.{n}" for n in NAMES if torchless(n)]
    loaded = child(f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint(*sys.modules)").split()
    assert set(names) <= set(loaded)
    assert not {"torch", "transformers"} & set(loaded)


DECORATORS = {"metric", "group_metric", "search", "recovery", "evaluation", "export"}


def holds_methods(text: str) -> bool:
    """Whether a file registers a method of its own."""
    marks = (d.func if isinstance(d, ast.Call) else d for f in functions(ast.parse(text)) for d in f.decorator_list)
    return any(isinstance(mark, ast.Name) and mark.id in DECORATORS for mark in marks)


# --- budgets and names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_files_and_functions_keep_their_budgets(name: str) -> None:
    """File 400 lines, method file 250, function 60, positional parameters 5, folder depth 3; or `Over budget: why`."""
    path, text = NAMES[name], NAMES[name].read_text()
    lines, parts = text.splitlines(), path.relative_to(HOUSE).parts
    most = 250 if path.name != "__init__.py" and holds_methods(text) else 400
    header = ast.get_docstring(ast.parse(text)) or ""
    over = [] if len(lines) <= most or OVER in header else [f"{len(lines)} lines, at most {most}"]
    over += [f"{len(parts)} levels deep, at most 3"] if len(parts) > 3 else []
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


# --- architectures -----------------------------------------------------------------------------------------------


def module_names() -> set[str]:
    """Every name of a module, a weight or a number of a module that a row or a constant of architectures.py holds."""
    tree = ast.parse(NAMES["models.architectures"].read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {part for text in texts if " " not in text for part in text.split(".") if "_" in part}
    own = {field.name for field in fields(module("models.architectures").Architecture)}
    return named - own - {*module("models.architectures").ARCHITECTURES} - WIDELY_KNOWN


# What every config of transformers has, or what Billhook calls by these names too.
WIDELY_KNOWN = {"hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "model_type", "text_config"}


# The table itself, what is copied into checkpoints, and formats, which have names of their own for the same things.
KNOWING = ("models.architectures", "models.modeling_billhook", "models.formats.", "methods.export.modeling_decilm")


@pytest.mark.parametrize("name", sorted(name for name in NAMES if not name.startswith(KNOWING)))
def test_only_the_table_of_architectures_knows_the_names_of_modules(name: str) -> None:
    known = module_names()
    assert {"q_proj", "gate_up_proj", "query_key_value", "post_attention_layernorm", "layer_types"} <= known
    tree = ast.parse(NAMES[name].read_text())
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {word for word in words if known & set(word.split("."))}


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
    found = [node.lineno for node in ast.walk(ast.parse(NAMES["cli.main"].read_text())) if isinstance(node, ast.Assert)]
    assert not found, f"cli/main.py asserts in lines {found}; raise UsageError instead"
