"""Decoders of transformers, tiny and random: what a method is told, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glocal.adapt import Method, Site, SiteCall, attach, host_of
from glocal.adapt.records import Core
from glocal.advise import Recipe, Rule
from glocal.advise.apply import RecipeMethod
from glocal.advise.methods import MethodSpec
from glocal.advise.recipe import Fallback, Phase
from glocal.ops import Score, attend
from glocal.patterns import Causal

REASON = "is not installed: pip install 'glocal[transformers]'"
transformers = pytest.importorskip("transformers", reason=f"transformers {REASON}")

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GEMMA: dict[str, Any] = {**TINY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]


def make(family: str, **changed: Any) -> Any:
    """The same random weights every time, sharp enough that attention matters."""
    classes = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", TINY),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TINY),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TINY, "head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6}),
    }
    model_name, config_name, sizes = classes[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, config_name)(**sizes, **changed)
        model = getattr(transformers, model_name)(config).eval()
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(rows: int = 1, length: int = 24) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **given).logits


class Ours(Method):
    """Exact attention of this library in place of the model's, by what the call says alone."""

    def __init__(self) -> None:
        self.calls: list[SiteCall] = []

    def sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(s for s in sites if s.sliding_window is None)

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        self.calls.append(call)
        if call.state.phase == "decode" or call.native.opaque:
            return inner(q, k, v, call)
        score = Score(scale=call.site.scale, softcap=call.site.softcap)
        return attend(q, k, v, Causal(), canvas=call.layout, score=score, backend="reference").out


def kept(model: Any) -> dict[str, Any]:
    return {
        f"{name}.{key}": dict(value) if key.endswith("_hooks") else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in ("forward", "_old_forward") or key.endswith("_hooks")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_recipe_and_undo_are_bit_equal(family: str) -> None:
    model, ids = make(family), tokens()
    table = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.items())
    before, plain = kept(model), logits(model, ids)
    with attach(model, RecipeMethod(Recipe("dense"))):
        assert torch.equal(logits(model, ids), plain)
    assert kept(model) == before and torch.equal(logits(model, ids), plain)
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.items()) == table, "something process-wide changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_says_all_that_exact_attention_needs(family: str) -> None:
    """Grouped heads, scale, soft-cap, causal order."""
    model, ids = make(family), tokens()
    plain, method = logits(model, ids), Ours()
    with attach(model, method):
        found = logits(model, ids)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    call = method.calls[0]
    assert call.site.causal and call.site.kv_heads == 2 and call.state.phase == "prefill"
    assert (call.site.softcap is not None) == (family == "gemma2")
    assert call.layout.kv.grid.axes == (24,)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_sliding_layers_are_told_and_left_alone(family: str) -> None:
    model = make(family)
    sites = host_of(model).sites(model)
    kinds = model.config.layer_types
    assert [s.sliding_window for s in sites] == [4 if k == "sliding_attention" else None for k in kinds]
    assert {s.layer for s in RecipeMethod(Recipe("dense")).sites(tuple(sites))} == {
        i for i, k in enumerate(kinds) if k == "full_attention"
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_on_either_side_is_said_by_the_layout(family: str, side: str) -> None:
    model, ids = make(family), tokens(2)
    mask = torch.ones_like(ids)
    rows = slice(0, 7) if side == "left" else slice(17, None)
    mask[1, rows] = 0
    plain, method = logits(model, ids, attention_mask=mask), Ours()
    with attach(model, method):
        found = logits(model, ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], plain[real], rtol=1e-4, atol=1e-5)
    assert not method.calls[0].native.opaque and method.calls[0].layout.documents is not None


def test_a_mask_of_four_axes_is_served_by_the_model_alone() -> None:
    model, ids = make("llama"), tokens()
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[:, 3:6] = False
    mask = mask[None, None] | torch.eye(24, dtype=torch.bool)
    plain = logits(model, ids, attention_mask=mask)
    window = MethodSpec("causal_window", {"window": {"tokens": 8}}, block=(8, 8))
    recipe = Recipe("candidate", {"w": window}, (rule("w"),), fallback=Fallback(min_tokens=4))
    with attach(model, RecipeMethod(recipe)) as handle:
        assert torch.equal(logits(model, ids, attention_mask=mask), plain)
        assert {r for s in handle.method.stats.values() for r in s.dense} == {"a mask"}  # type: ignore[attr-defined]


def rule(name: str) -> Rule:
    return Rule(name, ((0, 1),), phase=Phase("prefill", 0, 1 << 20), component="text_model")


def test_a_prompt_in_chunks_begins_where_the_cache_ends_and_decode_stays_dense() -> None:
    model, ids = make("llama"), tokens(1, 40)
    window = MethodSpec("causal_window", {"window": {"tokens": 8}}, block=(8, 8))
    recipe = Recipe("candidate", {"w": window}, (rule("w"),), fallback=Fallback(min_tokens=4))
    with torch.no_grad(), attach(model, RecipeMethod(recipe)) as handle:
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :24], use_cache=True)
        cached = first.past_key_values
        second = model(input_ids=ids[:, 24:], past_key_values=cached, use_cache=True)
        torch.testing.assert_close(second.logits, whole[:, 24:], rtol=1e-4, atol=1e-5)
        before = {n: dict(s.dense) for n, s in handle.method.stats.items()}  # type: ignore[attr-defined]
        assert not any(before.values())
        model(input_ids=ids[:, :1], past_key_values=cached, use_cache=True)
        stats = handle.method.stats  # type: ignore[attr-defined]
    assert all(dict(s.dense) == {"decode": 4} for s in stats.values())


def test_generate_with_a_recipe_equals_prefill_and_dense_decode() -> None:
    model, ids = make("llama"), tokens(1, 30)
    with attach(model, RecipeMethod(Recipe("dense"))):
        dense = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(dense, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_two_models_in_one_process_and_nested_methods() -> None:
    one, other, ids = make("llama"), make("llama"), tokens()
    plain, outer, inner = logits(one, ids), Ours(), Ours()
    first = attach(one, outer)
    assert torch.equal(logits(other, ids), plain) and not outer.calls
    second = attach(one, inner)
    logits(one, ids)
    assert len(inner.calls) == 2 and not outer.calls  # the inner one wins
    with pytest.raises(RuntimeError, match="attached later"):
        first.undo()
    second.undo()
    logits(one, ids)
    assert len(outer.calls) == 2
    first.undo()
    assert torch.equal(logits(one, ids), plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_weights(order: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason=f"accelerate {REASON}")
    model, ids = make("llama"), tokens()
    plain, method = logits(model, ids), Ours()

    def offload() -> None:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    if order == "before":
        offload()
    handle = attach(model, method)
    if order == "after":
        offload()
    torch.testing.assert_close(logits(model, ids), plain, rtol=1e-4, atol=1e-5)
    assert len(method.calls) == 2
    handle.undo()
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)
    assert len(method.calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_models(order: str) -> None:
    """A method runs between the graphs of a compiled model: same numbers, undone as ever."""
    model, ids = make("llama"), tokens()
    plain, method = logits(model, ids), Ours()
    handle = attach(model, method) if order == "before" else None
    compiled = torch.compile(model, backend="eager")
    if handle is None:
        logits(compiled, ids)
        handle = attach(model, method)
    torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-4, atol=1e-5)
    assert len(method.calls) == 2
    handle.undo()
    torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-5, atol=1e-6)
    assert len(method.calls) == 2


def test_heads_add_up_to_what_the_layer_adds() -> None:
    model, ids = make("llama"), tokens()
    outs: list[tuple[SiteCall, Tensor]] = []

    class Keep(Method):
        def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
            outs.append((call, inner(q, k, v, call)))
            return outs[-1][1]

    added: list[Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: added.append(out[0]))
    with attach(model, Keep()):
        logits(model, ids)
    hook.remove()
    call, out = outs[0]
    assert call.contribution is not None and call.residual is not None and call.residual.shape == (1, 24, 32)
    torch.testing.assert_close(call.contribution(out).sum(1), added[0], rtol=1e-4, atol=1e-5)
