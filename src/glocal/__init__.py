"""Attention that is local where it can be and global where it must be."""
