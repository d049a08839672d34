"""GGUF files, and the files that they leave out and other programs ask for."""
