"""One config for the whole line."""
