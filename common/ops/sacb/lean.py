"""Spatially adaptive convolution as ONE convolution whose taps are scaled per voxel: cost independent of N.

W_n[o, c, t] = a[n, t] W[o, c, t], so out(v) = W . (a[label(v)] * patch(v)) + b[label(v)]: a block's patches are scaled
while they are copied, and one matrix product follows. With T = W^T g(v), the gradients are
dW = sum_v g(v) (a patch)^T,  da[n, t] = sum_{v in n} sum_c T[t, c] patch[t, c],  dx = fold(a T),
db[n] = sum_{v in n} g(v).
"""

import torch
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._patches import add_patches, block_patches, blocks, channels_last, pad_grid, windows


def modulated_conv3d_lean(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor) -> Tensor:
    """See `common.ops.sacb.modulated_conv3d`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    arguments = [t.to(dtype) for t in (x, weight, bias, modulation)]
    return _modulated_conv3d(*arguments, labels.long()).to(x.dtype)


@custom_op("monai_registration::modulated_conv3d")
def _modulated_conv3d(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor) -> Tensor:
    last = channels_last(x)
    batch, *size, channels = last.shape
    matrix = weight.permute(2, 3, 4, 1, 0).reshape(27 * channels, -1)  # taps slowest, as in a patch
    out = last.new_empty(batch, *size, weight.shape[0])
    for b in range(batch):
        view = windows(pad_grid(last[b], 1), 1)
        for at in blocks(tuple(size), 27 * channels):
            label = labels[b][at].reshape(-1)
            value = torch.mm(_scaled(view[at], modulation[b], label).flatten(1), matrix)
            out[b][at] = value.add_(bias[b].index_select(0, label)).view(out[b][at].shape)
    return out.permute(0, 4, 1, 2, 3)


def _scaled(view: Tensor, modulation: Tensor, label: Tensor) -> Tensor:
    """The windows (i, j, K, 3, 3, 3, C) of a block, each tap times its voxel's modulation: (V, 27, C)."""
    scale = modulation.index_select(0, label).view(*view.shape[:6], 1)
    out = view.new_empty(view.shape)  # contiguous; without it, mul would take the order of the overlapping windows
    return torch.mul(view, scale, out=out).view(-1, 27, view.shape[6])


@_modulated_conv3d.register_fake
def _(x, weight, bias, modulation, labels):
    return x.new_empty(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 4, 1, 2, 3)


@custom_op("monai_registration::modulated_conv3d_backward")
def _modulated_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and modulation."""
    last, g = channels_last(x), channels_last(grad)
    batch, *size, channels = last.shape
    out_channels = weight.shape[0]
    matrix = weight.permute(2, 3, 4, 1, 0).reshape(27 * channels, out_channels)
    grad_x, grad_matrix = torch.empty_like(last), torch.zeros_like(matrix)
    grad_bias = g.new_zeros(batch, modulation.shape[1], out_channels)
    grad_modulation = torch.zeros_like(modulation)
    for b in range(batch):
        padded = pad_grid(last[b], 1)
        view, total = windows(padded, 1), torch.zeros_like(padded)
        for at in blocks(tuple(size), 27 * channels):
            label, block_g = labels[b][at].reshape(-1), g[b][at].reshape(-1, out_channels)
            grad_bias[b].index_add_(0, label, block_g)
            grad_matrix.addmm_(_scaled(view[at], modulation[b], label).flatten(1).t(), block_g)
            pulled = (block_g @ matrix.t()).view(-1, 27, channels)
            grad_modulation[b].index_add_(0, label, block_patches(view, at).mul_(pulled).sum(2))
            pulled *= modulation[b].index_select(0, label).unsqueeze(2)
            add_patches(total, pulled.view(*view[at].shape[:3], 27, channels), at, 1)
        grad_x[b] = total[1:-1, 1:-1, 1:-1]
    grad_weight = grad_matrix.view(3, 3, 3, channels, out_channels).permute(4, 3, 0, 1, 2).contiguous()
    return grad_x.permute(0, 4, 1, 2, 3), grad_weight, grad_bias, grad_modulation


@_modulated_conv3d_backward.register_fake
def _(grad, x, weight, modulation, labels):
    grad_x = x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3)
    grad_bias = x.new_empty(x.shape[0], modulation.shape[1], weight.shape[0])
    return grad_x, x.new_empty(weight.shape), grad_bias, x.new_empty(modulation.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, _, modulation, labels = inputs
    ctx.save_for_backward(x, weight, modulation, labels)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    return *_modulated_conv3d_backward(grad, *ctx.saved_tensors), None


_modulated_conv3d.register_autograd(_backward, setup_context=_setup)
