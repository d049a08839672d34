"""Pages of studies that are made of trials: a sweep, a transfer, and a study of stability."""
