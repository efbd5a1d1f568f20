"""norm_act on channels-last memory, saving its output only: LeakyReLU can be undone, so that y is known from it.

torch's instance norm leaves channels-last and is six times slower there; its group norm stays but takes the variance as
E[x^2] - E[x]^2, which costs three digits. Here the mean is removed first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._patches import channels_last

# Values worked on at a time: on a CPU what its cache holds, also in float64; on a GPU without Triton, few launches.
SLAB, SLAB_GPU = 1 << 17, 1 << 23


def norm_act_lean(x: Tensor, slope: float, eps: float) -> Tensor:
    """See `common.ops.norm_act`."""
    out, _ = _norm_act(x.to(torch.promote_types(x.dtype, torch.float32)), slope, eps)
    return out.to(x.dtype)


@custom_op("monai_registration::norm_act")
def _norm_act(x: Tensor, slope: float, eps: float) -> tuple[Tensor, Tensor]:
    """Output, and 1 / sqrt(var + eps) as (B, 1, C)."""
    last = channels_last(x)
    rows = last.flatten(1, 3)  # (B, V, C)
    slab = max((SLAB_GPU if x.is_cuda else SLAB) // rows.shape[2], 1)
    out, rstd = torch.empty_like(rows), rows.new_empty(len(rows), 1, rows.shape[2])
    for x_b, out_b, rstd_b in zip(rows, out, rstd):
        parts = x_b.split(slab)
        mean = (sum(part.sum(0, dtype=torch.float64) for part in parts) / len(x_b)).to(x.dtype)
        squares = sum((part - mean).double().square_().sum(0) for part in parts)  # exact: no digits cancel
        rstd_b[:] = (squares / len(x_b) + eps).rsqrt_().to(x.dtype)
        for part, into in zip(parts, out_b.split(slab)):
            F.leaky_relu_(torch.sub(part, mean, out=into).mul_(rstd_b), slope)
    return out.view(last.shape).permute(0, 4, 1, 2, 3), rstd


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
