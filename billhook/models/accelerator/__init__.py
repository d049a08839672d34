"""What differs between a CPU and a GPU: how much is given to it at a time, its memory, its products."""
