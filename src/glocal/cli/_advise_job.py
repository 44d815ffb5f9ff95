"""What `glocal advise` does with its options: load, run, and write the outputs, whole or not at all."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glocal._errors import check_choice
from glocal._files import atomic_dir
from glocal.cli._common import check_folder, extents, plain, print_fields, print_json, print_table, progress
from glocal.cli._machine import facts
from glocal.cli._models import STEPS, load_subject

if TYPE_CHECKING:
    from glocal.advise import AdviseOptions, Workload


@dataclass(frozen=True)
class Job:
    """The options of one call."""

    model: str
    out: Path
    workload: Path | None = None
    effort: str | None = None
    target_speedup: float | None = None
    limits: Mapping[str, float] = field(default_factory=lambda: {"drift": 0.10})
    methods: tuple[str, ...] = ()
    keep_dense: tuple[str, ...] = ()
    steps: int = STEPS
    canvas: tuple[str, ...] = ()
    budget: float | None = None
    sensitivity: str = "forward"
    jobs: int = 1
    resume: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Loaded:
    """What a job runs on."""

    model: Any
    workload: Any
    objective: Any
    effort: str


BUILT_IN = ("demo", "demo-language")


def load(job: Job) -> Loaded:
    """Model, workload and objective of a job; ValueError in the words of the user."""
    effort = ("demonstration" if job.model in BUILT_IN else "standard") if job.effort is None else job.effort
    subject = load_subject(job.model, job.device, steps=job.steps)
    workload = _workload(job, subject.model, subject.objective)
    subject.objective.check(subject.model, workload)
    return Loaded(subject.model, workload, subject.objective, effort)


def load_again(job: Job) -> tuple[Any, Any]:
    """Model and objective, for another process."""
    subject = load_subject(job.model, job.device, steps=job.steps)
    return subject.model, subject.objective


def _workload(job: Job, model: Any, objective: Any) -> Workload:
    from glocal.advise import Workload, demo_workload

    if job.workload is not None:
        fields = objective.fields(model) if hasattr(objective, "fields") else None
        return Workload.from_jsonl(job.workload, fields)
    if job.model == "demo":
        return demo_workload(16, fields=model.config.fields)
    if job.model == "demo-language":
        from glocal.data import make_text

        return Workload.from_calls([{"text": make_text(objective.tokens, 1000 + n)} for n in range(16)], range(16))
    raise ValueError(
        f"--workload is needed for the model {job.model!r}; only {' and '.join(BUILT_IN)} bring their own."
    )


def canvases(job: Job, objective: Any) -> tuple[dict[str, int], ...]:
    """`--canvas` as arguments of a call: frames, height and width, or height and width of pictures."""
    if not job.canvas:
        return ()
    names = {"frames": "frames", "latents": "frames"}.get(objective.name)
    if names is None:
        raise ValueError(f"--canvas: the objective {objective.name} has lengths in its samples; leave --canvas out")
    frames = "num_frames" if hasattr(objective, "pipe") else "frames"
    found = []
    for text in job.canvas:
        sizes = extents(text, "--canvas")
        if len(sizes) not in (2, 3):
            raise ValueError(
                f"--canvas {text!r} has {len(sizes)} axes; legal: frames x height x width, or height x width"
            )
        found.append(dict(zip(((frames,) if len(sizes) == 3 else ()) + ("height", "width"), sizes, strict=True)))
    return tuple(found)


def options_of(job: Job, objective: Any, *, state: bool = True) -> AdviseOptions:
    """The options of an advice."""
    from glocal.advise import AdviseOptions

    check_choice("--sensitivity", job.sensitivity, ("forward", "gradient"))
    return AdviseOptions(
        methods=job.methods,
        keep_dense=job.keep_dense,
        budget=job.budget,
        sensitivity=job.sensitivity,  # type: ignore[arg-type]
        canvases=canvases(job, objective),
        state=job.out / "state" if state else None,
        resume=job.resume and state,
        jobs=job.jobs,
        loader=partial(load_again, job) if job.jobs > 1 else None,
    )


def run_dry(job: Job, *, as_json: bool, quiet: bool) -> None:
    """Print what every stage of the job would cost; with a budget below it, AdviceError after that."""
    from glocal.advise import Target, forecast_advice
    from glocal.advise.forecast import check_budget, duration, total_seconds

    if job.model.endswith(".safetensors"):
        raise ValueError("--dry-run forecasts runs of a model; captured calls are judged without any. Leave it out.")
    on = load(job)
    stages = forecast_advice(
        on.model,
        on.workload,
        objective=on.objective,
        target=Target(job.target_speedup, limits=job.limits),
        effort=on.effort,
        options=options_of(job, on.objective, state=False),
        progress=progress(quiet or as_json),
    )
    if as_json:
        print_json({"stages": stages, "seconds": total_seconds(stages)})
    else:
        rows = [(s.name, duration(s.seconds), _bytes(s.memory), _bytes(s.disk)) for s in stages]
        rows.append(("all", duration(total_seconds(stages)), "", _bytes(sum(s.disk for s in stages))))
        print_table(("stage", "time", "memory", "disk"), rows)
    if job.budget is not None:
        check_budget(stages, job.budget)


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def run_job(job: Job, *, as_json: bool, quiet: bool) -> bool:
    """Run one advice and write OUT; whether a recipe met every limit."""
    if job.model.endswith(".safetensors"):
        from glocal.cli._advise_operator import run_operator

        return run_operator(job, as_json=as_json, quiet=quiet)
    from glocal.advise import Target, advise

    check_folder(job.out)
    if job.resume:  # a run that was killed while it wrote its outputs left them beside their place
        for stale in job.out.parent.glob(f".{job.out.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
    on = load(job)
    advice = advise(
        on.model,
        on.workload,
        objective=on.objective,
        target=Target(job.target_speedup, limits=job.limits),
        effort=on.effort,
        options=options_of(job, on.objective),
        progress=progress(quiet or as_json),
    )
    known = facts(job.device)
    words = PageWords(job.model, _workload_words(on, advice), command_line(job))
    write(job.out, advice, known, words)
    _print(_summary(advice, job.out), as_json)
    return advice.accepted


def run_validation(recipe: Path, job: Job, pairs: int | None, *, as_json: bool, quiet: bool) -> bool:
    """Prove an existing recipe again and write OUT; whether it met every limit."""
    from glocal.advise import Recipe, Target, validate

    given = Recipe.load(recipe)
    on = load(job)
    advice = validate(
        on.model,
        given,
        on.workload,
        objective=on.objective,
        target=Target(job.target_speedup, limits=job.limits),
        pairs=pairs,
        progress=progress(quiet or as_json),
    )
    words = PageWords(job.model, _workload_words(on, advice), validate_line(recipe, job, pairs))
    write(job.out, advice, facts(job.device), words)
    _print(_summary(advice, job.out), as_json)
    return advice.accepted


def _print(summary: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        print_fields(summary)


def _workload_words(on: Loaded, advice: Any) -> str:
    steps = len(advice.preflight.levels) - 1
    shown = f", {steps} steps" if steps > 1 else ""
    return f"{len(on.workload)} samples{shown}, objective {on.objective.name}"


@dataclass(frozen=True)
class PageWords:
    """What the page says of a job: its model, its workload in one line, and the line that runs it again."""

    model: str
    workload: str
    reproduce: str


def write(out: Path, advice: Any, known: Mapping[str, str], words: PageWords) -> None:
    """recipe.json, report.html and evidence.jsonl, in a folder that appears at once; `state` stays in it."""
    from dataclasses import replace

    from glocal.advise.state import link_into
    from glocal.cli._advice_page import advice_page
    from glocal.cli._advice_rows import rows
    from glocal.report import render_advice

    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    recipe = replace(advice.recipe, device=dict(known)).with_evidence(created=created, **evidence(advice))
    advice = replace(advice, recipe=recipe)
    page = advice_page(
        advice, model=words.model, workload=words.workload, created=created, reproduce=words.reproduce, facts=known
    )
    with atomic_dir(out) as folder:
        recipe.save(folder / "recipe.json")
        (folder / "report.html").write_text(render_advice(page), encoding="utf-8")
        lines = [json.dumps(plain(row), sort_keys=True) for row in rows(advice)]
        (folder / "evidence.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if (out / "state" / "job.json").is_file():
            link_into(out / "state", folder / "state")
            (folder / "state" / "finished").touch()


def evidence(advice: Any) -> dict[str, Any]:
    """`evidence` of the recipe: what was measured, in the schema's words."""
    from glocal.advise.ladder import rivals

    out: dict[str, Any] = {"versions": {}, "stages": dict(advice.stages)}
    if advice.shrunk:
        out["less_memory"] = [{"site": s.site, "heads": s.heads, "blocks": s.blocks} for s in advice.shrunk]
    if advice.validation is not None:
        verdict = advice.validation.verdict
        pairs = advice.validation.pairs
        out["drift"] = {**_ends(verdict.drift), "worst": verdict.worst}
        out["floor"] = sum(p.floor for p in pairs) / len(pairs)
        out["ceiling"] = sum(p.ceiling for p in pairs) / len(pairs)
        out["speedup"] = {"end_to_end": _ends(verdict.speedup)}
        out["speedup"]["step"] = _ends(advice.validation.step)
        out["speedup"]["operator"] = _ends(advice.validation.operator)
    if advice.confirmed is not None:
        found = advice.confirmed
        out["attention_time"] = {"forecast": found.ratio("forecast"), "measured": found.ratio()}
    if advice.weights is not None:
        out["prediction"] = {"loo_p90": advice.weights.band}
        out["ladder"] = [
            {"name": r.name, "kind": r.kind, "error": r.error, "speedup": r.speedup} for r in advice.ladder
        ]
        out["allocations"] = rivals(advice.ladder)
        if advice.chosen is not None:
            out["chosen"] = {"name": advice.chosen.name, "kind": advice.chosen.kind}
    return plain(out)


def _ends(interval: Any) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def command_line(job: Job) -> str:
    """The line that runs the same job again."""
    words = ["glocal", "advise", job.model, *_options(job)]
    if job.methods:
        words += ["--methods", ",".join(job.methods)]
    for glob in job.keep_dense:
        words += ["--keep-dense", glob]
    if job.budget is not None:
        words += ["--budget", f"{job.budget:g}s"]
    if job.sensitivity != "forward":
        words += ["--sensitivity", job.sensitivity]
    if job.jobs != 1:
        words += ["--jobs", str(job.jobs)]
    return shlex.join(words)


def validate_line(recipe: Path, job: Job, pairs: int | None) -> str:
    """The line that runs the same validation again."""
    words = ["glocal", "validate", str(recipe), job.model, *_options(job)]
    return shlex.join(words if pairs is None else [*words, "--pairs", str(pairs)])


def _options(job: Job) -> list[str]:
    words = ["-o", str(job.out)]
    for name, value in (
        ("--workload", job.workload),
        ("--effort", job.effort),
        ("--target-speedup", job.target_speedup),
        ("--device", None if job.device == "cpu" else job.device),
    ):
        if value is not None:
            words += [name, str(value)]
    for canvas in job.canvas:
        words += ["--canvas", canvas]
    if job.limits != {"drift": 0.10}:
        words += [w for name, value in job.limits.items() for w in ("--max", f"{name}={value:g}")]
    if job.steps != STEPS:
        words += ["--steps", str(job.steps)]
    return words


def _summary(advice: Any, out: Path) -> dict[str, Any]:
    found = advice.validation
    fields: dict[str, Any] = {"status": advice.status, "reason": advice.reason}
    if found is not None:
        drift, speed = found.verdict.drift, found.verdict.speedup
        fields["end to end"] = f"{speed.mean:.2f}x [{speed.low:.2f}, {speed.high:.2f}]"
        fields["drift"] = f"{drift.mean:.3f} [{drift.low:.3f}, {drift.high:.3f}], worst {found.verdict.worst:.3f}"
        for name, speed in (("step", found.step), ("operator", found.operator)):
            fields[name] = f"{speed.mean:.2f}x [{speed.low:.2f}, {speed.high:.2f}]"
    fields["page"] = str(out / "report.html")
    fields["recipe"] = str(out / "recipe.json")
    return fields
