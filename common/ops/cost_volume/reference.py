"""The formula of cost_volume: one shifted or warped copy of the moving features an offset. For TorchScript too."""

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
    if disp is None:
        return _shifted(fixed, moving, radius, padding, similarity).to(feat_fixed.dtype)
    start, scores = disp.to(dtype), []
    for step in offsets(radius, start).unbind(0):
        sample = warp_reference(moving, start + step.view(1, 3, 1, 1, 1), "linear", padding)
        scores.append(_score(fixed, sample, similarity))
    return torch.stack(scores, 1).to(feat_fixed.dtype)


def cost_volume(
    feat_fixed: Tensor,
    feat_moving: Tensor,
    radius: int,
    disp: Tensor | None = None,
    similarity: str = "dot",
    padding: str = "border",
    backend: str | None = None,
) -> Tensor:
    """What `common.ops.cost_volume` is in TorchScript."""
    return cost_volume_reference(feat_fixed, feat_moving, radius, disp, similarity, padding)


def _score(fixed: Tensor, sample: Tensor, similarity: str) -> Tensor:
    """Over the channels of (B, C, ...)."""
    return (fixed * sample).sum(1) if similarity == "dot" else (fixed - sample).square().sum(1)


def _shifted(fixed: Tensor, moving: Tensor, radius: int, padding: str, similarity: str) -> Tensor:
    """Whole steps of the grid: shifts of the padded features along i and j, all of k at once (for a shorter graph)."""
    mode = "replicate" if padding == "border" else "constant"
    padded = F.pad(moving, [radius] * 6, mode=mode)
    width, size_i, size_j = 2 * radius + 1, fixed.shape[2], fixed.shape[3]
    scores = []
    for i in range(width):
        for j in range(width):
            row = padded[:, :, i : i + size_i, j : j + size_j].unfold(4, width, 1)  # (B, C, I, J, K, width)
            scores.append(_score(fixed.unsqueeze(-1), row, similarity).movedim(-1, 1))
    return torch.cat(scores, 1)
