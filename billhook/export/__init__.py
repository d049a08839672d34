"""Exports: each writes a folder that loads back with equal logits, or raises and leaves no folder."""
