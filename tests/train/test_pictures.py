"""Training batches and loss of the image models."""

from __future__ import annotations

import torch

from glocal.data.captions import LENGTH, WORDS
from glocal.models.generation import ImageDiT, ImageDiTConfig, PictureModel
from glocal.train import FlowSpec, draw_batch, picture_loss


def batch(seed: int = 0, **more):
    return draw_batch(6, torch.Generator().manual_seed(seed), "cpu", **more)


def test_batches_are_latents_and_captions_fixed_by_the_generator():
    a, b = batch(), batch()
    assert a.latents.shape == (6, 12, 32, 32) and a.tokens.shape == (6, LENGTH)
    assert torch.equal(a.latents, b.latents) and torch.equal(a.tokens, b.tokens)
    assert a.latents.min() >= -1 and a.latents.max() <= 1
    assert not batch(silent=1.0).tokens.any()
    assert bool(batch(silent=0.0).tokens.any(1).all())


def test_a_perfect_model_has_no_loss_and_the_error_is_one_of_velocity():
    given = batch()

    class Knows(torch.nn.Module):
        encoder = torch.nn.Identity()

        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = off
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma, words):
            return given.latents + self.off * sigma.clamp(min=0.2).view(-1, 1, 1, 1)

    for off in (0.0, 0.5):
        loss = picture_loss(Knows(off), given, FlowSpec(), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        torch.testing.assert_close(loss, torch.tensor(off**2))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    net = ImageDiT(ImageDiTConfig(num_attention_heads=1, attention_head_dim=24, num_layers=1, ffn_dim=32))
    model = PictureModel(net, WORDS, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = picture_loss(model, batch(), FlowSpec(), torch.Generator().manual_seed(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
