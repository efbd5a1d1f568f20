"""The assignment pass of k-means in blocks that stay in the cache."""

import torch
from torch import Tensor

BLOCK = 16384  # points a block: scores and memberships of 7 clusters then take under 1 MiB


def assign_lean(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `assign_reference`, without a distance or one-hot buffer over all points."""
    batch, count, channels = points.shape
    labels = torch.empty(batch, count, dtype=torch.int64, device=points.device)
    sums = points.new_zeros(batch, centroids.shape[1], channels)
    counts = points.new_zeros(batch, centroids.shape[1], 1)
    half_norm = centroids.square().sum(2).mul_(0.5)
    index = torch.arange(centroids.shape[1], device=points.device)
    for b in range(batch):
        for begin in range(0, count, BLOCK):
            block = points[b, begin : begin + BLOCK]
            # argmin |p - c|^2 = argmax p.c - |c|^2 / 2, and max keeps the first of equals
            label = torch.addmm(half_norm[b], block, centroids[b].t(), beta=-1).argmax(1)
            labels[b, begin : begin + BLOCK] = label
            member = (label.unsqueeze(0) == index.unsqueeze(1)).to(points.dtype)
            sums[b].addmm_(member, block)
            counts[b, :, 0] += member.sum(1)
    return labels, sums, counts
