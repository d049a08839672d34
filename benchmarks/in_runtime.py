"""Random models and plans as exports in the runtime that serves them: how far each is from its student.

    python benchmarks/in_runtime.py vllm
    python benchmarks/in_runtime.py mlx --cases 'heads,the last MLP'

For runtimes that are too large to test with: the package must be installed beside Billhook. Every case is a process of
its own. Prints a line for each: the largest difference of log-probabilities over all next tokens of a random text, and
how many tokens of a greedy answer are the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers

from billhook.core.plan import Plan, Site
from billhook.methods.export import EXPORTS, Student, export_student
from billhook.models.load import load
from billhook.models.repair import Repair
from billhook.models.surgery import apply
from billhook.runtimes import RUNTIMES, RuntimeFailed, Served

TOKENS, GENERATED = 24, 16
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


class Case(NamedTuple):
    """What is removed of a model of a type with these fields, and the sites to which a recovery gave a bias."""

    plan: str = ""
    model_type: str = "llama"
    fields: Mapping[str, Any] = MappingProxyType({})
    biases: str = ""


CASES = {
    "whole": Case(),
    "a block": Case("attention.1,mlp.1"),
    "a middle attention": Case("attention.2"),
    "the last attention": Case("attention.3"),
    "the first attention": Case("attention.0"),
    "a middle MLP": Case("mlp.1"),
    "the last MLP": Case("mlp.3"),
    "mixed": Case("attention.0,attention.2,mlp.3,mlp.1[0-99],attention.3[1]"),
    "neurons": Case("mlp.1[0-299],mlp.2[5-13]"),
    "heads": Case("attention.1[0],attention.3[1]"),
    "biases of a recovery": Case("attention.1[0],mlp.2[0-30]", biases="attention.1,mlp.2"),
    "biases": Case("attention.2,mlp.1[0-30]", fields={"attention_bias": True, "mlp_bias": True}),
    "tied": Case("attention.2,mlp.1", fields={"tie_word_embeddings": True}),
    "llama3 positions": Case("attention.2", fields={"rope_parameters": LLAMA3}),
    "qwen2": Case("attention.2,mlp.1", "qwen2"),
    "mistral": Case("attention.2,mlp.1", "mistral", {"sliding_window": None}),
}


def main() -> None:
    """Parse, export, serve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=sorted(RUNTIMES))
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    given = parser.parse_args()
    target = next(n for n in EXPORTS if any(given.runtime in form.runtimes for form in EXPORTS.facts(n)))
    print(f"{target} in {given.runtime} {RUNTIMES[given.runtime].version}", flush=True)
    with tempfile.TemporaryDirectory() as home:
        for number, name in enumerate(given.cases.split(",")):
            print(f"{name:24}", measure(Path(home) / str(number), CASES[name], target, given.runtime), flush=True)


def measure(home: Path, case: Case, target: str, runtime: str) -> str:
    """Return one line about one case."""
    model = build(case)
    model.save_pretrained(home / "teacher")
    teacher = load(home / "teacher", device="cpu", dtype="float32")
    plan = Plan.parse(case.plan.split(",") if case.plan else [])
    biased = [Site.parse(site) for site in case.biases.split(",") if site]
    repair = Repair(biases={site: torch.randn(model.config.hidden_size) for site in biased})
    rows = torch.randint(3, model.config.vocab_size, (1, TOKENS))
    student = Student(apply(teacher, plan, repair=repair), teacher, plan, rows, repair, verify=False)
    path = export_student(target, student, home / "export").folder
    with torch.inference_mode():
        mine = student.model(input_ids=rows, use_cache=False).logits[0].float().log_softmax(-1)
        made = student.model.generate(rows, max_new_tokens=GENERATED, do_sample=False)[0, TOKENS:].tolist()
    try:
        with Served(runtime, path, context=TOKENS + GENERATED) as served:
            theirs = torch.from_numpy(served.logprobs(rows[0].tolist()))
            answer = served.generate(rows[0].tolist(), GENERATED)
    except RuntimeFailed as error:
        return f"refused: {str(error)[:400]}"
    same = next((i for i, (a, b) in enumerate(zip(made, answer, strict=True)) if a != b), GENERATED)
    kl = float((mine.exp() * (mine - theirs)).sum(-1).max())
    return f"difference {float((mine - theirs).abs().max()):.1e}, kl {kl:.1e}, {same} of {GENERATED} tokens"


def build(case: Case) -> Any:
    """Return a random model of 4 blocks, width 256, whose every part matters."""
    fields = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    } | case.fields  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(case.model_type, **fields), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.dim() == 1 and parameter.mean() > 0.5))
    model.generation_config.eos_token_id = None  # so that generation never stops early
    return model.eval()


if __name__ == "__main__":
    main()
