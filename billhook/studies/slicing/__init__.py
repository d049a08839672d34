"""A model with a narrower residual stream, and what that costs."""
