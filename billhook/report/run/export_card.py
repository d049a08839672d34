"""The model card of an export: what it is, whether it was verified, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from billhook.core.errors import visible
from billhook.core.results.exports import ExportReport
from billhook.report.frame import markdown
from billhook.report.numbers import verification_sentence
from billhook.report.run.use import engine_code

SERVED_BY = {"gguf": ("llama.cpp", "ollama"), "deci": ("vllm", "mlx")}  # by a shell command


def export_card(report: ExportReport, version: str) -> str:
    """README.md of an exported folder: Markdown with the YAML front matter of the Hugging Face Hub.

    `version`: the release of Billhook that wrote it.
    """
    name = re.split(r"[/\\]", report.model.rstrip("/\\"))[-1]
    lines = "\n".join(run_commands(report.to, report.files))
    told = [
        f"---\ntags:\n- billhook\n- pruned\n- {report.to}\n---",
        f"# {markdown(name)}, as {markdown(report.form)}",
        verification_sentence(report.verified),
        "\n".join(f"> {markdown(note)}\n>" for note in report.notes).removesuffix("\n>"),
        f"## Run it\n\nIn this folder:\n\n```sh\n{lines}\n```" if lines else "",
        f"Made with Billhook {markdown(version)}.\n",
    ]
    return visible("\n\n".join(filter(None, told)))


def run_commands(to: str, files: Sequence[str]) -> list[str]:
    """Shell commands that run an export in the folder of its `files`; none for a form that needs code of its own."""
    if to in ("transformers", "stock"):
        return ["transformers chat . --trust-remote-code" if to == "transformers" else "transformers chat ."]
    return [engine_code(target, ".", files) for target in SERVED_BY.get(to, ())]
