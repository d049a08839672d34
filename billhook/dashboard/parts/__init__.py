"""Parts of live pages: each reads what it shows, and makes HTML of it."""
