"""Losses against dense formulas, MONAI, and values worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from common import losses
from common.ops import warp


def dense_sum(x: Tensor, window: int) -> Tensor:
    kernel = torch.ones(x.shape[1], 1, *(window,) * 3, dtype=x.dtype)
    return F.conv3d(x, kernel, padding=window // 2, groups=x.shape[1])


def dense_cc(a: Tensor, b: Tensor, window: int, eps: float) -> Tensor:
    """Squared local correlation, each sum by a full convolution."""
    n = window**3
    sum_a, sum_b = dense_sum(a, window), dense_sum(b, window)
    cov = dense_sum(a * b, window) - sum_a * sum_b / n
    var_a, var_b = dense_sum(a * a, window) - sum_a**2 / n, dense_sum(b * b, window) - sum_b**2 / n
    return cov**2 / (var_a * var_b + eps)


def pair(size: tuple[int, int, int] = (11, 12, 13), batch: int = 2, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Two textured scans in [0, 1] that have something in common."""
    a = torch.rand(batch, channels, *size)
    return a, 0.6 * a + 0.4 * torch.rand(batch, channels, *size)


def inside(size: tuple[int, int, int], margin: int) -> Tensor:
    """Mask (1, 1, I, J, K) of the voxels whose window lies in the grid."""
    mask = torch.zeros(1, 1, *size)
    mask[(..., *(slice(margin, -margin),) * 3)] = 1
    return mask


@pytest.mark.parametrize("window", (1, 3, 5, 7, 9))
def test_box_sum(window: int) -> None:
    x = torch.randn(2, 3, 7, 10, 9, dtype=torch.float64)
    torch.testing.assert_close(losses.box_sum(x, window), dense_sum(x, window), rtol=1e-12, atol=1e-12)


def test_box_sum_wider_than_grid() -> None:
    x = torch.randn(1, 1, 2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(losses.box_sum(x, 9), dense_sum(x, 9), rtol=1e-12, atol=1e-12)


def test_box_sum_of_channels_last() -> None:
    x = torch.randn(2, 3, 7, 10, 9, dtype=torch.float64).to(memory_format=torch.channels_last_3d)
    for window in (1, 3, 9):
        torch.testing.assert_close(losses.box_sum(x, window), dense_sum(x, window), rtol=1e-12, atol=1e-12)


def test_box_sum_under_autocast() -> None:
    """Sums keep the precision of their input."""
    x = torch.rand(1, 2, 12, 11, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses.box_sum(x, 5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, dense_sum(x, 5), rtol=1e-5, atol=1e-5)


def test_box_sum_gradcheck() -> None:
    x = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: losses.box_sum(a, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda a: losses.box_sum(a, 3).square(), (x,))


@pytest.mark.parametrize("window", (0, 4, -3))
def test_box_sum_rejects(window: int) -> None:
    with pytest.raises(ValueError, match=rf"box_sum\(\) 'window' must be odd and >= 1, got {window}"):
        losses.box_sum(torch.zeros(1, 1, 3, 3, 3), window)


def test_lncc_same_as_monai() -> None:
    """Textured scans, whose variances are far above MONAI's floor and our eps."""
    a, b = pair()
    other = LocalNormalizedCrossCorrelationLoss(
        spatial_dims=3, kernel_size=9, kernel_type="rectangular", smooth_nr=0.0, smooth_dr=1e-7
    )
    torch.testing.assert_close(losses.lncc(a, b), other(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", (1, 2))
@pytest.mark.parametrize("window", (3, 5, 9))
def test_lncc_dense_formula(window: int, channels: int) -> None:
    """Value and both gradients, in low contrast, where eps counts."""
    a, b = (0.5 + 0.05 * x for x in pair(channels=channels))
    mine = [x.clone().requires_grad_() for x in (a, b)]
    theirs = [x.double().requires_grad_() for x in (a, b)]
    value = losses.lncc(*mine, window=window)
    expected = -dense_cc(*theirs, window, 1e-5).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-4)
    for name, got, true in zip("ab", torch.autograd.grad(value, mine), torch.autograd.grad(expected, theirs)):
        error = (got.double() - true).norm() / true.norm()
        assert error < 2e-3, f"gradient to {name} off by {error:.1e} of its norm"


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("chunk", (1, 1000, 2**20))
def test_lncc_gradients(chunk: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the hand-written backward pass against autograd's through the dense formula, volume by volume, two at
    a time (1000 voxels) and all together, with weights for every channel, and for either scan alone."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    a, b = (torch.rand(2, 3, 8, 6, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(2, 3, 8, 6, 7, dtype=torch.float64) if masked else None
    cc = dense_cc(a, b, 5, 1e-5)
    expected = -(cc if weight is None else cc * weight).sum() / (cc.numel() if weight is None else weight.sum())
    value = losses.lncc(a, b, window=5, mask=weight)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    true = torch.autograd.grad(3 * expected, (a, b))
    torch.testing.assert_close(torch.autograd.grad(3 * value, (a, b)), true, rtol=1e-8, atol=1e-12)
    for n, (x, y) in enumerate(((a, b.detach()), (a.detach(), b))):
        (alone,) = torch.autograd.grad(3 * losses.lncc(x, y, window=5, mask=weight), (a, b)[n])
        torch.testing.assert_close(alone, true[n], rtol=1e-8, atol=1e-12)


def test_lncc_identical_is_minus_one() -> None:
    a, b = pair()
    assert losses.lncc(a, a).item() == pytest.approx(-1, abs=1e-5)
    assert -0.9 < losses.lncc(a, b) < -0.3


def test_lncc_ignores_scale_and_offset() -> None:
    """Inside; at the border the zeros beyond the grid make an offset visible."""
    a, b = pair()
    mask = inside(a.shape[2:], 4)
    expected = losses.lncc(a, b, mask=mask)
    torch.testing.assert_close(losses.lncc(a, 0.3 * b + 0.5, mask=mask), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.lncc(a, -b, mask=mask), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(losses.lncc(a, 2 * b), losses.lncc(a, b), rtol=0, atol=1e-5)


def test_lncc_flat_scores_zero() -> None:
    a, _ = pair()
    flat = torch.full_like(a, 0.7)
    mask = inside(a.shape[2:], 4)
    assert losses.lncc(flat, flat, mask=mask).abs() < 1e-2
    assert losses.lncc(a, flat, mask=mask).abs() < 1e-2


def test_lncc_mask() -> None:
    """The mean is over the weights of the mask, one mask for every channel."""
    a, b = pair(channels=2)
    mask = torch.rand(2, 1, *a.shape[2:])
    cc = dense_cc(a.double(), b.double(), 5, 1e-5)
    expected = -(cc * mask).sum() / (2 * mask.sum())
    torch.testing.assert_close(losses.lncc(a, b, window=5, mask=mask).double(), expected, rtol=0, atol=1e-5)
    assert losses.lncc(a, b, mask=torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("masked", (False, True))
def test_lncc_gradcheck(masked: bool) -> None:
    a, b = (x.double().requires_grad_() for x in pair((4, 3, 4), batch=1))
    mask = torch.rand(1, 1, 4, 3, 4, dtype=torch.float64) if masked else None
    assert torch.autograd.gradcheck(lambda x, y: losses.lncc(x, y, window=3, mask=mask), (a, b))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_lncc_half_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in pair())
    value = losses.lncc(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses.lncc(a.float(), b.float()), rtol=0, atol=0)


def test_mse() -> None:
    a = torch.zeros(1, 1, 2, 2, 2)
    b = a.clone()
    b[0, 0, 0, 0, 0] = 4.0
    assert losses.mse(a, b) == 2.0 and losses.mse(a, a) == 0.0


def test_diffusion_linear_field() -> None:
    """Slope 2 of one component along j, 1 of another along k: mean over three components and three axes."""
    disp = torch.zeros(2, 3, 4, 5, 6)
    disp[:, 0] = 2 * torch.arange(5.0).view(5, 1) + 7
    disp[:, 2] = torch.arange(6.0)
    torch.testing.assert_close(losses.diffusion(disp), torch.tensor((4 + 1) / 9))
    assert losses.diffusion(torch.full_like(disp, 3.0)) == 0


@pytest.mark.parametrize("axis", (2, 3, 4))
def test_diffusion_sees_alternation(axis: int) -> None:
    """A field that alternates by +-1 from voxel to voxel differs by 2 everywhere along that axis."""
    sign = 1 - 2 * (torch.arange(6.0) % 2)
    disp = sign.view([6 if a == axis else 1 for a in range(5)]).expand(1, 3, 6, 6, 6)
    torch.testing.assert_close(losses.diffusion(disp), torch.tensor(4 / 3))


def test_diffusion_gradcheck() -> None:
    disp = torch.randn(1, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.diffusion, (disp,))


@pytest.mark.parametrize("sharpness", (0.0, 1.0, 25.0))
def test_edge_weighted_diffusion_formula(sharpness: float) -> None:
    """Voxel by voxel, in float64; without edges or sharpness it is the plain diffusion."""
    disp, fixed = torch.randn(2, 3, 4, 5, 3, dtype=torch.float64), torch.rand(2, 2, 4, 5, 3, dtype=torch.float64)
    total = 0.0
    for axis in range(3):
        terms = []
        for x in np.ndindex(4, 5, 3):
            ahead = [tuple(n + (a == b) for b, n in enumerate(x)) for a in range(3)]
            inside = [all(n < m for n, m in zip(y, (4, 5, 3))) for y in ahead]
            if not inside[axis]:
                continue
            steps = [fixed[(..., *y)] - fixed[(..., *x)] for y, known in zip(ahead, inside) if known]
            weight = torch.exp(-sharpness * sum(step.square().sum(1, keepdim=True) for step in steps))
            terms.append((weight * (disp[(..., *ahead[axis])] - disp[(..., *x)])).square().mean())
        total += sum(terms) / len(terms) / 3
    torch.testing.assert_close(losses.edge_weighted_diffusion(disp, fixed, sharpness=sharpness), total)
    if sharpness == 0:
        torch.testing.assert_close(total, losses.diffusion(disp))
    flat = losses.edge_weighted_diffusion(disp, torch.full_like(fixed, 0.4), sharpness=sharpness)
    torch.testing.assert_close(flat, losses.diffusion(disp))


def test_edge_weighted_diffusion_lets_organs_slide() -> None:
    """A jump of the field costs exp(-2 k) of its price where the scan jumps by 1 in the same place, all elsewhere."""
    disp, fixed = torch.zeros(1, 3, 6, 6, 6), torch.zeros(1, 1, 6, 6, 6)
    disp[:, 1, 3:] = 2.0
    fixed[:, :, 3:] = 1.0
    price = losses.diffusion(disp)
    found = losses.edge_weighted_diffusion(disp, fixed, sharpness=1.5)
    torch.testing.assert_close(found, price * torch.tensor(-3.0).exp())
    torch.testing.assert_close(losses.edge_weighted_diffusion(disp, fixed.roll(2, 2), sharpness=1.5), price)


def test_edge_weighted_diffusion_gradcheck() -> None:
    disp = torch.randn(1, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    fixed = torch.rand(1, 1, 3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: losses.edge_weighted_diffusion(d, fixed, sharpness=3.0), (disp,))


def test_dice() -> None:
    """Channel 0: 2 of 4 and 2 voxels shared by 1, 2 * 1 / 4; channel 1: equal; channel 2: empty in both, left out."""
    a, b = torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 3, 1, 2, 2)
    a[0, 0, 0, 0], b[0, 0, 0, :, 0] = 1, 1
    a[0, 1, 0, 1, 1] = b[0, 1, 0, 1, 1] = 1
    assert losses.dice(a, b).item() == pytest.approx(1 - (0.5 + 1) / 2, abs=1e-4)
    assert losses.dice(b, b).item() == pytest.approx(0, abs=1e-4)
    b[0, 2, 0, 0, 0] = 1  # no longer empty in both: it scores 0
    assert losses.dice(a, b).item() == pytest.approx(1 - (0.5 + 1 + 0) / 3, abs=1e-4)
    half = torch.full((1, 1, 2, 2, 2), 0.5)
    assert losses.dice(half, torch.ones_like(half)).item() == pytest.approx(1 - 2 * 4 / 12, abs=1e-4)


def one_hot(label: Tensor, number: int) -> Tensor:
    """Masks (B, number, I, J, K) of the labels 1, 2, ..., number."""
    return (label == torch.arange(1, number + 1).view(1, -1, 1, 1, 1)).float()


@pytest.mark.parametrize("size", ((9, 8, 7), (1, 6, 5)))
def test_label_dice_is_dice_of_warped_masks(size: tuple[int, int, int]) -> None:
    """Value and gradient against a mask for each label; unknown voxels, an unused label, a motion out of the grid."""
    moving, fixed = (torch.randint(-1, 7, (2, 1, *size)) for _ in range(2))
    moving[moving == 4], fixed[fixed == 4] = 0, 0
    disp = (3 * torch.randn(2, 3, *size)).requires_grad_()
    found = losses.label_dice(disp, moving.float(), fixed.float())
    known = warp((moving >= 0).float(), disp.detach()) * (fixed >= 0)
    masks = warp(one_hot(moving, 6), disp) * known, one_hot(fixed, 6) * known
    expected = sum(losses.dice(masks[0][n : n + 1], masks[1][n : n + 1]) for n in (0, 1)) / 2
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(value, disp)[0] for value in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_label_dice_known_values() -> None:
    """A step of two voxels known in closed form; what is unknown in one of the maps; maps without a label."""
    moving, fixed = torch.zeros(1, 1, 8, 6, 5), torch.zeros(1, 1, 8, 6, 5)
    moving[..., 2:4, :, :], fixed[..., 4:6, :, :] = 2, 2  # two slices, moved by two voxels
    disp = torch.zeros(1, 3, 8, 6, 5)
    assert losses.label_dice(disp, moving, fixed) == 1
    disp[:, 0] = -1
    assert losses.label_dice(disp, moving, fixed).item() == pytest.approx(0.5, abs=1e-4)  # 2 x 1 slice of 2 + 2
    disp[:, 0] = -2
    assert losses.label_dice(disp, moving, fixed).item() == pytest.approx(0, abs=1e-4)
    fixed[..., 5, :, :] = -1  # then one slice of each is compared
    assert losses.label_dice(disp, moving, fixed).item() == pytest.approx(0, abs=1e-4)
    moving[..., 2:4, :3, :] = -1  # as the half of the moving scan's slices, of which nobody says what they are
    assert losses.label_dice(disp, moving, fixed).item() == pytest.approx(0, abs=1e-4)
    for without in (-torch.ones_like(moving), torch.zeros_like(moving)):
        assert losses.label_dice(disp, without, without) == 0
    assert losses.label_dice(disp, -torch.ones_like(moving), fixed) == 0
    disp.fill_(torch.nan)  # no error: a trainer with a gradient scaler skips the step
    assert losses.label_dice(disp, moving, fixed).isnan()


def test_registration_loss_with_edges() -> None:
    """The fixed scan is the one whose edges count."""
    moving, fixed = pair((8, 9, 7))
    disp, image = 0.7 * torch.randn(2, 3, 8, 9, 7), torch.cat([moving, fixed], 1)
    plain = losses.RegistrationLoss("mse", smoothness=0.0)(disp, image)
    loss = losses.RegistrationLoss("mse", smoothness=0.25, edges=2.0)(disp, image)
    expected = losses.edge_weighted_diffusion(disp, fixed, sharpness=2.0)
    torch.testing.assert_close(loss - plain, 0.25 * expected)
    assert (losses.edge_weighted_diffusion(disp, moving, sharpness=2.0) - expected).abs() > 1e-3


@pytest.mark.parametrize("similarity", ("lncc", "mse"))
def test_registration_loss(similarity: str) -> None:
    """moving comes first in the packed image; every term and the weight count."""
    moving, fixed = pair((8, 9, 7))
    disp = 0.7 * torch.randn(2, 3, 8, 9, 7)
    loss = losses.RegistrationLoss(similarity, window=5, smoothness=0.25)(disp, torch.cat([moving, fixed], 1))
    warped = warp(moving, disp)
    fit = losses.lncc(warped, fixed, window=5) if similarity == "lncc" else losses.mse(warped, fixed)
    torch.testing.assert_close(loss, fit + 0.25 * losses.diffusion(disp))


def test_registration_loss_rejects() -> None:
    with pytest.raises(ValueError, match=r"'similarity' must be one of \('lncc', 'mse'\), got 'mi'"):
        losses.RegistrationLoss("mi")
    with pytest.raises(ValueError, match=r"'edges' must be >= 0, got -1"):
        losses.RegistrationLoss(edges=-1)


def test_folding_known_values() -> None:
    """0 where volume is kept; margin - det where an axis is turned round; a field that alternates counts as well."""
    still = torch.zeros(1, 3, 6, 7, 8)
    assert losses.folding(still) == 0
    turned = still.clone()
    turned[:, 0] = -1.5 * torch.arange(6.0).view(6, 1, 1)  # det -0.5 everywhere
    torch.testing.assert_close(losses.folding(turned), torch.tensor(0.7))
    torch.testing.assert_close(losses.folding(turned, margin=0.0), torch.tensor(0.5))
    alternating = still.clone()
    alternating[:, 1] = 1.4 * (torch.arange(7.0) % 2).view(1, 7, 1)  # det 2.4 and -0.4; central differences see 1
    torch.testing.assert_close(losses.folding(alternating), torch.tensor(0.3))


def test_folding_is_part_of_the_loss_and_has_a_gradient() -> None:
    moving, fixed = pair((8, 9, 7))
    disp = (2 * torch.randn(2, 3, 8, 9, 7)).requires_grad_()
    image = torch.cat([moving, fixed], 1)
    plain = losses.RegistrationLoss("mse", smoothness=0.0)(disp, image)
    loss = losses.RegistrationLoss("mse", smoothness=0.0, folding=3.0)(disp, image)
    torch.testing.assert_close(loss - plain, 3 * losses.folding(disp))
    (slope,) = torch.autograd.grad(losses.folding(disp), disp)
    with torch.no_grad():
        assert losses.folding(disp - 5 * slope) < losses.folding(disp)
