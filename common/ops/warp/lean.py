"""warp by torch's grid_sample: no corner copies, differentiable, exportable."""
import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.warp.reference import voxel_coords


def warp_lean(image: Tensor, disp: Tensor, mode: str, padding: str) -> Tensor:
    """See `common.ops.warp`."""
    coords = voxel_coords(disp)
    if image.dtype != coords.dtype:
        return warp_lean(image.to(coords.dtype), disp, mode, padding).to(image.dtype)
    if mode == "nearest":
        coords = coords.round()  # grid_sample would round the normalised coordinate, which carries its own error
    # grid_sample wants (k, j, i) in [-1, 1] with corners aligned; an axis of one voxel has only 0.
    scale = [2.0 / max(n - 1, 1) for n in image.shape[2:]]
    grid = torch.stack([coords[:, axis] * scale[axis] - (1.0 if image.shape[2 + axis] > 1 else 0.0) for axis in (2, 1, 0)], dim=-1)
    name = "bilinear" if mode == "linear" else "nearest"
    return F.grid_sample(image, grid, mode=name, padding_mode=padding, align_corners=True)
