"""How this library checks itself, open to code that is not part of it: exact oracles, the tolerance rule, weight rules
of golden models, parity with the authors' numbers, and base testers for patterns and layers.

Nothing here is imported at run time; the verb `glocal parity` imports it when it is called.
"""

from glocal.testing.adapter import Adapter, Run
from glocal.testing.case import Case
from glocal.testing.fill import fill_crc32, fill_sorted
from glocal.testing.layer_tester import LayerTester
from glocal.testing.oracle import Attended, dense_attention
from glocal.testing.parity import CaseResult, adapter, adapters, check
from glocal.testing.pattern_tester import Example, PatternTester
from glocal.testing.tolerance import Comparison, LowPrecision, compare, low_precision

__all__ = [
    "Adapter",
    "Attended",
    "Case",
    "CaseResult",
    "Comparison",
    "Example",
    "LayerTester",
    "LowPrecision",
    "PatternTester",
    "Run",
    "adapter",
    "adapters",
    "check",
    "compare",
    "dense_attention",
    "fill_crc32",
    "fill_sorted",
    "low_precision",
]
