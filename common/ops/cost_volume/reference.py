"""The formula of cost_volume: one shifted or warped copy of the moving features an offset."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.match.reference import offsets
from common.ops.warp.reference import warp_reference


def cost_volume_reference(
    feat_fixed: Tensor, feat_moving: Tensor, radius: int, disp: Tensor | None, similarity: str, padding: str
) -> Tensor:
    """See `common.ops.cost_volume`."""
    dtype = torch.promote_types(feat_fixed.dtype, torch.float32)
    fixed, moving = feat_fixed.to(dtype), feat_moving.to(dtype)
    score = _dot if similarity == "dot" else _ssd
    if disp is None:
        scores = _shifted(fixed, moving, radius, padding, score)
    else:
        start = disp.to(dtype)
        at = [start + step.view(1, 3, 1, 1, 1) for step in offsets(radius, start)]
        scores = torch.stack([score(fixed, warp_reference(moving, coords, "linear", padding)) for coords in at], 1)
    return scores.to(feat_fixed.dtype)


def _dot(fixed: Tensor, sample: Tensor) -> Tensor:
    return (fixed * sample).sum(1)


def _ssd(fixed: Tensor, sample: Tensor) -> Tensor:
    return (fixed - sample).square().sum(1)


def _shifted(fixed: Tensor, moving: Tensor, radius: int, padding: str, score: Callable[..., Tensor]) -> Tensor:
    """Whole steps of the grid: shifts of the padded features along i and j, all of k at once (for a shorter graph)."""
    mode = "replicate" if padding == "border" else "constant"
    padded = F.pad(moving, (radius,) * 6, mode=mode)
    width, (size_i, size_j) = 2 * radius + 1, fixed.shape[2:4]
    scores = []
    for i in range(width):
        for j in range(width):
            row = padded[:, :, i : i + size_i, j : j + size_j].unfold(4, width, 1)  # (B, C, I, J, K, width)
            scores.append(score(fixed.unsqueeze(-1), row).movedim(-1, 1))
    return torch.cat(scores, 1)
