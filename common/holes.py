"""What masks leave out of scans and fields, filled so that neither a network nor a reader meets an edge there."""

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS = 12  # of each level: what is left of an edge after them is below a hundredth of it


def spread(values: Tensor, known: Tensor) -> Tensor:
    """Continue values smoothly into where nothing is known: nearly the harmonic function, Laplace(v) = 0, slope 0 at
    the ends of the grid.

    From coarse to fine: means of the known voxels of blocks of 2^3 are continued on a grid of half the size, and
    SWEEPS means of the six neighbours follow.

    Args:
        values: (B, C, I, J, K).
        known: (B, 1, I, J, K), above 0 where `values` counts.

    Returns:
        (B, C, I, J, K): `values` where known; 0 where nothing is known in all of a volume.
    """
    known = known > 0
    if bool(known.all()) or max(values.shape[2:]) == 1:
        return values * known
    given = known.to(values.dtype)
    blocks = [min(n, 2) for n in values.shape[2:]]
    share = F.avg_pool3d(given, blocks, ceil_mode=True, count_include_pad=False)
    means = F.avg_pool3d(values * given, blocks, ceil_mode=True, count_include_pad=False) / share.clamp(min=1e-6)
    fine = F.interpolate(spread(means, share), scale_factor=blocks, mode="trilinear", align_corners=False)
    i, j, k = values.shape[2:]
    found = torch.where(known, values, fine[:, :, :i, :j, :k])
    for _ in range(SWEEPS):
        found = torch.where(known, values, _neighbours(found))
    return found


def _neighbours(x: Tensor) -> Tensor:
    """Mean of the six neighbours, the border repeated."""
    total = torch.zeros_like(x)
    for axis in (2, 3, 4):
        n = x.shape[axis]
        for way in (-1, 1):
            index = (torch.arange(n, device=x.device) + way).clamp(0, n - 1)
            total += x.index_select(axis, index)
    return total / 6


def fill(image: Tensor, mask: Tensor, *, other: bool = True) -> Tensor:
    """Fill what the masks of a pair leave out, so that a network sees no hole.

    With `other`, by what the other scan shows there, shifted by a smooth amount so that it joins the border:
    filled = other + spread(own - other). Where the other one has a background of 0 it stays 0; where it is masked as
    well, its surroundings stand in. Without `other`, by the scan's own surroundings alone: spread(own).

    Args:
        image: (B, 2C, I, J, K) moving and fixed scan on one grid, intensities near [0, 1].
        mask: (B, 2, I, J, K), above 0 where the moving and the fixed scan count.

    Source: the shifted copy is the membrane of Perez et al., Poisson image editing, SIGGRAPH 2003.
    """
    scans, known = image.chunk(2, 1), [half > 0.5 for half in mask.chunk(2, 1)]
    own = [spread(scan, where) for scan, where in zip(scans, known)]
    if not other:
        return torch.cat(own, 1)
    filled = []
    for scan, where, there in zip(scans, known, reversed(own)):
        inside = (there + spread(scan - there, where)).clamp(min=0) * (there > 0)
        filled.append(torch.where(where, scan, inside))
    return torch.cat(filled, 1)
