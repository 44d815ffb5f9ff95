"""Language models: the built-in decoder over bytes."""

from glocal.models.language.decoder import (
    VOCABULARY,
    Decoder,
    DecoderAttention,
    DecoderConfig,
    DecoderCore,
    DecoderSite,
    encode,
)
from glocal.models.language.weights import load_decoder, save_decoder

__all__ = [
    "VOCABULARY",
    "Decoder",
    "DecoderAttention",
    "DecoderConfig",
    "DecoderCore",
    "DecoderSite",
    "encode",
    "load_decoder",
    "save_decoder",
]
