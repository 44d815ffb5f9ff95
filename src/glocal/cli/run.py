"""glocal run: generate with a recipe or method, say what ran at every site, show it beside dense attention if asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glocal._errors import check_choice
from glocal.cli._common import Json, Quiet, check_folder, print_fields, print_json, print_table, progress

if TYPE_CHECKING:
    from torch import Tensor

    from glocal.adapt.attach import Method
    from glocal.adapt.sparse import Ran
    from glocal.advise.apply import SiteStats


def command(
    model: Annotated[str, typer.Argument(help="demo, demo-image, demo-image-unet, or package.module:factory.")],
    recipe: Annotated[Path | None, typer.Option(help="recipe.json of `glocal advise`.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A published system instead: gna, radial, rectified_spaattn, tile_windows, paro; teacache, freeswim "
            "and hidiffusion where they fit the model."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="A setting of the method, or preset=NAME; repeat for several."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first noise.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the run.", min=1)] = 8,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale: two calls a step.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", "-c", metavar="K=V", help="What to ask for; repeat for several.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run dense too, from the same noise.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda, for the built-in models.")] = "cpu",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for clip, contact sheet and record.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Generate with a recipe or a method, counting what ran."""
    from glocal.cli._machine import torch_device

    check_folder(out)
    device = torch_device(device)
    wanted = _named_values("--condition", [] if condition is None else condition, "shape=disc")
    used = _used(recipe, method, [] if settings is None else settings)
    generator = _generator(model, device, _Settings(seed, steps, guidance, wanted))
    bar = progress(quiet or json)
    try:
        found = _run(generator, used, compare, bar)
    finally:
        bar.close()
    record = _record(found, model, used, generator.settings)
    if out is not None:
        _write(found, record, out)
    if json:
        print_json(record)
        return
    _print(record)
    if out is not None:
        print(f"\nwritten: {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


PAINTED = ("caption", "size")
"""What the built-in image models can be asked for."""


@dataclass(frozen=True)
class _Settings:
    seed: int
    steps: int
    guidance: float | None
    condition: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Run:
    """One clip of each kind (dense None unless asked for), its seconds, and what the recipe or method did."""

    sparse: Tensor
    seconds: float
    stats: Mapping[str, SiteStats]
    dense: Tensor | None = None
    dense_seconds: float | None = None


class _Demo:
    """The built-in model and models of its class: rectified flow from a seeded noise."""

    def __init__(self, model: Any, settings: _Settings) -> None:
        self.model, self.settings = model, settings
        fields = dict(model.config.fields)
        for name, value in settings.condition.items():
            for word, given, legal in (("field", name, list(fields)), ("value", value, list(fields.get(name, ())))):
                check_choice(f"--condition {name}={value}: {word}", given, legal)

    def generate(self) -> Tensor:
        """The clip [T, C, H, W] in [0, 1]."""
        from glocal.models.generation import SampleSpec, draw_noise, sample, to_pixels

        s = self.settings
        asked = self.model.condition(**s.condition) if s.condition else None
        noise = draw_noise(s.seed, channels=self.model.config.channels)
        return to_pixels(sample(self.model, noise, asked, SampleSpec(steps=s.steps, guidance=s.guidance)))[0]


class _Foreign:
    """What a factory returned: it has `generate(seed=, steps=, **condition)` and, where the recipe goes into something
    else than itself, `model`.
    """

    def __init__(self, made: Any, settings: _Settings) -> None:
        self.made, self.settings = made, settings
        self.model = getattr(made, "model", made)

    def generate(self) -> Tensor:
        """What its own `generate` returns."""
        import torch

        extra = {} if self.settings.guidance is None else {"guidance": self.settings.guidance}
        with torch.no_grad():
            out = self.made.generate(
                seed=self.settings.seed, steps=self.settings.steps, **extra, **self.settings.condition
            )
        if not isinstance(out, torch.Tensor):
            raise ValueError(f"generate() returned a {type(out).__name__}; legal: a tensor, such as [T, C, H, W]")
        return out


def _generator(name: str, device: str, settings: _Settings) -> _Demo | _Foreign:
    from glocal.cli._models import load_model
    from glocal.models.generation import Painter, VideoDiT

    made = load_model(name, device)
    if isinstance(made, VideoDiT):
        return _Demo(made, settings)
    if isinstance(made, Painter):
        for given in settings.condition:
            check_choice(f"--condition {given}={settings.condition[given]}: field", given, PAINTED)
    if not callable(getattr(made, "generate", None)):
        raise ValueError(
            f"MODEL {name!r} is a {type(made).__name__} without generate(); legal: an object with "
            "generate(seed=..., steps=..., **condition) -> Tensor, and `model` if the recipe goes into a part of it"
        )
    return _Foreign(made, settings)


@dataclass(frozen=True, eq=False)
class _Used:
    """What is put into the model. says: of it, in the record. stats: what ran, once it has."""

    method: Method
    says: Mapping[str, Any]
    stats: Callable[[], Mapping[str, SiteStats]]


def _used(recipe: Path | None, name: str | None, words: list[str]) -> _Used:
    from glocal.adapt.published import made
    from glocal.adapt.sparse import SparseMethod
    from glocal.advise.apply import RecipeMethod
    from glocal.advise.recipe import Recipe

    if (recipe is None) == (name is None):
        raise ValueError("give one of --recipe FILE (of `glocal advise`) and --method NAME (a system with --set K=V)")
    if recipe is not None:
        if words:
            raise ValueError(f"--set {words[0]}: goes with --method; a recipe says its settings itself")
        loaded = Recipe.load(recipe)
        runs = RecipeMethod(loaded)
        return _Used(runs, {"recipe": {"id": loaded.id, "status": loaded.status}}, lambda: runs.stats)
    assert name is not None
    values = _values(words)
    method = made(name, values)
    ran = method.ran if isinstance(method, SparseMethod) else {}  # others count no attention
    return _Used(method, {"method": {"system": name, "settings": values}}, lambda: _stats(name, ran))


def _values(words: list[str]) -> dict[str, Any]:
    """Settings of --set, read as JSON where they are JSON: 0.2, true, [4,8,8] or 4,8,8; else as words."""
    import json

    found: dict[str, Any] = dict(_named_values("--set", words, "decay=0.2 or window=3,3,3"))
    for key, value in found.items():
        with suppress(ValueError):
            entries = json.loads(f"[{value}]")  # some shells read brackets as file names, so a list may go without
            found[key] = entries[0] if len(entries) == 1 else entries
    return found


def _stats(name: str, ran: Mapping[tuple[str, str], Ran]) -> dict[str, SiteStats]:
    """What a method counted, in the form of a recipe's counts."""
    from glocal.advise.apply import SiteStats

    found = {}
    for (_, site), r in ran.items():
        sparse = r.sparse * r.heads
        dense = Counter({why: n * r.heads for why, n in r.dense.items()})
        methods = Counter({name: sparse}) if sparse else Counter()
        found[site] = SiteStats(r.calls, methods, r.kernels, dense, r.kept * sparse, r.visited * sparse)
    return found


def _run(generator: _Demo | _Foreign, used: _Used, compare: bool, bar: Any) -> _Run:
    from glocal.adapt import attach

    with attach(generator.model, used.method) as handle:
        handle.state.total = generator.settings.steps
        bar.stage(f"generate with the {next(iter(used.says))}")
        begin = time.perf_counter()
        sparse = generator.generate()
        seconds = time.perf_counter() - begin
    if not compare:
        return _Run(sparse, seconds, used.stats())
    bar.stage("generate dense")
    begin = time.perf_counter()
    dense = generator.generate()
    return _Run(sparse, seconds, used.stats(), dense, time.perf_counter() - begin)


def _named_values(option: str, words: list[str], example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or not value:
            raise ValueError(f"{option} {word!r}: expected K=V, such as {example}")
        found[name] = value
    return found


def _record(found: _Run, name: str, used: _Used, settings: _Settings) -> dict[str, Any]:
    from glocal.adapt.teacache import TeaCache

    record: dict[str, Any] = {
        "model": name,
        **used.says,
        "settings": settings,
        "shape": list(found.sparse.shape),
        "seconds": found.seconds,
        "sites": [
            {
                "site": site,
                "calls": s.calls,
                "sparse": s.sparse,
                "kept": s.kept,
                "visited": s.visited_sum / s.sparse if s.sparse else 1.0,
                "methods": dict(s.methods),
                "kernels": dict(s.kernels),
                "dense": dict(s.dense),
            }
            for site, s in found.stats.items()
        ],
    }
    if isinstance(used.method, TeaCache):
        record["forwards"] = {"computed": used.method.computed, "skipped": used.method.skipped}
    if found.dense is not None:
        from glocal.measure import max_error, relative_l2

        record["dense"] = {
            "seconds": found.dense_seconds,
            "relative_l2": float(relative_l2(found.dense, found.sparse)),
            "max_error": float(max_error(found.dense, found.sparse)),
        }
    return record


def _print(record: dict[str, Any]) -> None:
    print_fields(
        {
            **_named(record),
            "output": "x".join(map(str, record["shape"])),
            "seconds": f"{record['seconds']:.3g}, planning included",
            **{f"forwards {what}": count for what, count in record.get("forwards", {}).items()},
        }
    )
    if "dense" in record:
        dense = record["dense"]
        print_fields(
            {
                "dense": f"{dense['seconds']:.3g} s; one run each is no measurement, `glocal advise` makes one",
                "difference": f"{dense['relative_l2']:.3g} relative, at most {dense['max_error']:.3g}",
            }
        )
    if not record["sites"]:
        return
    print()
    rows = []
    for s in record["sites"]:
        heads = s["sparse"] + sum(s["dense"].values())
        why = [f"{count} {reason}" for reason, count in s["dense"].items()]
        kept = round(100 * s["kept"], 1) if s["sparse"] else None
        visited = round(100 * s["visited"], 1) if s["sparse"] else None
        rows.append((s["site"], s["calls"], f"{s['sparse']} of {heads}", kept, visited, list(s["kernels"]), why))
    print_table(("site", "calls", "sparse head-calls", "kept %", "visited %", "kernels", "dense head-calls, why"), rows)


def _named(record: Mapping[str, Any], whole: bool = False) -> dict[str, str]:
    """What ran, for people; `whole`: for files."""
    if "recipe" in record:
        recipe = record["recipe"]
        return {"recipe": recipe["id"] if whole else f"{recipe['id'][:12]} ({recipe['status']})"}
    settings = ", ".join(f"{k}={v}" for k, v in record["method"]["settings"].items())
    return {"method": f"{record['method']['system']}({settings})"}


def _write(found: _Run, record: dict[str, Any], out: Path) -> None:
    import json

    from safetensors.torch import save

    from glocal._files import atomic_dir
    from glocal.cli._common import plain

    tensors = {"sparse": found.sparse.detach().cpu().contiguous()}
    if found.dense is not None:
        tensors["dense"] = found.dense.detach().cpu().contiguous()
    sheet = _sheet(tensors)
    text = json.dumps(plain(record), indent=1, allow_nan=False) + "\n"
    with atomic_dir(out) as folder:
        (folder / "clip.safetensors").write_bytes(save(tensors, metadata=_named(record, whole=True)))
        (folder / "run.json").write_text(text, encoding="utf-8")
        if sheet is not None:
            (folder / "frames.png").write_bytes(sheet)


def _sheet(clips: Mapping[str, Tensor]) -> bytes | None:
    """Frames in order of time: sparse, then dense and five times their difference below it; None for no pictures."""
    import torch

    from glocal.report import sprite_sheet

    sparse = clips["sparse"].float()
    if sparse.dim() != 4 or sparse.shape[1] != 3:  # [T, 3, H, W]
        return None
    rows = [sparse]
    if "dense" in clips:
        dense = clips["dense"].float()
        rows += [dense, (0.5 + 5 * (sparse - dense)).clamp(0, 1)]
    whole = torch.cat(rows, 2).clamp(0, 1).mul(255).round().to(torch.uint8)  # [T, 3, rows * H, W]
    return sprite_sheet([frame.permute(1, 2, 0).numpy() for frame in whole])
