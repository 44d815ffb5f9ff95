"""What every verb has around it: one message and an exit code for an error, close names for a verb that is none."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from glocal._errors import CheckFailed, GlocalError

USAGE = (GlocalError, ValueError, KeyError, OSError, ModuleNotFoundError)  # what the person at the keyboard can mend


def message_of(error: BaseException) -> str:
    """The words of an error: KeyError and OSError put more than words into `str`."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return str(error)


class Verb(TyperCommand):
    """Turns errors into `error: ...` on stderr with exit code 2, a failed check into exit code 1; `--debug` raises."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except USAGE as error:
            if ctx.obj is not None and ctx.obj["debug"]:
                raise
            failed = isinstance(error, CheckFailed)
            print(f"{'failed' if failed else 'error'}: {message_of(error)}", file=sys.stderr)
            raise typer.Exit(1 if failed else 2) from error


class VerbGroup(TyperGroup):
    """Names the closest verbs when one is misspelt."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], names, n=2, cutoff=0.5)
            hint = f"closest: {', '.join(close)}" if close else f"verbs: {', '.join(names)}"
            print(f"error: glocal has no verb {args[0]!r}; {hint}", file=sys.stderr)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)
