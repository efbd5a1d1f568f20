"""The formula of cost_volume: one warped copy of the moving features an offset."""

import torch
from torch import Tensor

from common.ops.match.reference import offsets
from common.ops.warp.reference import warp_reference


def cost_volume_reference(
    feat_fixed: Tensor, feat_moving: Tensor, radius: int, disp: Tensor | None, similarity: str, padding: str
) -> Tensor:
    """See `common.ops.cost_volume`; holds one (B, C, I, J, K) sample at a time."""
    dtype = torch.promote_types(feat_fixed.dtype, torch.float32)
    fixed, moving = feat_fixed.to(dtype), feat_moving.to(dtype)
    start = torch.zeros_like(fixed[:, :1]).expand(-1, 3, -1, -1, -1) if disp is None else disp.to(dtype)
    scores = []
    for step in offsets(radius, start):
        sample = warp_reference(moving, start + step.view(1, 3, 1, 1, 1), "linear", padding)
        pair = fixed * sample if similarity == "dot" else (fixed - sample).square()
        scores.append(pair.sum(1))
    return torch.stack(scores, 1).to(feat_fixed.dtype)
