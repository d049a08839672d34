"""A model without the tokens that a text does not need, and what that costs other text."""
