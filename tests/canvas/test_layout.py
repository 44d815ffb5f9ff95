import pytest
import torch

from glocal.canvas import Canvas, Layout, Part
from glocal.patterns import Dense


def test_most_specific_policy_wins():
    canvas = Canvas((2, 2), before=1, after=1)
    layout = Layout(canvas, canvas, {("*", "*"): "none", ("grid", "*"): "all", ("*", "after"): "causal"})
    assert layout.rule("grid", "after") == "all"
    assert layout.rule("before", "after") == "causal"
    assert layout.rule("before", "grid") == "none"


def test_causal_policy_compares_linear_indices():
    canvas = Canvas([Part("text", 4)])
    mask = Dense().mask(Layout(canvas, canvas, {("text", "text"): "causal"}))[0]
    assert torch.equal(mask, torch.ones(4, 4).tril().bool())


def test_different_sides():
    layout = Layout(Canvas([Part("image", (2, 3))]), Canvas([Part("image", (2, 3)), Part("extra", 2)]))
    assert (layout.nq, layout.nk) == (6, 8)
    assert layout.inside(0, 0) and not layout.inside(0, 1)
    assert Dense().mask(layout).shape == (1, 6, 8)


def test_slices_place_tokens():
    canvas = Canvas((10,))
    layout = Layout(canvas, canvas, q_start=4, q_tokens=3, kv_start=2)
    assert (layout.nq, layout.nk) == (3, 8)
    assert layout.q_coords().index.tolist() == [4, 5, 6]
    assert layout.kv_coords(torch.tensor([0])).index.tolist() == [2]


def test_segments_from_lengths_and_documents():
    canvas = Canvas((3,), after=2)
    layout = Layout(canvas, canvas, lengths={"after": torch.tensor([1, 2])})
    found = layout.segments(2, "cpu")
    assert found is not None
    assert found[0].tolist() == [[0, 0, 0, 0, -1], [0, 0, 0, 0, 0]]
    documents = torch.tensor([[0, 0, 1, 1, -1]])
    both = Layout(canvas, canvas, lengths={"after": torch.tensor([1])}, documents=documents).segments(1, "cpu")
    assert both is not None
    assert both[1].tolist() == [[0, 0, 1, 1, -1]]
    assert Layout.of(canvas).segments(1, "cpu") is None


def test_lengths_do_not_enter_the_key():
    canvas = Canvas((3,), after=2)
    assert Layout(canvas, canvas, lengths={"after": torch.tensor([1])}).key == Layout.of(canvas).key
    assert Layout(canvas, canvas, {("after", "*"): "none"}).key != Layout.of(canvas).key


def test_errors():
    canvas = Canvas((3,), after=2)
    with pytest.raises(ValueError, match=r"policy\[\('grid', 'after'\)\]='some'; legal: 'all', 'none', 'causal'"):
        Layout(canvas, canvas, {("grid", "after"): "some"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"canvas=\(8, 8\) is a tuple; legal: a Canvas"):
        Layout.of((8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no part 'text'"):
        Layout(canvas, canvas, {("text", "*"): "none"})
    with pytest.raises(ValueError, match="q_start=4 with q_tokens=2 leaves"):
        Layout(canvas, canvas, q_start=4, q_tokens=2)
    with pytest.raises(ValueError, match=r"documents of shape \(1, 3\) must be \[1, 5\]"):
        Layout(canvas, canvas, documents=torch.zeros(1, 3)).segments(1, "cpu")


def test_arguments_of_another_kind_are_told_what_is_legal() -> None:
    canvas = Canvas((4, 6))
    with pytest.raises(TypeError, match=r"Layout: q=\(4, 6\) is a tuple; legal: a Canvas"):
        Layout((4, 6), canvas)  # type: ignore[arg-type]
    for lengths in (torch.tensor([3]), 3, {"grid": [20]}):
        with pytest.raises(TypeError, match=r"Layout: lengths=.*; legal: names of parts with int tensors \[batch\]"):
            Layout(canvas, canvas, lengths=lengths)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Layout: documents are no tensors; legal: int \[batch, tokens\]"):
        Layout(canvas, canvas, documents=[0] * 24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Layout: lengths\['grid'\] has 3 entries; legal: 2, one a sample, or 1"):
        Layout(canvas, canvas, lengths={"grid": torch.tensor([1, 2, 3])}).segments(2, "cpu")
