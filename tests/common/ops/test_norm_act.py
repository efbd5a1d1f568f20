"""norm_act against torch's instance norm and its own reference."""

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
    refused(norm_act, {"x": X}, has_kernel=False)
