"""Displacement fields against affine maps, whose composition, flow, inverse and Jacobian are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common import fields
from common.ops import warp


def affine_field(matrix: Tensor, size: tuple[int, int, int], *, about: Tensor | None = None) -> Tensor:
    """Displacement (A - 1)(x - about) in float64; `about` defaults to the middle of the grid."""
    x = fields.identity(size, torch.zeros((), dtype=torch.float64))
    middle = (torch.tensor(size, dtype=torch.float64) - 1) / 2 if about is None else about
    relative = x - middle.view(1, 3, 1, 1, 1)
    return torch.einsum("ca,baijk->bcijk", matrix - torch.eye(3, dtype=torch.float64), relative)


def waves(size: tuple[int, int, int], amplitude: float, seed: int) -> Tensor:
    """Smooth displacement up to about `amplitude` voxels that fades to zero at the border."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.zeros(1, 3, 6, 6, 6, dtype=torch.float64)
    coarse[..., 1:-1, 1:-1, 1:-1] = torch.rand(1, 3, 4, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    return amplitude * torch.nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)


def inner(x: Tensor, margin: int) -> Tensor:
    return x[(..., *(slice(margin, -margin),) * 3)]


def smooth_image(size: tuple[int, int, int]) -> Tensor:
    i, j, k = fields.identity(size, torch.zeros((), dtype=torch.float64))[0]
    return ((i / 5).sin() + (j / 6 + 0.3).cos() * (k / 7).sin() + 0.05 * i)[None, None]


def ramp_image(size: tuple[int, int, int]) -> Tensor:
    """Linear interpolation of it is exact, so that the composition law holds to rounding."""
    i, j, k = fields.identity(size, torch.zeros((), dtype=torch.float64))[0]
    return (i + 2 * j - 3 * k)[None, None]


def test_identity() -> None:
    x = fields.identity((2, 3, 4), torch.zeros(1, dtype=torch.float16))
    assert x.shape == (1, 3, 2, 3, 4) and x.dtype == torch.float32
    assert x[0, :, 1, 2, 3].tolist() == [1.0, 2.0, 3.0]
    assert x[0, :, 1, 0, 2].tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(("image", "tolerance"), ((ramp_image, 1e-9), (smooth_image, 0.03)))
def test_compose_is_warp_after_warp(image: Callable, tolerance: float) -> None:
    """Warping by compose(first, then) = warping by first, and the result by then; the other order is another map."""
    size = (20, 22, 24)
    moving = image(size)
    first, then = waves(size, 2.0, 1), waves(size, 2.0, 2)
    expected = warp(warp(moving, first), then)
    difference = inner(warp(moving, fields.compose(first, then)) - expected, 4).abs().max()
    swapped = inner(warp(moving, fields.compose(then, first)) - expected, 4).abs().max()
    assert difference <= tolerance
    assert swapped > 0.1 > 3 * tolerance


def test_compose_affine() -> None:
    """then(x) + first(x + then(x)) of two affine maps that do not commute is A_first A_then - 1."""
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.9, -0.2], [0.2, 0.9]])
    shear = torch.eye(3, dtype=torch.float64)
    shear[0, 2] = 0.3
    size = (12, 13, 14)
    first, then = affine_field(turn, size), affine_field(shear, size)
    got = fields.compose(first, then)
    torch.testing.assert_close(inner(got, 3), inner(affine_field(turn @ shear, size), 3), rtol=0, atol=1e-9)
    assert inner(got - affine_field(shear @ turn, size), 3).abs().max() > 0.2


def test_compose_padding() -> None:
    """Where `then` leaves the grid, `first` keeps its border value or counts as zero."""
    first, then = torch.full((1, 3, 4, 4, 4), 2.0), torch.zeros(1, 3, 4, 4, 4)
    then[:, 2] = 5.0
    assert torch.equal(fields.compose(first, then), first + then)
    assert torch.equal(fields.compose(first, then, padding="zeros"), then)


def test_integrate_constant() -> None:
    velocity = torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1, 1).expand(2, 3, 6, 7, 8)
    torch.testing.assert_close(fields.integrate(velocity), velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", (0, 1, 7))
def test_integrate_linear(steps: int) -> None:
    """Velocity -a (x - m) shrinks towards m: scaling and squaring gives (1 - a / 2^n)^(2^n), which tends to exp(-a)."""
    size, a = (9, 10, 11), 0.6
    unit = affine_field(torch.zeros(3, 3, dtype=torch.float64), size)  # -(x - m)
    expected = 1 - (1 - a / 2**steps) ** (2**steps)
    got = fields.integrate(a * unit, steps=steps)
    torch.testing.assert_close(got, expected * unit, rtol=0, atol=1e-9)
    if steps == 7:
        torch.testing.assert_close(got, (1 - torch.tensor(-a, dtype=torch.float64).exp()) * unit, rtol=2e-3, atol=1e-9)


def test_integrate_backwards_is_inverse() -> None:
    velocity = waves((20, 18, 22), 1.0, 3)
    forward, backward = fields.integrate(velocity), fields.integrate(-velocity)
    error = fields.inverse_error(forward, backward)
    assert error.mean() < 0.02 and error.max() < 0.2  # what interpolation leaves at the kinks of `waves`
    assert error.max() < 0.5 * fields.inverse_error(forward, -forward).max()  # the negative is no inverse
    assert fields.jacobian_determinant(forward).min() > 0


def test_invert() -> None:
    disp = waves((20, 18, 22), 1.0, 4)
    inverse = fields.invert(disp, tolerance=1e-9)
    error = fields.inverse_error(disp, inverse)
    assert error.shape == (1, 1, 20, 18, 22)
    assert fields.inverse_error(disp, -disp).max() > 0.5  # the negative is no inverse
    assert error.max() < 1e-6


def test_invert_affine() -> None:
    matrix = torch.diag(torch.tensor([1.25, 1.0, 1.1], dtype=torch.float64))
    matrix[1, 0] = 0.1
    size = (12, 12, 12)
    inverse = fields.invert(affine_field(matrix, size), tolerance=1e-9)
    torch.testing.assert_close(inner(inverse, 2), inner(affine_field(matrix.inverse(), size), 2), rtol=0, atol=1e-6)


def test_invert_where_the_undamped_iteration_diverges() -> None:
    """x -> 2.5 x about the centre: D disp = 1.5 I; the inverse is known, disp * -1 / 2.5."""
    size = (16, 18, 20)
    centred = fields.identity(size, torch.zeros(1)) - (torch.tensor(size).view(1, 3, 1, 1, 1) - 1) / 2
    disp = 1.5 * centred
    inner = (..., *[slice(4, -4)] * 3)  # the border is repeated outside the grid: nothing to do with the formula
    torch.testing.assert_close(fields.invert(disp)[inner], (-0.6 * centred)[inner], atol=5e-3, rtol=0)
    plain = -disp
    for _ in range(60):
        plain = -warp(disp, plain)
    assert (plain + 0.6 * centred)[inner].abs().max() > 1


def test_round_trip() -> None:
    """At single points, between voxels too: back to the start where T is one-to-one, elsewhere where it folds."""
    disp = waves((20, 18, 22), 1.0, 4)
    points = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 13 + 2
    assert fields.round_trip(disp[0], points, tolerance=1e-9).abs().max() < 1e-6
    fold = torch.zeros(3, 20, 4, 4, dtype=torch.float64)
    fold[0] = (2.0 * (torch.arange(20) < 10))[:, None, None]  # both 8 and 9.x arrive beyond 10
    line = torch.tensor([[3.0, 9.0, 15.0], [1, 1, 1], [2, 2, 2]], dtype=torch.float64)
    back = fields.round_trip(fold, line).norm(dim=0)
    assert back[0] < 1e-2 and back[2] < 1e-2 and back[1] > 0.5


def test_inverse_error_value() -> None:
    disp = torch.zeros(1, 3, 4, 4, 4)
    disp[:, 0], disp[:, 1] = 3.0, 4.0
    torch.testing.assert_close(fields.inverse_error(disp, torch.zeros_like(disp)), torch.full((1, 1, 4, 4, 4), 5.0))


@pytest.mark.parametrize("size", ((9, 13, 6), (5, 3, 8), (17, 13, 22)))
def test_resize_disp(size: tuple[int, int, int]) -> None:
    """A linear map stays the same map: x' = s x per axis gives the field S (A - 1) S^-1 x'."""
    old = (9, 7, 6)
    matrix = torch.tensor([[1.1, 0.2, -0.1], [0.0, 0.8, 0.3], [0.15, -0.25, 1.2]], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    scale = torch.tensor([(n - 1) / (o - 1) for n, o in zip(size, old)], dtype=torch.float64)
    expected = affine_field(scale.diag() @ matrix @ (1 / scale).diag(), size, about=zero)
    got = fields.resize_disp(affine_field(matrix, old, about=zero), size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_jacobian_determinant() -> None:
    """Constant det A for an affine field, at the border too; off-diagonal entries in both triangles."""
    matrix = torch.tensor([[1.2, 0.3, -0.1], [0.2, 0.9, 0.4], [-0.3, 0.1, 1.1]], dtype=torch.float64)
    disp = torch.cat([affine_field(matrix, (4, 5, 6)), torch.zeros(1, 3, 4, 5, 6, dtype=torch.float64)])
    got = fields.jacobian_determinant(disp)
    assert got.shape == (2, 1, 4, 5, 6)
    torch.testing.assert_close(got[0], torch.linalg.det(matrix).expand(1, 4, 5, 6), rtol=0, atol=1e-9)
    torch.testing.assert_close(got[1], torch.ones_like(got[1]), rtol=0, atol=0)


def test_jacobian_determinant_two_voxels() -> None:
    disp = affine_field(torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)), (2, 2, 2))
    torch.testing.assert_close(fields.jacobian_determinant(disp), torch.full((1, 1, 2, 2, 2), 2.0).double())


def test_folding_is_seen() -> None:
    """Neighbours that swap places fold there and nowhere else; a mirrored axis folds everywhere."""
    disp = torch.zeros(1, 3, 9, 4, 4)
    disp[:, 0, 3], disp[:, 0, 5] = 1.5, -1.5
    det = fields.jacobian_determinant(disp)[0, 0, :, 1, 1]
    assert det[4] == -0.5  # (5 - 1.5 - (3 + 1.5)) / 2
    assert (det[[0, 1, 7, 8]] > 0).all()
    mirror = affine_field(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)), (4, 4, 4))
    assert (fields.jacobian_determinant(mirror) < 0).all()


def test_jacobian_determinant_rejects() -> None:
    with pytest.raises(ValueError, match=r"jacobian_determinant\(\) 'disp' must have at least 2 voxels along each"):
        fields.jacobian_determinant(torch.zeros(1, 3, 4, 1, 4))


def test_unfold_removes_folds_and_leaves_the_rest() -> None:
    coords = fields.identity((24, 24, 24), torch.zeros(1))
    disp = 0.3 * torch.sin(coords / 5)
    folded = disp.clone()
    folded[:, 0, 11:13] += torch.tensor([2.5, -2.5]).view(1, 2, 1, 1)
    assert (fields.jacobian_determinant(folded) <= 0).any()
    smoothed = fields.unfold(folded)
    assert not (fields.jacobian_determinant(smoothed) <= 0).any()
    torch.testing.assert_close(smoothed[:, :, :3], folded[:, :, :3])
    assert fields.unfold(disp) is disp
