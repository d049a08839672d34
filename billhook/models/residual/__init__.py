"""The residual stream of a model: who reads and writes it, and the same model with a narrower one."""
