"""The parts of the page of one run: its drawing, its sites, its losses, how to run it, and its model card."""
