"""Results as words, tables and pages. Imports core alone."""
