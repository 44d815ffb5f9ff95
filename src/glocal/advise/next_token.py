"""Language models judged by their next-token distributions on one prefill: KL, changed first choices, lost needles.

A prompt is a text with five facts laid into it at known depths, and five questions for them behind it. A mean over all
tokens hides a lost needle, so retrieval stands beside it, by depth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glocal.adapt.attach import attach
from glocal.adapt.records import Core, SiteCall
from glocal.advise.objective import Coordinate, OnePass, Output
from glocal.advise.probe import MediaMethod
from glocal.advise.workload import Sample, Workload
from glocal.models.language import Decoder
from glocal.ops import Score, attend
from glocal.patterns import Causal, CausalWindow, Sinks

_ARGUMENTS = ("text", "file", "tokens")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, eq=False)
class Prompt:
    """ids [N]. scored: positions whose prediction is compared. answers [needles, A]: places among `scored` that predict
    an answer; wanted [needles, A]: its tokens; -1 pads.
    """

    ids: Tensor
    scored: Tensor
    answers: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Finished:
    """What `on_step` is given: the logits."""

    latent: Tensor


@dataclass(frozen=True)
class NextToken(OnePass):
    """A causal language model judged on one prefill; the main error is the root of the mean KL in nats.

    encode: a text to token ids, without marks for begin and end. begin: ids in front of every prompt. tokens: length of
    a prompt where a sample does not say. scored: positions compared, spread over the text, beside the answers.
    depths: where facts are laid into the text, as shares of it. fact, question: their words, with {name} and {code};
    the answer is the code. window, sinks: what the ceiling may look at, the last and the first tokens.
    Samples hold `text`, or `file`, and may hold `tokens`.
    """

    encode: Callable[[str], Sequence[int]]
    begin: tuple[int, ...] = ()
    tokens: int = 4096
    scored: int = 256
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    window: int = 4096
    sinks: int = 64
    fact: str = "The code of {name} is {code}. "
    question: str = "What is the code of {name}? "

    @property
    def name(self) -> str:
        """As in `recipe.objective`."""
        return "next_token"

    @property
    def measures(self) -> tuple[str, ...]:
        """As `distance` gives them."""
        return ("root_kl", "kl", "top1_changed", "retrieval", "retrieval_lost", *map(_lost_at, self.depths))

    @property
    def coordinate(self) -> Coordinate:
        """Rules hold for prefills."""
        return "prefill"

    @property
    def higher(self) -> frozenset[str]:
        """Retrieval itself; what is lost of it is better when lower."""
        return frozenset({"retrieval"})

    def check(self, model: Any, workload: Workload) -> None:
        """ValueError for the first sample that makes no prompt, with its id and what is legal."""
        for sample in workload.samples:
            try:
                self.prompt(sample)
            except (ValueError, OSError) as error:
                raise ValueError(f"sample {sample.id!r}: {error}") from error

    def prompt(self, sample: Sample) -> Prompt:
        """The prompt of a sample; its needles depend on the seed alone."""
        for name in sample.args:
            if name not in _ARGUMENTS:
                raise ValueError(f"argument {name!r} is unknown; legal: {', '.join(_ARGUMENTS)}.")
        if ("text" in sample.args) == ("file" in sample.args):
            raise ValueError("needs exactly one of text and file.")
        length = sample.args.get("tokens", self.tokens)
        draw = random.Random(sample.seed)
        facts = [(_name(draw), f"{draw.randrange(10_000):04d}") for _ in self.depths]
        needles = [list(self.encode(self.fact.format(name=name, code=code))) for name, code in facts]
        asked = [list(self.encode(self.question.format(name=name))) for name, _ in facts]
        told = [list(self.encode(f"{code}. ")) for _, code in facts]
        digits = [len(list(self.encode(code))) for _, code in facts]
        spent = len(self.begin) + sum(map(len, (*needles, *asked, *told)))
        room = int(length) - spent
        text = list(self.encode(_text(sample)))
        if room < len(self.depths) or len(text) < room:
            raise ValueError(
                f"tokens={length}: {spent} go to facts and questions and the text has {len(text)}; legal: "
                f"{spent + len(self.depths)} to {spent + len(text)}."
            )
        ids = list(self.begin)
        at = 0
        for depth, needle in sorted(zip(self.depths, needles, strict=True)):
            stop = _sentence(text, min(int(depth * room), room - 1), list(self.encode(". ")), room)
            ids += text[at:stop] + needle
            at = max(at, stop)
        ids += text[at:room]
        body = len(ids)
        answers, wanted = [], []
        for number in draw.sample(range(len(facts)), len(facts)):
            ids += asked[number]
            places = list(range(len(ids) - 1, len(ids) - 1 + digits[number]))
            answers.append((number, places))
            ids += told[number]
            wanted.append((number, told[number][: digits[number]]))
        spread = torch.linspace(0, body - 1, min(self.scored, body)).long().tolist()
        scored = sorted({*spread, *(p for _, places in answers for p in places)})
        where = {place: row for row, place in enumerate(scored)}
        rows = [[where[p] for p in places] for _, places in sorted(answers)]
        return Prompt(
            torch.tensor(ids), torch.tensor(scored), _padded(rows), _padded([tokens for _, tokens in sorted(wanted)])
        )

    def run(
        self,
        model: Any,
        sample: Sample,
        *,
        start: int = 0,
        latent: Tensor | None = None,
        on_step: Callable[[Any], None] | None = None,
    ) -> Output:
        """Logits [scored, vocabulary] of one prefill, float32. ValueError for a start: one pass has none."""
        if start or latent is not None:
            raise ValueError(f"start={start}: a prefill is one pass; legal: 0.")
        prompt = self.prompt(sample)
        device = next(model.parameters()).device
        ids, keep = prompt.ids.to(device)[None], prompt.scored.to(device)
        with torch.no_grad():
            if isinstance(model, Decoder):
                logits = model(ids, keep)[0]
            else:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
        if on_step is not None:
            on_step(Finished(logits))
        return Output(logits.float(), None, {"answers": prompt.answers, "wanted": prompt.wanted})

    def brief(self, model: Any, sample: Sample) -> Output:
        """The run itself."""
        return self.run(model, sample)

    def distance(self, reference: Output, other: Output) -> Mapping[str, float]:
        """`root_kl`, `kl` (nats, mean over scored positions), `top1_changed` (share of positions), `retrieval` (share
        of needles the other one finds), `retrieval_lost` (of those the reference finds), and `lost_at_D` for every
        depth D in percent.
        """
        first, second = reference.tensor.log_softmax(-1), other.tensor.log_softmax(-1)  # [P, V]
        kl = float((first.exp() * (first - second)).sum(-1).clamp(min=0).mean())
        found, kept = _found(reference), _found(other)
        lost = [max(0.0, a - b) for a, b in zip(found, kept, strict=True)]
        measures = {
            "root_kl": kl**0.5,
            "kl": kl,
            "top1_changed": float((first.argmax(-1) != second.argmax(-1)).float().mean()),
            "retrieval": sum(kept) / max(len(kept), 1),
            "retrieval_lost": sum(lost) / max(sum(found), 1.0),
        }
        return {**measures, **{_lost_at(d): one for d, one in zip(self.depths, lost, strict=True)}}

    def ceiling(self, model: Any, sample: Sample) -> Output:
        """What the first and the last tokens alone say: nothing from further back."""
        with attach(model, Nearby(self.window, self.sinks)):
            return self.run(model, sample)


class Nearby(MediaMethod):
    """Every token sees the first `sinks` tokens and the last `window`, at all sites."""

    def __init__(self, window: int, sinks: int) -> None:
        self.pattern = CausalWindow(window) | (Sinks(sinks) & Causal())

    def core(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall, inner: Core) -> Tensor:
        """q [B, H, N, D] -> [B, H, N, D]."""
        score = Score(scale=call.site.scale, softcap=call.site.softcap)
        return attend(q, k, v, self.pattern, canvas=call.layout, score=score).out


def _lost_at(depth: float) -> str:
    """The measure of one depth."""
    return f"lost_at_{depth:.0%}".rstrip("%")


def _found(output: Output) -> list[float]:
    """For every needle whether all tokens of its answer come first."""
    rows, wanted = output.notes["answers"], output.notes["wanted"]
    best = output.tensor.argmax(-1).cpu()  # [P]
    right = (best[rows.clamp(min=0)] == wanted) | (wanted < 0)
    return right.all(1).float().tolist()


def _text(sample: Sample) -> str:
    if "text" in sample.args:
        return str(sample.args["text"])
    with open(sample.args["file"], encoding="utf-8") as file:
        return file.read()


def _sentence(text: list[int], place: int, mark: list[int], end: int) -> int:
    """The next end of a sentence behind `place`, within 200 tokens; `place` where there is none."""
    for at in range(place, min(place + 200, end - len(mark))):
        if text[at : at + len(mark)] == mark:
            return at + len(mark)
    return place


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows]).reshape(len(rows), width)


def _name(draw: random.Random) -> str:
    return "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(3))
