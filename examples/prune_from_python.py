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

print("Removed:", ", ".join(result["plan"]["removed"]))
for kind in ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token"):
    was, now = result[kind]["teacher"], result[kind]["student"]
    print(f"{kind}: {was:,} -> {now:,} ({now / was - 1:+.1%})")

quality = result["perplexity"]
low, high = quality["ci95"]
print(f"perplexity: {quality['teacher']:.2f} -> {quality['student']:.2f}")
print(f"ratio: {quality['ratio']:.3f} (95% interval {low:.3f} to {high:.3f}, {quality['clusters']} texts)")

for phase, ratio in result["speed"]["ratio"].items():
    print(f"{phase} speed: x{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
print(f"Open {result['out']}/report.html")
