"""Linear maps as two smaller ones: the best for what a text gives them, their ranks, and a student that has them."""
