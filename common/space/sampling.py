"""Values of a scan or a displacement at places between its voxels: linear, nearest, or by vote of the labels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def within(voxels: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Where (3, ...) voxels are within half a voxel of a grid."""
    i, j, k = ((v >= -0.5) & (v < n - 0.5) for v, n in zip(voxels, size))
    return i & j & k


def grid_sample(values: Tensor, voxels: Tensor) -> Tensor:
    """Values (C, I, J, K) at voxels (3, i, j, k): (C, i, j, k), linear, the border repeated outside."""
    scale = voxels.new_tensor([2 / max(n - 1, 1) for n in values.shape[1:]]).view(3, 1, 1, 1)
    unit = (voxels * scale - 1).flip(0).permute(1, 2, 3, 0)  # grid_sample has the last axis first
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    return F.grid_sample(values[None], unit[None], **options)[0]


def displaced(disp: np.ndarray, voxels: Tensor) -> Tensor:
    """Displacement (3, I, J, K) at voxels (3, i, j, k); 0 beyond half a voxel outside."""
    values = torch.from_numpy(np.ascontiguousarray(disp, dtype=np.float32))
    return grid_sample(values, voxels) * within(voxels, values.shape[1:])


def linear(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    """(i, j, k) values of (I, J, K), and `outside` where it does not reach; so are those below."""
    found = grid_sample(source[None], voxels)[0]
    return found.masked_fill_(~within(voxels, source.shape), outside)


def nearest(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    """Halves go up, as in ITK."""
    inside = within(voxels, source.shape)
    index = torch.zeros(voxels.shape[1:], dtype=torch.int64)
    for v, n in zip(voxels, source.shape):
        index = index * n + (v + 0.5).floor().long().clamp(0, n - 1)
    return source.flatten()[index].masked_fill_(~inside, outside)


def voted(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    """The label with the largest sum of linear weights."""
    labels, weights = [], []
    at = [v.clamp(0, n - 1) for v, n in zip(voxels, source.shape)]
    low = [v.floor().long().clamp(0, max(n - 2, 0)) for v, n in zip(at, source.shape)]
    share = [v - first for v, first in zip(at, low)]
    for corner in np.ndindex(2, 2, 2):
        i, j, k = ((first + step).clamp(max=n - 1) for first, step, n in zip(low, corner, source.shape))
        labels.append(source[i, j, k])
        parts = [x if step else 1 - x for x, step in zip(share, corner)]
        weights.append(parts[0] * parts[1] * parts[2])
    best, found = torch.full_like(weights[0], -1), labels[0]
    for label in labels:
        votes = sum(weight * (other == label) for weight, other in zip(weights, labels))
        found, best = torch.where(votes > best, label, found), torch.maximum(votes, best)
    return found.masked_fill(~within(voxels, source.shape), outside)
