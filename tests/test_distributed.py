"""Several processes over gloo: slices, shards and torch's wrappers give what one process computes, both ways.

Each test starts its processes once; what is wrong in any of them is raised here.
"""

import datetime
import os
import socket

import pytest
import torch
import torch.distributed as dist
from helpers import random
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import triton_conv as tc
from triton_conv import distributed
from triton_conv.kernels import launches

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="gloo moves CPU tensors, which kernels do not run on here"),
]
D = torch.float64


def started(rank, world, port, function):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        function(rank, world)
    finally:
        dist.destroy_process_group()


def run(function, world=2):
    """Runs `function(rank, world)` in so many processes; raises what any of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A server that has imported everything once forks them.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(started, (world, port, function), world, start_method="forkserver")


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------- slices


SPLITS = [
    ("conv2d", (2, 3, 12, 5), (4, 3, 3, 3), dict(padding=1), 2, None),
    ("conv2d", (2, 4, 5, 12), (4, 2, 3, 5), dict(padding=(1, 2), groups=2, activation="silu"), 3, None),
    ("conv2d", (1, 3, 14, 5), (4, 3, 3, 3), dict(stride=2, padding=1, dilation=(2, 1)), 2, None),
    ("conv2d", (1, 3, 16, 4), (2, 3, 4, 2), dict(stride=3, padding="valid"), 2, (6, 3, 7)),
    ("conv2d", (1, 2, 16, 4), (2, 2, 2, 2), dict(stride=4, padding=((3, 1), (0, 1))), 2, (5, 6, 5)),
    ("conv1d", (2, 3, 16), (3, 1, 4), dict(padding=((3, 0),), groups=3), 2, None),
    ("conv3d", (1, 2, 8, 4, 3), (3, 2, 3, 3, 2), dict(padding=1), 2, None),
    ("conv2d", (1, 2, 13, 4), (2, 2, 3, 3), dict(padding=2, stride=2, dilation=2, padding_mode="reflect"), 2, (6, 7)),
    ("conv2d", (1, 2, 4, 9), (2, 2, 3, 2), dict(padding=((1, 0), (2, 3)), padding_mode="circular"), 3, (4, 5)),
    ("conv2d", (1, 2, 11, 3), (2, 2, 4, 2), dict(padding=((0, 3), (1, 1)), stride=(3, 1), padding_mode="replicate"),
     2, (6, 5)),
    ("conv1d", (2, 2, 12), (2, 2, 3), dict(padding="same", dilation=2, padding_mode="circular"), 2, None),
    ("conv3d", (1, 1, 9, 3, 3), (2, 1, 3, 2, 2), dict(padding=(2, 0, 1), padding_mode="reflect"), 2, (4, 5)),
    ("conv3d", (1, 1, 3, 9, 3), (2, 1, 2, 3, 2), dict(padding=(0, 1, 1), stride=(1, 2, 1), padding_mode="circular"),
     3, (4, 5)),
]  # fmt: skip
# On every change with two ranks: one along the width, and every border, with strides and dilation; the rest is slow.
QUICK = (1, 7, 8, 9)


def check_slices(rank, world):
    """Each split on its slice, forward and backward, against the whole."""
    for function, shape, weight, arguments, dim, sizes in [SPLITS[i] for i in QUICK] if world == 2 else SPLITS:
        if sizes is None or len(sizes) != world:
            most = shape[dim] // world
            sizes = (most,) * (world - 1) + (shape[dim] - most * (world - 1),)
        whole = [random(shape, D).requires_grad_(), random(weight, D).requires_grad_(), random(weight[:1], D)]
        whole[2].requires_grad_()
        expected = getattr(tc, function)(*whole, **arguments)
        grad = random(expected.shape, D)
        gradients = torch.autograd.grad(expected, whole, grad)
        start = sum(sizes[:rank])
        own = whole[0].detach().narrow(dim, start, sizes[rank]).clone().requires_grad_()
        parameters = [tensor.detach().clone().requires_grad_() for tensor in whole[1:]]
        launches.clear()
        result = getattr(distributed, function)(own, *parameters, dim=dim, sizes=sizes, **arguments)
        assert sum(launches.values()) == 1
        rows = [torch.zeros(1, dtype=torch.long) for _ in range(world)]
        dist.all_gather(rows, torch.tensor([result.shape[dim]]))
        first = int(sum(rows[:rank]))
        close(result, expected.detach().narrow(dim, first, result.shape[dim]))
        assert int(sum(rows)) == expected.shape[dim]
        found = torch.autograd.grad(result, [own, *parameters], grad.narrow(dim, first, result.shape[dim]))
        close(found[0], gradients[0].narrow(dim, start, sizes[rank]))
        for share, exact in zip(found[1:], gradients[1:], strict=True):
            dist.all_reduce(share)
            close(share, exact)


def check_refusals(rank, world):
    x, w = random((1, 1, 4, 4)), random((1, 1, 9, 3))
    with pytest.raises(RuntimeError, match=r"slices of \[4, 4, 4\] rows along dimension 2 are too thin for a filter"):
        distributed.conv2d(x, w, padding=(8, 0), dilation=(1, 1))
    with pytest.raises(RuntimeError, match=r"too thin for a filter that spans 1 and padding \(3, 3\)"):
        distributed.conv2d(x, w[:, :, :1, :1], padding=(3, 0), padding_mode="reflect")
    with pytest.raises(RuntimeError, match=r"padding: .*circular"):
        distributed.conv2d(x, w, padding=(13, 0), padding_mode="circular")
    with pytest.raises(RuntimeError, match="dim: expected a batched input and a spatial dimension"):
        distributed.conv2d(x, w, dim=1)
    for sizes in ((4, 4), (4.0, 4.0, 4.0), 4, (4, 4, 4, None)):
        with pytest.raises(RuntimeError, match=r"sizes: expected the size of dimension 2 on each of 3 ranks"):
            distributed.conv2d(x, w, sizes=sizes)
    with pytest.raises(RuntimeError, match="dim: expected a batched input and a spatial dimension of it, got dim=h"):
        distributed.conv2d(x, w, dim="h")
    with pytest.raises(TypeError, match=r"input: expected this rank's slice.*to_local"):
        distributed.conv2d(distribute_tensor(x, init_device_mesh("cpu", (world,)), [Shard(2)]), w)


def check_second_derivatives(rank, world):
    """Of a loss on the slices: the exchange of what is sent back is the exchange again."""
    whole, weight = random((1, 1, 6, 3), D).requires_grad_(), random((1, 1, 3, 2), D)
    options = dict(padding=1, padding_mode="circular", activation="silu")

    def second(function, x, **more):
        y = function(x, weight, **options, **more)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(3).sum(), x)[0]

    own = whole.detach().narrow(2, rank * 3, 3).clone().requires_grad_()
    close(second(distributed.conv2d, own), second(tc.conv2d, whole).narrow(2, rank * 3, 3))


def three(rank, world):
    check_slices(rank, world)
    check_refusals(rank, world)


@pytest.mark.slow
def test_slices_on_three_ranks():
    run(three, 3)


# ------------------------------------------------------------------------------------------------------------- DTensors


def shard(tensor, mesh, placement):
    return distribute_tensor(tensor.detach().clone(), mesh, [placement]).requires_grad_()


def communicated(call):
    """The call's result, and how many collectives it took."""
    with CommDebugMode() as mode:
        result = call()
    return result, mode.get_total_counts()


def check_groups(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for name, weight, arguments in (
        ("conv2d", (8, 2, 3, 3), dict(padding=1)),
        ("conv_transpose2d", (8, 3, 3, 3), dict(stride=2)),
    ):
        outputs = 8 if name == "conv2d" else 12
        whole = [random(shape, D).requires_grad_() for shape in ((2, 8, 5, 4), weight, (outputs,))]
        expected = getattr(tc, name)(*whole, groups=4, **arguments)
        gradients = torch.autograd.grad(expected.square().sum(), whole)
        own = [shard(t, mesh, Shard(dim)) for t, dim in zip(whole, (1, 0, 0), strict=True)]

        def step(name=name, own=own, arguments=arguments):
            result = distributed.by_groups(getattr(tc, name), *own, groups=4, **arguments)
            return result, torch.autograd.grad(result.to_local().square().sum(), own)

        (result, found), collectives = communicated(step)
        assert collectives == 0
        assert result.placements == (Shard(1),)
        close(result.full_tensor(), expected)
        for share, exact in zip(found, gradients, strict=True):
            close(share.full_tensor(), exact)
    with pytest.raises(RuntimeError, match="groups: 3 groups cannot be shared by 2 ranks"):
        distributed.by_groups(tc.conv2d, *own[:2], groups=3)
    with pytest.raises(TypeError, match="weight: expected a DTensor, got Tensor"):
        distributed.by_groups(tc.conv2d, own[0], whole[1], groups=4)
    with pytest.raises(RuntimeError, match=r"weight: expected placement Shard\(0\)"):
        distributed.by_groups(tc.conv2d, own[0], own[0], groups=4)


R, S, CONV = Replicate(), [Shard(d) for d in range(4)], ((2, 4, 6, 5), (6, 4, 3, 3), (6,))
GROUPED, TRANSPOSED = ((2, 8, 4, 3), (8, 2, 3, 3), (8,)), ((2, 4, 3, 4), (4, 3, 2, 2), (12,))


def deformed(x, offset, mask, w, b):
    return tc.deform_conv2d(x, offset, w, b, padding=1, mask=mask)


def deformable(groups, offset_groups):
    taps = 9 * offset_groups
    return (2, 4, 3, 3), (2, 2 * taps, 3, 3), (2, taps, 3, 3), (4, 4 // groups, 3, 3), (4,)


def separated(x, d, p, b):
    return tc.separable_conv2d(x, d, p, b, padding=1, mid_activation="relu")


# (function, shapes, placements of the tensors, of the output): no collective runs, forward or backward. Gradients of
# what all ranks have are partial sums. The strides differ: a strategy is not remembered for both.
PLACED = [
    (lambda *t: tc.conv2d(*t, padding=1), CONV, (S[0], R, R), S[0]),
    (lambda *t: tc.conv2d(*t, stride=2, padding=1), CONV, (S[0], R, R), S[0]),
    (lambda *t: tc.conv2d(*t, stride=2, padding=1, activation="silu"), CONV, (R, S[0], S[0]), S[1]),
    (lambda *t: tc.conv2d(*t, padding=1, groups=4), GROUPED, (S[1], S[0], S[0]), S[1]),
    (lambda *t: tc.conv_transpose2d(*t, stride=2, groups=4), TRANSPOSED, (S[1], S[0], S[0]), S[1]),
    (deformed, deformable(1, 2), (S[0], S[0], S[0], R, R), S[0]),
    (deformed, deformable(1, 1), (R, R, R, S[0], S[0]), S[1]),
    (deformed, deformable(2, 1), (S[1], R, R, S[0], S[0]), S[1]),
    (deformed, deformable(2, 2), (S[1], S[1], S[1], S[0], S[0]), S[1]),
    (separated, ((2, 4, 3, 3), (4, 1, 3, 3), (6, 4, 1, 1), (6,)), (S[0], R, R, R), S[0]),
    (lambda *t: tc.shuffle_conv2d(*t, groups=2), ((2, 4, 3, 3), (6, 2, 1, 1), (6,)), (S[0], R, R), S[0]),
    (tc.locally_connected2d, ((2, 2, 3, 3), (2, 2, 4, 2, 2, 2), (4, 2, 2)), (S[0], R, R), S[0]),
    (tc.locally_connected2d, ((2, 2, 3, 3), (2, 2, 4, 2, 2, 2), (4, 2, 2)), (R, S[2], S[0]), S[1]),
    (lambda *t: tc.locally_connected2d(*t, groups=2), ((2, 4, 3, 3), (2, 2, 4, 2, 2, 2), (4, 2, 2)),
     (S[1], S[2], S[0]), S[1]),
]  # fmt: skip
# Right too, but gathered or summed on the way.
GATHERED = [
    (lambda *t: tc.conv2d(*t, padding=1), CONV, (S[1], R, R)),
    (lambda x, w: tc.conv2d(x, w), CONV[:2], (S[1], S[1])),
    (lambda *t: tc.conv2d(*t, padding=1, groups=3), ((1, 6, 3, 3), (6, 2, 3, 3), (6,)), (S[1], S[0], S[0])),
    (deformed, deformable(2, 1), (R, S[2], R, R, S[0])),
    # Forward it is free; the gradient of what is between the two kernels is a sum over output channels.
    (separated, ((2, 4, 3, 3), (4, 1, 3, 3), (6, 4, 1, 1), (6,)), (R, R, S[0], S[0])),
]


def placed(function, shapes, placements, mesh):
    """Values and gradients of a function of DTensors, as of plain tensors; its output and how many collectives ran."""
    whole = [random(shape, D, str(i)).requires_grad_() for i, shape in enumerate(shapes)]
    expected = function(*whole)
    own = [shard(t, mesh, p) for t, p in zip(whole, placements, strict=True)]
    launches.clear()

    result, collectives = communicated(lambda: function(*own))
    # As the loss would have it: each rank has the gradient of what it has of the output.
    grad = distribute_tensor(random(expected.shape, D), mesh, result.placements)
    found, more = communicated(lambda: torch.autograd.grad(result, own, grad))
    assert sum(launches.values()) >= 3
    close(result.full_tensor(), expected)
    for share, exact in zip(found, torch.autograd.grad(expected, whole, random(expected.shape, D)), strict=True):
        close(share.full_tensor(), exact)
    return result, (collectives, more)


def check_placements(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    distributed.register_sharding()
    for function, shapes, placements, out in PLACED:
        result, collectives = placed(function, shapes, placements, mesh)
        assert collectives == (0, 0), (shapes, placements)
        assert result.placements == (out,)
    for function, shapes, placements in GATHERED:
        placed(function, shapes, placements, mesh)


def two(rank, world):
    check_slices(rank, world)
    check_second_derivatives(rank, world)
    check_groups(rank, world)


def test_slices_and_groups():
    run(two)


@pytest.mark.slow
def test_other_placements():
    run(check_placements)


# ----------------------------------------------------------------------------------------------------- torch's wrappers


def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2)]
    return nn.Sequential(*layers).double()


def whole_gradients(x):
    plain = model()
    plain(x).square().mean().backward()
    return [parameter.grad for parameter in plain.parameters()]


def check_data_parallel(rank, world):
    x = random((2 * world, 2, 5, 5), D)
    wrapped = nn.parallel.DistributedDataParallel(tc.convert(model(), force=True))
    wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    assert sum(launches.values()) >= 4
    for parameter, exact in zip(wrapped.parameters(), whole_gradients(x), strict=True):
        close(parameter.grad, exact)


def check_fully_sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    x = random((2 * world, 2, 5, 5), D)
    sharded = tc.convert(model(), force=True)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    launches.clear()
    sharded(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    assert sum(launches.values()) >= 4
    for parameter, exact in zip(sharded.parameters(), whole_gradients(x), strict=True):
        close(parameter.grad.full_tensor(), exact)


def wrappers(rank, world):
    check_data_parallel(rank, world)
    check_fully_sharded(rank, world)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_data_parallel_and_fully_sharded():
    run(wrappers)
