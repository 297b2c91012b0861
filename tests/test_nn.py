"""The modules: torch's constructors, parameters and results, and what they take besides."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from helpers import DEVICE, launches, random
from torch import nn

import triton_conv as tc
from triton_conv.errors import ArgumentValueError, BackendWarning
from triton_conv.reference import reference, relative_error, tolerance

pytestmark = pytest.mark.usefixtures("exact_products")

NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
SIZES = {1: (9,), 2: (5, 6), 3: (4, 3, 5)}


def rank(name):
    return int(name[-2])


def made(name, *args, library=tc.nn, **kwargs):
    """A layer with the same parameters every time."""
    torch.manual_seed(0)
    return getattr(library, name)(*args, **kwargs).to(DEVICE)


def same_results(ours, plain, x, *args):
    """Ours, on our kernel, and torch's: the same output and gradients, from one launch each."""
    launches.clear()
    y = ours(x, *args)
    assert sum(launches.values()) == 1
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = ours(inputs[0], *args), plain(inputs[1], *args)
    assert (y.shape, y.stride()) == (expected.shape, expected.stride())
    grad = random(expected.shape, expected.dtype)
    found.backward(grad)
    expected.backward(grad)
    rows = [(found, expected), (inputs[0].grad, inputs[1].grad)]
    rows += [(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True)]
    for result, exact in rows:
        assert relative_error(result, exact.double()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_torchs_with_another_forward(name):
    arguments = (4, 6, 3, 2, 1) if "Transpose" not in name else (4, 6, 3, 2, 1, 1)
    plain = made(name, *arguments, library=nn)
    ours = made(name, *arguments, backend="triton")
    assert isinstance(ours, getattr(nn, name))
    # The same numbers are drawn, under the same names, and either loads the other's.
    for one, other in ((ours, plain), (plain, ours)):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
        one.load_state_dict(other.state_dict())
    same_results(ours, plain, random((2, 4, *SIZES[rank(name)])))


@pytest.mark.parametrize("name", NAMES)
def test_a_constructor_is_torchs_and_three_keywords(name):
    theirs = inspect.signature(getattr(nn, name).__init__).parameters
    parameters = inspect.signature(getattr(tc.nn, name).__init__).parameters
    plain = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in plain] == [(p.name, p.default) for p in theirs.values()]
    assert set(parameters) - set(theirs) == {"activation", "backend"}


@pytest.mark.parametrize("name", NAMES)
def test_an_unbatched_input(name):
    ours, plain = made(name, 4, 6, 3, backend="triton"), made(name, 4, 6, 3, library=nn)
    x = random((4, *SIZES[rank(name)]))
    torch.testing.assert_close(ours(x), plain(x))
    assert sum(launches.values()) == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"], ids=str)
def test_padding_modes(mode, padding):
    arguments = dict(padding=padding, padding_mode=mode, dilation=2 if padding == "same" else 1)
    plain = made("Conv2d", 3, 4, (2, 3), library=nn, **arguments)
    same_results(made("Conv2d", 3, 4, (2, 3), backend="triton", **arguments), plain, random((2, 3, 5, 6)))


def test_causal_padding_and_an_activation_of_its_own():
    arguments = dict(padding=((3, 0),), groups=8, activation="silu")
    results = []
    for backend in ("triton", "torch"):
        launches.clear()
        layer = made("Conv1d", 8, 8, 4, backend=backend, **arguments)
        results.append(layer(random((2, 8, 9))))
        assert sum(launches.values()) == (backend == "triton")
    exact = reference("conv1d", {"input": random((2, 8, 9)), "weight": layer.weight, "bias": layer.bias, **arguments})
    for result in results:
        assert result.shape == (2, 8, 9)
        assert relative_error(result, exact) < tolerance(torch.float32, 4)


def test_a_norm_is_folded_in_before_the_activation():
    """As the module's docstring says: torch's function folds into a layer, whatever it does after its convolution."""
    norm, x = nn.BatchNorm2d(4, device=DEVICE), random((2, 4, 5, 6))
    for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        value.uniform_(0.5, 1.5)
    for kind, transposed in (("Conv2d", False), ("ConvTranspose2d", True)):
        layer = made(kind, 4, 4, 3, backend="triton")
        plain = nn.Sequential(layer, norm, nn.ReLU()).eval()
        with torch.no_grad():
            expected = plain(x)
            folded = nn.utils.fuse_conv_bn_eval(layer, norm, transpose=transposed)
            folded(x)
            folded.activation = "relu"
            torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("padding", [((1, 0), (0, 2)), [(1, 0), (0, 2)]], ids=str)
def test_uneven_padding_of_a_folded_border(padding):
    layers = [
        made("Conv2d", 3, 4, 3, padding=padding, padding_mode="replicate", backend=backend)
        for backend in ("triton", "torch")
    ]
    results = [layer(random((2, 3, 5, 6))) for layer in layers]
    torch.testing.assert_close(*results)
    assert results[0].shape == (2, 4, 4, 6)
    assert sum(launches.values()) == 1


def test_output_size_of_a_transposed_layer():
    ours, plain = (made("ConvTranspose2d", 3, 4, 3, stride=2, library=lib) for lib in (tc.nn, nn))
    ours.backend = "triton"
    x = random((2, 3, 4, 5))
    torch.testing.assert_close(ours(x, output_size=(10, 12)), plain(x, output_size=(10, 12)))
    assert sum(launches.values()) == 1


def test_what_a_layer_says_of_itself():
    layer = tc.nn.Conv2d(3, 4, 3, padding=((1, 0), (2, 1)), padding_mode="reflect", activation="relu")
    assert repr(layer) == (
        "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=((1, 0), (2, 1)), padding_mode=reflect, "
        "activation=relu, backend=auto)"
    )
    with tc.set_backend("torch"):
        assert repr(tc.nn.ConvTranspose1d(3, 4, 3)) == (
            "ConvTranspose1d(3, 4, kernel_size=(3,), stride=(1,), backend=torch)"
        )
        assert "backend=triton" in repr(tc.nn.Conv3d(3, 4, 3, backend="triton"))


def copies(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)


def test_copies_and_pickles():
    layer = made("Conv2d", 3, 4, 3, padding=((1, 0), (2, 1)), activation="relu", backend="triton")
    x = random((1, 3, 5, 6))
    for other in copies(layer):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))
    assert sum(launches.values()) == 6
    predicting = made("DeformConv2d", 2, 4, 3, predict=True)
    for other in copies(predicting):
        assert torch.equal(other(random((1, 2, 4, 4))), predicting(random((1, 2, 4, 4))))


def spawned(layer, x, queue):
    queue.put(layer(x).detach().numpy())


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="one process a GPU is torch's business")
def test_a_layer_goes_to_a_spawned_process():
    layer, x = made("Conv2d", 3, 4, 3, backend="triton"), random((1, 3, 5, 6))
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned, args=(layer, x, queue))
    process.start()
    result = torch.from_numpy(queue.get(timeout=120))
    process.join(30)
    assert process.exitcode == 0
    torch.testing.assert_close(result, layer(x).detach())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(activation="tanh"), ValueError, "activation: 'tanh' is not known"),
        (dict(backend="cudnn"), ValueError, "backend: 'cudnn' is not known; choose one of auto, triton, torch"),
        (dict(padding=((1, 2),)), RuntimeError, "padding: expected 2 pairs of"),
        (dict(padding=((1, 0), (0, -1))), RuntimeError, "padding: negative padding is not supported, got padding="),
        (dict(groups=2), ValueError, "in_channels must be divisible by groups"),
        (dict(padding_mode="mirror"), ValueError, "padding_mode must be one of"),
    ],
)
def test_wrong_options(arguments, error, message):
    with pytest.raises(error, match=message):
        tc.nn.Conv2d(3, 4, 3, **arguments)


@pytest.mark.parametrize("backend", tc.policy.BACKENDS)
def test_a_wrong_input_is_torchs_error(backend):
    x = random((1, 5, 4, 4))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 5 channels"):
        made("Conv2d", 3, 4, 3, backend=backend)(x)


def test_what_we_cannot_run_still_runs_and_says_so():
    layer = made("Conv2d", 3, 4, 3, dtype=torch.complex64, backend="triton")
    x = torch.ones(1, 3, 4, 4, dtype=torch.complex64, device=DEVICE)
    with pytest.warns(BackendWarning, match=r"a layer runs on torch's kernel: .*no kernel for torch.complex64"):
        y = layer(x)
    assert not launches
    torch.testing.assert_close(y, nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias))
    assert not layer.choose(x).ours


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_nested_input_is_torchs_error(backend):
    nested, errors = torch.nested.nested_tensor([random((3, 4, 4))]), []
    for layer in (made("Conv2d", 3, 4, 3, backend=backend), made("Conv2d", 3, 4, 3, library=nn)):
        with pytest.raises(NotImplementedError) as raised:
            layer(nested)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_set_backend():
    assert tc.policy.current_backend() == "auto"
    with pytest.raises(ArgumentValueError, match="choose one of auto, triton, torch"):
        tc.set_backend("fast")
    with tc.set_backend("torch"):
        with tc.set_backend("triton"):
            assert tc.policy.current_backend() == "triton"
        assert tc.policy.current_backend() == "torch"
    assert tc.policy.current_backend() == "auto"


# ----------------------------------------------------------------------------------------------- deformable convolution


def test_deformable_module():
    layer = made("DeformConv2d", 4, 6, 3, padding=1, groups=2, backend="triton")
    x, offset, mask = random((2, 4, 5, 6)), random((2, 36, 5, 6)), random((2, 18, 5, 6)).sigmoid()
    for tensors in ((x, offset), (x, offset, mask)):
        launches.clear()
        result = layer(*tensors)
        assert dict(launches) == {"deformable": 1}
        named = dict(zip(("input", "offset", "mask"), tensors))
        exact = reference("deform_conv2d", {**named, "weight": layer.weight, "bias": layer.bias, "padding": 1})
        assert relative_error(result, exact) < 1e-4
    # Without torchvision the other way is tensor operations, with the same numbers.
    layer.backend = "torch"
    torch.testing.assert_close(layer(x, offset, mask), result, atol=1e-4, rtol=1e-4)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_predictor_begins_as_half_a_convolution():
    layer = made("DeformConv2d", 4, 6, 3, padding=1, stride=2, offset_groups=2, predict=True, bias=False)
    x = random((2, 4, 5, 6))
    torch.testing.assert_close(
        layer(x), 0.5 * torch.nn.functional.conv2d(x, layer.weight, None, 2, 1), atol=1e-5, rtol=1e-4
    )
    assert list(layer.state_dict()) == ["weight", "conv_offset.weight", "conv_offset.bias"]
    assert layer.conv_offset.weight.shape == (54, 4, 3, 3)
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_deformable_arguments():
    x, offset = random((1, 4, 5, 5)), random((1, 18, 3, 3))
    with pytest.raises(TypeError, match="without predict=True takes an offset"):
        tc.nn.DeformConv2d(4, 6, 3)(x)
    with pytest.raises(TypeError, match="takes the input alone"):
        made("DeformConv2d", 4, 6, 3, predict=True)(x, offset)
    for arguments in (dict(groups=3), dict(offset_groups=3)):
        with pytest.raises(ValueError, match="in_channels must be divisible by"):
            tc.nn.DeformConv2d(4, 6, 3, **arguments)
    for name in ("groups", "offset_groups"):
        with pytest.raises(ValueError, match=f"^{name} must be a positive integer, got 0"):
            tc.nn.DeformConv2d(4, 6, 3, **{name: 0})
    layer = tc.nn.DeformConv2d(4, 6, (3, 1), padding=1, groups=2, bias=False, predict=True, offset_groups=4)
    assert "4, 6, kernel_size=(3, 1), stride=(1, 1), padding=(1, 1), groups=2, offset_groups=4, bias=False, " in str(
        layer
    )


def test_the_constructor_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    theirs = inspect.signature(torchvision.ops.DeformConv2d.__init__).parameters
    ours = inspect.signature(tc.nn.DeformConv2d.__init__).parameters
    plain = [p.name for p in ours.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert plain == list(theirs)
