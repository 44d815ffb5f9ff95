"""Parts of `bench/generators.py`: the models, the cases, the check, the clocks and the rows."""
