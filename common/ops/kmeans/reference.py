"""Lloyd's algorithm and its deterministic starts, in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor

FIXED_POINT_CAP = 10_000
Assign = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def assign_reference(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over (B, P, C) points: labels (B, P), sums (B, N, C) and counts (B, N, 1) per nearest centroid.

    The distance is expanded, |p - c|^2 = p.p - 2 p.c + c.c; ties go to the lower index.
    """
    cross = points @ centroids.transpose(1, 2)
    distance = points.square().sum(2, keepdim=True) - 2 * cross + centroids.square().sum(2).unsqueeze(1)
    labels = distance.argmin(2)
    member = torch.nn.functional.one_hot(labels, centroids.shape[1]).to(points.dtype)
    return labels, member.transpose(1, 2) @ points, member.sum(1).unsqueeze(2)


def lloyd(points: Tensor, centroids: Tensor, iterations: int | None, assign: Assign) -> tuple[Tensor, Tensor]:
    """`iterations` Lloyd steps, or to the fixed point for None; labels belong to the returned centroids."""
    for _ in range(FIXED_POINT_CAP if iterations is None else iterations):
        _, sums, counts = assign(points, centroids)
        updated = sums / counts.clamp(min=1)  # an empty cluster has sum 0: the zero vector
        still = iterations is None and bool((updated - centroids).square().sum() <= 1e-10)
        centroids = updated
        if still:
            break
    return assign(points, centroids)[0], centroids


def even_start(points: Tensor, clusters: int) -> Tensor:
    """Points number floor((n + 0.5) P / N), n = 0..N-1: (B, N, C)."""
    index = ((torch.arange(clusters, device=points.device) + 0.5) * points.shape[1] / clusters).long()
    return points[:, index]


def spread_start(points: Tensor, clusters: int) -> Tensor:
    """D^2-weighted starts at fixed quantiles, the repeatable form of k-means++: (B, N, C).

    The first is the point nearest to the mean. Each next one is where the cumulated squared distance to the starts so
    far reaches a quantile; the quantiles follow the golden ratio, so that they fill (0, 1) evenly.
    """
    mean = points.mean(1, keepdim=True)
    nearest = (points - mean).square().sum(2).argmin(1)
    rows = torch.arange(points.shape[0], device=points.device)
    starts = [points[rows, nearest]]
    distance = (points - starts[0].unsqueeze(1)).square().sum(2)
    for n in range(1, clusters):
        mass = distance.cumsum(1)
        target = mass[:, -1:] * ((0.6180339887498949 * n) % 1.0)
        index = (mass <= target).sum(1).clamp(max=points.shape[1] - 1)  # searchsorted, which ONNX lacks
        starts.append(points[rows, index])
        distance = torch.minimum(distance, (points - starts[-1].unsqueeze(1)).square().sum(2))
    return torch.stack(starts, 1)
