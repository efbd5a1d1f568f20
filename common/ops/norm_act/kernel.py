"""norm_act in Triton: two passes forward and two backward, 12 and 20 bytes a value in float32.

The statistics pass leaves mean and sum of squared deviations of some hundred stretches (Chan's update, so that a mean a
thousand times the deviation costs no digits); every program of the second pass joins these few numbers by itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import TILE, on_device, padded, rows, volume

JOINED = 2048  # partial results, of all stretches and channels, that one program joins
PROGRAMS = 1056  # of a normalising pass: eight a multiprocessor


@triton.jit
def stats_kernel(p_x, p_mean, p_m2, voxels, steps, C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, less the first voxel of the volume, and sum of squared deviations of each stretch of `steps` tiles."""
    chunk, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_PAD)
    shift = tl.load(p_x + b * voxels * C + c, mask=c < C, other=0.0).to(tl.float32)
    mean = tl.zeros([C_PAD], tl.float32)
    m2 = tl.zeros([C_PAD], tl.float32)
    seen = 0.0
    for tile in range(steps):
        v = (chunk * steps + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = (v < voxels)[:, None] & (c < C)[None, :]
        x = tl.load(p_x + (b * voxels + v)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift[None, :], 0.0)
        n = tl.sum((v < voxels).to(tl.float32), 0)
        own = tl.sum(x, 0) / tl.maximum(n, 1.0)
        apart = tl.where(mask, x - own[None, :], 0.0)
        delta, total = own - mean, tl.maximum(seen + n, 1.0)
        m2 += tl.sum(apart * apart, 0) + delta * delta * (seen * n / total)
        mean += delta * (n / total)
        seen += n
    at = (b * tl.num_programs(0) + chunk) * C + c
    tl.store(p_mean + at, mean, mask=c < C)
    tl.store(p_m2 + at, m2, mask=c < C)


@triton.jit
def stretches(b, chunks, C: tl.constexpr, C_PAD: tl.constexpr, CHUNKS: tl.constexpr):
    """Where the partial results of batch entry b lie, (CHUNKS, C_PAD), and which of them there are."""
    n, c = tl.arange(0, CHUNKS)[:, None], tl.arange(0, C_PAD)[None, :]
    return (b * chunks + n) * C + c, (n < chunks) & (c < C)


@triton.jit
def apply_kernel(
    p_x, p_mean, p_m2, p_rstd, p_out, voxels, stretch, chunks, tiles, eps, slope,
    C: tl.constexpr, C_PAD: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_PAD)
    at, there = stretches(b, chunks, C, C_PAD, CHUNKS)
    begin = tl.arange(0, CHUNKS).to(tl.int64) * stretch
    count = tl.minimum(tl.maximum(voxels - begin, 0), stretch).to(tl.float32)[:, None]
    means = tl.load(p_mean + at, mask=there, other=0.0)
    mean = tl.sum(means * count, 0) / voxels
    apart = means - mean[None, :]
    m2 = tl.sum(tl.load(p_m2 + at, mask=there, other=0.0) + tl.where(there, apart * apart * count, 0.0), 0)
    rstd = 1.0 / tl.sqrt(m2 / voxels + eps)
    if part == 0:
        tl.store(p_rstd + b * C + c, rstd, mask=c < C)
    shift = tl.load(p_x + b * voxels * C + c, mask=c < C, other=0.0).to(tl.float32)
    for tile in range(tiles):
        v = (part * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = (v < voxels)[:, None] & (c < C)[None, :]
        at_x = (b * voxels + v)[:, None] * C + c[None, :]
        x = tl.load(p_x + at_x, mask=mask, other=0.0).to(tl.float32)
        y = (x - shift[None, :] - mean[None, :]) * rstd[None, :]
        tl.store(p_out + at_x, tl.where(y > 0, y, slope * y), mask=mask)


@triton.jit
def undone(p_grad, p_out, at, mask, slope):
    """Gradient before the LeakyReLU, and what it was given."""
    grad = tl.load(p_grad + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(p_out + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(out > 0, grad, slope * grad), tl.where(out > 0, out, out / slope)


@triton.jit
def sums_kernel(
    p_grad, p_out, p_sum, p_share, voxels, steps, slope, C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of g and of g y over each stretch."""
    chunk, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_PAD)
    total = tl.zeros([C_PAD], tl.float32)
    share = tl.zeros([C_PAD], tl.float32)
    for tile in range(steps):
        v = (chunk * steps + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = (v < voxels)[:, None] & (c < C)[None, :]
        g, y = undone(p_grad, p_out, (b * voxels + v)[:, None] * C + c[None, :], mask, slope)
        total += tl.sum(g, 0)
        share += tl.sum(g * y, 0)
    at = (b * tl.num_programs(0) + chunk) * C + c
    tl.store(p_sum + at, total, mask=c < C)
    tl.store(p_share + at, share, mask=c < C)


@triton.jit
def grad_kernel(
    p_grad, p_out, p_sum, p_share, p_rstd, p_into, voxels, chunks, tiles, slope,
    C: tl.constexpr, C_PAD: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rstd * (g - mean(g) - y * mean(g y))."""
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_PAD)
    at, there = stretches(b, chunks, C, C_PAD, CHUNKS)
    mean = tl.sum(tl.load(p_sum + at, mask=there, other=0.0), 0) / voxels
    share = tl.sum(tl.load(p_share + at, mask=there, other=0.0), 0) / voxels
    rstd = tl.load(p_rstd + b * C + c, mask=c < C, other=0.0)
    for tile in range(tiles):
        v = (part * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = (v < voxels)[:, None] & (c < C)[None, :]
        at_g = (b * voxels + v)[:, None] * C + c[None, :]
        g, y = undone(p_grad, p_out, at_g, mask, slope)
        tl.store(p_into + at_g, (g - mean[None, :] - y * share[None, :]) * rstd[None, :], mask=mask)


def _tiling(x: Tensor) -> tuple[int, int, int, int, int, dict[str, int]]:
    """Of rows (B, I, J, K, C): voxels, steps and number of the stretches, tiles and number of the programs, widths."""
    voxels, width = x[0, ..., 0].numel(), padded(x.shape[4])
    block = max(TILE // width, 16)
    all_tiles = triton.cdiv(voxels, block)
    steps = triton.cdiv(all_tiles, max(JOINED // width, 16))
    tiles = triton.cdiv(all_tiles, max(PROGRAMS // len(x), 1))
    chunks = triton.cdiv(all_tiles, steps)
    widths = {"C": x.shape[4], "C_PAD": width, "BLOCK": block}
    return voxels, steps, chunks, tiles, triton.cdiv(all_tiles, tiles), widths


def norm_act_triton(x: Tensor, slope: float, eps: float) -> Tensor:
    """See `common.ops.norm_act`."""
    return _norm_act(x, slope, eps)[0]


@custom_op("monai_registration::norm_act_triton")
@on_device
def _norm_act(x: Tensor, slope: float, eps: float) -> tuple[Tensor, Tensor]:
    """Output in the dtype of x, and 1 / sqrt(var + eps) as (B, C) in float32."""
    last = rows(x)
    voxels, steps, chunks, tiles, programs, widths = _tiling(last)
    batch, channels = len(last), last.shape[4]
    mean, m2 = torch.empty(2, batch, chunks, channels, device=x.device)
    out, rstd = torch.empty_like(last), torch.empty(batch, channels, device=x.device)
    stats_kernel[(chunks, batch)](last, mean, m2, voxels, steps, **widths)
    apply_kernel[(programs, batch)](
        last, mean, m2, rstd, out, voxels, steps * widths["BLOCK"], chunks, tiles, eps, slope,
        CHUNKS=padded(chunks), **widths,
    )  # fmt: skip
    return volume(out), rstd


@_norm_act.register_fake
def _(x, slope, eps):
    rstd = x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
    return volume(x.new_empty(x.shape[0], *x.shape[2:], x.shape[1])), rstd


@custom_op("monai_registration::norm_act_triton_backward")
@on_device
def _norm_act_backward(grad: Tensor, out: Tensor, rstd: Tensor, slope: float) -> Tensor:
    g, last = rows(grad), rows(out)
    voxels, steps, chunks, tiles, programs, widths = _tiling(last)
    total, share = torch.empty(2, len(last), chunks, last.shape[4], device=out.device)
    into = torch.empty_like(last)
    sums_kernel[(chunks, len(last))](g, last, total, share, voxels, steps, slope, **widths)
    grad_kernel[(programs, len(last))](
        g, last, total, share, rstd, into, voxels, chunks, tiles, slope, CHUNKS=padded(chunks), **widths
    )
    return volume(into)


@_norm_act_backward.register_fake
def _(grad, out, rstd, slope):
    return volume(out.new_empty(out.shape[0], *out.shape[2:], out.shape[1]))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output)
    ctx.slope = inputs[1]


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
    return _norm_act_backward(grad, *ctx.saved_tensors, ctx.slope), None, None


_norm_act.register_autograd(_backward, setup_context=_setup)
