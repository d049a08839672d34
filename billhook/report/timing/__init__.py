"""Measured speed as words and as a page."""
