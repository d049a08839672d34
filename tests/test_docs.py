"""The docs are true: generated blocks up to date, snippets and examples run, nothing left out, nothing made up."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import transformers
import typer

import billhook
from billhook.core import errors
from billhook.core.budget import UNITS, VOCABULARY, Budget, parse_budgets, parse_bytes
from billhook.core.problem import Problem
from billhook.engine.losses import LOSSES, loss_facts
from billhook.methods.search import estimate_losses
from billhook.models import structure
from billhook.models.architectures import ARCHITECTURES
from billhook.models.device import SHARE_OF_WEIGHTS
from billhook.models.pruned_config import PrunedConfig
from billhook.runs.recipe import Recipe, parse_recipe, with_overrides

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *GUIDES]
PROSE = [page for page in PAGES if page.name != "results.md"]  # which benchmarks/results.py writes
MOST_WORDS = 25  # in a sentence
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generator()
COMMANDS: dict[str, Any] = GENERATE.commands()
OPTIONS = {name: {o for p in command.params for o in p.opts if o[0] == "-"} for name, command in COMMANDS.items()}
for _options in OPTIONS.values():
    _options.add("--help")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def inline(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


# -- nothing is left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_generated_blocks_are_up_to_date(name: str) -> None:
    assert read(DOCS / name) == GENERATE.page(name), f"docs/{name} is out of date. Run: make docs"


def test_the_results_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    methods, results = (importlib.import_module(name) for name in ("methods", "results"))
    assert read(DOCS / "results.md") == results.page(methods.MEASURED, methods.SCALED)


def test_the_picture_of_widths_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    figure = importlib.import_module("figure")
    told = json.loads(read(ROOT / "benchmarks" / "measured" / "width.json"))
    assert figure.drawn_from(figure.lines_of(told)) in read(DOCS / "width.svg")
    row = {"parameters": 80, "on": {"c4": {"dense": 40.0, "before": 90.0, "after": 60.0}}}
    three = {
        "whole": 100,
        "rows": {"20%/flap": row, "20%/saap": row | {"parameters": 81}, "20%/flap again": row | {"parameters": 80.1}},
    }
    figure.figure(three, tmp_path / "some.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", read(tmp_path / "some.svg"))
    assert {"flap", "saap", "unpruned", "without a recovery", "with fold"} <= set(words)
    assert "flap again" not in words, "its line is that of flap"


def test_every_command_and_option_is_documented() -> None:
    sections = dict(re.findall(r"^## billhook (\w+)\n(.*?)(?=^## |\Z)", read(DOCS / "commands.md"), re.M | re.S))
    assert set(sections) == set(COMMANDS)
    for name, options in OPTIONS.items():
        missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", sections[name])]
        assert not missing, f"billhook {name}: {missing}"
    assert {
        "--" + field.replace("_", "-") for field in Recipe.model_fields if field not in ("about", "model")
    } <= OPTIONS["prune"]


def test_every_method_architecture_unit_and_public_name_is_documented() -> None:
    wanted = {
        "methods.md": {method.name for method in billhook.list_methods()},
        "architectures.md": set(ARCHITECTURES),
        "how-it-works.md": {*UNITS, VOCABULARY},
        "python.md": {*billhook.__all__, *(kind.__name__ for kind in _errors())},
    }
    for page, names in wanted.items():
        told = set(re.findall(r"\w+", " ".join(inline(read(DOCS / page)))))
        assert names <= told, f"docs/{page} lacks {sorted(names - told)}"


def _errors(root: type[errors.BillhookError] = errors.BillhookError) -> Iterator[type[errors.BillhookError]]:
    """The tree of errors.py."""
    if root.__module__ == errors.__name__:
        yield root
        for kind in root.__subclasses__():
            yield from _errors(kind)


def test_every_exit_code_is_documented() -> None:
    section = read(DOCS / "how-it-works.md").partition("## Refusals and exit codes")[2]
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    assert told == {0, 130, *(kind.exit_code for kind in _errors())}


def test_the_architectures_that_are_said_to_be_tested_are() -> None:
    assert set(ARCHITECTURES) == set(tiny.TYPES)


def test_every_loss_is_explained_with_its_unit() -> None:
    section = read(DOCS / "how-it-works.md").partition("## Losses")[2].partition("\n## ")[0]
    table = dict(re.findall(r"^\| `(\w+)`.* \| (\w+) \|$", section, re.MULTILINE))
    assert table == {loss: loss_facts(loss).unit for loss in LOSSES}


def test_every_budget_that_the_docs_name_can_be_read() -> None:
    section = read(DOCS / "how-it-works.md").partition("## Budgets")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    assert {unit for unit, _ in table} == {*UNITS, VOCABULARY}
    for unit, cell in table:
        assert [Budget.parse(text).unit for text in inline(cell)] == [unit] * len(inline(cell))


def test_the_worked_example_is_computed_from_its_model() -> None:
    """Sizes, losses and times of the guide's model of 7 billion parameters, from its shape alone."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    sizes = structure.anatomy(model, config, PrunedConfig(32, tuple(range(32))), item_bytes=2)
    attention, mlp = (next(size for size in sizes.sites if size.site.part == part) for part in ("attention", "mlp"))
    problems = {remove: Problem(sizes, parse_budgets(remove)) for remove in ("20%", "20%blocks")}
    losses = {name: estimate_losses(name, problems["20%"]) for name in ("oneshot", "greedy", "swap", "evolve")}
    grouped = replace(problems["20%"], group_scores={})
    losses["joint"] = estimate_losses("joint", grouped)
    ours = parse_recipe(with_overrides("billhook", remove="20%"))
    losses["ours"] = estimate_losses("joint", grouped, **ours.set)
    tflops = sizes.total("flops_per_token") * ours.tokens / 1e12
    few = sizes.total("flops_per_token") * int(ours.set["tokens"]) / 1e12
    evaluate = (2 + len(ours.recoveries)) * sizes.total("flops_per_token") * ours.eval_tokens
    need = float(0.2 * sizes.total("parameters"))
    page = " ".join(read(DOCS / "guides" / "make-a-model-smaller.md").split())
    for told in (
        f"{sizes.total('parameters') / 1e9:.2f}B parameters, {sizes.total('bytes') / 1e9:.2f} GB",
        f"{sizes.total('kv_bytes_per_token') / 1e3:.0f} kB KV per token",
        f"{sizes.total('flops_per_token') / 1e9:.1f} GFLOPs per token",
        f"{attention.parameters / 1e6:.1f}M parameters, {attention.bytes / 1e6:.0f} MB",
        f"{attention.kv_bytes_per_token / 1e3:.1f} kB KV per token",
        f"{mlp.parameters / 1e6:.1f}M parameters, {mlp.bytes / 1e6:.0f} MB",
        f"20% is {need / 1e9:.2f} billion parameters",
        f"or {math.ceil(need / attention.parameters)} attentions",
        f"{losses['ours'] - 10} × {few:.1f} TFLOP ({ours.set['tokens']} tokens) and 10 × {tflops:.0f} TFLOP "
        f"({ours.tokens:,} tokens)",
        f"of {ours.recover_tokens:,} tokens `fold` reads a third twice, `lora` the others four times",
        f"at most {losses['swap']:,} |",
        f"| {evaluate / 60e12:.0f} seconds |",
        f"`swap` then asks for at most {estimate_losses('swap', problems['20%blocks'])} losses",
        f"at most {(24 - sizes.total('bytes') / 1e9) / 2:.0f} GB",
        f"about {0.8 * sizes.total('bytes') / 1e9:.1f} GB",
        f"about {sizes.total('bytes') / 3e9:.0f} seconds",
        *(f"| `{name}` | {losses[name]:,} |" for name in ("oneshot", "greedy", "evolve")),
        f"| `joint` | at most {losses['joint']:,} |",
        f"`--effort thorough` asks for at most {losses['joint']:,} losses",
        f"| `joint`, of `billhook` | at most {losses['ours']:,} |",
        f"| losses to measure | at most {losses['ours']:,} |",
    ):
        assert told in page, told
    assert math.ceil(need / mlp.parameters) == 10, "ten MLPs"
    assert sizes.total("bytes") > SHARE_OF_WEIGHTS * parse_bytes("10GB"), "which streams the model"


# -- nothing is named that is not there -----------------------------------------------------------------------------


@each_page
def test_links_resolve(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: [{text}]({target}) leads nowhere"
        if anchor:
            assert anchor in set(anchors(read(file))), f"{page.name}: {file.name} has no heading #{anchor}"


def anchors(text: str) -> Iterator[str]:
    """The anchors that a reader's browser finds in a page: its headings, in GitHub's spelling."""
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    for code in inline(read(page)):
        if re.fullmatch(r"(billhook|tests|docs|examples|benchmarks|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{page.name}: `{code}`"
        elif named := re.fullmatch(r"(billhook(?:\.\w+)+)(\(.*)?", code):
            assert code in NO_MODULES or _resolves(named[1]), f"{page.name}: `{code}`"


NO_MODULES = {"billhook.json", "billhook.db", "billhook.patches", "billhook.groups", "billhook.kept_blocks"}
NO_MODULES |= {f"billhook.{family}" for family in ("metric", "group_metric", "loss", "task_loss", "search", "recovery")}
NO_MODULES |= {
    f"billhook.{family}" for family in ("evaluation", "export", "architecture", "suggestion", "tracker")
}  # entry points


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    head, _, last = name.rpartition(".")
    with suppress(ImportError):
        return importlib.import_module(name) is not None
    return hasattr(importlib.import_module(head), last) if head else False


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in sentences(read(page)) if len(sentence.split()) > MOST_WORDS]
    assert not long, f"{page.name}: more than {MOST_WORDS} words: {long}"


def sentences(text: str) -> Iterator[str]:
    """What stands outside of headings, tables and code, up to a full stop, a colon or a semicolon each."""
    text = FENCE.sub("", re.sub(r"<!-- generated.*?<!-- end -->", "", text, flags=re.DOTALL))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not paragraph.lstrip().startswith(("|", "#", "<")):
            plain = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", paragraph.replace("**", ""))
            yield from re.split(r"(?<=[.!?:;])\s+(?=\S)", " ".join(plain.split()))


def test_the_check_of_sentences_tells_long_from_short() -> None:
    text = f"# A heading\n\n- One two `three four`. {'word ' * 26}end\n\n| a table |\n"
    assert [len(sentence.split()) for sentence in sentences(text) if sentence] == [3, 27]


@each_page
def test_shell_blocks_name_only_what_exists(page: Path) -> None:
    for block in fences(read(page), "sh"):
        for words in simple_commands(block):
            check_command(words, page.name)


def simple_commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words: joined over continued lines, split at pipes, without `VAR=value`."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word[0] not in "|&;":
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []


def check_command(words: list[str], where: str) -> None:
    program, arguments = Path(words[0]).name, words[1:]
    if program == "billhook" and arguments[:1] != ["--help"]:
        name = arguments[0] if arguments else ""
        assert name in COMMANDS, f"{where}: there is no command `{' '.join(words)}`"
        try:
            COMMANDS[name].make_context(name, arguments[1:])
        except typer.Exit:  # --help
            pass
        except Exception as error:
            pytest.fail(f"{where}: `{shlex.join(words)}` is refused: {error}")
        check_values(arguments, where)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
        asked = {word for word in arguments if word[0] != "-" and "=" not in word}
        assert asked <= targets, f"{where}: the Makefile has no {sorted(asked - targets)}"
    elif program.startswith("python"):
        files = [word for word in arguments if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files), f"{where}: {files}"
    elif program == "pip":
        extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
        named = re.findall(r"(?:billhook|\.)\[([\w,]+)\]", " ".join(arguments))
        assert {extra for group in named for extra in group.split(",")} <= set(extras), f"{where}: {words}"


def check_values(arguments: list[str], where: str) -> None:
    """The budget, search and loss that a command line names."""
    known = {family: {each.name for each in billhook.list_methods() if each.family == family} for family in FAMILIES}
    for option, value in pairwise(arguments):
        if option == "--remove":
            for size in value.split(",") if arguments[0] == "sweep" else [value]:
                parse_budgets(size)
        elif option.removeprefix("--") in FAMILIES:
            assert value in known[option.removeprefix("--")], f"{where}: {option} {value}"


FAMILIES = ("search", "loss")


@pytest.mark.parametrize(
    "line", ["billhook prnue", "billhook prune --remov 1sites", "billhook speed a b c", "make tset", "billhook show",
             "billhook prune --tokens many", "python examples/none.py", "pip install 'billhook[all]'"],
)  # fmt: skip
def test_the_check_of_shell_blocks_tells_wrong_from_right(line: str) -> None:
    cd, command, head = simple_commands(f"X=1 cd /tmp && \\\n  {line} | head  # a comment\n")
    assert (cd, head) == (["cd", "/tmp"], ["head"])
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(command, "here")


@each_page
def test_inline_code_names_only_what_exists(page: Path) -> None:
    every = set().union(*OPTIONS.values())
    for code in inline(read(page)):
        words = code.replace("\\|", "|").split()
        if words[0] == "billhook" and len(words) > 1 and words[1] != "--help":
            assert words[1] in COMMANDS, f"{page.name}: `{code}`"
            wrong = {word for word in words if word.startswith("-")} - OPTIONS[words[1]]
            assert not wrong, f"{page.name}: `{code}`"
        elif re.match(r"--[a-z]", code):
            assert words[0].partition("=")[0] in every, f"{page.name}: `{code}`"
        elif words[0] == "make" and len(words) > 1:
            check_command(words, page.name)


def test_recipes_in_the_docs_are_recipes(tmp_path: Path) -> None:
    from billhook.core.monitoring.rules import read_rules
    from billhook.runs.recipe import parse_recipe, read_yaml

    found = [block for page in PAGES if page.exists() for block in fences(read(page), "yaml")]
    assert found
    for block in found:
        (tmp_path / "recipe.yaml").write_text(block)
        if block.startswith("rules:"):
            assert read_rules(tmp_path / "recipe.yaml")
        else:
            parse_recipe(read_yaml(tmp_path / "recipe.yaml"))


def test_the_table_of_rules_is_what_can_be_written() -> None:
    from billhook.core.monitoring.rules import KINDS

    section = read(DOCS / "guides" / "watch-a-served-model.md").partition("## Rules")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert {kind: inline(cell) for kind, cell in rows.items()} == {
        kind: [f"{limits.key}: {example}" for example in limits.examples] for kind, limits in KINDS.items()
    }


def test_the_licence_is_the_one_that_the_package_names() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert project["license"] == "Apache-2.0"
    assert re.match(r"\s*Apache License\s+Version 2.0, January 2004", read(ROOT / "LICENSE"))
    assert all((ROOT / file).is_file() for file in (project["readme"], *project["license-files"]))


# -- what the docs show runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the snippets name: the model `tiny` and `texts.jsonl`."""
    folder = tmp_path_factory.mktemp("workshop")
    tiny.with_tokenizer(folder / "tiny", max_position_embeddings=512)
    tiny.write_texts(folder / "texts.jsonl", 240)
    return folder


def run(script: Path, workshop: Path, *arguments: str) -> str:
    """What a script prints, run as a reader runs it: a process of its own in the working folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=workshop, env=env, check=False, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_snippets_run_and_the_result_is_as_described(workshop: Path) -> None:
    """One script of all the snippets, each line where it stands on the page, so that a traceback points there."""
    lines, inside = [], False
    for line in read(DOCS / "python.md").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    script = workshop / "python.md.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run(script, workshop)
    section = read(DOCS / "python.md").partition("### The result")[2].partition("\n## ")[0]
    told = {name for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in inline(cell)}
    assert told == set(json.loads(read(workshop / "pruned" / "report.json")))


def test_the_snippets_of_readme_and_guides_run(tmp_path: Path) -> None:
    """One script of all of them, with a tiny model and little text where a page says path/to/model and my.jsonl."""
    tiny.with_tokenizer(tmp_path / "tiny", max_position_embeddings=512)
    tiny.write_texts(tmp_path / "texts.jsonl", 120)
    snippets = "\n".join(snippet for page in (ROOT / "README.md", *GUIDES) for snippet in fences(read(page), "python"))
    little = {"tokens": 240, "length": 24, "self_share": 0, "eval_tokens": 640, "eval_length": 32}
    assert '"path/to/model"' in snippets
    before, *pieces = snippets.replace('"path/to/model"', '"tiny"').split('data="my.jsonl"')
    assert pieces
    for piece in pieces:
        called = signature(getattr(billhook, re.findall(r"billhook\.(\w+)\(", before)[-1])).parameters
        free = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in called.values())
        own = "".join(f", {name}={value}" for name, value in little.items() if free or name in called)
        before += f'data="texts.jsonl"{own}{piece}'
    snippets = before
    (tmp_path / "all.py").write_text(snippets, encoding="utf-8")
    run(tmp_path / "all.py", tmp_path)
    assert {"pruned", "without-the-end"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(script: Path, workshop: Path) -> None:
    assert run(script, workshop, "tiny", "texts.jsonl").count("\n") >= 3
    assert f"examples/{script.name}" in (read(script) + "".join(map(read, DOCS.glob("*.md"))))
