"""One loaded model: its architecture, its checkpoint, its device, and surgery on it."""
