"""Sparse methods in real video and image models: attention and a whole denoising forward against the best dense kernel,
into results/generators.csv.

python bench/generators.py                                  # all cases on the GPU, layers as in CASES
python bench/generators.py --case wan2.1-14b --layers 40    # the whole model
python bench/generators.py --tiny --device cpu --out /dev/stdout

Architectures, shapes and dtype are the papers', weights are random: speed does not depend on them, except that a
router keeps more blocks of random queries than of trained ones; `kept` is what it kept here. Every method first passes
a check: at a small size its model output equals that of the definition (backend "reference"). Then dense and sparse
forwards run interleaved in one process. attention_s is the time inside the attention calls of self and joint sites, by
events around them; step_s is the forward; layers says how many of the model's blocks were built (all of equal kind, so
a forward of a part is a part of a forward: no figure is scaled up). run_speedup is computed: a run of the published
number of steps in which the published first steps are dense forwards.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from glocal._files import write_atomic
from glocal.adapt import Method, Site, attach
from glocal.adapt.gna import GNA
from glocal.adapt.gna import PRESETS as GNA_PRESETS
from glocal.adapt.paro import Paro
from glocal.adapt.paro_plan import ParoPlan, pack_bits
from glocal.adapt.radial import PRESETS as RADIAL_PRESETS
from glocal.adapt.radial import Radial
from glocal.adapt.records import Core, SiteCall
from glocal.adapt.rectified_spaattn import PRESETS as SPA_PRESETS
from glocal.adapt.rectified_spaattn import RectifiedSpaAttn
from glocal.adapt.sparse import SparseMethod
from glocal.adapt.tile_windows import TileMethod, TileSettings
from glocal.kernels import registry
from glocal.ops import attention

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "generators.csv"
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
Inputs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A model at a size. build: layers, heads -> model; inputs: of a forward on a device; layers: built by default, of
    `whole`. grid: media tokens; words: text tokens in the sequence; steps: of a published run.
    """

    name: str
    build: Callable[[tuple[int, int], int], nn.Module]
    inputs: Callable[[tuple[int, ...], torch.device, torch.dtype], Inputs]
    layers: tuple[int, int]
    whole: tuple[int, int]
    grid: tuple[int, ...]
    heads: int
    words: int = 0
    steps: int = 50
    methods: Mapping[str, tuple[str, Callable[[Case], SparseMethod], int]] = field(default_factory=dict)


def _wan(layers: tuple[int, int], heads: int) -> nn.Module:
    import diffusers

    return diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=heads * 13824 // 40, num_layers=layers[0]
    )


def _wan_inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    return {
        "hidden_states": _rand((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": _rand((1, 512, 4096), device, dtype),
    }


def _hunyuan(layers: tuple[int, int], heads: int) -> nn.Module:
    import diffusers

    return diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=heads, num_layers=layers[0], num_single_layers=layers[1]
    )


def _hunyuan_inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    mask = torch.zeros(1, 256, dtype=torch.long, device=device)
    mask[:, :77] = 1
    return {
        "hidden_states": _rand((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": _rand((1, 256, 4096), device, dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": _rand((1, 768), device, dtype),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
    }


def _flux(layers: tuple[int, int], heads: int) -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        num_attention_heads=heads, num_layers=layers[0], num_single_layers=layers[1], guidance_embeds=True
    )


def _flux_inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    h, w = grid
    ids = torch.zeros(h, w, 3, device=device)
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return {
        "hidden_states": _rand((1, h * w, 64), device, dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": _rand((1, 512, 4096), device, dtype),
        "pooled_projections": _rand((1, 768), device, dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(512, 3, device=device),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
    }


def _cogvideox(layers: tuple[int, int], heads: int) -> nn.Module:
    import diffusers

    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=layers[0], use_rotary_positional_embeddings=True
    )


def _cogvideox_inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    angles = torch.rand(f * h * w, 64, device=device)
    return {
        "hidden_states": _rand((2, f, 16, 2 * h, 2 * w), device, dtype),  # guidance: two samples
        "timestep": torch.full((2,), 500, device=device),
        "encoder_hidden_states": _rand((2, 226, 4096), device, dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _cosmos(layers: tuple[int, int], heads: int) -> nn.Module:
    import diffusers

    return diffusers.CosmosTransformer3DModel(
        num_attention_heads=heads, num_layers=layers[0], concat_padding_mask=False, extra_pos_embed_type=None
    )


def _cosmos_inputs(grid: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    f, h, w = grid
    return {
        "hidden_states": _rand((1, 16, f, 2 * h, 2 * w), device, dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": _rand((1, 512, 1024), device, dtype),
        "fps": 24,
    }


def _rand(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _radial(preset: str) -> Callable[[Case], SparseMethod]:
    return lambda case: Radial(replace(RADIAL_PRESETS[preset].settings, dense_steps=0, dense_layers=0))


def _spa(preset: str, **changed: Any) -> Callable[[Case], SparseMethod]:
    settings = replace(
        SPA_PRESETS[preset].settings, **{"dense_steps": 0, "dense_layers": 0, "layers": frozenset()} | changed
    )
    return lambda case: RectifiedSpaAttn(settings)


def _gna(preset: str) -> Callable[[Case], SparseMethod]:
    return lambda case: GNA(replace(GNA_PRESETS[preset].settings, dense_steps=0, dense_layers=0))


def _paro(density: float) -> Callable[[Case], SparseMethod]:
    """Random orders and a mask of the density asked for: a plan needs trained weights, its time does not."""

    def make(case: Case) -> SparseMethod:
        draw = torch.Generator().manual_seed(0)
        tokens = torch.Size(case.grid).numel() + case.words
        blocks, layers = -(-tokens // 64), sum(case.layers)
        front = -(-case.words // 64)
        bits = torch.empty(1, layers, case.heads, blocks, -(-blocks // 8), dtype=torch.uint8)
        for layer in range(layers):
            mask = torch.rand(case.heads, blocks, blocks, generator=draw) < density
            mask[:, :front] = mask[:, :, :front] = mask[:, -1] = mask[..., -1] = True
            bits[0, layer] = pack_bits(mask)
        orders = torch.randint(6, (layers, case.heads), generator=draw)
        return Paro(ParoPlan(orders, bits, blocks, 1))

    return make


# name -> (what the paper says, how the method is made without its dense steps and layers, published dense first steps)
CASES = (
    Case(
        "wan2.1-14b 81 frames 720p",
        _wan,
        _wan_inputs,
        (4, 0),
        (40, 0),
        (21, 45, 80),
        40,
        methods={
            "rectified_spaattn": ("1.68-2.08x end to end", _spa("wan2.1-t2v"), 5),
            "rectified_spaattn mass=0": ("1.68-2.08x end to end", _spa("wan2.1-t2v", mass=0.0), 5),
            "paro 0.3": ("2.71x operator (A100), 1.9-2.7x end to end", _paro(0.3), 0),
            "paro 0.5": ("1.73x operator (A100), 1.9-2.7x end to end", _paro(0.5), 0),
        },
    ),
    Case(
        "wan2.1-14b 69 frames 768x1280",
        _wan,
        _wan_inputs,
        (4, 0),
        (40, 0),
        (18, 48, 80),
        40,
        methods={"radial": ("1.77x end to end", _radial("wan2.1-14b"), 12)},
    ),
    Case(
        "hunyuanvideo 129 frames 720p",
        _hunyuan,
        _hunyuan_inputs,
        (2, 4),
        (20, 40),
        (33, 45, 80),
        24,
        words=256,
        methods={
            "rectified_spaattn": ("2.50x end to end", _spa("hunyuanvideo"), 0),
            "rectified_spaattn drop=0.9 mass=0": ("3.33x end to end", _spa("hunyuanvideo", drop=0.9, mass=0.0), 0),
        },
    ),
    Case(
        "hunyuanvideo 117 frames 768x1280",
        _hunyuan,
        _hunyuan_inputs,
        (2, 4),
        (20, 40),
        (30, 48, 80),
        24,
        words=256,
        methods={
            "radial": ("1.88x end to end", _radial("hunyuanvideo"), 12),
            "gna 91": ("2.23x end to end (B200), 1.63x with 15 dense steps", _gna("hunyuanvideo-91"), 15),
            "gna 58": ("1.53x end to end (B200)", _gna("hunyuanvideo-58"), 0),
            "tile_windows 6x8x8 3x3x3": (
                "",
                lambda case: TileMethod(TileSettings((6, 8, 8), (3, 3, 3))),
                15,
            ),
        },
    ),
    Case(
        "flux 4096x4096",
        _flux,
        _flux_inputs,
        (2, 4),
        (19, 38),
        (256, 256),
        24,
        words=512,
        steps=28,
        methods={
            "rectified_spaattn mass=0": ("1.60x end to end", _spa("flux-4k", mass=0.0), 0),
            "gna 90": ("1.82x end to end (B200), 1.45x with 9 dense steps", _gna("flux-4k-90"), 9),
        },
    ),
    Case(
        "cogvideox-5b 49 frames 480x720",
        _cogvideox,
        _cogvideox_inputs,
        (42, 0),
        (42, 0),
        (13, 30, 45),
        48,
        words=226,
        steps=30,
        methods={
            "paro 0.3": ("2.71x operator (A100), 1.9-2.7x end to end", _paro(0.3), 0),
            "paro 0.5": ("1.73x operator (A100), 1.9-2.7x end to end", _paro(0.5), 0),
        },
    ),
    Case(
        "cosmos-predict1-7b 121 frames 720p",
        _cosmos,
        _cosmos_inputs,
        (4, 0),
        (28, 0),
        (16, 44, 80),
        32,
        steps=35,
        methods={
            "gna 56": ("1.46x end to end (B200)", _gna("cosmos-predict1-7b-56"), 0),
            "gna 89": ("2.05x end to end (B200)", _gna("cosmos-predict1-7b-89"), 12),
        },
    ),
)


class Dense(Method):
    """The fastest dense kernel that is here; hidden words of a single sample are cut off."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind != "cross")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        words = call.layout.lengths.get("text")
        if words is not None and q.shape[0] == 1:
            valid = call.layout.nk - call.layout.kv.parts[-1].tokens + int(words[0])
            k, v = k[:, :, :valid], v[:, :, :valid]
        return dense(self.kernel, q, k, v)


def dense(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by one kernel."""
    if kernel in registry.names():
        return attention(q, k, v, backend=kernel)
    chosen = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}.get(kernel)
    with sdpa_kernel(chosen) if chosen is not None else nullcontext():
        return scaled_dot_product_attention(q, k, v)


def best_dense(case: Case, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """The fastest dense kernel for the shape of the case; a kernel that refuses it is no candidate."""
    if device.type != "cuda":
        return "sdpa"
    tokens = torch.Size(case.grid).numel() + case.words
    q, k, v = (_rand((1, case.heads, tokens, dim), device, dtype) for _ in "qkv")
    found: dict[str, float] = {}
    for kernel in ("sdpa cudnn", "sdpa flash", "fa4_dense", "dense"):
        try:
            dense(kernel, q, k, v)
            found[kernel] = min(_seconds(lambda kernel=kernel: dense(kernel, q, k, v), device) for _ in range(2))
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"  {kernel}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return min(found, key=lambda name: found[name])


class Clock(Method):
    """Time inside the attention calls. It is attached last, so it stands around whatever computes them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.kind != "cross")

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        begin = self._mark()
        out = inner(q, k, v, call)
        self.marks.append((begin, self._mark()))
        return out

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last reading."""
        marks, self.marks = self.marks, []
        return sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in marks)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextmanager
def _type(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    with _type(dtype, device):
        return case.build(case.layers, case.heads).eval()


def check(case: Case, model: nn.Module, method: SparseMethod, device: torch.device, dtype: torch.dtype) -> float:
    """Relative difference of the model's output to that by the definition, at a small size of the same method."""
    grid = tuple(-(-n // 4) if n > 16 else n for n in case.grid)
    grid = tuple(
        n if len(grid) == 2 else min(n, m) for n, m in zip(grid, (6, 16, 16)[: len(grid)] if len(grid) == 3 else grid)
    )
    small = _small(method, grid, case)
    given = case.inputs(grid, device, dtype)
    found = {}
    with torch.no_grad():
        for backend in (method.backend, "reference"):
            small.backend = backend
            with attach(model, small):
                found[backend] = model(**given, return_dict=False)[0].float()
    return float((found[method.backend] - found["reference"]).norm() / found["reference"].norm())


def _small(method: SparseMethod, grid: tuple[int, ...], case: Case) -> SparseMethod:
    """The same kind of method with extents that fit a small grid."""
    if isinstance(method, GNA):
        from glocal.adapt.gna import Window

        window = tuple(max(1, n // 2) for n in grid)
        return GNA(replace(method.settings, window=Window(window, tuple(max(1, w // 2) for w in window))))
    if isinstance(method, TileMethod):
        return TileMethod(TileSettings(tuple(max(1, n // 4) for n in grid), (2,) * len(grid)))
    if isinstance(method, Paro):
        return _paro(0.5)(replace(case, grid=grid))
    if isinstance(method, RectifiedSpaAttn):
        return RectifiedSpaAttn(replace(method.settings, drop=0.8, mass=0.0, neighbours=False))
    return Radial(method.settings)  # type: ignore[attr-defined]


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one case."""
    device = torch.device(args.device)
    chosen = ("bfloat16" if args.device == "cuda" else "float32") if args.dtype is None else args.dtype
    dtype = getattr(torch, chosen)
    model = build(case, device, dtype)
    dim = 64 if "cogvideox" in case.name else 128
    kernel = best_dense(case, device, dtype, dim)
    given = case.inputs(case.grid, device, dtype)
    methods: dict[str, tuple[Method, float, str, int]] = {"dense": (Dense(kernel), 0.0, "", 0)}
    for name, (claim, make, first) in case.methods.items():
        method = make(case)
        method.backend = args.backend
        try:
            error = check(case, model, method, device, dtype)
        except (ValueError, RuntimeError) as problem:
            print(f"{case.name}: {name}: {problem}", file=sys.stderr)
            continue
        if error > TOLERANCE[dtype]:
            raise RuntimeError(f"{case.name}: {name}: output is off by {error:.2e}, more than {TOLERANCE[dtype]:.0e}")
        methods[name] = (method, error, claim, first)
    steps: dict[str, list[float]] = {name: [] for name in methods}
    inside: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(args.rounds + 1):  # the first one plans and compiles
        for name, (method, *_) in list(methods.items()):
            clock = Clock(device)
            try:
                with torch.no_grad(), attach(model, method), attach(model, clock):
                    took = _seconds(lambda: model(**given, return_dict=False), device)
            except (ValueError, RuntimeError) as problem:
                print(f"{case.name}: {name}: {str(problem)[:300]}", file=sys.stderr)
                del methods[name]
                continue
            if turn:
                steps[name].append(took)
                inside[name].append(clock.read())
    return [_row(case, name, methods, steps, inside, kernel, args) for name in methods]


def _row(
    case: Case,
    name: str,
    methods: Mapping[str, tuple[Method, float, str, int]],
    steps: Mapping[str, list[float]],
    inside: Mapping[str, list[float]],
    kernel: str,
    args: argparse.Namespace,
) -> dict[str, object]:
    method, error, claim, first = methods[name]
    ratios = sorted(d / s for d, s in zip(steps["dense"], steps[name], strict=True))
    mine = median(ratios)
    sparse = isinstance(method, SparseMethod)
    ran = list(method.ran.values()) if sparse else []  # type: ignore[attr-defined]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    return {
        "case": case.name,
        "method": name,
        "layers": f"{sum(case.layers)} of {sum(case.whole)}",
        "tokens": torch.Size(case.grid).numel() + case.words,
        "kept": f"{method.kept:.4f}" if sparse else "1.0000",  # type: ignore[attr-defined]
        "visited": f"{sum(r.visited for r in ran) / len(ran):.4f}" if ran else "1.0000",
        "kernel": ",".join(sorted({k for r in ran for k in r.kernels})) if ran else kernel,
        "attention_s": f"{median(inside[name]):.4f}",
        "attention_speedup": f"{median(d / s for d, s in zip(inside['dense'], inside[name], strict=True)):.3f}",
        "step_s": f"{median(steps[name]):.4f}",
        "step_speedup": f"{mine:.3f}",
        "step_speedup_low": f"{ratios[0]:.3f}",
        "step_speedup_high": f"{ratios[-1]:.3f}",
        "dense_steps": first,
        "run_speedup": f"{case.steps / (first + (case.steps - first) / mine):.3f}",
        "paper": claim,
        "error": f"{error:.1e}",
        "rounds": len(steps[name]),
        "device": gpu,
        "torch": torch.__version__,
    }


def _tiny(case: Case) -> Case:
    """The same model with few layers on a small grid."""
    grid = tuple(min(n, 8 if len(case.grid) == 3 else 16) for n in case.grid)
    methods = {}
    for name, (claim, make, steps) in case.methods.items():
        small = replace(case, grid=grid, heads=2, layers=(1, min(1, case.layers[1])))
        methods[name] = (claim, lambda c, make=make, small=small: _small(make(small), grid, small), steps)
    return replace(case, grid=grid, heads=2, layers=(1, min(1, case.layers[1])), methods=methods)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only cases whose name contains this, in this order")
    parser.add_argument("--method", default="", help="only methods whose name contains this")
    parser.add_argument("--layers", type=int, help="blocks of each kind to build")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--seconds", type=float, help="begin no further case after so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="kernel of the sparse calls")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small grids and one layer, to see that it runs")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    begin = time.perf_counter()
    wanted = [""] if args.case is None else args.case
    for case in dict.fromkeys(c for word in wanted for c in CASES if word in c.name):
        if args.seconds is not None and time.perf_counter() - begin > args.seconds:
            print(f"{case.name}: left out, {args.seconds:.0f} s are over", file=sys.stderr)
            continue
        case = replace(case, methods={n: m for n, m in case.methods.items() if args.method in n})
        if args.layers is not None:
            case = replace(case, layers=tuple(min(args.layers, n) if n else 0 for n in case.whole))
        rows += measure(_tiny(case) if args.tiny else case, args)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        _write(rows, args.out)
        for row in rows[-len(case.methods) - 1 :]:
            print(
                {k: row[k] for k in ("case", "method", "kept", "kernel", "attention_speedup", "step_speedup")},
                flush=True,
            )


def _write(rows: list[dict[str, object]], out: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if str(out) == "/dev/stdout":
        sys.stdout.write(text.getvalue())
    else:
        write_atomic(out, text.getvalue())


if __name__ == "__main__":
    main()
