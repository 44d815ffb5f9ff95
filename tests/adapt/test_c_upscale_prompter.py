"""Prompts of regions: what the model and its processor are given, and what becomes of the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glocal.adapt.c_upscale_prompter import VisionPrompter

pytest.importorskip("PIL", reason="Pillow is not installed: pip install pillow")


class Given(dict[str, Any]):
    def to(self, device: Any) -> Given:
        return self


class Processor:
    """Notes what it is given; decodes numbers."""

    def __init__(self) -> None:
        self.chat: Any = None
        self.images: Any = None

    def apply_chat_template(self, chat: Any, *, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        self.chat = chat
        return "<image> say"

    def __call__(self, *, text: list[str], images: list[Any], return_tensors: str) -> Given:
        assert text == ["<image> say"] and return_tensors == "pt"
        self.images = images
        return Given(input_ids=torch.tensor([[1, 2, 3]]))

    def batch_decode(self, tokens: torch.Tensor, *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" wet\n" + " ".join(str(int(t)) for t in row) + " " for row in tokens]


class Model:
    device = "cpu"

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, do_sample: bool) -> torch.Tensor:
        assert max_new_tokens == 5 and not do_sample
        return torch.cat([input_ids, torch.tensor([[7, 8]])], 1)


def test_the_answer_alone_is_the_prompt() -> None:
    processor = Processor()
    region = torch.zeros(3, 4, 6)
    region[0] = 1
    said = VisionPrompter(Model(), processor, words=5)(region, "a heron")
    assert said == "wet 7 8"
    image, text = processor.chat[0]["content"]
    assert image == {"type": "image"} and '"a heron"' in text["text"]
    assert processor.images[0].size == (6, 4) and processor.images[0].getpixel((0, 0)) == (255, 0, 0)
