"""warp by torch's grid_sample: no corner copies, differentiable, exportable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops.warp.reference import voxel_coords, warp_reference


def warp_lean(image: Tensor, disp: Tensor, mode: str, padding: str) -> Tensor:
    """See `common.ops.warp`."""
    size = [int(n) for n in image.shape[2:]]
    if min(size) == 1 and padding == "zeros":
        return warp_reference(image, disp, mode, padding)  # grid_sample cannot leave an axis of one voxel
    dtype = torch.promote_types(disp.dtype, torch.float32)
    if image.dtype != dtype:
        return warp_lean(image.to(dtype), disp, mode, padding).to(image.dtype)
    if mode == "nearest":  # grid_sample would round the normalised coordinate, which carries its own error
        coords = voxel_coords(disp).round()
        disp = coords - voxel_coords(torch.zeros_like(coords))
    name = "bilinear" if mode == "linear" else "nearest"
    if image.shape[1] >= 8 and image.device.type == "cpu":  # a corner is then one stretch of memory: a third faster
        image = image.contiguous(memory_format=torch.channels_last_3d)
    disp = disp.to(dtype)
    grid = _traced_grid(disp, image) if torch.jit.is_tracing() else _sampling_grid(disp, size)
    return F.grid_sample(image, grid, mode=name, padding_mode=padding, align_corners=True)


def _sampling_grid(disp: Tensor, size: list[int]) -> Tensor:
    """What grid_sample wants: (B, I, J, K, 3) in the order k, j, i, in [-1, 1] with corners aligned.

    An axis of one voxel has only 0. Where nobody asks for a gradient, each component is written in place, once.
    """
    grid = None if disp.requires_grad else disp.new_empty(disp.shape[0], *disp.shape[2:], 3)
    axes = []
    for n, axis in enumerate((2, 1, 0)):
        scale = 2.0 / max(size[axis] - 1, 1)
        start = torch.arange(disp.shape[2 + axis], device=disp.device, dtype=disp.dtype) * scale - float(size[axis] > 1)
        start = start.view([-1 if a == axis else 1 for a in range(3)])
        out = None if grid is None else grid[..., n]
        axes.append(torch.add(start, disp[:, axis], alpha=scale, out=out))
    return torch.stack(axes, dim=-1) if grid is None else grid


@torch.jit.script_if_tracing
def _traced_grid(disp: Tensor, image: Tensor) -> Tensor:
    """`_sampling_grid` as TorchScript: a trace would keep the sizes that it has seen as constants."""
    axes = []
    for axis in range(3):
        size = image.shape[2 + axis]
        scale = 2.0 / max(size - 1, 1)
        start = torch.arange(disp.shape[2 + axis], device=disp.device, dtype=disp.dtype) * scale
        start = start - (1.0 if size > 1 else 0.0)
        shape = [1, 1, 1]
        shape[axis] = -1
        axes.append(disp[:, axis] * scale + start.view(shape))
    return torch.stack([axes[2], axes[1], axes[0]], dim=-1)
