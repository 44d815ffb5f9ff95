"""Adapters for the transformers of diffusers. None of these files imports diffusers: the model in hand is enough."""
