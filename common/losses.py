"""Similarity and smoothness losses: functions, with thin modules for configs."""

import math
from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.ops import box_sum, warp

CHUNK = 2**20  # voxels that the LNCC works on at a time, so that its dozen volumes stay in the cache of a CPU


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _LNCC(torch.autograd.Function):
    """-sum of weight(x) cc(x) over all voxels, with the gradient made on the way there, a few volumes at a time.

    Autograd would keep some twenty volumes for every one of the scan's, and a CPU would fetch each of them from memory.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, weight: Tensor | None, window: int, eps: float) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        grads = [a.new_empty(a.shape) if want else None for want in wanted]
        size = a.shape[2:]
        volumes = [None if x is None else x.reshape(-1, 1, *size) for x in (a, b, weight, *grads)]
        step = max(CHUNK // size.numel(), 1)
        total = a.new_zeros(())
        for n in range(0, len(volumes[0]), step):
            part = [None if x is None else x[n : n + step] for x in volumes]
            total -= _lncc_part(*part, window, eps)
        ctx.save_for_backward(*(x for x in grads if x is not None))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = iter(ctx.saved_tensors)
        return *(next(grads) * grad if wanted else None for wanted in ctx.needs_input_grad[:2]), None, None, None


def _lncc_part(
    a: Tensor, b: Tensor, weight: Tensor | None, grad_a: Tensor | None, grad_b: Tensor | None, window: int, eps: float
) -> Tensor:
    """sum of weight cc for volumes (N, 1, I, J, K); its negative's gradients are written to those that are not None.

    With c, v, w for covariance and variances and r = c / (v w + eps), so that cc = c r:
        d cc / d c = 2 r    d cc / d v = -r^2 w    d cc / d w = -r^2 v
    and with S the box sum, c = S(ab) - S(a) S(b) / n, v = S(aa) - S(a)^2 / n; S is its own transpose.
    """
    n = window**3
    sum_a, sum_b, sum_aa, sum_bb, cov = (box_sum(x, window) for x in (a, b, a * a, b * b, a * b))
    cov -= sum_a * sum_b / n
    var_a, var_b = sum_aa.sub_(sum_a * sum_a / n), sum_bb.sub_(sum_b * sum_b / n)
    r = cov / (var_a * var_b).add_(eps)
    score = cov.mul_(r) if weight is None else cov.mul_(r).mul_(weight)
    total = score.sum()
    if grad_a is None and grad_b is None:
        return total
    by_cov = -2 * r if weight is None else -2 * r * weight
    by_var = by_cov * r / -2  # of -cc, without the other scan's variance
    across = box_sum(by_cov, window)
    for grad, x, y, sum_x, sum_y, var_y in ((grad_a, a, b, sum_a, sum_b, var_b), (grad_b, b, a, sum_b, sum_a, var_a)):
        if grad is not None:
            own = by_var * var_y
            torch.mul(across, y, out=grad)
            grad += 2 * x * box_sum(own, window)
            grad -= box_sum(own.mul_(2 * sum_x).add_(by_cov * sum_y).div_(n), window)
    return total


def lncc(warped: Tensor, fixed: Tensor, *, window: int = 9, eps: float = 1e-5, mask: Tensor | None = None) -> Tensor:
    """Negative mean of the squared local correlation coefficient.

    cc(x) = cov(x)^2 / (var_warped(x) var_fixed(x) + eps), sums over the window^3 cube around x, zeros outside

    Args:
        warped, fixed: (B, C, I, J, K) scans, intensities near [0, 1]; computed in at least float32.
        window: odd width in voxels.
        eps: added to the denominator, so that flat regions score 0.
        mask: (B, 1 or C, I, J, K) weights of the voxels in the mean, which get no gradient; None takes all alike.

    Returns:
        Scalar in [-1, 0], differentiable once.

    Source: SACB-Net eq. 12 in the squared form of the released code (window 9, eps 1e-5).
    """
    a, b = _at_least_float32(warped), _at_least_float32(fixed)
    if mask is None:
        return _LNCC.apply(a, b, None, window, eps) / a.numel()
    weight = mask.detach().to(a.dtype).expand_as(a)
    return _LNCC.apply(a, b, weight, window, eps) / weight.sum().clamp(min=1)


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


def label_dice(disp: Tensor, moving: Tensor, fixed: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`dice` of the moving label map, warped by `disp`, with the fixed one, without a volume for each label.

    a_c(x) = k(x) sum over the 8 corners i of the cell that holds x + disp(x) of w_i(x) [moving_i = c],
    b_c(x) = k(x) [fixed(x) = c] for the labels c = 1, 2, ..., and the formula of `dice`, the sums over x taken label by
    label. Memory and time do not grow with the number of labels. Outside the moving map the nearest voxel counts.

    Args:
        disp: (B, 3, I, J, K) displacement in voxels; the gradient goes there.
        moving, fixed: (B, 1, I, J, K) whole numbers: 0 the background, below 0 unknown, which is not compared: k is 0
            where `fixed` is unknown, and elsewhere the share of the known in the cell, without a gradient.

    Returns:
        Mean over the B pairs; 0 for a pair without a label, or with a map of which nothing is known.
    """
    each = [_label_dice(*pair, eps) for pair in zip(disp, moving.squeeze(1).long(), fixed.squeeze(1).long())]
    return torch.stack(each).mean()


def _label_dice(disp: Tensor, moving: Tensor, fixed: Tensor, eps: float) -> Tensor:
    largest = torch.stack([moving.max(), fixed.max()]).tolist()  # the one wait for a GPU
    number = 1 + max(largest)
    if number < 2 or min(largest) < 0:
        return disp.new_zeros(())
    disp, size = disp.to(torch.promote_types(disp.dtype, torch.float32)), moving.shape
    low, part = [], []  # of each axis: the lower corner and how far beyond it x + disp(x) lies
    for axis, n in enumerate(size):
        shape = [-1 if a == axis else 1 for a in range(3)]
        at = (torch.arange(n, dtype=disp.dtype, device=disp.device).view(shape) + disp[axis]).clamp(0, n - 1)
        low.append(at.detach().floor().long().clamp(0, max(n - 2, 0)))  # of a NaN, too
        part.append(at - low[-1])
    corners = []  # label and weight of each
    for corner in product((0, 1), repeat=3):
        i, j, k = ((first + step).clamp(max=n - 1) for first, step, n in zip(low, corner, size))
        weight = math.prod(x if step else 1 - x for x, step in zip(part, corner))
        corners.append((moving[i, j, k], weight))
    known = sum(weight.detach() * (label >= 0) for label, weight in corners) * (fixed >= 0)

    def sums(values: Tensor, label: Tensor) -> Tensor:
        return values.new_zeros(number).index_add(0, label.clamp(min=0).flatten(), values.flatten())[1:]

    a = sum(sums(weight * known, label) for label, weight in corners)
    b = sums(known, fixed)
    both = sums(known.square() * sum(weight * (label == fixed) for label, weight in corners), fixed)
    score, present = 2 * both / (a + b + eps), (a + b > 0).to(a.dtype)
    return 1 - (score * present).sum() / present.sum().clamp(min=1)


def folding(disp: Tensor, *, margin: float = 0.2) -> Tensor:
    """Mean by which the Jacobian determinant of x + disp(x) falls short of a margin: mean_x max(margin - det J(x), 0).

    Forward and backward differences along all axes at once, so that a field that alternates from voxel to voxel counts,
    which central differences do not see.

    Args:
        disp: (B, 3, I, J, K) in voxels.
        margin: determinants above it cost nothing.
    """
    d = _at_least_float32(disp)
    inner = [slice(0, n - 1) for n in d.shape[2:]]
    parts = []
    for begin in ((0, 0, 0), (1, 1, 1)):
        rows = []
        for axis in range(3):
            step = d.diff(dim=2 + axis)
            at = [slice(b, b + n - 1) for b, n in zip(begin, d.shape[2:])]
            at[axis] = inner[axis]
            rows.append(step[(..., *at)])
        i, j, k = rows
        det = (1 + i[:, 0]) * ((1 + j[:, 1]) * (1 + k[:, 2]) - k[:, 1] * j[:, 2])
        det = det - j[:, 0] * (i[:, 1] * (1 + k[:, 2]) - k[:, 1] * i[:, 2])
        det = det + k[:, 0] * (i[:, 1] * j[:, 2] - (1 + j[:, 1]) * i[:, 2])
        parts.append((margin - det).clamp(min=0).mean())
    return (parts[0] + parts[1]) / 2


class RegistrationLoss(nn.Module):
    """similarity(warped moving, fixed) + smoothness * diffusion(disp), on the packed image of a pair.

    Args:
        similarity: "lncc" or "mse".
        window: of the LNCC, in voxels.
        smoothness: weight lambda of the diffusion term.
        edges: sharpness of `edge_weighted_diffusion`; 0 for the same weight everywhere.
        folding: weight of `folding`; 0, as in the papers, leaves it out.

    Source: SACB-Net eq. 1; Residual Aligner Network eq. 13. The papers give no lambda; see the bundles' model cards for
    the values used.
    """

    SIMILARITIES = ("lncc", "mse")
    capturable = True  # in a CUDA graph: nothing waits for the host

    def __init__(
        self,
        similarity: str = "lncc",
        *,
        window: int = 9,
        smoothness: float = 1.0,
        edges: float = 0.0,
        folding: float = 0.0,
    ) -> None:
        super().__init__()
        if similarity not in self.SIMILARITIES:
            raise ValueError(f"RegistrationLoss() 'similarity' must be one of {self.SIMILARITIES}, got {similarity!r}")
        if edges < 0:
            raise ValueError(f"RegistrationLoss() 'edges' must be >= 0, got {edges}")
        self.similarity, self.window, self.smoothness, self.edges = similarity, window, smoothness, edges
        self.folding = folding

    def forward(self, disp: Tensor, image: Tensor) -> Tensor:
        """disp (B, 3, I, J, K) in voxels, image (B, 2C, I, J, K) = moving then fixed -> scalar."""
        moving, fixed = image.chunk(2, dim=1)
        warped = warp(moving, disp)
        fit = mse(warped, fixed) if self.similarity == "mse" else lncc(warped, fixed, window=self.window)
        rough = edge_weighted_diffusion(disp, fixed, sharpness=self.edges) if self.edges else diffusion(disp)
        value = fit + self.smoothness * rough
        return value + self.folding * folding(disp) if self.folding else value
