"""MODEL of the verbs: folders of transformers and diffusers, factories, and what none of them is."""

from __future__ import annotations

from pathlib import Path

import pytest

from glocal.cli._models import load_subject
from glocal.models.language import Decoder


def test_a_factory_may_bring_its_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(
        "def load():\n    return 'model', 'objective'\ndef bare():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    subject = load_subject("own_factory:load")
    assert (subject.model, subject.objective) == ("model", "objective")
    with pytest.raises(ValueError, match=r"is a int: it is not known how to run it; legal: .*\(model, objective\)"):
        load_subject("own_factory:bare")


def test_a_folder_of_transformers_is_a_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=8, **sizes, num_key_value_heads=1, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "<s>": 3}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path)
    subject = load_subject(str(tmp_path))
    assert type(subject.model).__name__ == "LlamaForCausalLM" and subject.objective.name == "next_token"
    assert list(subject.objective.encode("a b a")) == [0, 1, 0] and subject.objective.begin == (3,)


def test_a_folder_of_diffusers_is_a_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4, **blocks
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    subject = load_subject(str(tmp_path))
    assert type(subject.model).__name__ == "DDPMPipeline" and subject.objective.name == "latents"


def test_the_language_demonstration_is_judged_by_what_it_finds() -> None:
    subject = load_subject("demo-language")
    assert isinstance(subject.model, Decoder) and subject.objective.name == "next_token"


def test_a_hub_that_does_not_answer_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def silent(*_: object) -> bool:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(hub, "file_exists", silent)
    with pytest.raises(ValueError, match="MODEL 'some/model' is no folder here.*no route to host; without a network"):
        load_subject("some/model")
