"""How to run a student, in each piece of software that takes it, and what to do next: code and commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from billhook.core.results.exports import ExportReport, TargetFit
from billhook.core.results.run import RunResult
from billhook.report.frame import caption, details, escaped
from billhook.report.numbers import printable, verification_sentence
from billhook.report.run.narrowed import narrowed_sites
from billhook.report.run.sites import sites_in_words
from billhook.report.run.smaller_vocabulary import rows_in_words
from billhook.report.run_words import FAULTS

MOST_KINDS = 4  # of narrowed sites, at a glance
PROMPT = "The capital of France is"
ENGINES = {
    "llama.cpp": "llama.cpp", "ollama": "Ollama", "lmstudio": "LM Studio", "mlx": "MLX", "vllm": "vLLM",
    "sglang": "SGLang", "onnx": "ONNX Runtime", "openvino": "OpenVINO",
    "stock": "Software that reads stock checkpoints",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """How one piece of software runs a student: what to type, and whether Billhook has seen it do so."""

    name: str
    code: str
    verified: bool
    state: str


def transformers_code(result: RunResult, folder: str) -> str:
    """Return Python that answers a prompt."""
    trust = ", trust_remote_code=True" if result.checkpoint.startswith("billhook-") else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder!r}\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f'prompt = tokenizer("{PROMPT}", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"
    )


def uses(result: RunResult) -> list[Use]:
    """Return every piece of software that takes the student: transformers first, then exports that are there."""
    out = printable(result.out)
    state = "Verified: Billhook loaded the checkpoint back, and its outputs were those of the student it measured."
    found = [Use("transformers", transformers_code(result, out), True, state)]
    done = {report.to: report for report in result.exports}
    seen: set[str] = set()
    for target in sorted(result.targets, key=lambda each: each.export not in done):
        if target.fault is None and target.export != "transformers":
            found.append(_use(target, done.get(target.export), out))
            seen.add(target.export)
    for name, report in done.items():
        if name not in seen and name != "transformers":
            found.append(_use(TargetFit(name, name, None, True), report, out))
    return found


def _use(target: TargetFit, report: ExportReport | None, out: str) -> Use:
    """How `target` runs the export of `report`, or what to type first where there is none."""
    folder = printable(report.out) if report is not None else f"{out}-{target.export}"
    code = engine_code(target.target, folder, report.files if report is not None else ())
    name = ENGINES.get(target.target, target.target)
    if report is None:
        code = f"billhook export {shlex.quote(out)} --to {target.export}\n{code}"
    if report is not None and report.verified is not None and target.verified:
        return Use(name, code, True, verification_sentence(report.verified))
    why = "Billhook did not run this export there" if target.verified else f"Billhook does not run {name}"
    if report is None and target.verified:
        why = f"no export was written yet; billhook export runs it in {name} where that is installed"
    return Use(name, code, False, f"Not verified: {why}.")


def engine_code(target: str, folder: str, files: Sequence[str] = ()) -> str:
    """Return what to type to run the export in `folder` in one piece of software."""
    quoted = shlex.quote(folder)
    gguf = next((file for file in files if file.endswith(".gguf")), "model-F16.gguf")
    codes = {
        "llama.cpp": f"llama-server -m {shlex.quote(f'{folder}/{gguf}')}",
        "ollama": f"ollama create pruned -f {shlex.quote(f'{folder}/Modelfile')} && ollama run pruned",
        "lmstudio": f"lms import {shlex.quote(f'{folder}/{gguf}')}",
        "mlx": f'mlx_lm.generate --model {quoted} --prompt "{PROMPT}" --max-tokens 32',
        "vllm": f"vllm serve {quoted} --trust-remote-code",
        "sglang": f"python -m sglang.launch_server --model-path {quoted} --trust-remote-code",
        "onnx": f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({f'{folder}/model.onnx'!r})",
        "openvino": f"import openvino\n\nmodel = openvino.Core().compile_model({f'{folder}/openvino_model.xml'!r})",
    }
    return codes.get(target, f"# the checkpoint is in {folder}")


def use_html(result: RunResult) -> str:
    """How to run the student: transformers in sight, all other software to open, and what does not take it."""
    first, *rest = uses(result)
    parts = [f"<h3>In {escaped(first.name)}</h3><pre>{escaped(first.code)}</pre>{caption(first.state)}"]
    if first.code.count("trust_remote_code"):
        parts.append(caption(
            "No stock class has a place for single missing sites or widths of their own, so the checkpoint brings a "
            "small class. Trust it as above, or install Billhook and call billhook.register() first."
        ))  # fmt: skip
    for use in rest:
        mark = "verified" if use.verified else "not verified"
        body = f"<pre>{escaped(use.code)}</pre>{caption(use.state)}"
        parts.append(details(f"In {use.name}: {mark}", body))
    refused = [
        f"{ENGINES.get(each.target, each.target)} has no place for {FAULTS[each.fault]}."
        for each in result.targets if each.fault is not None
    ]  # fmt: skip
    return "".join(parts) + caption(" ".join(refused) if refused else "")


def next_steps(result: RunResult) -> list[tuple[str, str]]:
    """Return what to do next, the most urgent first: words, and the command."""
    asked = result.recipe.get("model", result.model.name)
    model, out = (shlex.quote(printable(text)) for text in (asked, result.out))
    steps = []
    few = result.perplexity is not None and not result.perplexity.ratio.reliable
    tasks, cut = not result.tasks, result.vocabulary is not None
    if few or tasks:
        why = "on more text" if few else "on the tasks that you care about"
        more = "--eval-tokens 65536" if few else "--tasks TASK.jsonl"
        steps.append((f"Be sure of the quality: measure both {why}.", f"billhook compare {model} {out} {more}"))
    if not result.recoveries and not cut:
        steps.append(("Get quality back without training: refit what is left.",
                      f"billhook prune --recipe recipe.yaml --recover fold --out {out}-fold"))  # fmt: skip
    path = f" --run {shlex.quote(printable(result.run))}" if len(result.steps) > 1 else ""
    if cut:
        steps.append(("See what other text costs with fewer tokens: bits per byte compare models of other tokens.",
                      f"billhook eval {out} --data OTHER.jsonl"))  # fmt: skip
    else:
        steps.append(
            ("Find how much can be removed within a margin.", f"billhook threshold {model}{path} --margin 3%ppl")
        )
    taken = next((t for t in result.targets if t.fault is None and t.export not in ("transformers", "stock")), None)
    if taken is not None and not result.exports:
        steps.append((f"Serve it, such as in {ENGINES.get(taken.target, taken.target)}.",
                      f"billhook export {out} --to {taken.export}"))  # fmt: skip
    return steps


def at_a_glance(result: RunResult) -> str:
    """Which parts were removed, and what to do next, in a few lines."""
    parts = [
        *([rows_in_words(result.vocabulary)] if result.vocabulary is not None else []),
        *sites_in_words(result.plan.sites()),
        *(f"narrowed: {kind}" for kind in narrowed_sites(result)[:MOST_KINDS]),
    ]
    (words, code), *_ = next_steps(result)
    return (
        f'<dl class="glance"><dt>Removed</dt><dd>{escaped("; ".join(parts) or "nothing")}. '
        f'<a href="#parts">All sites</a></dd><dt>Next</dt><dd>{escaped(words)} '
        f'<a href="#next">More</a><pre>{escaped(code)}</pre></dd></dl>'
    )


def next_html(result: RunResult) -> str:
    """What to do next as HTML."""
    lines = (f"<p class=plain>{escaped(words)}</p><pre>{escaped(code)}</pre>" for words, code in next_steps(result))
    return "".join(lines) + caption("recipe.yaml: the whole recipe, at the end of this page.")
