"""Similarity and smoothness losses: functions, with thin modules for configs."""

import torch
from torch import Tensor, nn

from common.ops import warp

BAND_LIMIT = 128  # voxels along an axis up to which a product with a banded matrix beats running sums on a CPU


class _BoxSum(torch.autograd.Function):
    """Sum over a cube of odd width, zeros outside; symmetric, hence its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, window: int) -> Tensor:
        ctx.window = window
        with torch.autocast(x.device.type, enabled=False):  # which would round the matrix products
            for axis in (2, 3, 4):
                banded = x.device.type == "cpu" and x.shape[axis] <= BAND_LIMIT
                x = (_banded_sum if banded else _axis_sum)(x, window, axis)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _BoxSum.apply(grad, ctx.window), None


def _banded_sum(x: Tensor, window: int, axis: int) -> Tensor:
    """Running sum along one axis as a product with a matrix of zeros and ones."""
    n = torch.arange(x.shape[axis], device=x.device)
    band = ((n[:, None] - n).abs() <= window // 2).to(x.dtype)
    if axis == 4:
        return x @ band
    if axis == 3:
        return band @ x
    return (band @ x.flatten(3)).view(x.shape)


def _axis_sum(x: Tensor, window: int, axis: int) -> Tensor:
    """Running sum along one axis by doubling: widths 1, 2, 4, ... are added where `window` has a binary digit.

    Unlike a cumulative sum it subtracts nothing, so that no digits cancel.
    """
    size, radius = x.shape[axis], window // 2
    shape = list(x.shape)
    shape[axis] = size + 2 * radius
    power = x.new_zeros(shape)
    power.narrow(axis, radius, size).copy_(x)
    total, begin, width = None, 0, 1
    while width <= window:
        if window & width:
            part = power.narrow(axis, begin, size)
            total = part.clone() if total is None else total.add_(part)
            begin += width
        width *= 2
        if width <= window:
            length = power.shape[axis] - width // 2
            power = power.narrow(axis, 0, length) + power.narrow(axis, width // 2, length)
    return total


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum over the window^3 cube around each voxel of (B, C, I, J, K); zeros outside. `window` is odd."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"box_sum() 'window' must be odd and >= 1, got {window}")
    return _BoxSum.apply(x, window)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lncc(warped: Tensor, fixed: Tensor, *, window: int = 9, eps: float = 1e-5, mask: Tensor | None = None) -> Tensor:
    """Negative mean of the squared local correlation coefficient.

    cc(x) = cov(x)^2 / (var_warped(x) var_fixed(x) + eps), sums over the window^3 cube around x, zeros outside

    Args:
        warped, fixed: (B, C, I, J, K) scans, intensities near [0, 1]; computed in at least float32.
        window: odd width in voxels.
        eps: added to the denominator, so that flat regions score 0.
        mask: (B, 1, I, J, K) weights of the voxels in the mean; None takes all alike.

    Returns:
        Scalar in [-1, 0].

    Source: SACB-Net eq. 12 in the squared form of the released code (window 9, eps 1e-5).
    """
    a, b = _at_least_float32(warped), _at_least_float32(fixed)
    n = window**3
    sums = box_sum(torch.cat([a, b, a * a, b * b, a * b]), window)
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = sums.chunk(5)
    cov = sum_ab - sum_a * sum_b / n
    var_a, var_b = sum_aa - sum_a * sum_a / n, sum_bb - sum_b * sum_b / n
    cc = cov * cov / (var_a * var_b + eps)
    if mask is None:
        return -cc.mean()
    weight = mask.to(cc.dtype).expand_as(cc)
    return -(cc * weight).sum() / weight.sum().clamp(min=1)


def mse(warped: Tensor, fixed: Tensor) -> Tensor:
    """Mean squared intensity difference of (B, C, I, J, K) scans."""
    return (warped.float() - fixed.float()).square().mean()


def diffusion(disp: Tensor) -> Tensor:
    """Mean squared forward difference of the displacement, averaged over axes and components.

    (1/9) sum over axes a and components c of mean_x (disp_c(x + e_a) - disp_c(x))^2

    Args:
        disp: (B, 3, I, J, K) in voxels.

    Source: SACB-Net eq. 1, |grad phi|^2; forward differences as in the released code (MONAI's DiffusionLoss takes wide
    central differences, which do not see a field that alternates from voxel to voxel).
    """
    d = _at_least_float32(disp)
    return sum(d.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3


def edge_weighted_diffusion(disp: Tensor, fixed: Tensor, *, sharpness: float = 1.0) -> Tensor:
    """`diffusion`, but a difference counts less where the fixed scan has an edge, so that organs may slide.

    (1/9) sum over axes a and components c of mean_x (w(x) (disp_c(x + e_a) - disp_c(x)))^2
    w(x) = exp(-sharpness |grad fixed(x)|^2), forward differences, summed over channels

    Args:
        disp: (B, 3, I, J, K) in voxels.
        fixed: (B, C, I, J, K) fixed scan, intensities near [0, 1].
        sharpness: 0 gives `diffusion`.

    Source: Residual Aligner Network eq. 13 (sharpness 1). The authors' code takes absolute differences and divides the
    gradient by the intensity, with sharpness 25 or 9.
    """
    d, f = _at_least_float32(disp), _at_least_float32(fixed)
    squares = torch.zeros_like(f[:, :1])
    for axis in (2, 3, 4):
        size = f.shape[axis] - 1
        squares.narrow(axis, 0, size).add_(f.diff(dim=axis).square().sum(1, keepdim=True))
    weight = torch.exp(-sharpness * squares)
    return sum((d.diff(dim=axis) * weight.narrow(axis, 0, d.shape[axis] - 1)).square().mean() for axis in (2, 3, 4)) / 3


def dice(warped_onehot: Tensor, fixed_onehot: Tensor, *, eps: float = 1e-5) -> Tensor:
    """One minus the mean soft Dice over the channels.

    1 - mean_c 2 sum(a_c b_c) / (sum(a_c) + sum(b_c) + eps), channels empty in both left out

    Args:
        warped_onehot, fixed_onehot: (B, L, I, J, K) soft or one-hot segmentations.
    """
    a, b = warped_onehot.float().flatten(2), fixed_onehot.float().flatten(2)
    total = a.sum(2) + b.sum(2)
    score = 2 * (a * b).sum(2) / (total + eps)
    present = (total > 0).float()
    return 1 - (score * present).sum() / present.sum().clamp(min=1)


class RegistrationLoss(nn.Module):
    """similarity(warped moving, fixed) + smoothness * diffusion(disp), on the packed image of a pair.

    Args:
        similarity: "lncc" or "mse".
        window: of the LNCC, in voxels.
        smoothness: weight lambda of the diffusion term.
        edges: sharpness of `edge_weighted_diffusion`; 0 for the same weight everywhere.

    Source: SACB-Net eq. 1; Residual Aligner Network eq. 13. The papers give no lambda; see the bundles' model cards for
    the values used.
    """

    SIMILARITIES = ("lncc", "mse")

    def __init__(
        self, similarity: str = "lncc", *, window: int = 9, smoothness: float = 1.0, edges: float = 0.0
    ) -> None:
        super().__init__()
        if similarity not in self.SIMILARITIES:
            raise ValueError(f"RegistrationLoss() 'similarity' must be one of {self.SIMILARITIES}, got {similarity!r}")
        if edges < 0:
            raise ValueError(f"RegistrationLoss() 'edges' must be >= 0, got {edges}")
        self.similarity, self.window, self.smoothness, self.edges = similarity, window, smoothness, edges

    def forward(self, disp: Tensor, image: Tensor) -> Tensor:
        """disp (B, 3, I, J, K) in voxels, image (B, 2C, I, J, K) = moving then fixed -> scalar."""
        moving, fixed = image.chunk(2, dim=1)
        warped = warp(moving, disp)
        fit = mse(warped, fixed) if self.similarity == "mse" else lncc(warped, fixed, window=self.window)
        rough = edge_weighted_diffusion(disp, fixed, sharpness=self.edges) if self.edges else diffusion(disp)
        return fit + self.smoothness * rough
