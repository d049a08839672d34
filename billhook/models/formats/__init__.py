"""Formats of files that a GGUF file leaves out and other programs ask for."""
