"""What the papers of the vision backbones claim about cost, measured, into results/vision_claims.csv.

python bench/vision_claims.py --device cpu --only hilo,biformer
python bench/vision_claims.py --device cuda --only inline,l2vit,biformer
python bench/vision_claims.py --device cpu --only hilo --rounds 3 --batch 2 --out /dev/stdout    # only to try it

hilo: HiLo (arXiv 2205.13213) against spatial reduction and windows, one layer of 196 tokens, 768 channels, 12 heads.
inline: InLine Swin-T with windows of 56, and InLine DeiT-T at 1,024 px (arXiv 2412.06590), against softmax twins.
l2vit: time a pixel of L2ViT-T (arXiv 2501.16182) from 224 to 1,024 px.
biformer: memory of BiFormer-T (arXiv 2303.08810) at 1 x 3 x 1024 x 1024 against a gather of the chosen regions.
Rivals are checked against our layers where both compute the same. Rows of other devices are kept.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal._files import write_atomic
from glocal.measure import compare_paired
from glocal.models import create_model
from glocal.nn.bilevel_routing import BiLevelRoutingAttention
from glocal.nn.hilo import HiLo
from glocal.nn.inline import InLineAttention
from glocal.nn.window_attention import WindowAttention

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "results" / "vision_claims.csv"
FIELDS = (
    "claim", "subject", "rival", "size", "batch", "dtype", "ours", "theirs", "unit", "ratio", "low", "high", "paper",
    "device", "torch",
)  # fmt: skip
Row = dict[str, object]


class SpatialReduction(nn.Module):
    """Attention to a map that a convolution of stride 2 made smaller (PVT, arXiv 2102.12122), as published or fused."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> the same shape."""
        b, height, width, c = x.shape
        tokens = x.reshape(b, height * width, c)
        fewer = self.norm(self.sr(x.permute(0, 3, 1, 2).contiguous()).flatten(2).transpose(1, 2))
        q = self.q(tokens).reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)
        k, v = self.kv(fewer).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = softmax_attention(q, k, v, self.fused)
        return self.proj(out.transpose(1, 2).reshape(b, -1, c)).reshape(x.shape)


class PlainWindows(nn.Module):
    """Attention inside windows of 7 without bias or shift, as published or fused."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C] -> the same shape."""
        b, height, width, c = x.shape
        rows, columns = height // 7, width // 7
        cut = x.reshape(b, rows, 7, columns, 7, c).transpose(2, 3).reshape(-1, 49, c)
        q, k, v = self.qkv(cut).reshape(-1, 49, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = self.proj(softmax_attention(q, k, v, self.fused).transpose(1, 2).reshape(-1, 49, c))
        return out.reshape(b, rows, columns, 7, 7, c).transpose(2, 3).reshape(x.shape)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """By torch's kernel, or in the open as the papers' code has it."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def hilo(a: argparse.Namespace) -> Iterator[Row]:
    """One layer each, as the paper's benchmark has it."""
    torch.manual_seed(0)
    x = torch.randn(a.batch, 14, 14, 768, device=a.device)
    ours = HiLo(768, 12, 2, 0.9).to(a.device).eval()
    windows = PlainWindows(768, 12, fused=True).to(a.device).eval()
    same = WindowAttention(768, 12, 7).to(a.device).eval()
    same.load_state_dict(windows.state_dict())
    check("windows", windows(x), same(x), 1e-4)
    claims = {"spatial reduction": ("1.4", SpatialReduction), "windows of 7": ("1.6", PlainWindows)}
    for name, (paper, kind) in claims.items():
        for fused in (False, True):
            rival = kind(768, 12, fused).to(a.device).eval()
            with torch.no_grad():
                timed = compare_paired({"rival": lambda r=rival: r(x), "ours": lambda: ours(x)}, a.rounds, a.device)
            yield speeds(a, "hilo", f"{name}, {'torch kernel' if fused else 'as published'}", "14x14", timed, paper)


class Twin(InLineAttention):
    """InLine attention's place with softmax attention in it."""

    fused = False

    def tokens(self, x: Tensor, size: tuple[int, int], lead: int = 0) -> Tensor:
        """As in `InLineAttention`, without a local part."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.project(x))
        return softmax_attention(q, k, v, self.fused).transpose(1, 2).flatten(2)


def twin(model: nn.Module, fused: bool) -> nn.Module:
    """The model with softmax attention in place of InLine's; class tokens stay where they are."""
    for layer in model.modules():
        if isinstance(layer, InLineAttention):
            layer.__class__ = type("Twin", (Twin, type(layer)), {"fused": fused})
    return model


def inline(a: argparse.Namespace) -> Iterator[Row]:
    """Whole models, forward."""
    cases = (("inline_swin_tiny", 224, 3.7, {}, a.batch), ("inline_deit_tiny", 1024, 4.8, {"img_size": 1024}, 8))
    for name, size, paper, changes, batch in cases:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
        image = torch.randn(batch, 3, size, size, device=a.device, dtype=dtype)
        for fused in (False, True):
            ours, rival = (create_model(name, **changes).to(a.device, dtype).eval() for _ in range(2))
            calls = {"rival": partial(twin(rival, fused), image), "ours": partial(ours, image)}
            with torch.no_grad():
                timed = compare_paired(calls, a.rounds, a.device)
            how = "softmax, torch kernel" if fused else "softmax, as published"
            yield {**speeds(a, "inline", how, f"{size} px", timed, str(paper)), "subject": name, "batch": batch}


def l2vit(a: argparse.Namespace) -> Iterator[Row]:
    """Time a megapixel, relative to 224 px."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    model = create_model("l2vit_tiny").to(a.device, dtype).eval()
    sizes = {224: 64, 448: 16, 672: 7, 1024: 3} if a.device == "cuda" else {224: 4, 448: 1}
    calls: dict[str, Callable[[], object]] = {}
    for size, batch in sizes.items():
        image = torch.randn(batch, 3, size, size, device=a.device, dtype=dtype)
        calls[str(size)] = lambda image=image: model(image)
    with torch.no_grad():
        timed = compare_paired(calls, a.rounds, a.device, baseline="224")
    pixels = {str(size): batch * size**2 / 1e6 for size, batch in sizes.items()}
    base = timed.times["224"].median / pixels["224"]
    for size in list(calls)[1:]:
        ours = timed.times[size].median / pixels[size]
        ratio, more = timed.ratios[size], pixels[size] / pixels["224"]  # time at 224 px over this one's
        yield {
            **common(a, "l2vit", "itself at 224 px", f"{size} px"), "subject": "l2vit_tiny", "batch": sizes[int(size)],
            "dtype": str(dtype).removeprefix("torch."), "ours": f"{ours * 1e3:.3f}", "theirs": f"{base * 1e3:.3f}",
            "unit": "ms a megapixel", "ratio": f"{ratio.median * more:.3f}",
            "low": f"{ratio.low * more:.3f}", "high": f"{ratio.high * more:.3f}", "paper": "1",
        }  # fmt: skip


class Gathered(BiLevelRoutingAttention):
    """The published way: keys and values of the chosen regions are copied side by side for every region."""

    fused = False

    def _attend(self, parts):
        chosen, _ = self._chosen(parts)
        index = chosen[:, 0].long()  # [B, S, top]
        sample = torch.arange(len(index), device=index.device)[:, None, None]
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (parts.q, parts.k, parts.v))  # [B, S, n, heads, d]
        k, v = (t[sample, index].flatten(2, 3).transpose(2, 3) for t in (k, v))  # [B, S, heads, top * m, d]
        q = q.transpose(2, 3)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = ((q * self.scale) @ k.mT).softmax(-1) @ v
        return out.transpose(2, 3).flatten(3)


GATHERS = {"as published": False, "torch kernel": True}


def biformer_model(gather: str | None, device: str) -> nn.Module:
    """BiFormer-T with random weights, with our attention (None) or with a gather."""
    torch.manual_seed(0)
    model = create_model("biformer_tiny").to(device).eval()
    for layer in model.modules():
        if gather is not None and isinstance(layer, BiLevelRoutingAttention):
            layer.__class__ = type("Gathered", (Gathered,), {"fused": GATHERS[gather]})
    return model


def biformer(a: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of a forward pass above weights and image; on a CPU each in a process of its own."""
    small = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(a.device)
    found = {}
    for gather in (None, *GATHERS):
        with torch.no_grad():
            given = biformer_model(gather, a.device)(small)
            check("gather", given, biformer_model(None, a.device)(small), 1e-3)
        if a.device == "cuda":
            model, image = biformer_model(gather, "cuda"), torch.randn(1, 3, 1024, 1024, device="cuda")
            with torch.no_grad():
                model(image)  # what is loaded or planned on first use
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.no_grad():
                model(image)
            found[gather] = (torch.cuda.max_memory_allocated() - before) / 2**20
            del model
        else:
            command = [sys.executable, __file__, "--peak", "ours" if gather is None else gather]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[gather] = int(done.stdout) / 2**20
    for gather in GATHERS:
        yield {
            **common(a, "biformer", f"gather of the chosen regions, {gather}", "1024 px"), "subject": "biformer_tiny",
            "batch": 1, "dtype": "float32", "ours": f"{found[None]:.0f}", "theirs": f"{found[gather]:.0f}",
            "unit": "MiB", "ratio": f"{found[gather] / found[None]:.3f}", "low": "", "high": "", "paper": "",
        }  # fmt: skip


def own_peak(gather: str | None) -> None:
    """Print the growth of this process's peak memory during one forward pass at 1,024 px, in bytes."""
    import resource

    model, image = biformer_model(gather, "cpu"), torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))  # what is loaded on first use
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        model(image)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def check(name: str, found: Tensor, wanted: Tensor, limit: float) -> None:
    """Raise RuntimeError unless a rival computes what it should; nothing is timed before."""
    error = float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
    if not error <= limit:
        raise RuntimeError(f"{name}: off by {error:.1e} of the largest value; no figures taken")


def common(a: argparse.Namespace, claim: str, rival: str, size: str) -> Row:
    """What all rows say."""
    device = torch.cuda.get_device_name() if a.device == "cuda" else f"cpu {platform.processor()}".strip()
    return {
        "claim": claim,
        "subject": claim,
        "rival": rival,
        "size": size,
        "device": device,
        "torch": torch.__version__,
    }


def speeds(a: argparse.Namespace, claim: str, rival: str, size: str, timed, paper: str) -> Row:
    """A row of images a second of ours and of a rival."""
    ratio = timed.against("rival").ratios["ours"]
    dtype = "bfloat16" if a.device == "cuda" and claim == "inline" else "float32"
    ours, theirs = (f"{timed.times[who].median * 1e3:.2f}" for who in ("ours", "rival"))
    return {
        **common(a, claim, rival, size), "batch": a.batch, "dtype": dtype, "ours": ours, "theirs": theirs, "unit": "ms",
        "ratio": f"{ratio.median:.3f}", "low": f"{ratio.low:.3f}", "high": f"{ratio.high:.3f}", "paper": paper,
    }  # fmt: skip


CLAIMS = {"hilo": hilo, "inline": inline, "l2vit": l2vit, "biformer": biformer}


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--only", default=",".join(CLAIMS))
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--out", type=Path, default=CSV)
    p.add_argument("--turn", type=Path, help="a file that other drivers lock while they time")
    p.add_argument("--peak", choices=("ours", *GATHERS))
    a = p.parse_args()
    if a.peak is not None:
        own_peak(None if a.peak == "ours" else a.peak)
        return
    rows = []
    turn = None if a.turn is None else a.turn.open("w")
    if turn is not None:
        fcntl.flock(turn, fcntl.LOCK_EX)
    for name in a.only.split(","):
        for row in CLAIMS[name](a):
            rows.append(row)
            print(
                {k: row[k] for k in ("subject", "rival", "size", "ours", "theirs", "unit", "ratio", "low", "high")},
                flush=True,
            )
    keys = {(r["claim"], r["device"]) for r in rows}
    old = list(csv.DictReader(a.out.open())) if a.out.is_file() else []
    kept = [row for row in old if (row["claim"], row["device"]) not in keys]
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_atomic(a.out, text.getvalue().encode())


if __name__ == "__main__":
    main()
