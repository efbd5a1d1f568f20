"""A second registration, quick and by structure alone, to hold a result against: do both move things the same way?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.fields import pool_disp
from common.mind import box_mean
from common.ops import warp
from common.quality.metrics import concordance

VOXELS = 2**15  # of the grid on which it runs, at most
STEPS = 8
DAMPING = 0.1  # of the mean trace of the normal matrices
PAIRS = [(a, b) for a in range(3) for b in range(a, 3)]


def against_quick(moving: Tensor, fixed: Tensor, inside: Tensor, disp: Tensor) -> tuple[float, float]:
    """A displacement u of any method beside v, which Lucas and Kanade's steps find from the features alone.

    agreement = sum u . v / sqrt(sum |u|^2 sum |v|^2),  gain = agreement of structure after v, less that after u

    both on the grid of v, inside. Where v fits the scans better than u and goes elsewhere, u followed something else
    than structure. Where v fits worse, it was lost, and says nothing about u.

    Args:
        moving, fixed: (C, i, j, k) of `mind_features`, of pre-aligned scans.
        inside: (i, j, k) voxels of that grid that count.
        disp: (3, I, J, K) u, in voxels of the grid twice as fine.

    Returns:
        agreement in [-1, 1], 0 where nothing moves; gain, nan of nothing inside.
    """
    factor = 2
    while inside.numel() / factor**3 > VOXELS:
        factor *= 2
    moving, fixed, weight = (
        F.avg_pool3d(x[None].float(), factor, ceil_mode=True, count_include_pad=False)
        for x in (moving, fixed, inside[None])
    )
    quick = _lucas_kanade(moving, fixed, weight[0, 0])
    given = pool_disp(disp[None], 2 * factor)
    smooth = box_mean(given, padding="border")  # as `quick` is
    products = ((a * b * weight).sum() for a, b in ((smooth, quick), (smooth, smooth), (quick, quick)))
    both, own, other = products
    where = weight[0, 0] > 0.5
    fit = [concordance(warp(moving, v)[0][:, where], fixed[0][:, where]) for v in (quick, given)]
    return float(both / (own * other).sqrt().clamp(min=1e-9)), fit[0] - fit[1]


def _lucas_kanade(moving: Tensor, fixed: Tensor, weight: Tensor) -> Tensor:
    """(1, 3, i, j, k) that lowers sum w |M(x + v) - F(x)|^2 in windows around every voxel; smoothed after each step.

    Source: Lucas and Kanade, IJCAI 1981; slopes are those of the fixed features, and stay.
    """
    slopes = torch.stack([torch.gradient(fixed[0], dim=axis)[0] for axis in (1, 2, 3)])  # (3, C, i, j, k)
    products = torch.stack([(slopes[a] * slopes[b]).sum(0) * weight for a, b in PAIRS])
    normal = torch.empty(*fixed.shape[2:], 3, 3)
    for (a, b), entry in zip(PAIRS, box_mean(products[None], times=2)[0]):
        normal[..., a, b] = normal[..., b, a] = entry
    trace = normal.diagonal(dim1=-2, dim2=-1).sum(-1)[weight > 0].mean().nan_to_num()
    inverse = torch.linalg.inv(normal + (DAMPING * trace + 1e-8) * torch.eye(3))
    disp = torch.zeros(1, 3, *fixed.shape[2:])
    for _ in range(STEPS):
        rest = (fixed - warp(moving, disp))[0]
        right = box_mean(((slopes * rest).sum(1) * weight)[None], times=2)[0]
        step = torch.einsum("ijkab,bijk->aijk", inverse, right)
        disp = box_mean(disp + step.clamp(-1, 1), padding="border")
    return disp
