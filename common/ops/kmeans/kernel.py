"""One assignment pass of k-means in Triton: labels, cluster sums and counts from one read of the points.

Partial sums of a program go to memory of their own and are added afterwards: no atomics, no wait for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._triton import block_of, on_device, padded

CHUNKS = 512  # programs of one batch entry


@triton.jit
def assign_kernel(
    p_points, p_centroids, p_labels, p_sums, p_counts, count, steps, chunks,
    N: tl.constexpr, C: tl.constexpr, N_PAD: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """argmin |p - c|^2 = argmax p.c - |c|^2 / 2; the first of equals, as in the other layers."""
    chunk, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, c = tl.arange(0, N_PAD), tl.arange(0, C_PAD)
    in_table = (n < N)[:, None] & (c < C)[None, :]
    table = tl.load(p_centroids + (b * N + n[:, None]) * C + c[None, :], mask=in_table, other=0.0)
    half_norm = tl.where(n < N, 0.5 * tl.sum(table * table, 1), float("inf"))
    sums = tl.zeros([N_PAD, C_PAD], tl.float32)
    counts = tl.zeros([N_PAD], tl.float32)
    for tile in range(steps):
        p = (chunk * steps + tile) * BLOCK + tl.arange(0, BLOCK)
        valid = p < count
        at = (b * count + p)[:, None] * C + c[None, :]
        points = tl.load(p_points + at, mask=valid[:, None] & (c < C)[None, :], other=0.0)
        score = tl.dot(points, tl.trans(table), input_precision="ieee") - half_norm[None, :]
        label = tl.argmax(score, 1)
        tl.store(p_labels + b * count + p, label.to(tl.int64), mask=valid)
        member = ((label[None, :] == n[:, None]) & valid[None, :]).to(tl.float32)
        sums = tl.dot(member, points, sums, input_precision="ieee")
        counts += tl.sum(member, 1)
    row = (b * chunks + chunk) * N
    tl.store(p_sums + (row + n[:, None]) * C + c[None, :], sums, mask=in_table)
    tl.store(p_counts + row + n, counts, mask=n < N)


def assign_triton(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `assign_reference`, for float32 points."""
    return _assign(points.contiguous(), centroids.contiguous())


@torch.library.custom_op("monai_registration::kmeans_assign_triton", mutates_args=())
@on_device
def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, channels = points.shape
    clusters = centroids.shape[1]
    n_pad, c_pad = padded(clusters, 16), padded(channels, 16)
    block = block_of(max(n_pad, c_pad))
    steps = triton.cdiv(count, block * CHUNKS)
    chunks = triton.cdiv(count, block * steps)
    labels = torch.empty(batch, count, dtype=torch.int64, device=points.device)
    sums = points.new_empty(batch, chunks, clusters, channels)
    counts = points.new_empty(batch, chunks, clusters)
    assign_kernel[(chunks, batch)](
        points, centroids, labels, sums, counts, count, steps, chunks,
        N=clusters, C=channels, N_PAD=n_pad, C_PAD=c_pad, BLOCK=block,
    )  # fmt: skip
    return labels, sums.sum(1), counts.sum(1).unsqueeze(2)


@_assign.register_fake
def _(points, centroids):
    batch, count, channels = points.shape
    labels = points.new_empty(batch, count, dtype=torch.int64)
    return labels, torch.empty_like(centroids), centroids.new_empty(batch, centroids.shape[1], 1)
