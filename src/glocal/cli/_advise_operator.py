"""`glocal advise FILE.safetensors`: captured calls, operator figures only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from glocal._errors import check_file
from glocal._files import atomic_dir
from glocal.cli._common import extents, print_fields, print_json, progress
from glocal.cli._machine import facts

if TYPE_CHECKING:
    from glocal.advise.operator import OperatorAdvice
    from glocal.cli._advise_job import Job
    from glocal.report import Table


def run_operator(job: Job, *, as_json: bool, quiet: bool) -> bool:
    """Judge the captured calls and write recipe, page and table; whether any layer gained a method."""
    from glocal.advise import Workload
    from glocal.advise.operator import advise_operator
    from glocal.report import TableReport, render_table, table_csv

    _check(job)
    if len(job.canvas) > 1:
        raise ValueError(f"--canvas: captured calls lie on one canvas, {len(job.canvas)} are given")
    canvas = extents(job.canvas[0], "--canvas") if job.canvas else None
    check_file("MODEL", job.model)
    workload = Workload.from_tensors(job.model, canvas)
    limit = job.limits.get("relative_l2", 0.05)
    advice = advise_operator(workload, limit=limit, device=job.device, progress=progress(quiet or as_json))
    known = facts(job.device)
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    report = TableReport(
        title="Operator advice on captured calls",
        table=_table(advice),
        created=created,
        subtitle=f"{job.model}: {len(workload)} call(s). Speeds are of single calls; nothing here is end to end",
        notes=tuple(f"{name}: {why}" for name, why in advice.dropped.items()),
        facts=known,
        notice=f"Operator figures only. The recipe takes methods with a relative error of at most {limit:g} per call.",
    )
    recipe = advice.recipe.with_evidence(created=created)
    with atomic_dir(job.out) as folder:
        recipe.save(folder / "recipe.json")
        (folder / "report.html").write_text(render_table(report), encoding="utf-8")
        (folder / "operator.csv").write_text(table_csv(report.table), encoding="utf-8")
    summary = {
        "status": recipe.status,
        "layers with a method": len(recipe.rules),
        "page": str(job.out / "report.html"),
        "recipe": str(job.out / "recipe.json"),
    }
    if as_json:
        print_json(summary)
    else:
        print_fields(summary)
    return recipe.status != "dense"


def _check(job: Job) -> None:
    """ValueError for what says something of a run of a model: captured calls have none."""
    given = {
        "--workload": job.workload,
        "--effort": job.effort,
        "--target-speedup": job.target_speedup,
        "--methods": job.methods,
        "--keep-dense": job.keep_dense,
        "--budget": job.budget,
        "--sensitivity": job.sensitivity != "forward",
        "--jobs": job.jobs != 1,
        "--resume": job.resume,
    }
    given |= {f"--max {n}": n != "relative_l2" for n, limit in job.limits.items() if (n, limit) != ("drift", 0.10)}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name}: captured calls are judged each by itself; legal beside them: --canvas, --device, "
                "--max relative_l2=V"
            )


def _table(advice: OperatorAdvice) -> Table:
    from glocal.report import Column, Table

    chosen = {(layer, rule.use) for rule in advice.recipe.rules for a, b in rule.layers for layer in range(a, b + 1)}
    columns = (
        Column("call"),
        Column("layer", digits=0),
        Column("method"),
        Column("kept", percent=True),
        Column("time, operator", "ms"),
        Column("dense", "ms"),
        Column("speed-up, operator", "x"),
        Column("relative error", percent=True),
        Column("worst head", percent=True),
        Column("in the recipe"),
    )
    rows = tuple(
        (
            r.call,
            r.layer,
            advice.methods[r.method].words(),
            r.time.kept,
            r.time.median * 1e3,
            r.dense.median * 1e3,
            r.speedup,
            r.measures["relative_l2"],
            r.measures["worst_head"],
            "yes" if (r.layer, r.method) in chosen else "",
        )
        for r in sorted(advice.rows, key=lambda r: (r.call, r.time.median))
    )
    return Table(columns, rows)
