"""Training: a resumable loop, its schedule and averages, and the flow-matching loss of the built-in model."""

from glocal.train.average import Average
from glocal.train.flow import FlowSpec, flow_loss
from glocal.train.loop import CurveRow, Loop, LoopSpec
from glocal.train.optim import build_optimizers
from glocal.train.pictures import Pictures, draw_batch, picture_loss
from glocal.train.scene_clips import SCENE_FIELDS, ClipStage, draw_clips
from glocal.train.schedule import trapezoid

__all__ = [
    "SCENE_FIELDS",
    "Average",
    "ClipStage",
    "CurveRow",
    "FlowSpec",
    "Loop",
    "LoopSpec",
    "Pictures",
    "build_optimizers",
    "draw_batch",
    "draw_clips",
    "flow_loss",
    "picture_loss",
    "trapezoid",
]
