"""Forecasts, costs and suggestions in words."""
