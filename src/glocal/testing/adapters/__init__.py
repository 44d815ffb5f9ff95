"""One file a system: how its golden cases go through this library."""
