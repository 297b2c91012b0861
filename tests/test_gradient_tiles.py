"""Weight gradients with tiles smaller and larger than the problem, and with more partial sums than blocks of pixels."""

import itertools

import pytest
import torch
from helpers import DTYPES, INTERPRETED, channels_last, compare, launches, name_of, random

from triton_conv import dispatch, ops_conv
from triton_conv.defaults import default_tile
from triton_conv.kernels.depthwise_weight_gradient import DepthwiseWeightGradientTile
from triton_conv.kernels.grouped_packed_weight_gradient import GroupedPackedWeightGradientTile
from triton_conv.kernels.weight_gradient import WeightGradientTile
from triton_conv.reference import reference, tolerance
from triton_conv.target import KNOWN
from triton_conv.workloads import WEIGHT_GRADIENT, find

GENERAL, DIRECT = "weight_gradient", "depthwise_weight_gradient"
PACKED = "grouped_packed_weight_gradient"

# (kernel, input, weight, options)
LAYERS = {
    "conv1d": (GENERAL, (2, 5, 33), (7, 5, 3), {"padding": 1}),
    "conv2d": (GENERAL, (3, 19, 5, 7), (21, 19, 2, 2), {"stride": (1, 2), "padding": 1}),
    "conv3d": (GENERAL, (2, 3, 4, 3, 5), (5, 3, 2, 3, 2), {"padding": (1, 0, 1), "dilation": (1, 1, 2)}),
    "grouped": (GENERAL, (2, 66, 4, 5), (6, 33, 2, 2), {"padding": 1, "groups": 2}),
    "reflect": (GENERAL, (2, 5, 4, 5), (3, 5, 3, 2), {"padding": 2, "padding_mode": "reflect"}),
    "packed1d": (PACKED, (2, 21, 13), (14, 3, 5), {"padding": 2, "groups": 7, "stride": 2}),
    "packed2d": (
        PACKED,
        (3, 20, 5, 7),
        (10, 4, 3, 2),
        {"padding": 1, "groups": 5, "stride": (2, 1), "dilation": (1, 2)},
    ),
    "packed3d": (PACKED, (2, 6, 4, 3, 5), (12, 2, 2, 3, 2), {"padding": (1, 0, 1), "groups": 3, "stride": (2, 1, 1)}),
    # More groups than a slab holds, and the last slab not full; a dilation that shares a factor with the stride.
    "packed-slabs": (
        PACKED,
        (1, 74, 7, 6),
        (37, 2, 3, 5),
        {"padding": 2, "groups": 37, "stride": (4, 2), "dilation": (2, 1)},
    ),
    "packed-circular": (
        PACKED,
        (2, 12, 4, 5),
        (12, 3, 3, 3),
        {"padding": ((2, 1), (0, 3)), "groups": 4, "padding_mode": "circular", "stride": (2, 1)},
    ),
    # Whole rows of outputs see nothing but padding.
    "packed-padding": (PACKED, (2, 6, 3, 3), (4, 3, 2, 2), {"padding": 5, "groups": 2}),
    "depthwise1d": (DIRECT, (3, 5, 13), (5, 1, 4), {"padding": ((3, 0),), "groups": 5}),
    "depthwise2d": (DIRECT, (3, 7, 5, 7), (7, 1, 3, 2), {"stride": (1, 2), "padding": 1, "groups": 7}),
    "depthwise3d": (DIRECT, (2, 3, 4, 3, 5), (3, 1, 2, 3, 2), {"padding": 1, "groups": 3}),
    "multiplier-3": (DIRECT, (2, 5, 4, 5), (15, 1, 3, 3), {"padding": 1, "groups": 5}),
}
# The most splits are more than there are blocks of pixels: those without any add zeros.
TILES = {
    GENERAL: [
        WeightGradientTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, FLAT_N=flat, SPLITS=splits, num_warps=8)
        for (m, n, k, splits), flat in itertools.product(
            [(16, 16, 16, 1), (32, 16, 32, 2), (16, 64, 64, 8), (64, 32, 256, 1)], (False, True)
        )
    ],
    PACKED: [
        GroupedPackedWeightGradientTile(ROWS=rows, COLS=cols, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLITS=splits)
        for rows, cols, m, n, k, splits in [
            (1, 1, 16, 16, 16, 2),
            (4, 4, 32, 64, 64, 1),
            (2, 1, 32, 16, 256, 1),
            (1, 4, 64, 128, 32, 8),
        ]
    ],
    DIRECT: [
        DepthwiseWeightGradientTile(BLOCK_M=m, BLOCK_C=c, SPLITS=splits)
        for m, c, splits in [(16, 4, 2), (64, 16, 8), (128, 64, 1), (256, 2, 1)]
    ],
}


def run(name, dtype, layout, pick, monkeypatch):
    """The op with the tile `pick(plan)`, compared with the derivative of the float64 reference."""
    kernel, x_shape, w_shape, options = LAYERS[name]
    plan = ops_conv.plan_conv_weight_gradient

    def forced(*arguments):
        made = plan(*arguments)
        assert kernel in [form.name for form in dispatch.forms(made.problem, made.target)[0]]
        return dispatch.plan(made.problem, made.target, kernel, pick(dispatch.plan(made.problem, made.target, kernel)))

    monkeypatch.setattr(ops_conv, "plan_conv_weight_gradient", forced)
    x = layout(random(x_shape, dtype, "gradient"))
    w = torch.zeros(w_shape, dtype=torch.float64, device=x.device).requires_grad_()
    function = f"conv{len(w_shape) - 2}d"
    output = reference(function, {"input": x, "weight": w, **options})
    grad_output = layout(random(output.shape, dtype, "output"))
    (expected,) = torch.autograd.grad(output, w, grad_output.double())

    made = plan(x, grad_output, *flat(options, w_shape))
    launches.clear()
    found = ops_conv.conv_weight_gradient(x, grad_output, *flat(options, w_shape))
    assert dict(launches) == {kernel: 1}
    assert found.dtype == dtype
    precision = "ieee" if INTERPRETED else made.problem.precision
    compare(found, expected, tolerance(dtype, made.problem.geometry.M, precision))


def flat(options, w_shape):
    """The options of a call as the op takes them."""
    rank = len(w_shape) - 2

    def each(value):
        return [value] * rank if isinstance(value, int) else list(value)

    pairs = [(p, p) if isinstance(p, int) else p for p in each(options.get("padding", 0))]
    return (
        list(w_shape[2:]), each(options.get("stride", 1)), [p for pair in pairs for p in pair],
        each(options.get("dilation", 1)), options.get("groups", 1), options.get("padding_mode", "zeros"),
    )  # fmt: skip


FORMATS = {"contiguous": lambda tensor: tensor, "channels-last": channels_last}
EACH = ("conv2d", "grouped", "packed2d", "depthwise2d")
FORCED = [
    pytest.param(
        name, tile, layout,
        id="-".join([name, *(str(int(value)) for value in tile.sizes().values()), layout]),
        marks=pytest.mark.slow if layout == "channels-last" and name not in EACH else (),
    )
    for name, layer in LAYERS.items()
    for tile in TILES[layer[0]]
    for layout in FORMATS
]  # fmt: skip


@pytest.mark.parametrize(("name", "tile", "layout"), FORCED)
def test_forced(name, tile, layout, monkeypatch):
    run(name, torch.float32, FORMATS[layout], lambda made: tile, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", EACH)
def test_safe_tile(name, dtype, monkeypatch):
    run(name, dtype, FORMATS["contiguous"], lambda made: made.kernel.safe_tile, monkeypatch)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("name", EACH)
def test_default_tile_of_a_gpu(name, dtype, layout, monkeypatch):
    def pick(made):
        return default_tile(made.kernel.name, made.problem, KNOWN["sm_90"])

    run(name, dtype, FORMATS[layout], pick, monkeypatch)


@pytest.mark.parametrize(
    ("layer", "tile", "taken"),
    [
        # (BLOCK_M, BLOCK_N, BLOCK_K, num_warps), and bytes that Triton 3.7.1 takes.
        ("wide_groups_56", (32, 128, 64, 8), 36864),
        ("wide_groups_56", (16, 64, 128, 8), 36864),
        ("wide_groups_56", (64, 128, 16, 4), 10240),
        ("wide_groups_56", (128, 256, 32, 8), 24576),
        ("wide_groups_56", (64, 64, 64, 4), 16384),
        ("narrow_groups_4", (64, 64, 64, 4), 24576),
        ("narrow_groups_4", (128, 64, 128, 2), 49152),
    ],
)
def test_addresses_that_change_threads_are_counted(layer, tile, taken):
    problem = next(part for part in find(layer)[0].parts() if part.part == WEIGHT_GRADIENT).problem()
    m, n, k, warps = tile
    tile = WeightGradientTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=2, FLAT_N=True)
    assert tile.shared_bytes(problem, KNOWN["gfx942"]) == taken
