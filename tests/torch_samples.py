"""torch's OpInfo database: its own samples of the six convolution functions, `OPS` by name."""

import importlib.util
import sys
import types
import unittest
import warnings

import torch

if importlib.util.find_spec("expecttest") is None:
    # torch's test code imports expecttest, which torch does not install, for two things: a base class of its own test
    # cases, and whether to rewrite expected outputs. The database uses neither, so it needs the names alone.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase, stand_in.ACCEPT = unittest.TestCase, False
    sys.modules["expecttest"] = stand_in

with warnings.catch_warnings():
    # Without hypothesis it warns that torch's own fuzz tests are not the same every time.
    warnings.simplefilter("ignore", ImportWarning)
    from torch.testing._internal.common_methods_invocations import op_db

# Importing torch's test code forbids setting flags outside of their context managers; other tests set them.
torch.backends.__allow_nonbracketed_mutation_flag = True

OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name.startswith("nn.functional.conv")}
