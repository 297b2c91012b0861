"""The weight's copy that kernels read in place of a weight whose taps lie innermost."""

import pytest
import torch
from helpers import DEVICE, DTYPES, name_of, random

from triton_conv.kernels.pack_weight import pack_weight
from triton_conv.layout import dense_strides


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(5, 130, 3, 3), (3, 7, 11), (2, 300, 2, 3, 2), (4, 1, 1)], ids=str)
def test_packed(shape, dtype):
    weight = random(shape, dtype)
    packed = torch.empty_strided(shape, dense_strides(shape, channels_last=True), dtype=dtype, device=DEVICE)
    pack_weight(weight, packed.fill_(float("nan")))
    assert torch.equal(packed, weight)
