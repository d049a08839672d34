"""Devices as text and numbers: their names, and which part of a model each holds."""
