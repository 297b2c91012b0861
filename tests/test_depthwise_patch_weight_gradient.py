"""The weight gradient in patches: odd patches and filters, operands in every layout, splits, refusals."""

import pytest
import torch
from helpers import DEVICE, DTYPES, channels_last, chosen_tile, compare, launches, name_of, random
from test_depthwise_patch import framed
from test_gradient_tiles import flat

from triton_conv import dispatch, ops, ops_conv
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels.depthwise_patch_weight_gradient import DepthwisePatchWeightGradientTile
from triton_conv.reference import reference, tolerance
from triton_conv.target import KNOWN

NAME = "depthwise_patch_weight_gradient"

# (input, filter, options)
LAYERS = {
    "1d": ((3, 5, 13), (4,), {"padding": ((3, 0),)}),
    "1d-strided": ((2, 6, 19), (5,), {"padding": ((1, 2),), "stride": 3, "dilation": 2}),
    "3x3": ((2, 9, 7, 11), (3, 3), {"padding": 1}),
    "7x7": ((1, 6, 9, 8), (7, 7), {"padding": 3}),
    "1x1": ((2, 3, 5, 4), (1, 1), {}),
    "5x1": ((2, 4, 8, 3), (5, 1), {"padding": ((1, 4), (0, 0))}),
    "stride-over-kernel": ((2, 3, 13, 14), (2, 2), {"stride": (5, 3)}),
    "stride-and-dilation": ((2, 3, 12, 13), (3, 3), {"stride": (3, 2), "dilation": (1, 3), "padding": 2}),
    "dilation-past-the-border": ((1, 3, 5, 4), (3, 3), {"dilation": 6, "padding": 6}),
    "3d": (
        (2, 5, 5, 4, 6), (3, 2, 3),
        {"stride": (2, 1, 1), "dilation": (1, 2, 1), "padding": ((2, 0), (1, 1), (0, 2))},
    ),
}  # fmt: skip
# The most splits are more than there are blocks of patches: those without any write zeros.
TILES = {
    "rows": DepthwisePatchWeightGradientTile(ROWS=3, COLS=4, LANES=1, BLOCK_P=32, BLOCK_C=16, SPLITS=2),
    "lanes": DepthwisePatchWeightGradientTile(ROWS=1, COLS=5, LANES=8, BLOCK_P=64, BLOCK_C=4, SPLITS=1),
    "rows-and-lanes": DepthwisePatchWeightGradientTile(ROWS=2, COLS=7, LANES=2, BLOCK_P=32, BLOCK_C=8, SPLITS=3),
    "one-patch": DepthwisePatchWeightGradientTile(ROWS=4, COLS=14, LANES=4, BLOCK_P=4, BLOCK_C=16, SPLITS=12),
    "pixels": DepthwisePatchWeightGradientTile(ROWS=1, COLS=1, LANES=1, BLOCK_P=256, BLOCK_C=2, SPLITS=2),
}


def run(layer, dtype, tile, x_layout=channels_last, y_layout=channels_last, name=NAME):
    """The op with a forced tile, compared with the derivative of the float64 reference.

    A layer is (input, filter, options); it is depthwise if the filter has no channels.
    """
    x_shape, filter_size, options = LAYERS[layer] if isinstance(layer, str) else layer
    depthwise = len(filter_size) == len(x_shape) - 2
    w_shape = (x_shape[1], 1, *filter_size) if depthwise else filter_size
    options = options | {"groups": x_shape[1] // w_shape[1]}
    x = x_layout(random(x_shape, dtype, "gradient"))
    w = torch.zeros(w_shape, dtype=torch.float64, device=x.device).requires_grad_()
    output = reference(f"conv{x.dim() - 2}d", {"input": x, "weight": w, **options})
    grad_output = y_layout(random(output.shape, dtype, "output"))
    (expected,) = torch.autograd.grad(output, w, grad_output.double())

    made = ops_conv.plan_conv_weight_gradient(x, grad_output, *flat(options, w_shape))
    made = dispatch.plan(made.problem, made.target, name, tile(made) if callable(tile) else tile)
    launches.clear()
    found = ops.run_partial(made, x, grad_output)
    assert dict(launches) == ({name: 1} if made.grid else {})
    assert found.dtype == dtype
    compare(found, expected, tolerance(dtype, made.problem.geometry.M, "ieee"))


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        pytest.param(layer, tile, marks=() if (i + j) % 2 else pytest.mark.slow)
        for i, layer in enumerate(LAYERS)
        for j, tile in enumerate(TILES)
    ],
)
def test_odd_patches(layer, tile):
    run(layer, torch.float32, TILES[tile])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tile", ["safe", "sm_90"])
@pytest.mark.parametrize("channels", [9, 24])
def test_chosen_tiles(channels, tile, dtype):
    def pick(made):
        return chosen_tile(NAME, made.problem, tile)

    run(((2, channels, 5, 7), (3, 3), {"padding": 1}), dtype, pick)


@pytest.mark.parametrize("y_layout", [channels_last, framed, torch.clone], ids=lambda f: f.__name__)
@pytest.mark.parametrize("x_layout", [channels_last, framed], ids=lambda f: f.__name__)
def test_layouts(x_layout, y_layout):
    run("3x3", torch.bfloat16, TILES["rows-and-lanes"], x_layout, y_layout)


def plan_of(x_shape, w_shape, layout=channels_last, **options):
    options = {"groups": x_shape[1]} | options
    x = layout(torch.empty(x_shape, device=DEVICE))
    w = torch.empty(w_shape, dtype=torch.float64, device=DEVICE)
    y = reference(f"conv{x.dim() - 2}d", {"input": x, "weight": w, **options})
    return ops_conv.plan_conv_weight_gradient(x, layout(y.float()), *flat(options, w_shape))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: plan_of((1, 4, 5, 5), (4, 1, 3, 3), layout=torch.clone), "not contiguous"),
        (lambda: plan_of((1, 4, 5, 5), (8, 1, 3, 3)), "2 output channels"),
        (lambda: plan_of((1, 4, 5, 5), (4, 1, 3, 3), padding=1, padding_mode="reflect"), "border is reflect"),
        (lambda: plan_of((1, 4, 40), (4, 1, 33)), "33 taps of a filter row"),
    ],
)
def test_refused_problems(made, message):
    made = made()
    assert made.kernel.name != "depthwise_patch_weight_gradient"
    assert any(message in note for note in made.notes)
    with pytest.raises(PlanError, match=message):
        dispatch.plan(made.problem, made.target, NAME)


def test_refused_tiles():
    problem = plan_of((1, 64, 9, 9), (64, 1, 7, 7), padding=3).problem
    for tile, message in (
        (DepthwisePatchWeightGradientTile(LANES=8, BLOCK_P=4), "more than 4 lanes"),
        (DepthwisePatchWeightGradientTile(ROWS=7, BLOCK_P=16), "registers a thread for sums"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(problem, KNOWN["sm_90"], NAME, tile)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("kernel", [(4,), (31,), (3, 3), (5, 5), (7, 7), (31, 31), (3, 3, 3), (7, 7, 7)], ids=str)
def test_defaults_fit(kernel, target, dtype):
    for channels in (3, 24, 64, 192):
        x = channels_last(torch.empty(2, channels, *[32] * len(kernel), device="meta", dtype=getattr(torch, dtype)))
        for stride in (1, 2):
            options = {"groups": channels, "stride": stride, "padding": kernel[0] // 2}
            size = [(32 + 2 * (k // 2) - k) // stride + 1 for k in kernel]
            y = channels_last(torch.empty(2, channels, *size, device="meta", dtype=x.dtype))
            problem = ops_conv.plan_conv_weight_gradient(x, y, *flat(options, (channels, 1, *kernel))).problem
            assert default_tile(NAME, problem, target).unfit(problem, target) is None
