"""A model whose linear maps are pairs of smaller ones, and what that costs on held-out text."""
