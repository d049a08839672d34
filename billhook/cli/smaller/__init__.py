"""Commands that write a smaller model of the stock type without a search: fewer tokens, a narrower stream."""
