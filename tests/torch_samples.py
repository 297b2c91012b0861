"""torch's OpInfo database: its own samples of the six convolution functions, `OPS` by name."""

import sys
import types
import unittest
import warnings

try:
    import expecttest  # noqa: F401
except ModuleNotFoundError:
    # torch's test code imports expecttest, which torch does not install, for two things: a base class of its own test
    # cases, and whether to rewrite expected outputs. The database uses neither, so it needs the names alone.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase, stand_in.ACCEPT = unittest.TestCase, False
    sys.modules["expecttest"] = stand_in

with warnings.catch_warnings():
    # Without hypothesis it warns that torch's own fuzz tests are not the same every time.
    warnings.simplefilter("ignore", ImportWarning)
    from torch.testing._internal.common_methods_invocations import op_db

OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name.startswith("nn.functional.conv")}
