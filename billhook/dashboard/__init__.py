"""Live pages over the run store: what runs do, what they found, and what is worth trying. No torch."""
