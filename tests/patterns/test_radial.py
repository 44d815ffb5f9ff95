import json
import math

import pytest
import torch
from safetensors import safe_open

from glocal.canvas import Canvas, Layout
from glocal.patterns import RadialBlocks, RadialTokens


def paper_rule(tokens, sink):
    def rule(q, k):
        (i, *pos_q), (j, *pos_k) = q, k
        gap = abs(i - j)
        p = 2 ** int(math.log2(max(gap, 1)))
        a, b = (sum(x * w for x, w in zip(pos, weights, strict=True)) for pos in (pos_q, pos_k))
        band = p <= tokens and abs(a - b) + 1 <= tokens / p
        return band or (gap % math.ceil(p / tokens) == 0 and a == b) or (sink and j == 0)

    weights = [tokens]
    return rule, weights


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("shape", [(9, 5), (11, 2), (6, 3, 4), (17, 1, 3), (3, 7), (2, 2, 2)])
def test_token_form_of_the_paper(agrees, shape, sink):
    tokens = math.prod(shape[1:])
    rule, weights = paper_rule(tokens, sink)
    weights[:] = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    seen = agrees(RadialTokens(sink), shape, rule)
    assert bool(seen.diagonal().all())
    if not sink:
        assert torch.equal(seen, seen.T)


def test_two_frames_are_dense():
    layout = Layout.of(Canvas((2, 3, 4)))
    assert bool(RadialTokens(sink=False).mask(layout).all())
    assert bool(RadialBlocks(32, 0.2, "hunyuan").block_mask(Layout.of(Canvas((2, 160)))).all())


@pytest.mark.parametrize(("name", "number"), [("small", i) for i in range(7)] + [("unaligned64", i) for i in range(3)])
def test_published_block_masks(golden, name, number):
    with safe_open(golden(f"radial/block_masks_{name}.safetensors"), "pt") as case:
        config = json.loads(case.metadata()["meta"])["config"][number]
        want = case.get_tensor(f"out.block_mask{number}").bool()
    pattern = RadialBlocks(config["block_size"], config["decay_factor"], config["model_type"])
    canvas = Canvas((config["num_frame"], config["token_per_frame"]), after=config["text_tokens"])
    mask = pattern.block_mask(Layout.of(canvas))[0]
    whole = canvas.size // config["block_size"]  # the published mask leaves a last partial block out
    assert torch.equal(mask[:whole, :whole], want)
    assert bool(mask[whole:].all()) and bool(mask[:, whole:].all())


@pytest.mark.parametrize("number", range(3))
def test_published_widths_and_kept_pairs(golden, number):
    with safe_open(golden("radial/frame_pair_tables.safetensors"), "pt") as case:
        config = json.loads(case.metadata()["meta"])["config"][number]
        width, keep = (case.get_tensor(f"out.{n}{number}") for n in ("window_width", "keep_frame_pair"))
    pattern = RadialBlocks(config["block_size"], config["decay_factor"], config["model_type"])
    frames, tokens = config["num_frame"], config["token_per_frame"]
    gaps = (torch.arange(frames)[:, None] - torch.arange(frames)[None]).abs()
    widths = torch.tensor([pattern.width(gap, tokens) for gap in range(frames)], dtype=torch.float64)
    keeps = torch.tensor([pattern.keeps(gap, tokens) for gap in range(frames)])
    assert torch.equal(widths[gaps], width)
    assert torch.equal(keeps[gaps], keep.bool())
    assert bool((widths.diff() <= 0).all())


@pytest.mark.parametrize(
    ("frames", "decay", "model", "text", "percent"),
    [
        (18, 0.2, "wan", 0, 28.71),
        (30, 0.95, "hunyuan", 0, 27.46),
        (30, 0.95, "hunyuan", 256, 27.78),
        (64, 0.95, "hunyuan", 0, 17.46),
        (64, 1.0, "hunyuan", 0, 18.41),
        (128, 0.95, "hunyuan", 0, 11.00),
        (128, 1.0, "hunyuan", 0, 11.50),
        (41, 0.2, "wan", 0, 18.16),
        (41, 1.0, "wan", 0, 26.39),
    ],
)
def test_density_at_full_size(frames, decay, model, text, percent):
    canvas = Canvas((frames, 48, 80), after=text)
    mask = RadialBlocks(128, decay, model).block_mask(Layout.of(canvas))
    assert 100 * mask.double().mean().item() == pytest.approx(percent, abs=0.006)


def slow_mask(frames, tokens, block, decay, sink):
    """Pooling by the letter: build every token mask of a frame pair, place it, count columns."""
    pattern = RadialBlocks(block, decay, "wan" if sink else "hunyuan")
    side = -(-tokens // block)
    count = -(-frames * tokens // block)
    out = torch.zeros(count + side, count + side, dtype=torch.bool)
    place = torch.arange(tokens)
    distance = (place[:, None] - place[None]).abs()
    for i in range(frames):
        for j in range(frames):
            token = (distance <= pattern.width(abs(i - j), tokens)) & pattern.keeps(abs(i - j), tokens)
            if sink and j == 0:
                token = torch.ones_like(token)
            q0, k0 = i * tokens % block, j * tokens % block
            big = torch.zeros(q0 + side * block, k0 + side * block)
            big[q0 : q0 + tokens, k0 : k0 + tokens] = token[: side * block, : side * block].float()
            cut = big[: side * block, : side * block].unflatten(0, (side, block)).unflatten(2, (side, block))
            density = cut.mean(1)  # [row block, column block, column]
            kept = (density > 1 / 3).sum(-1) / ((density > 0).sum(-1) + 1e-9) > 0.6
            out[i * tokens // block :, j * tokens // block :][:side, :side] |= kept
    out = out[:count, :count]
    text = frames * tokens // block
    out[text:] = True
    out[:, text:] = True
    return out


@pytest.mark.parametrize(("frames", "tokens", "block"), [(7, 48, 16), (9, 44, 16), (6, 75, 32), (12, 21, 8)])
@pytest.mark.parametrize("sink", [True, False])
def test_counting_equals_pooling_of_token_masks(frames, tokens, block, sink):
    pattern = RadialBlocks(block, 0.6, "wan" if sink else "hunyuan", own_block=False)
    mask = pattern.block_mask(Layout.of(Canvas((frames, tokens))))[0]
    assert torch.equal(mask, slow_mask(frames, tokens, block, 0.6, sink))


def test_block_form_is_its_expansion_and_covers_text():
    canvas = Canvas((5, 3, 4), after=7)
    layout = Layout(canvas, canvas, {("grid", "after"): "none"})
    pattern = RadialBlocks(8, 0.5, "hunyuan")
    kept = pattern.block_mask(layout)[0]
    block = torch.arange(canvas.size) // 8
    assert torch.equal(pattern.mask(layout)[0], kept[block[:, None], block])
    assert bool(pattern.mask(layout)[0][:, 60:].all())


@pytest.mark.parametrize("tokens", [48, 62, 100, 125, 200])
def test_every_token_sees_itself_even_with_ragged_frames(tokens):
    layout = Layout.of(Canvas((24, tokens)))
    mine, published = (RadialBlocks(64, 0.5, "hunyuan", own_block=own).block_mask(layout)[0] for own in (True, False))
    assert bool(mine.diagonal().all())
    assert torch.equal(mine, published | torch.eye(mine.shape[0], dtype=torch.bool))
    if tokens in (62, 125):
        assert not bool(published.diagonal().all())


def test_another_size_gets_another_mask():
    """The published builder keeps the first mask it made; sizes, models and decays here never share one."""
    small, large = (Layout.of(Canvas((6, n))) for n in (256, 384))
    assert RadialBlocks(128).block_mask(small).shape != RadialBlocks(128).block_mask(large).shape
    a, b = RadialBlocks(128, 0.2).block_mask(large), RadialBlocks(128, 0.2, "hunyuan").block_mask(large)
    assert not torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match="must begin with its only grid"):
        RadialBlocks().check(Layout.of(Canvas((4, 64), before=3)))
    with pytest.raises(ValueError, match="must share one canvas"):
        RadialBlocks().check(Layout(Canvas((4, 64)), Canvas((5, 64))))
    with pytest.raises(ValueError, match="decay=0 must be positive"):
        RadialBlocks(decay=0)
    with pytest.raises(ValueError, match="model='mochi'; legal: 'wan'"):
        RadialBlocks(model="mochi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grid \(9,\) has one axis; it needs frames first"):
        RadialTokens().check(Layout.of(Canvas((9,))))
