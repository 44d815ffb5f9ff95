"""Adapters for models of this and of other libraries, one file a family."""
