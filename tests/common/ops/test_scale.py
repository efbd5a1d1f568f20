"""halve, double and box_mean against torch's pooling and interpolation, and each layer against the reference."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from common.ops.scale import box_mean, double, halve

OPS = {
    "halve": (halve, lambda x: F.avg_pool3d(x, 2)),
    "double": (double, lambda x: F.interpolate(2 * x, scale_factor=2, mode="trilinear", align_corners=True)),
    "box_mean": (box_mean, lambda x: F.avg_pool3d(x, 3, stride=1, padding=1)),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ("reference", "lean"))
def test_known_values(name: str, backend: str) -> None:
    op, torch_has = OPS[name]
    x = torch.randn(2, 3, 4, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(op(x, backend=backend), torch_has(x))


@pytest.mark.parametrize("backend", ("lean", "triton"))
@pytest.mark.parametrize("name", ("halve", "double"))
def test_kernel_matches_reference(name: str, backend: str, arrange: Callable, assert_backends_agree: Callable) -> None:
    inputs = {"x" if name == "halve" else "disp": torch.randn(2, 3, 4, 6, 2)}
    assert_backends_agree(OPS[name][0], inputs, arrange, backend=backend)


def test_kernel_box_mean(arrange: Callable, kernel_device: torch.device) -> None:
    x = torch.randn(2, 5, 3, 4, 5)
    found = box_mean(arrange(x.to(kernel_device)), backend="triton").cpu()
    torch.testing.assert_close(found, box_mean(x, backend="reference"))


def test_kernel_one_voxel(kernel_device: torch.device) -> None:
    x = torch.tensor([3.0], device=kernel_device).view(1, 1, 1, 1, 1)
    assert torch.equal(double(x, backend="triton"), torch.full((1, 1, 2, 2, 2), 6.0, device=kernel_device))
    assert box_mean(x, backend="triton").item() == pytest.approx(3 / 27)


@pytest.mark.parametrize("name", ("halve", "box_mean"))
def test_stays_channels_last(name: str) -> None:
    x = torch.randn(1, 4, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d).requires_grad_(name == "halve")
    out = OPS[name][0](x)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    if name == "halve":
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert grad.is_contiguous(memory_format=torch.channels_last_3d)


def test_gradcheck() -> None:
    x = torch.randn(1, 2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(halve, (x,)) and torch.autograd.gradcheck(double, (x,))


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.scale.kernel")  # registers the operators
    x = torch.randn(1, 2, 2, 4, 2, device=kernel_device)
    for name in ("halve", "double", "box_mean"):
        op = getattr(torch.ops.monai_registration, f"{name}_triton").default
        torch.library.opcheck(op, (x.clone().requires_grad_(name != "box_mean"),))


def test_kernel_repeats_under_deterministic_algorithms(kernel_device: torch.device) -> None:
    """torch's own trilinear interpolation has no repeatable gradient on CUDA and refuses."""
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(1, 3, 3, 4, 5, device=kernel_device, requires_grad=True)
        double(x, backend="triton").square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("op", "x", "text"),
    (
        (halve, torch.zeros(1, 1, 3, 4, 4), r"halve\(\) 'x' must have even spatial sizes, got \(3, 4, 4\)"),
        (double, torch.zeros(1, 3, 4, 4), r"double\(\) 'disp' must have shape \(B, C, I, J, K\)"),
        (box_mean, torch.zeros(1, 1, 3, 4, 4).int(), r"box_mean\(\) 'x' must be floating point"),
    ),
)
def test_rejects(op: Callable, x: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        op(x)


@pytest.mark.parametrize("name", OPS)
def test_rejects_backend(name: str, refused: Callable) -> None:
    refused(OPS[name][0], {"x" if name != "double" else "disp": torch.zeros(1, 1, 2, 2, 2)})
