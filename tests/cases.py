"""The curated cases: small calls, each there for a reason that its group names."""

import itertools

from helpers import Case, channels_last, expanded, permuted, shifted, sliced

GEMM, PACKED, DEPTHWISE, PHASE = "implicit_gemm", "grouped_packed", "depthwise", "transposed_phase"
BANDED = "depthwise_banded"
PATCH = "depthwise_patch"


def case(id, kernel, function, input, weight, bias=True, x=None, w=None, **arguments):
    return Case(id, kernel, function, input, weight, arguments, bias, x, w)


SMOKE = [
    case("conv1d", GEMM, "conv1d", (2, 6, 11), (5, 6, 3)),
    case("conv2d", GEMM, "conv2d", (2, 6, 7, 6), (5, 6, 3, 2), padding=1),
    case("conv3d", GEMM, "conv3d", (2, 3, 4, 5, 4), (5, 3, 2, 3, 2), padding=1),
    case("grouped", PACKED, "conv2d", (2, 12, 6, 5), (6, 4, 3, 3), groups=3, padding=1),
    case("depthwise", DEPTHWISE, "conv2d", (2, 5, 6, 7), (5, 1, 3, 3), groups=5, padding=1),
    case("transposed", PHASE, "conv_transpose2d", (2, 6, 4, 5), (6, 5, 3, 3), stride=2, padding=1),
    case("no-bias", GEMM, "conv2d", (2, 6, 5, 5), (5, 6, 3, 3), bias=False),
    case("1x1", GEMM, "conv2d", (2, 17, 5, 5), (9, 17, 1, 1)),
    case("output-of-one-pixel", GEMM, "conv2d", (1, 3, 3, 3), (4, 3, 3, 3)),
    case("one-of-everything", DEPTHWISE, "conv2d", (1, 1, 1, 1), (1, 1, 1, 1)),
]

# Sizes one below, at and above a tile's, and sizes that share no factor with any.
ODD_SIZES = [
    *(case(f"pixels-{n}", GEMM, "conv1d", (1, 4, n), (4, 4, 1)) for n in (15, 16, 17, 31, 33, 127, 129)),
    *(case(f"channels-{c}", GEMM, "conv2d", (1, c, 4, 3), (c, c, 2, 2)) for c in (2, 13, 15, 16, 17, 31, 33, 65)),
    case("primes", GEMM, "conv3d", (3, 7, 5, 3, 7), (11, 7, 3, 2, 5), padding=(1, 0, 2)),
    case("wide-and-low", GEMM, "conv2d", (1, 3, 1, 37), (2, 3, 1, 5)),
    case("more-channels-than-steps", GEMM, "conv1d", (2, 130, 5), (3, 130, 3)),
]

GROUPS = [
    *(
        case(f"{ci}-to-{co}-by-{g}", PACKED, "conv2d", (2, g * ci, 5, 4), (g * co, ci, 3, 3), groups=g, padding=1)
        for ci, co, g in ((2, 2, 3), (3, 3, 7), (4, 8, 5), (8, 4, 5), (16, 16, 3), (17, 17, 2), (32, 32, 2), (5, 1, 4))
    ),
    case("wide", GEMM, "conv2d", (1, 66, 4, 4), (68, 33, 2, 2), groups=2),
    case("rank-1", PACKED, "conv1d", (2, 12, 9), (8, 3, 3), groups=4),
    case("rank-3", PACKED, "conv3d", (1, 8, 3, 4, 3), (8, 4, 2, 2, 2), groups=2, padding=1),
    case("strided-dilated", PACKED, "conv2d", (2, 8, 9, 8), (12, 2, 3, 2), groups=4, stride=2, dilation=2),
    case("more-groups-than-a-slab", PACKED, "conv2d", (1, 74, 3, 4), (74, 2, 2, 2), groups=37),
]

DEPTHWISE_MULTIPLIERS = [
    *(
        case(f"rank-{r}-times-{m}", DEPTHWISE, f"conv{r}d", (2, 5, *[6] * r), (5 * m, 1, *[3] * r), groups=5, padding=1)
        for r, m in itertools.product((1, 2, 3), (1, 2, 3))
    ),
    case("many-channels", DEPTHWISE, "conv2d", (1, 33, 4, 3), (66, 1, 3, 3), groups=33, stride=2, padding=1),
    case("one-channel-few-outputs", DEPTHWISE, "conv2d", (2, 1, 6, 6), (7, 1, 3, 3)),
    case("one-channel-many-outputs", GEMM, "conv2d", (2, 1, 6, 6), (8, 1, 3, 3)),
    case("row-of-8-taps", DEPTHWISE, "conv1d", (1, 3, 20), (3, 1, 8), groups=3),
    case("row-of-9-taps", DEPTHWISE, "conv1d", (1, 3, 20), (3, 1, 9), groups=3),
    case("row-of-40-taps", DEPTHWISE, "conv1d", (2, 3, 64), (3, 1, 40), groups=3, padding=20),
    case("3x33", DEPTHWISE, "conv2d", (1, 2, 5, 6), (2, 1, 3, 33), groups=2, padding=(1, 16)),
]

DILATION_AND_STRIDE = [
    case("dilation-per-axis", GEMM, "conv2d", (2, 4, 12, 11), (3, 4, 3, 2), dilation=(2, 5), padding=(2, 1)),
    case("dilation-past-the-border", GEMM, "conv2d", (1, 3, 4, 4), (2, 3, 3, 3), dilation=7, padding=7),
    case("stride-per-axis", GEMM, "conv2d", (2, 4, 9, 10), (3, 4, 3, 2), stride=(3, 1), padding=(1, 0)),
    case("stride-over-kernel", GEMM, "conv2d", (1, 4, 11, 12), (3, 4, 2, 2), stride=5),
    case("both-rank-3", GEMM, "conv3d", (1, 2, 7, 6, 8), (3, 2, 3, 2, 2), stride=(2, 1, 3), dilation=(1, 3, 2)),
    case("long-kernel", GEMM, "conv1d", (2, 3, 50), (4, 3, 40), padding=7),
    case("padding-over-kernel", GEMM, "conv2d", (1, 2, 3, 3), (2, 2, 2, 2), padding=5),
]

PADDING = [
    case("pair-before", GEMM, "conv1d", (2, 3, 9), (4, 3, 4), padding=((3, 0),)),
    case("pair-after", GEMM, "conv1d", (2, 3, 9), (4, 3, 4), padding=((0, 3),)),
    case("pairs", GEMM, "conv2d", (2, 3, 5, 6), (4, 3, 3, 3), padding=((2, 0), (1, 3)), stride=2),
    case("pairs-depthwise", DEPTHWISE, "conv2d", (2, 3, 5, 6), (3, 1, 3, 3), padding=((0, 2), (3, 1)), groups=3),
    case("pairs-grouped", PACKED, "conv2d", (2, 4, 5, 6), (4, 2, 3, 3), padding=((0, 2), (3, 1)), groups=2),
    case("pairs-rank-3", GEMM, "conv3d", (1, 2, 3, 4, 3), (3, 2, 2, 3, 2), padding=((1, 0), (0, 2), (2, 1))),
    case("per-axis", GEMM, "conv2d", (2, 3, 5, 6), (4, 3, 3, 3), padding=(0, 2)),
    case("valid", GEMM, "conv2d", (2, 3, 5, 6), (4, 3, 3, 3), padding="valid", stride=2),
    case("same-odd", GEMM, "conv2d", (2, 3, 5, 6), (4, 3, 3, 5), padding="same"),
    case("same-even", GEMM, "conv2d", (2, 3, 5, 6), (4, 3, 2, 4), padding="same", dilation=(3, 1)),
    case("same-reflect", GEMM, "conv1d", (2, 3, 9), (4, 3, 4), padding="same", padding_mode="reflect"),
]

_MODE_LAYERS = (
    (GEMM, "conv1d", (2, 3, 5), (4, 3, 3), {"padding": 2}),
    (GEMM, "conv2d", (2, 3, 5, 4), (4, 3, 3, 3), {"padding": ((2, 1), (0, 3))}),
    (GEMM, "conv3d", (1, 2, 3, 4, 3), (3, 2, 2, 3, 2), {"padding": (1, 2, 2)}),
    (GEMM, "conv2d", (1, 33, 4, 4), (4, 33, 3, 3), {"padding": 1, "stride": 2}),
    (PACKED, "conv2d", (2, 6, 5, 4), (6, 2, 3, 3), {"padding": (2, 1), "dilation": (2, 1), "groups": 3}),
    (DEPTHWISE, "conv1d", (2, 3, 5), (3, 1, 3), {"padding": 2, "groups": 3}),
    (DEPTHWISE, "conv2d", (2, 3, 5, 4), (6, 1, 3, 3), {"padding": (1, 2), "groups": 3}),
    (DEPTHWISE, "conv3d", (1, 2, 3, 4, 3), (2, 1, 2, 3, 2), {"padding": (1, 2, 2), "groups": 2}),
)
PADDING_MODES = [
    case(f"{mode}-{kernel}-{i}", kernel, function, x, w, **arguments, padding_mode=mode)
    for mode in ("reflect", "replicate", "circular")
    for i, (kernel, function, x, w, arguments) in enumerate(_MODE_LAYERS)
] + [
    # The whole input once more on each side is the most that a circular border takes; replicate has no limit.
    case("circular-full", GEMM, "conv1d", (1, 2, 4), (3, 2, 3), padding=4, padding_mode="circular"),
    case("reflect-full", GEMM, "conv1d", (1, 2, 4), (3, 2, 3), padding=3, padding_mode="reflect"),
    case("replicate-beyond", GEMM, "conv1d", (1, 2, 4), (3, 2, 3), padding=9, padding_mode="replicate"),
    case("circular-in-one-axis", GEMM, "conv2d", (1, 2, 1, 5), (3, 2, 1, 3), padding=(0, 1), padding_mode="circular"),
]

ACTIVATIONS = [
    case(f"{activation}-{kernel}", kernel, function, x, w, **arguments, activation=activation)
    for activation in ("relu", "relu6", "gelu", "silu")
    for kernel, function, x, w, arguments in (
        (GEMM, "conv2d", (2, 3, 5, 4), (4, 3, 3, 3), {}),
        (PACKED, "conv2d", (2, 6, 5, 4), (6, 2, 3, 3), {"groups": 3}),
        (DEPTHWISE, "conv2d", (2, 3, 5, 4), (3, 1, 3, 3), {"groups": 3}),
        (PHASE, "conv_transpose2d", (2, 3, 4, 4), (3, 4, 3, 3), {"stride": 2}),
    )
]

EMPTY = [
    case("batch", GEMM, "conv2d", (0, 3, 5, 5), (4, 3, 3, 3)),
    case("batch-grouped", PACKED, "conv2d", (0, 4, 5, 5), (4, 2, 3, 3), groups=2),
    case("batch-depthwise", DEPTHWISE, "conv1d", (0, 4, 5), (4, 1, 3), groups=4),
    case("batch-transposed", PHASE, "conv_transpose2d", (0, 3, 5, 5), (3, 4, 3, 3), stride=2),
    case("batch-rank-3", GEMM, "conv3d", (0, 3, 5, 5, 5), (4, 3, 3, 3, 3)),
]

TRANSPOSED = [
    case("stride-over-kernel", PHASE, "conv_transpose2d", (2, 3, 4, 3), (3, 4, 2, 2), stride=(5, 3)),
    case("stride-1", PHASE, "conv_transpose2d", (2, 3, 4, 5), (3, 4, 3, 2), padding=(1, 0)),
    case("kernel-1-stride-3", PHASE, "conv_transpose1d", (2, 3, 4), (3, 4, 1), stride=3),
    case("dilation-shares-a-factor", PHASE, "conv_transpose1d", (2, 3, 6), (3, 4, 3), stride=4, dilation=6),
    case("dilation-equals-stride", PHASE, "conv_transpose1d", (2, 3, 6), (3, 4, 4), stride=2, dilation=2),
    case("dilation-coprime", PHASE, "conv_transpose2d", (1, 3, 4, 3), (3, 2, 3, 3), stride=3, dilation=(2, 5)),
    case("output-padding", PHASE, "conv_transpose2d", (2, 3, 4, 3), (3, 4, 3, 3), stride=3, output_padding=(2, 1)),
    case(
        "output-padding-under-dilation",
        PHASE,
        "conv_transpose1d",
        (2, 3, 4),
        (3, 4, 3),
        stride=2,
        dilation=4,
        output_padding=3,
    ),
    case("groups-packed", PHASE, "conv_transpose2d", (2, 12, 3, 4), (12, 2, 3, 3), stride=2, groups=6),
    case("groups-depthwise", PHASE, "conv_transpose2d", (2, 7, 3, 4), (7, 1, 4, 4), stride=2, groups=7, padding=1),
    case("groups-wide", PHASE, "conv_transpose2d", (1, 40, 3, 3), (40, 17, 2, 2), stride=2, groups=2),
    case("groups-partly-filled-slab", PHASE, "conv_transpose1d", (1, 35, 5), (35, 3, 3), stride=2, groups=7),
    case("rank-3", PHASE, "conv_transpose3d", (1, 3, 2, 3, 2), (3, 4, 3, 2, 3), stride=(2, 3, 1), padding=1),
    case("padding-cuts-phases", PHASE, "conv_transpose1d", (2, 3, 2), (3, 4, 8), stride=8, padding=6),
    case("output-smaller-than-stride", PHASE, "conv_transpose1d", (2, 3, 1), (3, 4, 3), stride=7),
    case("no-bias", PHASE, "conv_transpose2d", (2, 3, 4, 3), (3, 4, 2, 2), stride=3, bias=False),
]

# (name, layout of the input, layout of the weight)
LAYOUTS = (
    ("sliced", sliced, None),
    ("sliced-weight", None, sliced),
    ("permuted", permuted, permuted),
    ("expanded", expanded, None),
    ("expanded-weight", None, expanded),
    ("unaligned", shifted, shifted),
    ("channels-last-input", channels_last, None),
    ("channels-last-weight", None, channels_last),
    ("channels-last", channels_last, channels_last),
    ("channels-last-sliced", lambda x: sliced(channels_last(x)), sliced),
)
_LAYOUT_LAYERS = (
    case("conv1d", GEMM, "conv1d", (3, 6, 9), (5, 6, 3)),
    case("conv2d", GEMM, "conv2d", (3, 20, 5, 4), (5, 20, 3, 3), padding=1),
    case("conv3d", GEMM, "conv3d", (2, 3, 3, 4, 3), (5, 3, 2, 2, 2), padding=1),
    case("grouped", PACKED, "conv2d", (3, 12, 5, 4), (12, 4, 3, 3), groups=3, padding=1),
    case("depthwise", DEPTHWISE, "conv2d", (3, 6, 5, 4), (12, 1, 3, 3), groups=6, padding=1),
    case("depthwise3d", DEPTHWISE, "conv3d", (2, 4, 3, 4, 3), (4, 1, 2, 2, 2), groups=4),
    case("transposed", PHASE, "conv_transpose2d", (3, 6, 3, 4), (6, 5, 3, 3), stride=2, padding=1),
    case("transposed-grouped", PHASE, "conv_transpose2d", (3, 6, 3, 4), (6, 2, 3, 3), stride=2, groups=3),
)
STRIDED_VIEWS = [
    case(f"{layer.id}-{name}", layer.kernel, layer.function, layer.input, layer.weight, x=x, w=w, **layer.arguments)
    for layer in _LAYOUT_LAYERS
    for name, x, w in LAYOUTS
]

# Layers of known networks with fewer channels and pixels: (c_in, c_out, size) shrunk, the rest as published.
NETWORKS = [
    case("mobilenet-dw-s2", DEPTHWISE, "conv2d", (1, 24, 14, 14), (24, 1, 3, 3), groups=24, stride=2, padding=1),
    case("convnext-7x7", DEPTHWISE, "conv2d", (1, 6, 7, 7), (6, 1, 7, 7), groups=6, padding=3),
    case("resnext-32x4", PACKED, "conv2d", (1, 32, 7, 7), (32, 4, 3, 3), groups=8, padding=1),
    case("regnet-width-8", PACKED, "conv2d", (1, 24, 7, 7), (24, 8, 3, 3), groups=3, padding=1),
    case("regnet-width-56", GEMM, "conv2d", (1, 112, 4, 4), (112, 56, 3, 3), groups=2, padding=1),
    case("deeplab-dilation-12", GEMM, "conv2d", (1, 16, 17, 17), (8, 16, 3, 3), dilation=12, padding=12),
    case("hifi-gan-k16-s8", PHASE, "conv_transpose1d", (1, 32, 9), (32, 16, 16), stride=8, padding=4),
    case("dcgan-k4-s2", PHASE, "conv_transpose2d", (2, 16, 4, 4), (16, 8, 4, 4), stride=2, padding=1, bias=False),
    case("unet-k2-s2", PHASE, "conv_transpose2d", (1, 16, 5, 5), (16, 8, 2, 2), stride=2),
    case("x3d-3x3x3-depthwise", DEPTHWISE, "conv3d", (1, 9, 4, 5, 5), (9, 1, 3, 3, 3), groups=9, padding=1),
    case("causal-k4", DEPTHWISE, "conv1d", (2, 16, 20), (16, 1, 4), groups=16, padding=((3, 0),), activation="silu"),
    case("wavenet-dilation-8", GEMM, "conv1d", (1, 8, 30), (16, 8, 2), dilation=8, padding=((8, 0),)),
    case("vit-patches", GEMM, "conv2d", (1, 3, 16, 16), (24, 3, 8, 8), stride=8),
    case("stem-7x7-s2", GEMM, "conv2d", (1, 3, 20, 20), (16, 3, 7, 7), stride=2, padding=3, bias=False),
]

CASES = {
    "smoke": SMOKE,
    "odd-sizes": ODD_SIZES,
    "groups": GROUPS,
    "depthwise": DEPTHWISE_MULTIPLIERS,
    "dilation-stride": DILATION_AND_STRIDE,
    "padding": PADDING,
    "padding-modes": PADDING_MODES,
    "activations": ACTIVATIONS,
    "empty": EMPTY,
    "transposed": TRANSPOSED,
    "strided-views": STRIDED_VIEWS,
    "networks": NETWORKS,
}
