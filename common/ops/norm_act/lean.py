"""norm_act on channels-last memory, saving its output only: LeakyReLU can be undone, so that y is known from it.

torch's instance norm leaves channels-last and is six times slower there; its group norm stays but takes the variance as
E[x^2] - E[x]^2, which costs three digits. Here the first voxel and then the slab's mean are removed before squares are
summed, and slabs are joined in float64 (Chan's update). Some voxels side by side make a wide row: torch's loops over
rows of eight numbers take three times as long.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._patches import channels_last

# Values worked on at a time: on a CPU what its cache holds, also in float64; on a GPU without Triton, few launches.
SLAB, SLAB_GPU = 1 << 17, 1 << 23
WIDE = 256  # values of a row, about


def norm_act_lean(x: Tensor, slope: float, eps: float) -> Tensor:
    """See `common.ops.norm_act`."""
    out, _ = _norm_act(x.to(torch.promote_types(x.dtype, torch.float32)), slope, eps)
    return out.to(x.dtype)


@custom_op("monai_registration::norm_act")
def _norm_act(x: Tensor, slope: float, eps: float) -> tuple[Tensor, Tensor]:
    """Output, and 1 / sqrt(var + eps) as (B, 1, C)."""
    last = channels_last(x)
    batch, *size, channels = last.shape
    side = math.gcd(math.prod(size), max(WIDE // channels, 1))  # voxels of a row
    rows = last.view(batch, -1, side * channels)
    slab = max((SLAB_GPU if x.is_cuda else SLAB) // rows.shape[2], 1)
    out, rstd = torch.empty_like(rows), rows.new_empty(batch, 1, channels)
    for x_b, out_b, rstd_b in zip(rows, out, rstd):
        parts = x_b.split(slab)
        mean, var = _moments(parts, channels)
        mean, rstd_b[:] = mean.to(x.dtype).repeat(side), (var + eps).rsqrt_().to(x.dtype)
        scale = rstd_b.repeat(1, side)
        for part, into in zip(parts, out_b.split(slab)):
            F.leaky_relu_(torch.sub(part, mean, out=into).mul_(scale), slope)
    return out.view(last.shape).permute(0, 4, 1, 2, 3), rstd


def _moments(parts: tuple[Tensor, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float64 of slabs of rows, each of some voxels of C channels."""

    def summed(values: Tensor) -> Tensor:
        return values.sum(0, dtype=torch.float64).view(-1, channels).sum(0)

    width = parts[0].shape[1]
    shift = parts[0][0, :channels].repeat(width // channels)
    mean = squares = torch.zeros(channels, dtype=torch.float64, device=shift.device)
    seen, buffer = 0, torch.empty_like(parts[0])
    for part in parts:
        apart = torch.sub(part, shift, out=buffer[: len(part)])
        count = part.numel() // channels
        own = summed(apart) / count
        delta = own - mean
        mean = mean + delta * (count / (seen + count))
        apart.sub_(own.to(part.dtype).repeat(width // channels))
        squares = squares + summed(apart.square_()) + delta.square() * (seen * count / (seen + count))
        seen += count
    return mean + shift[:channels], squares / seen


@_norm_act.register_fake
def _(x, slope, eps):
    batch, channels, *size = x.shape
    return x.new_empty(batch, *size, channels).permute(0, 4, 1, 2, 3), x.new_empty(batch, 1, channels)


@custom_op("monai_registration::norm_act_backward")
def _norm_act_backward(grad: Tensor, out: Tensor, rstd: Tensor, slope: float) -> Tensor:
    """rstd * (g - mean(g) - y * mean(g y)), with g the gradient before the LeakyReLU."""
    last = channels_last(out)
    rows = last.flatten(1, 3)
    g = torch.ops.aten.leaky_relu_backward(channels_last(grad).flatten(1, 3), rows, slope, True)
    y = F.leaky_relu(rows, 1 / slope)
    share = (g * y).mean(1, keepdim=True)
    g -= g.mean(1, keepdim=True)
    g.addcmul_(y, share, value=-1).mul_(rstd)
    return g.view(last.shape).permute(0, 4, 1, 2, 3)


@_norm_act_backward.register_fake
def _(grad, out, rstd, slope):
    batch, channels, *size = out.shape
    return out.new_empty(batch, *size, channels).permute(0, 4, 1, 2, 3)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output)
    ctx.slope = inputs[1]


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
    return _norm_act_backward(grad, *ctx.saved_tensors, ctx.slope), None, None


_norm_act.register_autograd(_backward, setup_context=_setup)
