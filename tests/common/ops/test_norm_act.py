"""norm_act against torch's instance norm and its own reference."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from common.ops import norm_act

BACKENDS = ("reference", "lean")


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values(backend: str) -> None:
    """1, 2, 3, 6 have mean 3 and biased variance 3.5; with eps 0.5 the divisor is 2."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 1, 2, 2)
    out = norm_act(torch.cat([x, -x], 1), 0.1, 0.5, backend=backend).flatten(2)
    expected = torch.tensor([[[-0.1, -0.05, 0.0, 1.5], [1.0, 0.5, 0.0, -0.15]]])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_as_torch(backend: str) -> None:
    x = torch.randn(2, 3, 5, 4, 7)
    torch.testing.assert_close(norm_act(x, backend=backend), F.leaky_relu(F.instance_norm(x), 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean(backend: str) -> None:
    """The variance must survive a mean a thousand times the deviation."""
    x = 1000 + torch.randn(1, 2, 8, 8, 8)
    expected = norm_act(x.double(), backend="reference").float()
    torch.testing.assert_close(norm_act(x, backend=backend), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("slab", "wide"), ((60, 16), (7, 1), (1 << 17, 256)))
def test_slabs_are_joined(slab: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different means, and the last not full; rows of one voxel and of several."""
    lean = importlib.import_module("common.ops.norm_act.lean")
    monkeypatch.setattr(lean, "SLAB", slab)
    monkeypatch.setattr(lean, "WIDE", wide)
    x = torch.randn(2, 3, 5, 4, 6) + torch.arange(5.0).view(5, 1, 1) * torch.tensor([0.0, 10, -100]).view(3, 1, 1, 1)
    expected = norm_act(x.double(), backend="reference").float()
    torch.testing.assert_close(norm_act(x, backend="lean"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channel(backend: str) -> None:
    x = torch.full((1, 1, 2, 2, 2), 5.0, requires_grad=True)
    out = norm_act(x, backend=backend)
    out.sum().backward()
    assert out.abs().max() == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("slope", (0.1, 0.3))
def test_lean_matches_reference(slope: float, arrange: Callable, assert_backends_agree: Callable) -> None:
    inputs = {"x": 2 + 3 * torch.randn(2, 5, 7, 5, 9)}
    assert_backends_agree(lambda **kw: norm_act(**kw, slope=slope), inputs, arrange)


@pytest.mark.parametrize("joined", (2048, 8))
def test_kernel_matches_reference(
    joined: int, arrange: Callable, assert_backends_agree: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stretch and tile a program, and several of each; the last ones not full."""
    kernel = importlib.import_module("common.ops.norm_act.kernel")
    monkeypatch.setattr(kernel, "JOINED", joined)
    monkeypatch.setattr(kernel, "PROGRAMS", joined)
    monkeypatch.setattr(kernel, "TILE", 128)
    assert_backends_agree(norm_act, {"x": 2 + 3 * torch.randn(2, 3, 7, 5, 9)}, arrange, backend="triton")


def test_kernel_large_mean(kernel_device: torch.device) -> None:
    x = 1000 + torch.randn(1, 2, 8, 8, 9)
    expected = norm_act(x.double(), backend="reference").float()
    found = norm_act(x.to(kernel_device), backend="triton").cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_kernel_constant_channel(kernel_device: torch.device) -> None:
    x = torch.full((1, 1, 2, 2, 2), 5.0, requires_grad=True, device=kernel_device)
    out = norm_act(x, backend="triton")
    out.sum().backward()
    assert out.abs().max() == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_kernel_half(dtype: torch.dtype, kernel_device: torch.device) -> None:
    """Computed in float32: only the result, and the output that the gradient is made from, are rounded."""
    x = torch.randn(2, 3, 4, 5, 6).to(kernel_device, dtype).requires_grad_()
    single = x.detach().float().requires_grad_()
    out, expected = norm_act(x, backend="triton"), norm_act(single, backend="triton")
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=eps, atol=1e-5)
    grad = torch.randn(out.shape).to(kernel_device, dtype)
    (found,), (wanted,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, single, grad.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=eps, atol=2 * eps)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.norm_act.kernel")  # registers the operator
    x = torch.randn(2, 3, 3, 4, 5, device=kernel_device, requires_grad=True)
    torch.library.opcheck(torch.ops.monai_registration.norm_act_triton.default, (x, 0.1, 1e-5))
    out, rstd = torch.ops.monai_registration.norm_act_triton(x.detach(), 0.1, 1e-5)
    arguments = (torch.randn(2, 3, 3, 4, 5, device=kernel_device), out, rstd, 0.1)
    torch.library.opcheck(torch.ops.monai_registration.norm_act_triton_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    x = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: norm_act(a, backend=backend), (x,))


def test_opcheck() -> None:
    x = torch.randn(2, 3, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.monai_registration.norm_act.default, (x, 0.1, 1e-5))
    out, rstd = torch.ops.monai_registration.norm_act(x.detach(), 0.1, 1e-5)
    arguments = (torch.randn(2, 3, 3, 4, 5), out, rstd, 0.1)
    torch.library.opcheck(torch.ops.monai_registration.norm_act_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_keeps_dtype(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(1, 2, 4, 5, 6).to(dtype)
    out = norm_act(x, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), norm_act(x.float()), rtol=2e-2, atol=2e-2)


X = torch.zeros(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"x": X[0]}, r"norm_act\(\) 'x' must have shape \(B, C, I, J, K\), got \(2, 3, 4, 5\)"),
        ({"x": X.int()}, r"norm_act\(\) 'x' must be floating point, got torch.int32"),
        ({"x": 1.0}, r"norm_act\(\) 'x' must be a torch.Tensor, got float"),
        ({"x": X[:, :, :, :0]}, r"norm_act\(\) 'x' must have no empty axis, got \(1, 2, 3, 0, 5\)"),
        ({"slope": 0.0}, r"norm_act\(\) 'slope' must be > 0, got 0.0"),
    ),
)
def test_rejects(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        norm_act(**({"x": X} | change))


def test_rejects_backend(refused: Callable) -> None:
    refused(norm_act, {"x": X})
