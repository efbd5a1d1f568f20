"""conv3d and pointwise: torch's own convolutions, what is quicker on a CPU, and the gradients that a kernel makes."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops import conv3d, pointwise
from common.ops.conv import Conv3d, Pointwise
from common.ops.conv.cpu import paired
from common.ops.conv.lean import HalfGradients, by_halves


def arguments(size: tuple[int, int, int] = (3, 5, 4), *, batch: int = 2, channels: int = 3, out: int = 4) -> dict:
    x, weight = torch.randn(batch, channels, *size), torch.randn(out, channels, 3, 3, 3)
    return {"x": x, "weight": weight, "bias": torch.randn(out)}


def contiguous_weight(arrange: Callable) -> Callable:
    """The layout under test is that of volumes."""
    return lambda x: arrange(x) if x.ndim == 5 and x.shape[2:] != (3, 3, 3) else x.contiguous()


def test_is_torchs() -> None:
    given = arguments()
    assert torch.equal(conv3d(**given, backend="reference"), F.conv3d(*given.values(), padding=1))


@pytest.mark.parametrize("backend", ("reference", "lean", None))
def test_known_values(backend: str | None) -> None:
    """Taps 1, 10, 100 along k and 1000 in the next row of 1, 2, 3; zeros outside; the bias 0.5 on top."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).view(1, 1, 1, 2, 3)
    weight = torch.zeros(1, 1, 3, 3, 3)
    weight[0, 0, 1, 1], weight[0, 0, 1, 2, 1] = torch.tensor([1.0, 10.0, 100.0]), 1000.0
    expected = torch.tensor([[4210.5, 5321.5, 6032.5], [540.5, 654.5, 65.5]])
    out = conv3d(x, weight, torch.tensor([0.5]), backend=backend)
    torch.testing.assert_close(out.view(2, 3), expected)


LEAN_CASES = {
    "pairs": {"channels": 1, "out": 4},
    "pairs, an odd row": {"size": (3, 2, 5), "channels": 8, "out": 8},
    "a row of one voxel": {"size": (2, 3, 1), "channels": 3, "out": 2},
    "many outputs": {"channels": 5, "out": 18},
}


@pytest.mark.parametrize("sizes", LEAN_CASES.values(), ids=LEAN_CASES.keys())
def test_lean_matches_reference(sizes: dict, arrange: Callable, assert_backends_agree: Callable) -> None:
    assert_backends_agree(conv3d, arguments(**sizes), contiguous_weight(arrange), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("size", ((2, 2, 4), (2, 3, 3)))
def test_gradcheck(size: tuple[int, int, int]) -> None:
    """Of the pairs, whatever this processor's registers hold."""
    given = [x.double().requires_grad_() for x in arguments(size, batch=1, channels=2, out=2).values()]
    assert torch.autograd.gradcheck(paired, given)
    assert torch.autograd.gradgradcheck(paired, given)


@pytest.mark.parametrize("out", (4, 18))
def test_half_on_a_cpu(out: int) -> None:
    """Under autocast as torch's own: the same type, and values as near to the exact ones."""
    given = {name: x.bfloat16().float() for name, x in arguments(out=out).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = conv3d(**given), F.conv3d(*given.values(), padding=1)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ("reference", "lean", None))
def test_pointwise_known_values(backend: str | None) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 1, 2).contiguous(memory_format=torch.channels_last_3d)
    out = pointwise(x, torch.tensor([10.0, 1.0]).view(1, 2, 1, 1, 1), torch.tensor([0.5]), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([13.5, 24.5]))


def pointwise_arguments() -> dict:
    return {"x": torch.randn(2, 3, 4, 3, 5), "weight": torch.randn(4, 3, 1, 1, 1), "bias": torch.randn(4)}


def test_pointwise_lean_matches_reference(arrange: Callable, assert_backends_agree: Callable) -> None:
    assert_backends_agree(pointwise, pointwise_arguments(), contiguous_weight(arrange))


def test_pointwise_gradcheck() -> None:
    given = {name: x.double() for name, x in pointwise_arguments().items()}
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last_3d)
    assert torch.autograd.gradcheck(pointwise, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize(("layer", "taps"), ((Conv3d, 3), (Pointwise, 1)))
def test_layers_are_torchs(layer: type, taps: int) -> None:
    """The same parameters from the same seed, the same values, also scripted; without a bias too."""
    x = torch.randn(1, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    for bias in (True, False):
        torch.manual_seed(1)
        own = layer(3, 4, bias=bias)
        torch.manual_seed(1)
        torchs = torch.nn.Conv3d(3, 4, taps, padding=taps // 2, bias=bias)
        assert own.state_dict().keys() == torchs.state_dict().keys()
        torch.testing.assert_close(own(x), torchs(x))
        assert torch.equal(torch.jit.script(own)(x), torchs(x))


def test_half_gradients() -> None:
    """The digits of bfloat16, sums in float32; what is not wanted is not computed."""
    x, weight, bias = (value.requires_grad_() for value in arguments((6, 7, 5), channels=8, out=8).values())
    grad = torch.randn(2, 8, 6, 7, 5)
    exact = torch.autograd.grad(conv3d(x, weight, bias), (x, weight, bias), grad)
    value = HalfGradients.apply(x, weight, bias)
    assert torch.equal(value, conv3d(x, weight, bias, backend="reference"))
    for found, expected in zip(torch.autograd.grad(value, (x, weight, bias), grad), exact):
        assert found.dtype == torch.float32 and not torch.equal(found, expected) or found.ndim == 1
        assert (found - expected).norm() < 5e-3 * expected.norm()
    (alone,) = torch.autograd.grad(HalfGradients.apply(x.detach(), weight, None), weight, grad)
    assert (alone - exact[1]).norm() < 5e-3 * exact[1].norm()


def test_when_gradients_are_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, of float32, unless the user wants every digit."""

    class Gpu(Tensor):
        is_cuda = property(lambda self: True)

    x = torch.zeros(1).as_subclass(Gpu)
    for allowed in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=allowed))
        assert by_halves(x) == (allowed == "tf32")
        assert not by_halves(x.half()) and not by_halves(torch.zeros(1))


KERNEL_CASES = {
    "several programs": ({"size": (4, 5, 3), "channels": 5, "out": 3}, 6, 2048, 32),
    "tiles of channels": ({"size": (3, 4, 2), "channels": 17, "out": 19}, 12, 4096, 16),
    "one channel": ({"size": (3, 4, 5), "channels": 1, "out": 4}, 1024, 8192, 32),
    "a line of voxels": ({"size": (5, 1, 1), "channels": 8, "out": 8}, 1024, 8192, 32),
}


@pytest.mark.parametrize(("sizes", "programs", "held", "widest"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_kernel_matches_reference(
    sizes: dict,
    programs: int,
    held: int,
    widest: int,
    arrange: Callable,
    assert_backends_agree: Callable,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that are not full, several a program; channels in one tile and in several; borders on every side."""
    monkeypatch.setattr("common.ops.conv.kernel.PROGRAMS", programs)
    monkeypatch.setattr("common.ops.conv.kernel.HELD", held)
    monkeypatch.setattr("common.ops.conv.kernel.WIDEST", widest)
    arranged = contiguous_weight(arrange)
    assert_backends_agree(conv3d, arguments(**sizes), arranged, backend="triton", rtol=1e-5, atol=3e-5)


def test_kernel_without_bias(kernel_device: torch.device) -> None:
    given = {name: x.to(kernel_device).requires_grad_() for name, x in arguments().items() if name != "bias"}

    def gradients(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(conv3d(**given, backend=backend).square().sum(), list(given.values()))

    for own, torchs in zip(gradients("triton"), gradients("reference")):
        torch.testing.assert_close(own, torchs, rtol=1e-4, atol=1e-3)


def test_kernel_half(assert_half_kernel_agrees: Callable) -> None:
    """Without bias, whose gradient is a sum that torch rounds in its own way."""
    given = arguments((3, 2, 4), batch=1)
    del given["bias"]
    assert_half_kernel_agrees(lambda x, weight, backend: conv3d(x, weight, backend=backend), given)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    given = [x.to(kernel_device).requires_grad_() for x in arguments((2, 3, 2), batch=1).values()]
    conv3d(*given, backend="triton")  # registers the operators
    torch.library.opcheck(torch.ops.monai_registration.conv3d_triton.default, given)
    grad = torch.randn(1, 4, 2, 3, 2, device=kernel_device)
    torch.library.opcheck(torch.ops.monai_registration.conv3d_triton_weight.default, (given[0].detach(), grad))


def test_scripted() -> None:
    given = arguments()
    scripted = torch.jit.script(_layer)
    assert torch.equal(scripted(*given.values()), conv3d(**given, backend="reference"))


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv3d(x, weight, bias)


def test_refused(refused: Callable) -> None:
    refused(conv3d, arguments())
    with pytest.raises(RuntimeError, match=r"pointwise\(\) cannot run backend 'triton': pointwise has no Triton"):
        pointwise(**pointwise_arguments(), backend="triton")


def test_bad_shapes() -> None:
    given = arguments()
    shapes = r"have shape \(O, 3, 3, 3, 3\), got \(4, 2, 3, 3, 3\)"
    with pytest.raises(ValueError, match=rf"conv3d\(\) 'weight' must {shapes}"):
        conv3d(given["x"], given["weight"][:, :2])
    with pytest.raises(ValueError, match=r"conv3d\(\) 'x' must"):
        conv3d(given["x"][0], given["weight"])
    shapes = r"have shape \(O, 3, 1, 1, 1\), got \(4, 3, 3, 3, 3\)"
    with pytest.raises(ValueError, match=rf"pointwise\(\) 'weight' must {shapes}"):
        pointwise(given["x"], given["weight"])
    with pytest.raises(ValueError, match=r"pointwise\(\) 'x' must"):
        pointwise(given["x"][0], given["weight"])
