"""Recipes in the words of other libraries: what those cannot say is said, or refused with the rule in the way."""

from glocal.advise.export.modelopt import from_modelopt, to_modelopt
from glocal.advise.export.vllm_omni import sparse_attention, to_vllm_omni

__all__ = ["from_modelopt", "sparse_attention", "to_modelopt", "to_vllm_omni"]
