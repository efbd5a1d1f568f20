"""The formula of warp: a weighted sum over the eight corners of the cell that is hit. For TorchScript too."""

import torch
from torch import Tensor


def voxel_coords(disp: Tensor) -> Tensor:
    """x + disp(x) in voxels: (B, 3, I, J, K), at least float32."""
    dtype = torch.promote_types(disp.dtype, torch.float32)
    axes = [torch.arange(n, device=disp.device, dtype=dtype) for n in disp.shape[2:]]
    return torch.stack(torch.meshgrid(axes, indexing="ij")) + disp.to(dtype)


def warp(
    image: Tensor, disp: Tensor, mode: str = "linear", padding: str = "border", backend: str | None = None
) -> Tensor:
    """What `common.ops.warp` is in TorchScript."""
    return warp_reference(image, disp, mode, padding)


def warp_reference(image: Tensor, disp: Tensor, mode: str, padding: str) -> Tensor:
    """See `common.ops.warp`. Shapes: image (B, C, I', J', K'), disp (B, 3, I, J, K)."""
    coords = voxel_coords(disp)
    size = torch.tensor(image.shape[2:], device=image.device).view(1, 3, 1, 1, 1)
    if padding == "border":
        last = (size - 1).to(coords.dtype)
        held = torch.minimum(coords.detach().clamp(min=0), last)  # no gradient at or past a border, as in grid_sample
        coords = torch.where((coords > 0) & (coords < last), coords, held)
    if mode == "nearest":
        return _gather(image, coords.round().long(), size)
    cell = coords.floor()
    fraction = coords - cell
    out = torch.zeros_like(coords[:, :1])
    for corner in range(8):
        weight, sides = torch.ones_like(coords[:, :1]), [corner // 4, corner // 2 % 2, corner % 2]
        for axis, side in enumerate(sides):
            f = fraction[:, axis : axis + 1]
            weight = weight * (f if side == 1 else 1 - f)
        offset = torch.tensor(sides, device=image.device).view(1, 3, 1, 1, 1)
        out = out + weight * _gather(image, cell.long() + offset, size).to(coords.dtype)
    return out.to(image.dtype)


def _gather(image: Tensor, index: Tensor, size: Tensor) -> Tensor:
    """image at integer voxels `index` (B, 3, I, J, K); 0 outside."""
    inside = ((index >= 0) & (index < size)).all(1, keepdim=True)
    i, j, k = torch.minimum(index.clamp(min=0), size - 1).unbind(1)
    flat = (i * image.shape[3] + j) * image.shape[4] + k
    values = image.flatten(2).gather(2, flat.flatten(1).unsqueeze(1).expand(-1, image.shape[1], -1))
    return values.view(image.shape[:2] + flat.shape[1:]) * inside
