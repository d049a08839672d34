"""Texts and tasks, as tokens."""
