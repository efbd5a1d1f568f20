"""warp against hand-made values, MONAI's Warp, and its own reference."""

import importlib
from collections.abc import Callable

import pytest
import torch
from monai.networks.blocks import Warp
from torch import Tensor

from common.ops import warp

BACKENDS = ("reference", "lean")


def constant(shift: tuple[float, float, float], size: tuple[int, int, int], batch: int = 1) -> Tensor:
    return torch.tensor(shift).view(1, 3, 1, 1, 1).expand(batch, 3, *size).contiguous()


def off_grid(size: tuple[int, int, int], *, batch: int = 1, seed: int = 0, reach: int = 2) -> Tensor:
    """Displacements up to `reach` voxels and at least 0.15 away from every integer, where the formula has a kink."""
    rng = torch.Generator().manual_seed(seed)
    cell = torch.randint(-reach, reach, (batch, 3, *size), generator=rng)
    return cell + 0.15 + 0.7 * torch.rand(batch, 3, *size, generator=rng)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", (0, 1, 2))
def test_known_values(axis: int, backend: str) -> None:
    size = (4, 5, 6)
    image = torch.arange(120.0).view(1, 1, *size)
    step = (30.0, 6.0, 1.0)[axis]
    one = tuple(1.0 if a == axis else 0.0 for a in range(3))

    # pull-back: a displacement of +1 along an axis fetches the next voxel of that axis
    shifted = warp(image, constant(one, size), backend=backend)
    inner = size[axis] - 1
    following = image.narrow(2 + axis, 1, inner)
    torch.testing.assert_close(shifted.narrow(2 + axis, 0, inner), following, rtol=0, atol=1e-4)
    quarter = warp(image, constant(tuple(0.25 * o for o in one), size), backend=backend)
    torch.testing.assert_close((quarter - image).narrow(2 + axis, 0, inner).mean(), torch.tensor(0.25 * step))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_outside(backend: str) -> None:
    image = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 1, 4).expand(1, 1, 2, 2, 4).contiguous()
    disp = constant((0.0, 0.0, 1.75), (2, 2, 4))
    border = warp(image, disp, backend=backend)[0, 0, 0, 0]
    zeros = warp(image, disp, padding="zeros", backend=backend)[0, 0, 0, 0]
    nearest = warp(image, disp, "nearest", "zeros", backend=backend)[0, 0, 0, 0]
    torch.testing.assert_close(border, torch.tensor([2.75, 3.75, 4.0, 4.0]))
    torch.testing.assert_close(zeros, torch.tensor([2.75, 3.75, 1.0, 0.0]))  # fades within one voxel
    torch.testing.assert_close(nearest, torch.tensor([3.0, 4.0, 0.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_nearest_ties(backend: str) -> None:
    """Exactly between two voxels the even one is taken, whatever the length of the axis: labels must not flicker."""
    image = torch.arange(97.0).expand(1, 1, 2, 2, 97)
    out = warp(image, constant((0.0, 0.0, 0.5), (2, 2, 97)), "nearest", backend=backend)
    assert torch.equal(out, (image + 0.5).clamp(max=96).round())


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_one_voxel_axis(backend: str) -> None:
    """Along an axis of one voxel, half a voxel outside keeps half the value, as along any other axis."""
    image = torch.arange(1.0, 10.0).view(1, 1, 1, 3, 3)
    disp = constant((0.5, 0.0, 0.0), (1, 3, 3))
    torch.testing.assert_close(warp(image, disp, backend=backend), image)
    torch.testing.assert_close(warp(image, disp, padding="zeros", backend=backend), 0.5 * image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values_other_grid(backend: str) -> None:
    """The result lives on the grid of the displacement, also where the image is larger."""
    image = torch.arange(5 * 7 * 9.0).view(1, 1, 5, 7, 9)
    out = warp(image, constant((1.0, 2.0, 3.0), (2, 3, 4)), backend=backend)
    torch.testing.assert_close(out, image[:, :, 1:3, 2:5, 3:7], rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_same_as_monai(padding: str, backend: str) -> None:
    image, disp = torch.randn(2, 3, 7, 6, 5), off_grid((7, 6, 5), batch=2)
    expected = Warp(mode="bilinear", padding_mode=padding)(image, disp)
    torch.testing.assert_close(warp(image, disp, padding=padding, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_are_float32(backend: str) -> None:
    """bfloat16 holds no half voxel above 128; x + disp(x) must not be computed in it."""
    image = torch.arange(300.0).expand(1, 1, 2, 2, 300)
    out = warp(image, constant((0.0, 0.0, 0.5), (2, 2, 300)).bfloat16(), backend=backend)
    torch.testing.assert_close(out[..., :-1], image[..., :-1] + 0.5, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_keeps_dtype(dtype: torch.dtype, backend: str) -> None:
    image, disp = torch.randn(1, 2, 4, 5, 6), off_grid((4, 5, 6))
    out = warp(image.to(dtype), disp, backend=backend)
    assert out.dtype == dtype
    expected = warp(image.to(dtype).float(), disp, backend=backend)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_lean_matches_reference(padding: str, arrange: Callable, assert_backends_agree: Callable) -> None:
    inputs = {"image": torch.randn(2, 3, 5, 7, 9), "disp": off_grid((6, 5, 7), batch=2)}
    assert_backends_agree(lambda **kw: warp(**kw, padding=padding), inputs, arrange)


def grid_gradient(backend: str, padding: str, step: float, device: torch.device) -> dict[str, Tensor]:
    """Gradients of a whole-voxel displacement, on which every voxel of the border comes to lie on the border."""
    image, disp = torch.arange(75.0).view(1, 1, 3, 5, 5).square() / 75, torch.full((1, 3, 3, 5, 5), step)
    leaves = [x.to(device).requires_grad_() for x in (image, disp)]
    grads = torch.autograd.grad(warp(*leaves, padding=padding, backend=backend).square().sum(), leaves)
    return dict(zip(("image", "disp"), (x.cpu() for x in grads)))


@pytest.mark.parametrize("step", (0.0, 1.0, -2.0))
@pytest.mark.parametrize("padding", ("border", "zeros"))
@pytest.mark.parametrize("backend", ("lean", "triton"))
def test_gradient_on_the_grid(backend: str, padding: str, step: float, request: pytest.FixtureRequest) -> None:
    """Between two cells the one after counts; at and past a border the coordinate is held, as grid_sample holds it.

    The sizes are such that grid_sample's normalised coordinates are exact.
    """
    device = request.getfixturevalue("kernel_device") if backend == "triton" else torch.device("cpu")
    expected = grid_gradient("reference", padding, step, torch.device("cpu"))
    found = grid_gradient(backend, padding, step, device)
    assert expected["disp"].abs().max() > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-3, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_lean_matches_reference_nearest(padding: str, arrange: Callable, assert_backends_agree: Callable) -> None:
    inputs = {"image": torch.randn(2, 3, 5, 7, 9)}
    disp = arrange(off_grid((6, 5, 7), batch=2))
    assert_backends_agree(lambda **kw: warp(**kw, disp=disp, mode="nearest", padding=padding), inputs, arrange)


@pytest.mark.parametrize(("size", "block"), (((5, 7, 9), 64), ((5, 1, 4), 256)))
@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_kernel_matches_reference(
    padding: str,
    size: tuple[int, int, int],
    block: int,
    arrange: Callable,
    assert_backends_agree: Callable,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Far outside the image, from another grid, an axis of one voxel; several programs of which the last is not full.

    An image gradient sums the shares of up to 30 voxels that meet at a border, each times up to 2, in any order.
    """
    monkeypatch.setattr("common.ops._triton.MAX_BLOCK", block)
    inputs = {"image": torch.randn(2, 5, *size), "disp": off_grid((6, 5, 7), batch=2, reach=5)}
    assert_backends_agree(lambda **kw: warp(**kw, padding=padding), inputs, arrange, backend="triton", atol=3e-5)


@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_kernel_matches_reference_nearest(padding: str, arrange: Callable, assert_backends_agree: Callable) -> None:
    """The gradient to the image; there is none to the displacement."""
    inputs, disp = {"image": torch.randn(2, 5, 5, 7, 9)}, off_grid((6, 5, 7), batch=2, reach=4)

    def nearest(image: Tensor, backend: str) -> Tensor:
        return warp(image, arrange(disp.to(image.device)), "nearest", padding, backend=backend)

    assert_backends_agree(nearest, inputs, arrange, backend="triton")


def test_kernel_nearest_ties(kernel_device: torch.device) -> None:
    """As torch.round: halves go to the even voxel, and what is just below a half does not go up."""
    shift = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, 0.50000006, -0.49999997, 3.4999998, 1e9])
    image = torch.arange(7.0).expand(1, 1, 10, 1, 7)
    disp = torch.zeros(1, 3, 10, 1, 1)
    disp[0, 2, :, 0, 0] = shift  # all from voxel 0 of the last axis, so that the coordinate is not rounded
    out = warp(image.to(kernel_device), disp.to(kernel_device), "nearest", backend="triton")
    assert torch.equal(out.flatten().cpu(), shift.round().clamp(0, 6))


def test_kernel_half(assert_half_kernel_agrees: Callable) -> None:
    inputs = {"image": torch.randn(1, 5, 3, 4, 5), "disp": off_grid((4, 3, 5))}
    assert_half_kernel_agrees(warp, inputs)


@pytest.mark.parametrize("mode", ("linear", "nearest"))
@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_kernel_deterministic(
    padding: str, mode: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With deterministic algorithms the image gradient is summed by sorting: the same numbers, bit for bit each time.

    The interpreter adds in order anyway, so that which way was taken is looked at too.
    """
    kernel = importlib.import_module("common.ops.warp.kernel")
    by_sorting, sorted_sums = kernel._add_by_sorting, []
    monkeypatch.setattr(kernel, "_add_by_sorting", lambda *a: sorted_sums.append(1) or by_sorting(*a))
    image = torch.randn(2, 3, 4, 3, 5, device=kernel_device, requires_grad=True)
    disp = off_grid((5, 4, 6), batch=2, reach=4).to(kernel_device)
    grad = torch.randn(2, 3, 5, 4, 6, device=kernel_device)

    def gradient() -> Tensor:
        return torch.autograd.grad(warp(image, disp, mode, padding, backend="triton"), image, grad)[0]

    usual = gradient()
    assert len(sorted_sums) == (mode == "nearest")  # which has no other way
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        first, second = gradient(), gradient()
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(sorted_sums) == 2 + (mode == "nearest")
    assert torch.equal(first, second)
    torch.testing.assert_close(first, usual, rtol=1e-5, atol=1e-5)


def test_kernel_opcheck(kernel_device: torch.device) -> None:
    importlib.import_module("common.ops.warp.kernel")  # registers the operators
    image = torch.randn(2, 2, 3, 4, 2, device=kernel_device, requires_grad=True)
    disp = off_grid((2, 3, 2), batch=2).to(kernel_device).requires_grad_()
    for nearest in (False, True):
        torch.library.opcheck(torch.ops.monai_registration.warp_triton.default, (image, disp, nearest, True))
        grad = torch.randn(2, 2, 2, 3, 2, device=kernel_device)
        arguments = (grad, image.detach(), disp.detach(), nearest, True, True)
        torch.library.opcheck(torch.ops.monai_registration.warp_triton_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ("border", "zeros"))
def test_gradcheck(padding: str, backend: str) -> None:
    image = torch.randn(2, 2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    disp = off_grid((2, 3, 2), batch=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: warp(a, b, padding=padding, backend=backend), (image, disp))


IMAGE, DISP = torch.zeros(2, 1, 3, 4, 5), torch.zeros(2, 3, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"image": [0.0]}, r"warp\(\) 'image' must be a torch.Tensor, got list"),
        ({"image": IMAGE[0]}, r"warp\(\) 'image' must have shape \(B, C, I, J, K\), got \(1, 3, 4, 5\)"),
        ({"image": IMAGE.int()}, r"warp\(\) 'image' must be floating point, got torch.int32"),
        ({"image": IMAGE[:, :, :0]}, r"warp\(\) 'image' must have no empty axis, got \(2, 1, 0, 4, 5\)"),
        ({"disp": DISP[:, :2]}, r"warp\(\) 'disp' must have 3 channels, got 2"),
        ({"disp": DISP[:1]}, r"warp\(\) 'disp' must have batch 2, got 1"),
        ({"disp": DISP.to("meta")}, r"warp\(\) 'disp' must be on cpu, got meta"),
        ({"mode": "cubic"}, r"warp\(\) 'mode' must be one of \('linear', 'nearest'\), got 'cubic'"),
        ({"padding": "reflection"}, r"warp\(\) 'padding' must be one of \('border', 'zeros'\), got 'reflection'"),
    ),
)
def test_rejects(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        warp(**({"image": IMAGE, "disp": DISP} | change))


def test_rejects_backend(refused: Callable) -> None:
    refused(warp, {"image": IMAGE, "disp": DISP})
