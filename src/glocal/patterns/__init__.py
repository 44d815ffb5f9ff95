"""Who may see whom by position."""
