"""Lloyd's algorithm and its deterministic starts, in plain torch. TorchScript compiles `kmeans` below."""

from collections.abc import Callable

import torch
from torch import Tensor

FIXED_POINT_CAP = 10_000
FULL_PASSES = 2  # Lloyd steps on all points after those on the sample
Assign = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def assign_reference(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over (B, P, C) points: labels (B, P), sums (B, N, C) and counts (B, N, 1) per nearest centroid.

    The distance is expanded, |p - c|^2 = p.p - 2 p.c + c.c; ties go to the lower index.
    """
    cross = points @ centroids.transpose(1, 2)
    distance = points.square().sum(2, keepdim=True) - 2 * cross + centroids.square().sum(2).unsqueeze(1)
    labels = distance.argmin(2)
    numbers = torch.arange(centroids.shape[1], device=points.device)
    member = (labels.unsqueeze(2) == numbers).to(points.dtype)  # one_hot checks its range: twice the nodes if exported
    return labels, member.transpose(1, 2) @ points, member.sum(1).unsqueeze(2)


def lloyd(points: Tensor, centroids: Tensor, iterations: int | None, assign: Assign) -> tuple[Tensor, Tensor]:
    """`iterations` Lloyd steps, or to the fixed point for None; labels belong to the returned centroids."""
    for _ in range(FIXED_POINT_CAP if iterations is None else iterations):
        _, sums, counts = assign(points, centroids)
        updated = means(sums, counts)
        still = iterations is None and unmoved(updated, centroids)
        centroids = updated
        if still:
            break
    return assign(points, centroids)[0], centroids


def means(sums: Tensor, counts: Tensor) -> Tensor:
    """Centroids of the clusters; that of an empty one, whose sum is 0, is the zero vector."""
    return sums / counts.clamp(min=1)


def unmoved(centroids: Tensor, before: Tensor) -> bool:
    return bool((centroids - before).square().sum() <= 1e-10)


def even_start(points: Tensor, clusters: int) -> Tensor:
    """Points number floor((n + 0.5) P / N), n = 0..N-1: (B, N, C)."""
    index = ((torch.arange(clusters, device=points.device) + 0.5) * points.shape[1] / clusters).long()
    return points[:, index]


def spread_start(points: Tensor, clusters: int) -> Tensor:
    """D^2-weighted starts at fixed quantiles, the repeatable form of k-means++: (B, N, C).

    The first is the point nearest to the mean. Each next one is where the cumulated squared distance to the starts so
    far reaches a quantile; the quantiles follow the golden ratio, so that they fill (0, 1) evenly.
    """
    mean = points.double().mean(1, keepdim=True).to(points.dtype)  # in float32, a runtime's order of sums would decide
    nearest = (points - mean).square().sum(2).argmin(1)
    rows = torch.arange(points.shape[0], device=points.device)
    starts = [points[rows, nearest]]
    distance = (points - starts[0].unsqueeze(1)).square().sum(2)
    for n in range(1, clusters):
        # In whole numbers, whose sums are the same in any order: torch has no repeatable cumsum of floats on CUDA.
        unit = distance.double() / distance.amax(1, keepdim=True).double().clamp(min=1e-300)
        mass = (unit * 68719476736.0).long().cumsum(1)  # 2^36
        target = mass[:, -1:].double() * ((0.6180339887498949 * n) % 1.0)
        index = (mass.double() <= target).sum(1).clamp(max=points.shape[1] - 1)  # searchsorted, which ONNX lacks
        starts.append(points[rows, index])
        distance = torch.minimum(distance, (points - starts[-1].unsqueeze(1)).square().sum(2))
    return torch.stack(starts, 1)


def kmeans(
    points: Tensor,
    clusters: int,
    iterations: int | None = 20,
    init: str = "spread",
    sample: int | None = 8192,
    backend: str | None = None,
    cap: int = FIXED_POINT_CAP,
    full_passes: int = FULL_PASSES,
) -> tuple[Tensor, Tensor]:
    """What `common.ops.kmeans` is in TorchScript, which takes no function and reads no global; `init` by name only."""
    with torch.no_grad():
        work = points.to(torch.promote_types(points.dtype, torch.float32))
        stride = 1 if sample is None or iterations is None else max(work.shape[1] // sample, 1)
        subset = work[:, ::stride]
        centroids = spread_start(subset, clusters) if init == "spread" else even_start(work, clusters)
        passes = [(subset, cap if iterations is None else iterations)]
        if stride > 1:
            passes.append((work, full_passes))
        for chosen, steps in passes:
            for _ in range(steps):
                _, sums, counts = assign_reference(chosen, centroids)
                before, centroids = centroids, means(sums, counts)
                if iterations is None and unmoved(centroids, before):
                    break
        return assign_reference(work, centroids)[0], centroids.to(points.dtype)
