"""Prune a model to a budget and print what that cost and gained.

    python examples/prune_from_python.py [MODEL [TEXT]]

MODEL: a folder, a .gguf file, a Hugging Face name, or demo (the default). TEXT: a .txt, .jsonl or .parquet file; left
out, it is the prose that comes with Python. The checkpoint and its report appear in pruned/example.
"""

import sys

import billhook

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
text = sys.argv[2] if len(sys.argv) > 2 else "pydoc"

result = billhook.prune(model, remove="25%sites", search="greedy", data=text, out="pruned/example")

print("Removed:", ", ".join(result.plan.names()))
teacher, student = result.sizes.teacher, result.sizes.student
for kind in ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token"):
    was, now = getattr(teacher, kind), getattr(student, kind)
    print(f"{kind}: {was:,} -> {now:,} ({now / was - 1:+.1%})")

if result.perplexity:
    quality, ratio = result.perplexity, result.perplexity.ratio
    print(f"perplexity: {quality.teacher:.2f} -> {quality.student:.2f}")
    print(f"ratio: {ratio.value:.3f} (95% interval {ratio.low:.3f} to {ratio.high:.3f}, {ratio.clusters} texts)")

if result.speed:
    for phase, times in (("prefill", result.speed.ratio.prefill), ("decode", result.speed.ratio.decode)):
        print(f"{phase} speed: x{times.value:.2f} ({times.low:.2f} to {times.high:.2f})")
print(f"Open {result.out}/report.html")
