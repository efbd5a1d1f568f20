"""Neighbourhoods of a channels-last volume in cache-sized blocks: what the lean layers of match and sacb share."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_FLOATS = 1 << 19  # numbers in one block of patches: 2 MiB in float32


def channels_last(x: Tensor) -> Tensor:
    """(B, C, I, J, K) -> contiguous (B, I, J, K, C); a view if `x` is stored channels-last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def pad_grid(x: Tensor, radius: int) -> Tensor:
    """(I, J, K, C) -> (I + 2r, J + 2r, K + 2r, C) with zeros around."""
    return F.pad(x, (0, 0) + (radius,) * 6)


def windows(padded: Tensor, radius: int) -> Tensor:
    """View of a padded (I + 2r, J + 2r, K + 2r, C) volume as (I, J, K, w, w, w, C), w = 2r + 1; no copy."""
    width = 2 * radius + 1
    size = [n - 2 * radius for n in padded.shape[:3]]
    stride = padded.stride()
    return padded.as_strided((*size, width, width, width, padded.shape[3]), (*stride[:3], *stride))


def block_patches(view: Tensor, at: tuple[slice, slice]) -> Tensor:
    """The windows of block `at` as (V, w^3, C), always a copy: reshape would keep them overlapping where J = K = 1."""
    block = view[at].clone(memory_format=torch.contiguous_format)
    return block.view(-1, view.shape[3] ** 3, view.shape[6])


def blocks(size: tuple[int, int, int], per_voxel: int) -> Iterator[tuple[slice, slice]]:
    """Slices of axes i and j that cut a grid into blocks of about BLOCK_FLOATS / per_voxel voxels."""
    voxels = max(BLOCK_FLOATS // per_voxel, 1)
    rows = min(max(voxels // size[2], 1), size[1])
    planes = max(voxels // (size[1] * size[2]), 1) if rows == size[1] else 1
    for i in range(0, size[0], planes):
        for j in range(0, size[1], rows):
            yield slice(i, min(i + planes, size[0])), slice(j, min(j + rows, size[1]))


def add_patches(total: Tensor, patches: Tensor, at: tuple[slice, slice], radius: int) -> None:
    """Transpose of `windows`: add the patches (i, j, K, w^3, C) of block `at` to the padded volume `total`."""
    width, depth = 2 * radius + 1, total.shape[2] - 2 * radius
    for n, (a, b, c) in enumerate(itertools.product(range(width), repeat=3)):
        i, j = (slice(s.start + shift, s.stop + shift) for s, shift in zip(at, (a, b)))
        total[i, j, c : c + depth] += patches[:, :, :, n]
