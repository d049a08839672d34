"""The vocabulary of a model: which tokens a text needs, and model and tokenizer without the others."""
