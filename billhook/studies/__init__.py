"""Comparisons of several models or recipes."""
