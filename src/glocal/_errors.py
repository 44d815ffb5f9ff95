"""Errors whose message is written for the person at the keyboard."""

from __future__ import annotations


class GlocalError(Exception):
    """Something the user can mend: the message says what was given, what is legal and the nearest fix."""


class CheckFailed(GlocalError):
    """Everything ran, and the answer is no: a parity case missed its tolerance, a limit was not kept."""
