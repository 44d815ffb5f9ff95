"""Language: prompts with needles, distances that see a lost one, and the whole job on a small random decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glocal.advise import AdviseOptions, Effort, MethodSpec, Target, Workload, advise, attach, climb, inside, run
from glocal.advise.methods import candidates
from glocal.advise.next_token import NextToken
from glocal.advise.objective import Output
from glocal.advise.workload import Sample
from glocal.data import FACT, QUESTION, make_text
from glocal.models.language import Decoder, DecoderConfig, encode, load_decoder

from .test_run import times_by_pairs

OBJECTIVE = NextToken(encode, tokens=700, scored=32, window=64, sinks=8)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Two layers whose attention matters."""
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(dim=32, layers=2, heads=4, kv_heads=2, hidden=48)).eval()
    for block in made.blocks:
        torch.nn.init.normal_(block.attn.proj.weight, std=0.3)  # type: ignore[union-attr]
        torch.nn.init.normal_(block.attn.q.weight, std=0.5)  # type: ignore[union-attr]
    return made


def texts(count: int) -> Workload:
    return Workload.from_calls([{"text": make_text(700, n)} for n in range(count)], range(count))


def test_a_prompt_has_its_needles_where_they_belong() -> None:
    prompt = OBJECTIVE.prompt(texts(1).samples[0])
    assert prompt.ids.shape == (700,) and prompt.answers.shape == prompt.wanted.shape == (5, 4)
    text = bytes(prompt.ids.tolist()).decode()
    body, questions = text[:-170], text[-170:]
    for number, depth in enumerate(OBJECTIVE.depths):
        code = bytes(prompt.wanted[number].tolist()).decode()
        fact = f"is {code}. "
        assert fact in body and f"? {code}. " in questions
        assert abs(body.index(fact) / len(body) - depth) < 0.25
        places = prompt.scored[prompt.answers[number]]
        assert bytes(prompt.ids[places + 1].tolist()).decode() == code
    again = OBJECTIVE.prompt(Sample("other", 0, texts(1).samples[0].args))
    assert torch.equal(again.ids, prompt.ids)


def test_a_lost_needle_is_seen_at_its_depth() -> None:
    prompt = OBJECTIVE.prompt(texts(1).samples[0])
    notes = {"answers": prompt.answers, "wanted": prompt.wanted}
    right = torch.zeros(len(prompt.scored), 256)
    right[prompt.answers.flatten(), prompt.wanted.flatten()] = 5.0
    lost = right.clone()
    lost[prompt.answers[2, 1]] = 0.0
    lost[prompt.answers[2, 1], 7] = 5.0
    measures = OBJECTIVE.distance(Output(right, None, notes), Output(lost, None, notes))
    assert measures["retrieval"] == 0.8 and measures["retrieval_lost"] == pytest.approx(0.2)
    assert [measures[f"lost_at_{d}"] for d in (10, 30, 50, 70, 90)] == [0, 0, 1, 0, 0]
    assert measures["root_kl"] == pytest.approx(measures["kl"] ** 0.5) and measures["kl"] > 0
    assert OBJECTIVE.distance(Output(right, None, notes), Output(right, None, notes))["root_kl"] == 0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"words": "x"}, "argument 'words' is unknown; legal: text, file, tokens"),
        ({}, "exactly one of text and file"),
        ({"text": "short"}, r"tokens=700: \d+ go to facts and questions and the text has 5; legal: \d+ to \d+"),
    ],
)
def test_what_makes_no_prompt_is_said(args: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=f"sample 'a': .*{text}"):
        OBJECTIVE.check(None, Workload((Sample("a", 1, args),)))


def test_texts_from_files_at_several_lengths(tmp_path: Path, decoder: Decoder) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(make_text(900, number))
    found = Workload.from_texts(sorted(tmp_path.iterdir()), [600, 700])
    OBJECTIVE.check(decoder, found)
    assert [len(OBJECTIVE.prompt(s).ids) for s in found.samples] == [600, 700, 600, 700]


def test_prefill_advice_end_to_end(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal candidates, rules for prefills of the text model, proven on the length; short prompts run dense."""
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))  # whatever it takes
    methods = tuple(
        MethodSpec(s, p, block=(32, 32), kind=k)  # type: ignore[arg-type]
        for s, p, k in [
            ("causal_window", {"window": {"fraction": 0.25}, "sinks": 32}, "pattern"),
            ("causal_window", {"window": {"fraction": 0.5}, "sinks": 32}, "pattern"),
            ("causal_topk", {"keep": 0.25}, "route"),
        ]
    )
    effort = Effort("tiny", 1, 8, 1, (0.8,), pairs=2, rounds=1, steps_a_bucket=1, published=0, show=True, rungs=1)
    target = Target(1.0, of="prefill", limits={"drift": 1e6, "retrieval_lost": 2.0})
    options = AdviseOptions(candidates=methods, min_tokens=64)
    found = advise(decoder, texts(4), objective=OBJECTIVE, target=target, effort=effort, options=options)
    assert found.ladder and found.validation is not None
    rule = next(r.recipe.rules[0] for r in found.ladder if r.kind == "allocation")
    assert rule.component == "text_model" and rule.phase.coordinate == "prefill"
    assert "lost_at_50" in found.validation.pairs[0].measures
    recipe = found.chosen.recipe  # type: ignore[union-attr]
    assert recipe.workload["canvases"] == [{"shape": [700], "before": 0, "after": 0}]
    ids = torch.randint(256, (1, 700))
    with torch.no_grad(), attach(decoder, recipe) as handle:
        decoder(ids)
        assert sum(s.sparse for s in handle.method.stats.values()) > 0  # type: ignore[attr-defined]
        decoder(ids[:, :300])
        reasons = [set(s.dense) for s in handle.method.stats.values()]  # type: ignore[attr-defined]
    assert any("canvas not proven" in r for r in reasons)


def test_prefill_advice_for_a_decoder_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = transformers.Gemma2Config(**sizes, **heads, sliding_window=4, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    objective = NextToken(lambda text: list(text.encode()), tokens=600, scored=24, window=64, sinks=8)
    methods = tuple(
        MethodSpec("causal_window", {"window": {"fraction": f}, "sinks": 16}, block=(32, 32)) for f in (0.25, 0.5)
    )
    effort = Effort("tiny", 1, 8, 1, (0.8,), pairs=2, rounds=1, steps_a_bucket=1, published=0, rungs=1)
    workload = Workload.from_calls([{"text": make_text(600, n)} for n in range(4)], range(4))
    options = AdviseOptions(candidates=methods, min_tokens=64)
    target = Target(of="prefill", limits={"drift": 1e6})
    found = advise(model, workload, objective=objective, target=target, effort=effort, options=options)
    assert found.preflight.causal and {s.layer for s in found.preflight.sites} == {1}  # layer 0 has a sliding window
    assert found.validation is not None and found.chosen is not None
    assert all(r.covers(1) and not r.covers(0) for r in found.chosen.recipe.rules)


def test_on_the_built_in_model_the_allocation_keeps_the_needles_that_one_window_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inside, "times_of", times_by_pairs)
    monkeypatch.setattr("glocal.advise.climb.refined", lambda times, found: times)
    monkeypatch.setattr(run, "_refusal", lambda *args: None)
    monkeypatch.setattr(climb, "winners", lambda measured, anchors, target: (list(measured), ""))
    objective = NextToken(encode, tokens=2048, scored=128, window=256, fact=FACT, question=QUESTION)
    workload = Workload.from_calls([{"text": make_text(2048, n)} for n in range(4)], range(4))
    effort = Effort("tiny", 1, 16, 1, (0.6,), pairs=2, rounds=1, steps_a_bucket=1, published=0, rungs=1)
    methods = tuple(candidates((2048,), causal=True))
    options = AdviseOptions(candidates=methods, min_tokens=64)
    found = advise(load_decoder(), workload, objective=objective, effort=effort, options=options, target=Target(1.0))
    measured = {r.kind: r.measures for r in found.ladder}
    assert measured["allocation"]["retrieval"] >= 0.8 > measured["single"]["retrieval"]
    assert measured["allocation"]["root_kl"] < 0.5 * measured["single"]["root_kl"]
