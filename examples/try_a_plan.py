"""Compare a few plans made by hand, then make the best of them real and let it write.

    python examples/try_a_plan.py [MODEL [TEXT]]

MODEL: a folder, a .gguf file, a Hugging Face name, or demo (the default). TEXT: a text file; its first 256 tokens are
read. One short text ranks plans roughly; `billhook prune` measures many.
"""

import sys
from pathlib import Path

import torch

import billhook

teacher = billhook.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
text = Path(sys.argv[2] if len(sys.argv) > 2 else __file__).read_text(encoding="utf-8")
ids = teacher.tokenizer(text, return_tensors="pt").input_ids[:, :256].to(teacher.model.device)


@torch.inference_mode()
def loss_of(plan: billhook.Plan) -> float:
    """Mean KL(teacher || student) over the tokens of the text, in nats."""
    p = teacher.model(ids, use_cache=False).logits.float().log_softmax(-1)  # [1, tokens, vocabulary]
    with billhook.masked(teacher, plan):
        q = teacher.model(ids, use_cache=False).logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


middle = teacher.anatomy.blocks // 2
plans = [
    billhook.Plan.parse([f"attention.{middle}"]),
    billhook.Plan.parse([f"mlp.{middle}"]),
    billhook.Plan.parse([f"attention.{middle}", f"mlp.{middle}"]),
    billhook.Plan.parse(["attention.0", f"attention.{middle}"]),
]
whole = teacher.anatomy.total("parameters")
for plan in plans:
    share = 1 - teacher.anatomy.total("parameters", plan) / whole
    print(f"{loss_of(plan):9.5f} nats/token  {share:6.2%} of the parameters  {plan}")

best = min(plans, key=loss_of)
student = billhook.apply(teacher, best)
written = student.generate(ids[:, :16], max_new_tokens=16, do_sample=False)
print(f"Without {best} it goes on: {teacher.tokenizer.decode(written[0, 16:])!r}")
