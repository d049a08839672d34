"""Studies of models behind HTTP servers."""
