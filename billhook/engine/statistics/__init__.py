"""Statistics for metrics: passes over a model whose sums over document groups add up."""
