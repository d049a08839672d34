"""Exports: what makes a folder of a student that other software loads."""
