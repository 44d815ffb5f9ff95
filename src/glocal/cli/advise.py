"""glocal advise: where sparse attention pays on a model, with a recipe and a page that proves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glocal.cli._common import Json, Quiet
from glocal.cli._models import STEPS


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="demo, demo-language, package.module:factory, a folder or hub id of diffusers or transformers, or a "
            ".safetensors of captured q, k, v."
        ),
    ] = "demo",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for recipe, page and evidence.")] = Path(
        "out/advise"
    ),
    workload: Annotated[
        Path | None, typer.Option(help="JSON lines, one sample each: id, seed, call arguments. Built in for demo.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="quick, standard or thorough; demo has its own, the demonstration.")
    ] = None,
    target_speedup: Annotated[float | None, typer.Option(help="End-to-end speed-up that is asked for.")] = None,
    max_: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="METRIC=V", help="Limit on a measure, such as drift=0.1; repeat for several."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Systems to consider, joined by commas.")] = None,
    keep_dense: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Sites never to touch; repeat for several.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a run of the built-in model.", min=2)] = STEPS,
    canvas: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FxHxW", help="Size of the samples; repeat to prove several; of captured tensors in tokens."
        ),
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(help="What an error counts for: forward (in the residual stream) or gradient (of the output)."),
    ] = "forward",
    jobs: Annotated[int, typer.Option(help="Processes that share the samples, one a GPU.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda, for the built-in models.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what OUT/state holds.")] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop if the forecast is above it: 6h, 30m or 90s.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each stage will cost; write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find where sparse attention pays in a model; hand back a recipe.

    The recipe comes with its evidence on one page; where nothing pays, the page says "stay dense" and why.
    Exit code 0 if a recipe met every limit, 1 if none did (the page says why first), 2 for bad usage.
    """
    from glocal.advise.forecast import parse_duration
    from glocal.cli._advise_job import Job, run_dry, run_job
    from glocal.cli._machine import torch_device

    job = Job(
        model=model,
        out=out,
        workload=workload,
        effort=effort,
        target_speedup=target_speedup,
        limits=read_limits([] if max_ is None else max_),
        methods=() if methods is None else tuple(methods.split(",")),
        keep_dense=() if keep_dense is None else tuple(keep_dense),
        steps=steps,
        canvas=() if canvas is None else tuple(canvas),
        sensitivity=sensitivity,
        jobs=jobs,
        resume=resume,
        device=torch_device(device),
        budget=None if budget is None else parse_duration(budget, "--budget"),
    )
    if dry_run:
        run_dry(job, as_json=json, quiet=quiet)
        return
    if not run_job(job, as_json=json, quiet=quiet):
        raise typer.Exit(1)


def read_limits(words: list[str]) -> dict[str, float]:
    """`--max` options as limits by measure; drift has one always."""
    limits = {"drift": 0.10}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--max {word!r}: expected METRIC=V, such as drift=0.1")
    return limits
