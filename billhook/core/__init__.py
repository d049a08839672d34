"""Values and arithmetic: plans, budgets, results, statistics. No torch."""
