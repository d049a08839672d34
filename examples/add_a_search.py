"""Add a search of your own and prune with it.

    python examples/add_a_search.py [MODEL [TEXT]]

MODEL: a folder, a .gguf file, a Hugging Face name, or demo (the default). TEXT: a .txt, .jsonl or .parquet file; left
out, it is the prose that comes with Python. The checkpoint and its report appear in pruned/own-search.
"""

import sys

import billhook
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, search


@search
def shortlist(problem: Problem, keep: int = 8) -> Search:
    """Rank all sites once, then go on greedily, measuring only the `keep` best ranked of those that are left.

    Source: an example, not a published method.
    """
    moves = problem.moves(Plan())  # what may go: single sites, or whole blocks where the budget counts blocks
    losses = yield MeasureRequest(
        tuple(Plan().without(*move) for move in moves)
    )  # whoever runs the search measures them
    ranked = [moves[i] for i in sorted(range(len(moves)), key=lambda i: losses[i].mean)]
    plan, path = Plan(), []
    while not problem.is_met(plan):
        free = set(problem.moves(plan))
        plans = tuple(plan.without(*move) for move in [move for move in ranked if move in free][:keep])
        losses = yield MeasureRequest(
            plans
        )  # the first of these rounds is in the store already: nothing is measured twice
        plan = plans[min(range(len(plans)), key=lambda i: losses[i].mean)]
        path.append(plan)
    return path


model = sys.argv[1] if len(sys.argv) > 1 else "demo"
text = sys.argv[2] if len(sys.argv) > 2 else "pydoc"
result = billhook.prune(model, remove="25%sites", search="shortlist", data=text, out="pruned/own-search")
for step in result.steps:
    print(f"{step.loss:9.5f} nats/token after {', '.join(map(str, step.sites))}")
if result.perplexity:
    print(f"perplexity x{result.perplexity.ratio.value:.3f}")
