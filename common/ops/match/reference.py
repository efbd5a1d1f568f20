"""The formula of match, with the neighbourhood unfolded. For TorchScript too."""

import torch
import torch.nn.functional as F
from torch import Tensor


def offsets(radius: int, like: Tensor) -> Tensor:
    """((2r+1)^3, 3) integer offsets as floats, i slowest and k fastest."""
    step = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid([step, step, step], indexing="ij"), 3).view(-1, 3)


def match(feat_fixed: Tensor, feat_moving: Tensor, radius: int = 1, backend: str | None = None) -> Tensor:
    """What `common.ops.match` is in TorchScript."""
    return match_reference(feat_fixed, feat_moving, radius)


def match_reference(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
    """See `common.ops.match`; keeps the (B I J K, (2r+1)^3, C) neighbourhoods in memory."""
    dtype = torch.promote_types(feat_fixed.dtype, torch.float32)
    feat_fixed, feat_moving = feat_fixed.to(dtype), feat_moving.to(dtype)
    width = 2 * radius + 1
    padded = F.pad(feat_moving, [radius] * 6)
    windows = padded.unfold(2, width, 1).unfold(3, width, 1).unfold(4, width, 1)  # (B, C, I, J, K, w, w, w)
    each = windows.permute(0, 2, 3, 4, 5, 6, 7, 1)  # (B, I, J, K, w, w, w, C)
    keys = each.reshape(-1, width * width * width, feat_fixed.shape[1])
    query = feat_fixed.permute(0, 2, 3, 4, 1).reshape(-1, feat_fixed.shape[1], 1)
    weight = (keys @ query).squeeze(2).softmax(1)
    disp = weight @ offsets(radius, feat_fixed)
    return disp.view(list(feat_fixed.shape[:1]) + list(feat_fixed.shape[2:]) + [3]).permute(0, 4, 1, 2, 3)
