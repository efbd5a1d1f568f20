"""K-means clustering of feature points, repeatable and without gradient."""

import torch
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.kmeans import reference
from common.ops.kmeans.lean import assign_lean
from common.ops.kmeans.reference import FULL_PASSES, Assign, assign_reference, even_start, lloyd, spread_start

STARTS = ("spread", "even")


@scripted_as(reference.kmeans)
@on_plain_tensors
@torch.no_grad()
def kmeans(
    points: Tensor,
    clusters: int,
    iterations: int | None = 20,
    init: str | Tensor = "spread",
    *,
    sample: int | None = 8192,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster `points` by Lloyd's algorithm and return labels and centroids.

    label(p) = argmin_n |p - centroid_n|^2,  centroid_n = mean of the points with label n

    The start is deterministic. Lloyd runs `iterations` times on every s-th point (about `sample` of them), then twice
    on all points; the labels returned are those of the returned centroids. An empty cluster's centroid is the zero
    vector; it may win points back. Nothing is read back to the host unless `iterations` is None.

    Args:
        points: (B, P, C) points; every batch entry is clustered by itself.
        clusters: number N of clusters.
        iterations: cap of Lloyd steps on the sample; None runs all points to the fixed point (at most 10,000 steps).
        init: "spread" (each next start drawn far from the others, D^2-weighted at fixed quantiles), "even" (points
            floor((n + 0.5) P / N)) or a (B, N, C) tensor of start centroids.
        sample: number of points for the capped steps; None takes all.
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        labels (B, P) int64 and centroids (B, N, C) in the dtype of `points`.

    Raises:
        ValueError: shapes, clusters, iterations, sample or init are not as above.

    Source: SACB-Net section 3.2, eq. 4. The authors' code draws random starts (not repeatable), always runs all
    points to the fixed point, and gives an emptied cluster the zero vector as here.
    """
    _check(points, clusters, iterations, init, sample)
    if torch.jit.is_tracing() and isinstance(init, str):  # a trace would keep the stride of the size that it has seen
        return torch.jit.script(reference.kmeans)(points, clusters, iterations, init, sample)
    layer = choose("kmeans", points, backend)
    work = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    stride = 1 if sample is None or iterations is None else max(work.shape[1] // sample, 1)
    start = init.to(work.dtype) if isinstance(init, Tensor) else None
    if start is None and init == "even":
        start = even_start(work, clusters)
    if layer == "triton":
        from common.ops.kmeans.kernel import kmeans_triton

        labels, centroids = kmeans_triton(work, clusters, iterations, start, stride)
        return labels, centroids.to(points.dtype)
    assign: Assign = assign_reference if layer == "reference" else assign_lean
    subset = work[:, ::stride]
    start = spread_start(subset, clusters) if start is None else start
    labels, centroids = lloyd(subset, start, iterations, assign)
    if stride > 1:
        labels, centroids = lloyd(work, centroids, FULL_PASSES, assign)
    return labels, centroids.to(points.dtype)


def _check(points: Tensor, clusters: int, iterations: int | None, init: str | Tensor, sample: int | None) -> None:
    _checks.require(points.ndim == 3, "kmeans", "points", "have shape (B, P, C)", tuple(points.shape))
    _checks.require(points.is_floating_point(), "kmeans", "points", "be floating point", points.dtype)
    count = points.shape[1]
    _checks.require(
        1 <= clusters <= count, "kmeans", "clusters", f"be from 1 to the number of points {count}", clusters
    )
    _checks.require(iterations is None or iterations >= 0, "kmeans", "iterations", "be >= 0 or None", iterations)
    _checks.require(sample is None or sample >= clusters, "kmeans", "sample", f"be >= clusters {clusters}", sample)
    if isinstance(init, Tensor):
        shape = (points.shape[0], clusters, points.shape[2])
        _checks.require(tuple(init.shape) == shape, "kmeans", "init", f"have shape {shape}", tuple(init.shape))
    else:
        _checks.require(init in STARTS, "kmeans", "init", f"be a tensor or one of {STARTS}", repr(init))
