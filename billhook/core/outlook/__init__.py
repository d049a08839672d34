"""Outlook: what follows from numbers that a store already holds. Values and arithmetic; no torch."""
