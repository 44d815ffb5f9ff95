"""The table of the 51 published systems: what each is made of, where its code lies, and what its evidence says.

Every system is `out = merge(local(q, k, v), global(q, k, v))` put into a host; the four columns say which kinds.
Nothing here claims success: `status` looks whether the code is there and what the rows of `results/parity.csv` say.
"""

from __future__ import annotations

import csv
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

# fmt: off
Kind = Literal["operator", "backbone", "generation", "acceleration", "language", "restoration", "dense", "graph", "vlm",
               "geometry", "benchmark"]
Local = Literal["neighborhood", "window", "tile", "radial", "routed", "shard", "convolution", "cells", "graph"]
Global = Literal["dense", "dilated", "grid", "pooled", "super tokens", "descriptors", "generated queries", "channel",
                 "linear", "local linear", "scan", "codebook", "sampled points", "guide", "cross override"]
Merge = Literal["lse", "heads", "sum", "concat", "sequence", "gate", "rectification"]
Host = Literal["layer", "backbone", "generator", "language model", "vlm", "reconstruction", "codec", "graph",
               "pipeline"]
Source = Literal["code", "paper", "abstract"]
State = Literal["planned", "partial", "built", "failing", "parity"]
# fmt: on

PACKAGE = Path(__file__).resolve().parent
_L = tuple[Local, ...]
_G = tuple[Global, ...]
_M = tuple[Merge, ...]
_H = tuple[Host, ...]


@dataclass(frozen=True)
class System:
    """One published system.

    slug: its name in code, docs and golden folders. title: the paper's. arxiv: id without version. venue: "" where
    none is known. source: what our knowledge rests on, the authors' code, the paper's text, or only its abstract.
    code: files or folders below src/glocal that make it. local, global_, merge, host: its parts by kind.
    """

    slug: str
    title: str
    arxiv: str
    venue: str
    source: Source
    kind: Kind
    code: tuple[str, ...]
    local: _L
    global_: _G
    merge: _M
    host: _H

    @property
    def url(self) -> str:
        """Where to read the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Evidence:
    """One parity case on one backend and device, as `results/parity.csv` has it.

    skipped: the reason, "" for a case that ran. backend: "" where a case runs no attention.
    """

    system: str
    case: str
    backend: str
    device: str
    max_error: float
    tolerance: float
    passed: bool
    skipped: str


@dataclass(frozen=True)
class Status:
    """What can be seen of a system: its missing code, its parity cases, and the state that follows from both.

    planned: no code yet. failing: a parity case failed. partial: some code is missing. built: the code is there, no
    case ran. parity: the code is there and every case that ran equals the authors' numbers.
    passed, failed, skipped: cases, each counted once; one passes if it does on every backend and device it ran on.
    worst: the largest error divided by its tolerance, NaN where none ran.
    """

    state: State
    missing: tuple[str, ...]
    passed: int
    failed: int
    skipped: int
    worst: float


def systems() -> tuple[System, ...]:
    """All rows, in the order of the table."""
    return ROWS


def system(slug: str) -> System:
    """The row of `slug`; a name that is none raises ValueError with the closest ones."""
    for row in ROWS:
        if row.slug == slug:
            return row
    names = [row.slug for row in ROWS]
    folded = slug.lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(folded, names, n=3, cutoff=0.5)
    hint = f"closest: {', '.join(close)}" if close else "no name is close"
    raise ValueError(f"no system is called {slug!r}; {hint}; `glocal list` has all {len(names)}")


def evidence(path: Path | None = None) -> tuple[Evidence, ...]:
    """The parity cases of `path`, or of `results/parity.csv` beside the package; none where the file is absent.

    Columns: system, case, backend, device, max_error and tolerance (one unit), passed (true|false), skipped (a reason,
    or empty); others are ignored.
    """
    file = _evidence_file() if path is None else path
    if path is None and not file.exists():
        return ()
    with file.open(newline="", encoding="utf-8") as lines:
        return tuple(_read(row, file) for row in csv.DictReader(lines))


def status(slug: str, rows: tuple[Evidence, ...] | None = None) -> Status:
    """What the code and the parity cases say about `slug`. `rows` saves reading the file again in a loop."""
    row = system(slug)
    cases = [case for case in (evidence() if rows is None else rows) if case.system == slug]
    missing = tuple(name for name in row.code if not _exists(name))
    ran = [case for case in cases if not case.skipped]
    names = {case.case for case in ran}
    failed = {case.case for case in ran if not case.passed}
    return Status(
        state=_state(absent=len(missing), files=len(row.code), failed=len(failed), ran=len(names)),
        missing=missing,
        passed=len(names - failed),
        failed=len(failed),
        skipped=len({case.case for case in cases} - names),
        worst=max((case.max_error / case.tolerance for case in ran if case.tolerance > 0), default=math.nan),
    )


def kinds() -> dict[str, tuple[str, ...]]:
    """The legal values of each column of kinds."""
    columns = {"kind": Kind, "local": Local, "global": Global, "merge": Merge, "host": Host}
    return {name: get_args(values) for name, values in columns.items()} | {"status": get_args(State)}


def _state(absent: int, files: int, failed: int, ran: int) -> State:
    if absent == files:
        return "planned"
    if failed:
        return "failing"
    if absent:
        return "partial"
    return "parity" if ran else "built"


def _evidence_file() -> Path:
    """A checkout keeps its results at the root; a wheel carries a copy inside the package."""
    carried = PACKAGE / "evidence" / "parity.csv"
    return carried if carried.exists() else PACKAGE.parent.parent / "results" / "parity.csv"


def _exists(name: str) -> bool:
    """Whether the module or folder `name` (with slashes) holds code; looking imports nothing."""
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def _read(row: dict[str, str], file: Path) -> Evidence:
    try:
        skipped = row["skipped"]
        return Evidence(
            system=row["system"],
            case=row["case"],
            backend=row["backend"],
            device=row["device"],
            max_error=math.nan if skipped else float(row["max_error"]),
            tolerance=math.nan if skipped else float(row["tolerance"]),
            passed=row["passed"].lower() == "true",
            skipped=skipped,
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: row {row} is no parity case ({error}); `glocal parity` writes the columns "
            "system, case, backend, device, max_error, tolerance, passed, skipped"
        ) from error


# fmt: off
ROWS: tuple[System, ...] = (
    # Operators and patterns
    System("gna", "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
           "2504.16922", "", "code", "operator", ("patterns/neighborhood", "plan/simulate", "ops/merge", "adapt/gna"),
           ("neighborhood",), ("dilated",), ("lse",), ("layer", "pipeline")),
    System("fna", "Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level",
           "2403.04690", "NeurIPS 2024", "code", "operator", ("patterns/neighborhood", "ops/capture"),
           ("neighborhood",), ("dilated",), (), ("layer",)),
    System("dinat", "Dilated Neighborhood Attention Transformer",
           "2209.15001", "", "code", "backbone", ("patterns/neighborhood", "nn/neighborhood", "models/vision/dinat"),
           ("neighborhood",), ("dilated",), ("sequence",), ("backbone",)),
    System("s2_attention", "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
           "2407.17678", "", "code", "language", ("patterns/strided", "models/language/s2"),
           ("window", "shard"), ("dense",), ("heads",), ("layer", "language model")),
    System("radial", "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
           "2506.19852", "NeurIPS 2025", "code", "acceleration", ("patterns/radial", "adapt/radial"),
           ("radial",), ("dilated",), ("lse",), ("pipeline",)),
    # Generators made fast or large
    System("scale_dit", "Scale-DiT: Ultra-High-Resolution Image Generation with Hierarchical Local Attention",
           "2510.16325", "ECCV 2026", "code", "generation",
           ("patterns/guided", "nn/lora", "adapt/scale_dit", "adapt/scale_dit_flux2", "adapt/scale_dit_run"),
           ("window",), ("guide",), ("lse",), ("pipeline",)),
    System("ultragen", "UltraGen: High-Resolution Video Generation with Hierarchical Attention",
           "2510.18775", "", "paper", "generation", ("nn/ultragen", "adapt/ultragen", "adapt/ultragen_parts"),
           ("window",), ("pooled",), ("gate",), ("pipeline",)),
    System("freeswim", "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free "
           "Ultra-High-Resolution Video Generation",
           "2511.14712", "", "code", "generation", ("adapt/freeswim", "adapt/freeswim_refine"),
           ("neighborhood",), ("cross override",), ("sequence",), ("pipeline",)),
    System("biformer", "BiFormer: Vision Transformer with Bi-Level Routing Attention",
           "2303.08810", "CVPR 2023", "code", "backbone", ("nn/biformer", "models/vision/biformer"),
           ("routed", "convolution"), ("pooled",), ("sum",), ("backbone",)),
    System("dhsa", "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
           "2510.24606", "NeurIPS 2025 workshop", "code", "language", ("adapt/dhsa",),
           ("routed",), ("pooled",), (), ("language model",)),
    System("rectified_spaattn", "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
           "2511.19835", "", "code", "acceleration", ("adapt/rectified_spaattn", "routing/shares", "ops/rectify"),
           ("routed",), ("pooled",), ("rectification",), ("pipeline",)),
    System("paro", "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual "
           "Generation Models",
           "2506.16054", "NeurIPS 2025", "code", "acceleration",
           ("adapt/paro", "adapt/paro_plan", "adapt/paro_calibration"),
           ("tile",), (), ("heads",), ("pipeline",)),
    System("hess", "HeSS: Head Sensitivity Score for Sparsity Redistribution in VGGT",
           "2603.25336", "CVPR 2026", "paper", "geometry", ("adapt/hess",),
           ("routed",), ("pooled",), ("heads",), ("reconstruction",)),
    System("flash_vggt", "FlashVGGT: Efficient and Scalable Visual Geometry Transformers with Compressed Descriptor "
           "Attention",
           "2512.01540", "CVPR 2026", "code", "geometry", ("models/geometry/flash_vggt",),
           ("window",), ("descriptors",), ("sequence",), ("reconstruction",)),
    System("hidiffusion", "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion "
           "Models",
           "2311.17528", "ECCV 2024", "code", "generation",
           ("adapt/hidiffusion", "adapt/hidiffusion_schedule", "adapt/hidiffusion_windows",
            "adapt/hidiffusion_control"),
           ("window",), ("pooled",), ("sequence",), ("pipeline",)),
    System("apet", "ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
           "2602.19870", "CVPR 2026", "code", "vlm", ("adapt/apet",),
           (), ("super tokens",), (), ("vlm",)),
    # Backbones
    System("gc_vit", "Global Context Vision Transformers",
           "2206.09959", "ICML 2023", "code", "backbone", ("nn/gc_vit", "models/vision/gc_vit"),
           ("window",), ("generated queries",), ("sequence",), ("backbone",)),
    System("maxvit", "MaxViT: Multi-Axis Vision Transformer",
           "2204.01697", "ECCV 2022", "code", "backbone", ("nn/maxvit", "models/vision/maxvit"),
           ("window", "convolution"), ("grid",), ("sequence",), ("backbone",)),
    System("davit", "DaViT: Dual Attention Vision Transformers",
           "2204.03645", "ECCV 2022", "code", "backbone", ("nn/davit", "models/vision/davit"),
           ("window",), ("channel",), ("sequence",), ("backbone",)),
    System("hilo", "Fast Vision Transformers with HiLo Attention",
           "2205.13213", "NeurIPS 2022", "code", "backbone", ("nn/hilo", "models/vision/hilo"),
           ("window",), ("pooled",), ("heads",), ("layer", "backbone")),
    System("stvit", "Vision Transformer with Super Token Sampling",
           "2211.11167", "CVPR 2023", "code", "backbone", ("nn/stvit", "models/vision/stvit"),
           ("cells",), ("super tokens",), ("sequence",), ("backbone",)),
    System("sg_former", "SG-Former: Self-guided Transformer with Evolving Token Reallocation",
           "2308.12216", "ICCV 2023", "code", "backbone", ("nn/sg_former", "models/vision/sg_former"),
           ("window",), ("super tokens",), ("heads",), ("backbone",)),
    System("duoformer", "DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision "
           "Transformer",
           "2506.12982", "MIDL 2025", "code", "backbone", ("nn/duoformer", "models/vision/duoformer"),
           ("window",), ("dense",), ("sequence",), ("backbone",)),
    System("l2vit", "The Linear Attention Resurrection in Vision Transformer",
           "2501.16182", "", "code", "backbone", ("nn/l2vit", "models/vision/l2vit"),
           ("window", "convolution"), ("linear",), ("sequence",), ("backbone",)),
    System("inline", "Bridging the Divide: Reconsidering Softmax and Linear Attention",
           "2412.06590", "NeurIPS 2024", "code", "backbone", ("nn/inline", "models/vision/inline"),
           ("convolution",), ("linear",), ("sum",), ("layer", "backbone")),
    # Language and sequence models
    System("lla", "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time "
           "Regression",
           "2510.01450", "ICLR 2026", "code", "operator", ("ops/local_linear",),
           (), ("local linear",), (), ("layer",)),
    System("lamamba_diff", "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and "
           "Mamba",
           "2408.02615", "", "code", "generation", ("ops/scan", "models/generation/lamamba_diff"),
           ("window",), ("scan",), ("sequence",), ("generator",)),
    System("block_transformer", "Block Transformer: Global-to-Local Language Modeling for Fast Inference",
           "2406.02657", "NeurIPS 2024", "code", "language", ("models/language/block_transformer",),
           ("window",), ("pooled",), ("sequence",), ("language model",)),
    System("ls_attention", "Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention "
           "Solution",
           "2505.15548", "", "code", "language", ("nn/ls_attention", "models/language/ls_attention"),
           ("window",), ("dense",), ("heads",), ("language model",)),
    System("aila", "AILA: First Experiments with Localist Language Models",
           "2511.03559", "", "abstract", "language", ("adapt/aila",),
           ("window",), ("dense",), (), ("language model",)),
    System("cab", "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
           "2210.07661", "ICML 2023", "code", "benchmark", ("bench/cab",),
           ("window",), ("pooled", "linear", "scan"), ("lse",), ("layer",)),
    # Dense prediction and channel attention
    System("ela", "ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
           "2403.01123", "", "code", "dense", ("nn/ela",),
           ("convolution",), ("pooled",), ("gate",), ("layer", "backbone")),
    System("ulsam", "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
           "2006.15102", "WACV 2020", "code", "dense", ("nn/ulsam",),
           ("convolution",), ("channel",), ("sum",), ("layer", "backbone")),
    System("ms_self_guided", "Multi-scale self-guided attention for medical image segmentation",
           "1906.02849", "IEEE JBHI 2020", "code", "dense", ("models/dense/ms_self_guided",),
           ("convolution",), ("dense", "channel"), ("sum",), ("backbone",)),
    System("gl_dmnet", "Dual Mutual Learning Network with Global-local Awareness for RGB-D Salient Object Detection",
           "2501.01648", "", "paper", "dense", ("models/dense/gl_dmnet",),
           ("convolution",), ("dense", "channel"), ("sum",), ("backbone",)),
    System("dcal", "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
           "2205.02151", "CVPR 2022", "paper", "dense", ("models/dense/dcal",),
           ("routed",), ("dense",), (), ("backbone",)),
    System("tgbformer", "TGBFormer: Transformer-GraphFormer Blender Network for Video Object Detection",
           "2503.13903", "AAAI 2025", "abstract", "dense", ("models/dense/tgbformer",),
           ("graph",), ("dense",), ("gate",), ("backbone",)),
    System("oat", "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
           "2407.13335", "ECCV 2024", "code", "dense", ("models/dense/oat",),
           (), ("dense",), (), ("backbone",)),
    System("large_gt", "Graph Transformers for Large Graphs",
           "2312.11109", "", "code", "graph", ("models/graph/large_gt",),
           ("graph",), ("codebook",), ("concat",), ("graph",)),
    # Restoration and compression
    System("dlgsanet", "Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
           "2301.02031", "ICCV 2023", "code", "restoration", ("models/restoration/dlgsanet",),
           ("cells",), ("channel",), ("sequence",), ("reconstruction",)),
    System("catanet", "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
           "2503.06896", "CVPR 2025", "code", "restoration", ("models/restoration/catanet",),
           ("routed", "window"), ("codebook",), ("sum",), ("reconstruction",)),
    System("s2lic", "S2LIC: Learned Image Compression with the SwinV2 Block, Adaptive Channel-wise and Global-inter "
           "Attention Context",
           "2403.14471", "", "code", "restoration", ("models/restoration/s2lic",),
           ("window",), ("channel", "sampled points"), ("concat",), ("codec",)),
    System("uplift", "UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders",
           "2601.17950", "CVPR 2026", "code", "restoration", ("models/restoration/uplift",),
           ("cells",), ("guide",), (), ("reconstruction",)),
    # Vision-language models and what is read out of attention
    System("slime", "Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models",
           "2406.08487", "", "code", "vlm", ("models/vlm/slime",),
           ("routed",), ("super tokens",), ("gate", "concat"), ("vlm",)),
    System("vision_remember", "Vision Remember: Alleviating Visual Forgetting in Efficient MLLM with Vision Feature "
           "Resample",
           "2506.03928", "", "abstract", "vlm", ("adapt/vision_remember",),
           ("cells",), (), ("sum",), ("vlm",)),
    System("agla", "Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local "
           "Attention",
           "2406.12718", "CVPR 2025", "code", "vlm", ("adapt/agla",),
           ("routed",), ("dense",), ("sum",), ("vlm",)),
    System("carve", "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
           "2509.06461", "ECCV 2026", "code", "vlm", ("adapt/carve",),
           ("routed",), ("dense",), ("sequence",), ("vlm",)),
    System("refam", "RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
           "2509.22650", "", "paper", "vlm", ("adapt/refam",),
           (), ("dense",), ("sum",), ("pipeline",)),
    System("c_upscale", "Creatively Upscaling Images with Global-Regional Priors",
           "2505.16976", "IJCV 2025", "abstract", "generation",
           ("ops/frequency", "ops/tiles", "adapt/c_upscale", "adapt/c_upscale_run"),
           ("window",), ("guide", "cross override"), ("gate",), ("pipeline",)),
    System("edit_mgt", "EditMGT: Unleashing Potentials of Masked Generative Transformers in Image Editing",
           "2512.11715", "CVPR 2026", "code", "generation", ("models/generation/edit_mgt",),
           ("routed",), ("dense",), ("lse",), ("generator",)),
    System("gestalt_disrt", "From Local Cues to Global Percepts: Emergent Gestalt Organization in Self-Supervised "
           "Vision Models",
           "2506.00718", "", "paper", "benchmark", ("bench/disrt",),
           (), (), (), ("backbone",)),
)
# fmt: on
