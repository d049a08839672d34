"""Forecasts, costs and suggestions, from what a store holds. No torch, but where a model has to be read."""
