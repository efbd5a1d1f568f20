"""box_sum: known values, each layer against the formula, its gradients, what it refuses."""

from collections.abc import Callable

import pytest
import torch

from common.ops import box_sum

BACKENDS = ("reference", "lean", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values(backend: str, kernel_device: torch.device) -> None:
    """Of one voxel a cube of ones, cut at the border; of ones the number of voxels inside."""
    x = torch.zeros(1, 1, 4, 5, 6, device=kernel_device if backend == "triton" else "cpu")
    x[0, 0, 1, 2, 0] = 2
    expected = torch.zeros_like(x)
    expected[0, 0, :3, 1:4, :2] = 2
    assert torch.equal(box_sum(x, 3, backend=backend), expected)
    assert torch.equal(box_sum(x, 1, backend=backend), x)
    ones = box_sum(torch.ones_like(x), 9, backend=backend)
    assert float(ones[0, 0, 2, 2, 2]) == 4 * 5 * 6 and float(ones[0, 0, 0, 0, 0]) == 4 * 5 * 5


@pytest.mark.parametrize("backend", ("lean", "triton"))
@pytest.mark.parametrize("window", (3, 7))
def test_kernel_matches_reference(
    backend: str, window: int, arrange: Callable, assert_backends_agree: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows within the grid and wider than it; several programs."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        monkeypatch.setattr("common.ops.box.kernel.BLOCK", 64)
    given = {"x": torch.randn(2, 3, 4, 5, 6)}
    assert_backends_agree(lambda x, backend: box_sum(x, window, backend=backend), given, arrange, backend=backend)


def test_kernel_half(assert_half_kernel_agrees: Callable) -> None:
    given = {"x": torch.randn(1, 2, 3, 4, 5)}
    assert_half_kernel_agrees(lambda x, backend: box_sum(x, 3, backend=backend), given)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    x = torch.randn(1, 2, 3, 2, 4, device=kernel_device, requires_grad=True)
    box_sum(x, 3, backend="triton")  # registers the operator
    torch.library.opcheck(torch.ops.monai_registration.box_sum_triton.default, (x, 3))


@pytest.mark.parametrize("backend", ("reference", "lean"))
def test_gradcheck(backend: str) -> None:
    x = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    call = lambda x: box_sum(x, 3, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(lambda x: call(x).square(), (x,))


def test_rejects(refused: Callable) -> None:
    with pytest.raises(ValueError, match=r"box_sum\(\) 'x' must"):
        box_sum(torch.zeros(3, 3, 3), 3)
    for window in (0, 2, -3):
        with pytest.raises(ValueError, match=rf"box_sum\(\) 'window' must be odd and >= 1, got {window}"):
            box_sum(torch.zeros(1, 1, 3, 3, 3), window)
    refused(box_sum, {"x": torch.zeros(1, 1, 3, 3, 3), "window": 3})
