"""Data that is made on the spot: procedural moving scenes with everything known about them, and text to look up in."""

from glocal.data.captions import caption_of, caption_tokens
from glocal.data.objects import Layouts, SceneSpec, draw_layouts
from glocal.data.pictures import at_side, draw_pictures, paint, picture_spec
from glocal.data.render import Rendered, render
from glocal.data.scenes import Scene, make_scene, make_scenes
from glocal.data.texts import FACT, QUESTION, TextSpec, make_text
from glocal.data.words import ObjectAttributes, Question

__all__ = [
    "FACT",
    "QUESTION",
    "Layouts",
    "ObjectAttributes",
    "Question",
    "Rendered",
    "Scene",
    "SceneSpec",
    "TextSpec",
    "at_side",
    "caption_of",
    "caption_tokens",
    "draw_layouts",
    "draw_pictures",
    "make_scene",
    "make_scenes",
    "make_text",
    "paint",
    "picture_spec",
    "render",
]
