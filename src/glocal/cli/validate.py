"""glocal validate: an existing recipe, proven again on samples it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glocal.cli._common import Json, Quiet
from glocal.cli._models import STEPS


def command(
    recipe: Annotated[Path, typer.Argument(help="recipe.json of an earlier advice.")],
    model: Annotated[str, typer.Argument(help="As for `glocal advise`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for recipe, page and evidence.")] = Path(
        "out/validate"
    ),
    workload: Annotated[
        Path | None, typer.Option(help="JSON lines, one sample each: id, seed, call arguments. Built in for demo.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Samples to run, dense and sparse (default: 8).", min=2)] = None,
    target_speedup: Annotated[float | None, typer.Option(help="End-to-end speed-up that is asked for.")] = None,
    max_: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="METRIC=V", help="Limit on a measure, such as drift=0.1; repeat for several."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a run of the built-in model.", min=2)] = STEPS,
    device: Annotated[str, typer.Option(help="cpu or cuda, for the built-in models.")] = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove an existing recipe again.

    On other weights, another canvas or device. Samples that the recipe was made or proven on are left out. Exit code 0
    if it met every limit, 1 if not, 2 for bad usage.
    """
    from glocal.cli._advise_job import Job, run_validation
    from glocal.cli._machine import torch_device
    from glocal.cli.advise import read_limits

    job = Job(
        model=model,
        out=out,
        workload=workload,
        target_speedup=target_speedup,
        limits=read_limits([] if max_ is None else max_),
        steps=steps,
        device=torch_device(device),
    )
    if not run_validation(recipe, job, pairs, as_json=json, quiet=quiet):
        raise typer.Exit(1)
