"""Published architectures under one roof: built by name, filled from the authors' checkpoints."""

from glocal.models.checkpoints import CheckpointError, infer_variant, load_published, read_state
from glocal.models.registry import Variant, create_model, list_models, register_model, variant

__all__ = [
    "CheckpointError",
    "Variant",
    "create_model",
    "infer_variant",
    "list_models",
    "load_published",
    "read_state",
    "register_model",
    "variant",
]
