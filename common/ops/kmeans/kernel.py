"""k-means in Triton: a launch an iteration, which joins the sums of the one before, and a launch a start point.

Partial sums of a program go to memory of their own: no atomics, no wait for the host, the same bits in every run.
The points of a sample are read where they lie, every s-th row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded
from common.ops.kmeans.reference import FULL_PASSES, lloyd, spread_start

PARTIALS = 65536  # numbers that every program of the next launch has to join: few programs where tables are large
JOINED = 8192  # of them at a time
MOST_TILES = 1024  # of a sample whose starts one program can look for


@triton.jit
def joined(
    p_sums, p_counts, b, chunks,
    N: tl.constexpr, C: tl.constexpr, N_PAD: tl.constexpr, C_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Centroids (N_PAD, C_PAD) from the sums and counts of all programs; that of an empty cluster is 0."""
    n, c, r = tl.arange(0, N_PAD), tl.arange(0, C_PAD), tl.arange(0, ROWS)
    sums = tl.zeros([N_PAD, C_PAD], tl.float32)
    counts = tl.zeros([N_PAD], tl.float32)
    for first in range(0, chunks, ROWS):
        row = b * chunks + first + r
        there = (first + r < chunks)[:, None] & (n < N)[None, :]
        counts += tl.sum(tl.load(p_counts + row[:, None] * N + n[None, :], mask=there, other=0.0), 0)
        at = (row[:, None, None] * N + n[None, :, None]) * C + c[None, None, :]
        sums += tl.sum(tl.load(p_sums + at, mask=there[:, :, None] & (c < C)[None, None, :], other=0.0), 0)
    return sums / tl.maximum(counts, 1.0)[:, None]


@triton.jit
def assign_kernel(
    p_points, p_centroids, p_before, p_before_counts, p_labels, p_sums, p_counts, count, stride, total, steps, before,
    FIRST: tl.constexpr, LAST: tl.constexpr, N: tl.constexpr, C: tl.constexpr, N_PAD: tl.constexpr,
    C_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """argmin |p - c|^2 = argmax p.c - |c|^2 / 2; the first of equals, as in the other layers.

    FIRST: the centroids are given; otherwise they are joined from `before` partial sums. LAST: labels (and the joined
    centroids) are written, otherwise sums and counts.
    """
    chunk, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, c = tl.arange(0, N_PAD), tl.arange(0, C_PAD)
    in_table = (n < N)[:, None] & (c < C)[None, :]
    at_table = (b * N + n[:, None]) * C + c[None, :]
    if FIRST:
        table = tl.load(p_centroids + at_table, mask=in_table, other=0.0)
    else:
        table = joined(p_before, p_before_counts, b, before, N, C, N_PAD, C_PAD, ROWS)
        if LAST:
            if chunk == 0:
                tl.store(p_centroids + at_table, table, mask=in_table)
    half_norm = tl.where(n < N, 0.5 * tl.sum(table * table, 1), float("inf"))
    sums = tl.zeros([N_PAD, C_PAD], tl.float32)
    counts = tl.zeros([N_PAD], tl.float32)
    for tile in range(steps):
        p = (chunk * steps + tile) * BLOCK + tl.arange(0, BLOCK)
        valid = p < count
        at = (b * total + p * stride)[:, None] * C + c[None, :]
        points = tl.load(p_points + at, mask=valid[:, None] & (c < C)[None, :], other=0.0)
        score = tl.dot(points, tl.trans(table), input_precision="ieee") - half_norm[None, :]
        score = tl.where(score == score, score, float("-inf"))  # of NaN, a GPU's argmax takes the last of N_PAD
        label = tl.argmax(score, 1)
        if LAST:
            tl.store(p_labels + b * count + p, label.to(tl.int64), mask=valid)
        else:
            member = ((label[None, :] == n[:, None]) & valid[None, :]).to(tl.float32)
            sums = tl.dot(member, points, sums, input_precision="ieee")
            counts += tl.sum(member, 1)
    if not LAST:
        row = (b * tl.num_programs(0) + chunk) * N
        tl.store(p_sums + (row + n[:, None]) * C + c[None, :], sums, mask=in_table)
        tl.store(p_counts + row + n, counts, mask=n < N)


@triton.jit
def total_kernel(
    p_points, p_sums, count, stride, total, C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of the points of each tile."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p, c = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C_PAD)
    mask = (p < count)[:, None] & (c < C)[None, :]
    points = tl.load(p_points + (b * total + p * stride)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(p_sums + (b * tl.num_programs(0) + tile) * C + c, tl.sum(points, 0), mask=c < C)


@triton.jit
def nearest_kernel(
    p_points, p_sums, p_best, p_which, count, stride, total, tiles,
    C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each tile the point nearest to the mean of all, and its squared distance."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p, c = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C_PAD)
    mean = tl.zeros([C_PAD], tl.float32)
    for first in range(0, tiles, BLOCK):
        t = first + tl.arange(0, BLOCK)
        at = (b * tiles + t)[:, None] * C + c[None, :]
        mean += tl.sum(tl.load(p_sums + at, mask=(t < tiles)[:, None] & (c < C)[None, :], other=0.0), 0)
    mean = mean / count
    mask = (p < count)[:, None] & (c < C)[None, :]
    points = tl.load(p_points + (b * total + p * stride)[:, None] * C + c[None, :], mask=mask, other=0.0)
    apart = tl.where(mask, points - mean[None, :], 0.0)
    distance = tl.sum(apart * apart, 1)
    distance = tl.where((p < count) & (distance == distance), distance, float("inf"))
    tl.store(p_best + b * tiles + tile, tl.min(distance, 0))
    tl.store(p_which + b * tiles + tile, tile * BLOCK + tl.argmin(distance, 0))


@triton.jit
def start_kernel(
    p_points, p_best, p_which, p_before, p_after, p_mass_before, p_mass_after, p_starts, quantile, number,
    count, stride, total, tiles,
    FIRST: tl.constexpr, N: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Start point `number`, found by every program for itself, and the distances of a tile to the starts so far."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    own, c, t = tl.arange(0, BLOCK), tl.arange(0, C_PAD), tl.arange(0, TILES)
    if FIRST:
        best = tl.load(p_best + b * tiles + t, mask=t < tiles, other=float("inf"))
        at = tl.minimum(tl.argmin(best, 0), tiles - 1)
        index = tl.load(p_which + b * tiles + at)
    else:
        mass = tl.load(p_mass_before + b * tiles + t, mask=t < tiles, other=0.0)
        up_to = tl.cumsum(mass, 0)
        target = tl.sum(mass, 0) * quantile * 2.220446049250313e-16  # 2^-52: a float argument would be rounded
        at = tl.minimum(tl.sum(((up_to <= target) & (t < tiles)).to(tl.int32), 0), tiles - 1)
        base = tl.sum(tl.where(t < at, mass, 0.0), 0)
        there = at.to(tl.int64) * BLOCK + own
        inside = tl.load(p_before + b * count + there, mask=there < count, other=0.0).to(tl.float64)
        passed = (base + tl.cumsum(inside, 0) <= target) & (there < count)
        index = at.to(tl.int64) * BLOCK + tl.sum(passed.to(tl.int32), 0)
    index = tl.minimum(index, count - 1).to(tl.int64)
    start = tl.load(p_points + (b * total + index * stride) * C + c, mask=c < C, other=0.0)
    if tile == 0:
        tl.store(p_starts + (b * N + number) * C + c, start, mask=c < C)
    p = tile * BLOCK + own
    mask = (p < count)[:, None] & (c < C)[None, :]
    points = tl.load(p_points + (b * total + p * stride)[:, None] * C + c[None, :], mask=mask, other=0.0)
    apart = tl.where(mask, points - start[None, :], 0.0)
    distance = tl.sum(apart * apart, 1)
    if not FIRST:
        distance = tl.minimum(distance, tl.load(p_before + b * count + p, mask=p < count, other=0.0))
    tl.store(p_after + b * count + p, distance, mask=p < count)
    tl.store(p_mass_after + b * tiles + tile, tl.sum(distance.to(tl.float64), 0))


def kmeans_triton(
    points: Tensor, clusters: int, iterations: int | None, start: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Labels and centroids of float32 points; `start` None: spread. Steps on every `stride`-th point, then on all."""
    points = points.contiguous()
    if start is None:
        start = spread_start_triton(points, clusters, stride)
    if iterations is None:
        return lloyd(points, start, None, _assign)
    return _lloyd(points, start.contiguous(), iterations, stride)


def _widths(points: Tensor, clusters: int) -> tuple[dict[str, int], int]:
    n_pad, c_pad = padded(clusters, 16), padded(points.shape[2], 16)
    widths = {"N": clusters, "C": points.shape[2], "N_PAD": n_pad, "C_PAD": c_pad}
    block = block_of(max(n_pad, c_pad, 64))  # of more, the sums in "ieee" would not fit into registers
    return widths | {"ROWS": max(JOINED // (n_pad * c_pad), 1), "BLOCK": block}, block


class _Passes:
    """Launches of assign_kernel one after the other, each on the sums of the last."""

    def __init__(self, points: Tensor, centroids: Tensor) -> None:
        self.points, self.centroids = points, centroids
        self.sums, self.counts, self.chunks = centroids, centroids, 0  # not read by the first launch
        self.widths, self.block = _widths(points, centroids.shape[1])

    def __call__(self, stride: int, labels: Tensor | None = None) -> None:
        batch, total, channels = self.points.shape
        count = triton.cdiv(total, stride)
        most = max(PARTIALS // (self.widths["N_PAD"] * self.widths["C_PAD"]), 1)
        steps = triton.cdiv(count, self.block * most)
        chunks = triton.cdiv(count, self.block * steps)
        clusters, last = self.centroids.shape[1], labels is not None
        sums, counts = self.sums, self.counts
        if not last:
            sums = self.points.new_empty(batch, chunks, clusters, channels)
            counts = self.points.new_empty(batch, chunks, clusters)
        assign_kernel[(chunks, batch)](
            self.points, self.centroids, self.sums, self.counts, labels, sums, counts,
            count, stride, total, steps, self.chunks, FIRST=self.chunks == 0, LAST=last, **self.widths,
        )  # fmt: skip
        self.sums, self.counts, self.chunks = (sums, counts, chunks) if not last else (self.sums, self.counts, -1)


@custom_op("monai_registration::kmeans_lloyd_triton")
@on_device
def _lloyd(points: Tensor, start: Tensor, iterations: int, stride: int) -> tuple[Tensor, Tensor]:
    labels = torch.empty(points.shape[:2], dtype=torch.int64, device=points.device)
    run = _Passes(points, start.clone())
    for _ in range(iterations):
        run(stride)
    for _ in range(FULL_PASSES if stride > 1 else 0):
        run(1)
    run(1, labels)
    return labels, run.centroids


@_lloyd.register_fake
def _(points, start, iterations, stride):
    return points.new_empty(points.shape[:2], dtype=torch.int64), torch.empty_like(start)


@custom_op("monai_registration::kmeans_assign_triton")
@on_device
def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `assign_reference`: for the way to the fixed point, which the host watches."""
    labels = torch.empty(points.shape[:2], dtype=torch.int64, device=points.device)
    run = _Passes(points, centroids.contiguous())
    run(1)
    sums, counts = run.sums.sum(1), run.counts.sum(1).unsqueeze(2)
    _Passes(points, centroids.contiguous())(1, labels)
    return labels, sums, counts


@_assign.register_fake
def _(points, centroids):
    labels = points.new_empty(points.shape[:2], dtype=torch.int64)
    return labels, torch.empty_like(centroids), centroids.new_empty(len(points), centroids.shape[1], 1)


@custom_op("monai_registration::kmeans_start_triton")
@on_device
def spread_start_triton(points: Tensor, clusters: int, stride: int) -> Tensor:
    """As `spread_start` of every `stride`-th point."""
    batch, total, channels = points.shape
    widths, block = _widths(points, clusters)
    count = triton.cdiv(total, stride)
    tiles = triton.cdiv(count, block)
    if tiles > MOST_TILES:  # all points of a large volume as the sample: nobody's default
        return spread_start(points[:, ::stride], clusters)
    sizes, constants = (count, stride, total), {"C": channels, "C_PAD": widths["C_PAD"], "BLOCK": block}
    sums, best = points.new_empty(batch, tiles, channels), points.new_empty(batch, tiles)
    which = torch.empty(batch, tiles, dtype=torch.int64, device=points.device)
    starts = points.new_empty(batch, clusters, channels)
    distances = [points.new_empty(batch, count) for _ in range(2)]
    masses = [torch.empty(batch, tiles, dtype=torch.float64, device=points.device) for _ in range(2)]
    total_kernel[(tiles, batch)](points, sums, *sizes, **constants)
    nearest_kernel[(tiles, batch)](points, sums, best, which, *sizes, tiles, **constants)
    constants["TILES"] = padded(tiles)
    for n in range(clusters):
        (before, after), (mass, mass_after) = distances[:: 1 - 2 * (n % 2)], masses[:: 1 - 2 * (n % 2)]
        start_kernel[(tiles, batch)](
            points, best, which, before, after, mass, mass_after, starts,
            int((0.6180339887498949 * n) % 1.0 * 2**52), n, *sizes, tiles, FIRST=n == 0, N=clusters, **constants,
        )  # fmt: skip
    return starts


@spread_start_triton.register_fake
def _(points, clusters, stride):
    return points.new_empty(len(points), clusters, points.shape[2])
