"""Prompts of regions, written by a vision-language model (C-Upscale, arXiv 2505.16976, takes them from one).

``upscale(pipe, picture, 4096, 4096, prompt, prompter=VisionPrompter(model, processor))`` with LLaVA, Qwen2.5-VL, or any
model of transformers whose processor has a chat template for images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INSTRUCTION = (
    'This is a part of a picture of "{prompt}". Describe in at most 30 words what is seen in this part alone: its '
    "objects, materials and fine details. Name nothing that is not in it."
)


@dataclass(frozen=True)
class VisionPrompter:
    """model, processor: of transformers. instruction: {prompt} becomes the global prompt. words: tokens at most."""

    model: Any
    processor: Any
    instruction: str = INSTRUCTION
    words: int = 60

    def __call__(self, region: Tensor, prompt: str) -> str:
        """region [3, h, w] in [0, 1] -> what is in it, in the light of the global prompt."""
        content = [{"type": "image"}, {"type": "text", "text": self.instruction.format(prompt=prompt)}]
        chat = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given = self.processor(text=[chat], images=[_picture(region)], return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(**given, max_new_tokens=self.words, do_sample=False)
        said = self.processor.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return " ".join(said.split())


def _picture(region: Tensor) -> Any:
    """As an image of PIL, which every processor takes."""
    from PIL import Image

    return Image.fromarray((region.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())
