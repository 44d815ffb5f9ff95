"""glocal export: a recipe in the words of another library, with what is lost said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glocal.cli._common import Json


def command(
    recipe: Annotated[Path, typer.Argument(help="recipe.json of an advice.")],
    to: Annotated[str, typer.Option("--to", help="vllm-omni or modelopt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, JSON.")],
    json: Json = False,
) -> None:
    """Write a recipe for another library. What the target cannot say is printed; a rule it cannot say at all is named
    and nothing is written (exit code 2).
    """
    from glocal._errors import check_choice
    from glocal._files import write_atomic
    from glocal.advise import Recipe
    from glocal.advise.export import to_modelopt, to_vllm_omni
    from glocal.cli._common import print_fields, print_json

    writers = {"vllm-omni": to_vllm_omni, "modelopt": to_modelopt}
    check_choice("--to", to, writers)
    made = writers[to](Recipe.load(recipe))
    write_atomic(out, dumps(made.content))
    if json:
        print_json({"written": out, "lost": list(made.lost)})
        return
    print_fields({"written": out})
    for sentence in made.lost:
        print(f"lost: {sentence}")


def dumps(content: object) -> str:
    """JSON with sorted keys."""
    import json

    return json.dumps(content, sort_keys=True, indent=1) + "\n"
