"""One run: its recipe, its store and its stages."""
