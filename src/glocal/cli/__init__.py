"""The command line. A verb is one module here with a function `command`; its options are the function's parameters.

A verb's module is imported when the verb is named or the help lists it, so it imports heavy things inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any

import typer

from glocal.cli._guard import Verb, VerbGroup

ORDER = ("advise", "run", "validate", "export", "simulate", "compare", "view", "bench", "parity", "list", "show", "env")


def verbs() -> list[str]:
    """The names of all verbs: those of ORDER that exist, then any other module here that is not private."""
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return [name for name in ORDER if name in found] + sorted(found.difference(ORDER))


class _Verbs(VerbGroup):
    """Finds verbs among the modules of this package."""

    def list_commands(self, ctx: Any) -> list[str]:
        return verbs()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in verbs():
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, cls=Verb)(module.command)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Verbs, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"glocal {version('glocal')}")
        raise typer.Exit


@app.callback()
def _glocal(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Attention that is local where it can be and global where it must be.

    Exit codes: 0 done, 1 a check failed, 2 bad usage.
    """
    ctx.obj = {"debug": debug}


def main() -> None:
    """The entry point `glocal`."""
    app(prog_name="glocal")
