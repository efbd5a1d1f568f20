"""conv3d: torch's own convolution, and the gradients that a kernel makes of it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops import conv3d
from common.ops.conv.lean import HalfGradients, by_halves


def arguments(size: tuple[int, int, int] = (3, 5, 4), *, batch: int = 2, channels: int = 3, out: int = 4) -> dict:
    x, weight = torch.randn(batch, channels, *size), torch.randn(out, channels, 3, 3, 3)
    return {"x": x, "weight": weight, "bias": torch.randn(out)}


def contiguous_weight(arrange: Callable) -> Callable:
    """The layout under test is that of volumes."""
    return lambda x: arrange(x) if x.ndim == 5 and x.shape[2:] != (3, 3, 3) else x.contiguous()


@pytest.mark.parametrize("backend", ("reference", "lean", None))
def test_is_torchs(backend: str | None) -> None:
    given = arguments()
    assert torch.equal(conv3d(**given, backend=backend), F.conv3d(*given.values(), padding=1))


def test_half_gradients() -> None:
    """The digits of bfloat16, sums in float32; what is not wanted is not computed."""
    x, weight, bias = (value.requires_grad_() for value in arguments((6, 7, 5), channels=8, out=8).values())
    grad = torch.randn(2, 8, 6, 7, 5)
    exact = torch.autograd.grad(conv3d(x, weight, bias), (x, weight, bias), grad)
    value = HalfGradients.apply(x, weight, bias)
    assert torch.equal(value, conv3d(x, weight, bias))
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
    assert torch.equal(scripted(*given.values()), conv3d(**given))


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv3d(x, weight, bias)


def test_refused(refused: Callable) -> None:
    refused(conv3d, arguments())


def test_bad_shapes() -> None:
    given = arguments()
    shapes = r"have shape \(O, 3, 3, 3, 3\), got \(4, 2, 3, 3, 3\)"
    with pytest.raises(ValueError, match=rf"conv3d\(\) 'weight' must {shapes}"):
        conv3d(given["x"], given["weight"][:, :2])
    with pytest.raises(ValueError, match=r"conv3d\(\) 'x' must"):
        conv3d(given["x"][0], given["weight"])
