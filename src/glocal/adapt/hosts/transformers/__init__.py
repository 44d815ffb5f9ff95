"""Host adapters of transformers."""
