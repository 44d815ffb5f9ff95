"""Charts as inline SVG text, one a file; each takes plain records and a size and returns markup."""
