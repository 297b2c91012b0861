"""Every kernel with tiles far smaller and far larger than the problem: the tile changes the speed, not the result."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BANDED, CASES, DEPTHWISE, GEMM, PACKED, PATCH, PHASE, case
from helpers import DEVICE, DTYPES, channels_last, compare, launches, limit, name_of, random
from test_deformable import tensors as deformable_tensors

import triton_conv as tc
from triton_conv import dispatch
from triton_conv.defaults import default_tile
from triton_conv.errors import PlanError
from triton_conv.kernels import KERNELS
from triton_conv.kernels.deformable import DeformableTile
from triton_conv.kernels.depthwise import DepthwiseTile
from triton_conv.kernels.depthwise_banded import DepthwiseBandedTile
from triton_conv.kernels.depthwise_patch import DepthwisePatchTile
from triton_conv.kernels.grouped_packed import GroupedPackedTile
from triton_conv.kernels.implicit_gemm import ImplicitGemmTile
from triton_conv.kernels.transposed_phase import TransposedPhaseTile
from triton_conv.reference import reference
from triton_conv.target import INTERPRETER, KNOWN
from triton_conv.workloads import FLAGSHIPS


def run(function, arguments, kernel, tile):
    """The result of a forced kernel with a forced tile, compared with the reference."""
    made = tc.plan(getattr(tc, function), **arguments)
    made = dispatch.plan(made.problem, made.target, kernel, tile)
    assert (made.tile, made.source) == (tile, "forced")
    names = {"x_ptr": "input", "w_ptr": "weight", "b_ptr": "bias", "offset_ptr": "offset", "mask_ptr": "mask"}
    arguments_read = arguments | {"weight": made.arranged(arguments["weight"])}
    operands = [arguments_read.get(names[pointer]) for pointer in made.kernel.pointers[:-1]]
    output = torch.empty_strided(made.out_shape, made.out_strides, dtype=operands[0].dtype, device=DEVICE)
    output.fill_(float("nan"))
    made.launch(*operands, output)
    assert dict(launches) == {kernel: 1}
    compare(output, reference(function, arguments), limit(made, output))


LAYERS = {
    GEMM: [
        case("conv1d", GEMM, "conv1d", (3, 5, 13), (7, 5, 3), padding=1),
        case("conv2d", GEMM, "conv2d", (3, 19, 5, 7), (21, 19, 3, 2), padding=1, stride=(1, 2)),
        case("conv3d", GEMM, "conv3d", (2, 3, 4, 3, 5), (5, 3, 2, 3, 2), padding=(1, 0, 1), dilation=(1, 1, 2)),
        case("reflect", GEMM, "conv2d", (2, 5, 4, 5), (3, 5, 3, 3), padding=2, padding_mode="reflect"),
        case("grouped", GEMM, "conv2d", (2, 15, 4, 5), (9, 5, 3, 2), groups=3, padding=1),
        case("depthwise", GEMM, "conv2d", (2, 5, 4, 5), (10, 1, 3, 3), groups=5, padding=1, activation="relu"),
    ],
    PACKED: [
        case("conv1d", PACKED, "conv1d", (3, 21, 13), (14, 3, 3), groups=7, padding=1),
        case("conv2d", PACKED, "conv2d", (3, 20, 5, 7), (10, 4, 3, 2), groups=5, padding=1, stride=(1, 2)),
        case("conv3d", PACKED, "conv3d", (2, 6, 4, 3, 5), (12, 2, 2, 3, 2), groups=3, padding=1),
        case("depthwise", PACKED, "conv2d", (2, 19, 4, 5), (19, 1, 3, 3), groups=19, padding=1),
        case("circular", PACKED, "conv2d", (2, 12, 4, 5), (12, 3, 3, 3), groups=4, padding=2, padding_mode="circular"),
    ],
    DEPTHWISE: [
        case("conv1d", DEPTHWISE, "conv1d", (3, 5, 13), (5, 1, 4), groups=5, padding=((3, 0),)),
        case("conv2d", DEPTHWISE, "conv2d", (3, 7, 5, 7), (7, 1, 3, 2), groups=7, padding=1, stride=(1, 2)),
        case("conv3d", DEPTHWISE, "conv3d", (2, 3, 4, 3, 5), (3, 1, 2, 3, 2), groups=3, padding=1),
        case("multiplier-3", DEPTHWISE, "conv2d", (2, 5, 4, 5), (15, 1, 3, 3), groups=5, padding=1, activation="silu"),
        case("border", DEPTHWISE, "conv2d", (2, 5, 4, 5), (5, 1, 3, 3), groups=5, padding=2, padding_mode="replicate"),
    ],
    BANDED: [
        case("conv1d", BANDED, "conv1d", (3, 3, 37), (3, 1, 4), groups=3, padding=((3, 0),)),
        case("conv2d", BANDED, "conv2d", (3, 3, 6, 24), (3, 1, 3, 5), groups=3, padding=((1, 2), (2, 1)), stride=2),
        case("conv3d", BANDED, "conv3d", (2, 2, 4, 3, 16), (2, 1, 2, 3, 3), groups=2, padding=1, stride=(2, 1, 1)),
        case("dilated", BANDED, "conv2d", (2, 2, 9, 20), (2, 1, 3, 3), groups=2, padding=4, dilation=(3, 2), stride=2),
        case("multiplier-3", BANDED, "conv2d", (2, 2, 5, 18), (6, 1, 3, 3), groups=2, padding=1, activation="silu"),
        case("many-rows", BANDED, "conv2d", (2, 2, 13, 9), (2, 1, 13, 7), groups=2, padding=(6, 3)),
    ],
    PATCH: [
        case("conv1d", PATCH, "conv1d", (3, 5, 13), (5, 1, 4), groups=5, padding=((3, 0),), x=channels_last),
        case(
            "conv2d", PATCH, "conv2d", (3, 7, 5, 7), (7, 1, 3, 2), groups=7, padding=1, stride=(1, 2), x=channels_last
        ),
        case("conv3d", PATCH, "conv3d", (2, 3, 4, 3, 5), (3, 1, 2, 3, 2), groups=3, padding=1, x=channels_last),
        case(
            "dilated", PATCH, "conv2d", (2, 5, 9, 7), (5, 1, 3, 3), groups=5, padding=((2, 1), (0, 4)), stride=(2, 1),
            dilation=(2, 3), activation="silu", x=channels_last,
        ),
    ],
    PHASE: [
        case("conv1d", PHASE, "conv_transpose1d", (3, 5, 6), (5, 7, 5), stride=3, padding=1),
        case("conv2d", PHASE, "conv_transpose2d", (2, 19, 3, 4), (19, 21, 3, 3), stride=2, padding=1, output_padding=1),
        case("conv3d", PHASE, "conv_transpose3d", (2, 3, 2, 2, 2), (3, 5, 2, 2, 2), stride=(2, 1, 2), dilation=2),
        case("groups", PHASE, "conv_transpose2d", (2, 21, 3, 3), (21, 2, 3, 3), stride=2, groups=7),
        case("wide-groups", PHASE, "conv_transpose1d", (2, 34, 5), (34, 19, 3), stride=2, groups=2),
    ],
}  # fmt: skip

# (BLOCK_M, BLOCK_N, BLOCK_K): the least that a product takes, much of one dimension, and more than there is of all.
_SIZES = [(16, 16, 16), (128, 64, 64), (16, 128, 16), (32, 16, 128)]
TILES = {
    GEMM: [
        ImplicitGemmTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, FLAT_K=flat, num_warps=8)
        for (m, n, k), flat in itertools.product(_SIZES, (False, True))
    ],
    PACKED: [
        GroupedPackedTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        for m, n, k in [(16, 16, 16), (128, 64, 64), (32, 16, 64), (32, 64, 16)]
    ],
    DEPTHWISE: [
        DepthwiseTile(BLOCK_M=m, BLOCK_C=c, UNROLL=unroll)
        for (m, c), unroll in itertools.product([(16, 4), (256, 1), (64, 64)], (False, True))
    ],
    BANDED: [
        DepthwiseBandedTile(BLOCK_M=m, BLOCK_T=t, BLOCK_K=k, ROWS=rows, FUSED=fused, STEPS=steps, RESIDENT=resident)
        for m, t, k, rows, fused, steps, resident in [
            (16, 16, 64, 1, 1, 1, False),
            (16, 32, 128, 2, 2, 2, True),
            (64, 16, 64, 4, 1, 1, True),
            (32, 16, 64, 4, 2, 2, True),
            (32, 16, 64, 8, 2, 1, False),
        ]
    ],
    PATCH: [
        DepthwisePatchTile(UNROLL=unroll, ROWS=rows, COLS=cols, BLOCK_P=p, BLOCK_C=c)
        for (rows, cols, p, c), unroll in itertools.product([(1, 4, 16, 4), (2, 8, 4, 16)], (False, True))
    ],
    PHASE: [TransposedPhaseTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=8) for m, n, k in _SIZES],
}
DEFORMABLE_TILES = [DeformableTile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=8) for m, n, k in _SIZES]
FORMATS = {"contiguous": None, "channels-last": channels_last}


def formatted(layer, kernel, layout):
    """The layer in a memory format; of a kernel that takes one format the weight alone, and so the output."""
    x = {BANDED: None, PATCH: channels_last}.get(kernel, FORMATS[layout])
    return replace(layer, x=x, w=FORMATS[layout])


def short(tile):
    """The sizes of a tile as a test id."""
    return "-".join(str(int(value)) for value in tile.sizes().values())


# Neighbours in one memory format and the other; all of them in both is for the long run.
FORCED = [
    pytest.param(
        layer, kernel, tile, layout, id=f"{kernel}-{layer.id}-{short(tile)}-{layout}",
        marks=() if (i + j + k) % 2 else pytest.mark.slow,
    )
    for kernel, layers in LAYERS.items()
    for i, layer in enumerate(layers)
    for j, tile in enumerate(TILES[kernel])
    for k, layout in enumerate(FORMATS)
]  # fmt: skip


@pytest.mark.parametrize(("layer", "kernel", "tile", "layout"), FORCED)
def test_forced(layer, kernel, tile, layout):
    arguments = formatted(layer, kernel, layout).tensors(torch.float32)
    made = tc.plan(getattr(tc, layer.function), **arguments)
    if reason := tile.unfit(made.problem, made.target):
        # The interpreter runs them all.
        pytest.skip(f"the device is too small for the tile: {reason}")
    run(layer.function, arguments, kernel, tile)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("tile", DEFORMABLE_TILES, ids=short)
def test_forced_deformable(tile, layout):
    run("deform_conv2d", deformable_tensors(3, torch.float32, layout=FORMATS[layout]), "deformable", tile)


@pytest.mark.parametrize(
    "layer",
    [layer for group in CASES for layer in CASES[group] if layer.kernel == DEPTHWISE and not layer.x],
    ids=name_of,
)
def test_depthwise_takes_what_its_other_forms_take(layer):
    # Plans prefer those; a border, or a layout that neither takes, leaves it to this one.
    arguments = layer.tensors(torch.float32)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    if layer.input[0]:
        run(layer.function, arguments, DEPTHWISE, default_tile(DEPTHWISE, problem, INTERPRETER))


EACH = [pytest.param(layers[1], kernel, id=kernel) for kernel, layers in LAYERS.items()]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("layer", "kernel"), EACH)
def test_safe_tile(layer, kernel, dtype):
    run(layer.function, layer.tensors(dtype), kernel, KERNELS[kernel].safe_tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_safe_tile_deformable(dtype):
    run("deform_conv2d", deformable_tensors(3, dtype), "deformable", KERNELS["deformable"].safe_tile)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize(("layer", "kernel"), EACH)
def test_default_tile_of_a_gpu(layer, kernel, dtype, layout):
    # The interpreter's own default differs; what a GPU would run has to be right too.
    arguments = formatted(layer, kernel, layout).tensors(dtype)
    problem = tc.plan(getattr(tc, layer.function), **arguments).problem
    run(layer.function, arguments, kernel, default_tile(kernel, problem, KNOWN["sm_90"]))


def problems():
    """The flagships in every dtype and memory format, as planning sees them."""
    for workload in FLAGSHIPS:
        for variant in workload.variants(("float16", "bfloat16", "float32", "float64"), both_formats=True):
            yield variant.title, variant.problem()


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_defaults_fit(target):
    unfit = []
    for title, problem in problems():
        suited = [k.name for k in KERNELS.values() if k.unavailable(target) is None and k.unsuited(problem) is None]
        for name in suited if title.startswith("narrow") else [dispatch.forms(problem, target)[0][0].name]:
            reason = default_tile(name, problem, target).unfit(problem, target)
            unfit += [f"{name} {title}: {reason}"] if reason else []
    assert unfit == []


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_safe_tiles_fit(target):
    unfit = []
    for title, problem in problems():
        kernel = dispatch.forms(problem, target)[0][0]
        reason = kernel.safe_tile.unfit(problem, target)
        unfit += [f"{kernel.name} {title}: {reason}"] if reason else []
    assert unfit == []


def test_what_cannot_run_is_refused_with_the_reason():
    x, w = random((2, 6, 5, 5)), random((6, 3, 3, 3))
    made = tc.plan(tc.conv2d, x, w, groups=2)
    for kernel, tile, message in (
        ("depthwise", None, "3 input channels"),
        ("transposed_phase", None, "not transposed"),
        ("deformable", None, "no offsets"),
        ("cudnn", None, "not known; choose one of implicit_gemm"),
        ("implicit_gemm", DepthwiseTile(), "takes ImplicitGemmTile, got DepthwiseTile"),
        ("grouped_packed", GroupedPackedTile(BLOCK_K=2), "does not fit in 2"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(made.problem, made.target, kernel, tile)
    for tile, message in (
        (ImplicitGemmTile(BLOCK_M=256, BLOCK_N=256, BLOCK_K=256, num_stages=4), "shared memory of 232448"),
        (ImplicitGemmTile(BLOCK_M=256, BLOCK_N=128), "accumulator registers do not fit in 4 warps"),
    ):
        with pytest.raises(PlanError, match=message):
            dispatch.plan(made.problem, KNOWN["sm_90"], "implicit_gemm", tile)
    assert not launches


@pytest.mark.parametrize("kernel", ["implicit_gemm", "depthwise", "grouped_packed"])
def test_offsets_are_for_the_deformable_kernel_only(kernel):
    problem = tc.plan(tc.deform_conv2d, **deformable_tensors(2, torch.float32)).problem
    with pytest.raises(PlanError, match=r"offsets|input channels"):
        dispatch.plan(problem, KNOWN["sm_90"], kernel)


@pytest.mark.parametrize(("stride", "channels", "least"), [(1, 256, 16), (2, 512, 8)])
def test_few_pixels_make_small_tiles(stride, channels, least):
    # 28 us by the model with tiles of 128 x 128, of which there are four; 18 with sixteen.
    x, w = torch.empty(1, channels, 14, 14, dtype=torch.bfloat16, device="meta"), (channels, channels, 3, 3)
    weight = torch.empty(w, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    problem = tc.plan(tc.conv2d, x.to(memory_format=torch.channels_last), weight, stride=stride, padding=1).problem
    for kernel in [kernel.name for kernel in dispatch.forms(problem, KNOWN["sm_90"])[0]]:
        if kernel not in ("implicit_gemm_windows", "implicit_gemm_rolling"):
            tile = default_tile(kernel, problem, KNOWN["sm_90"])
            assert (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K) == (64, 64, 128)
            assert KERNELS[kernel].grid(problem, tile) >= least
