"""Commands that write a smaller model without a search, and what they print: tokens, a narrower stream, factors."""
