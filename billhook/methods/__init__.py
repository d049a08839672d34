"""The families of methods, each an entry under its family's decorator. No family imports another."""
