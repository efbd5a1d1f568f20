"""match block by block: (2r+1)^3 patches exist for one block of voxels only; backward recomputes the scores.

With weights s_d = exp(score_d - lse) and g the gradient of disp, the softmax gives
d score_d = s_d * (d.g - g.disp), so that only disp and lse are kept.
"""

import torch
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._patches import add_patches, block_patches, blocks, channels_last, pad_grid, windows
from common.ops.match.reference import offsets


def match_lean(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
    """See `common.ops.match`."""
    dtype = torch.promote_types(feat_fixed.dtype, torch.float32)
    disp, _ = _match(feat_fixed.to(dtype), feat_moving.to(dtype), radius)
    return disp


@custom_op("monai_registration::match")
def _match(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """disp (B, 3, I, J, K) and the log-sum-exp of the scores (B, I, J, K)."""
    fixed, moving = channels_last(feat_fixed), channels_last(feat_moving)
    batch, *size, channels = fixed.shape
    step = offsets(radius, fixed)
    disp, lse = fixed.new_empty(batch, *size, 3), fixed.new_empty(batch, *size)
    for b in range(batch):
        view = windows(pad_grid(moving[b], radius), radius)
        for at in blocks(tuple(size), len(step) * channels):
            score = _scores(fixed[b][at], view[at])
            total = score.logsumexp(1, keepdim=True)
            lse[b][at] = total.view(lse[b][at].shape)
            disp[b][at] = ((score - total).exp() @ step).view(disp[b][at].shape)
    return disp.permute(0, 4, 1, 2, 3), lse


def _scores(fixed: Tensor, view: Tensor) -> Tensor:
    """(V, (2r+1)^3) dot products of block `fixed` (i, j, K, C) with its windows."""
    channels = fixed.shape[-1]
    patches = view.reshape(-1, view.shape[3] ** 3, channels)
    return torch.bmm(patches, fixed.reshape(-1, channels, 1)).squeeze(2)


@_match.register_fake
def _(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    batch, _, i, j, k = feat_fixed.shape
    return feat_fixed.new_empty(batch, i, j, k, 3).permute(0, 4, 1, 2, 3), feat_fixed.new_empty(batch, i, j, k)


@custom_op("monai_registration::match_backward")
def _match_backward(
    grad: Tensor, feat_fixed: Tensor, feat_moving: Tensor, disp: Tensor, lse: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Gradients to both features, in their shape."""
    fixed, moving, g, out = map(channels_last, (feat_fixed, feat_moving, grad, disp))
    batch, *size, channels = fixed.shape
    step = offsets(radius, fixed)
    grad_fixed, grad_moving = torch.empty_like(fixed), torch.empty_like(moving)
    for b in range(batch):
        padded = pad_grid(moving[b], radius)
        view, total = windows(padded, radius), torch.zeros_like(padded)
        for at in blocks(tuple(size), len(step) * channels):
            f, block_g, block_out = fixed[b][at], g[b][at].reshape(-1, 3), out[b][at].reshape(-1, 3)
            patches = block_patches(view, at)
            query = f.reshape(-1, channels, 1)
            score = torch.bmm(patches, query).squeeze(2)
            weight = (score - lse[b][at].reshape(-1, 1)).exp()
            d_score = weight * (block_g @ step.t() - (block_g * block_out).sum(1, keepdim=True))
            grad_fixed[b][at] = torch.bmm(d_score.unsqueeze(1), patches).view(f.shape)
            torch.mul(d_score.unsqueeze(2), query.transpose(1, 2), out=patches)
            add_patches(total, patches.view(*f.shape[:3], len(step), channels), at, radius)
        inner = slice(radius, -radius or None)
        grad_moving[b] = total[inner, inner, inner]
    return grad_fixed.permute(0, 4, 1, 2, 3), grad_moving.permute(0, 4, 1, 2, 3)


@_match_backward.register_fake
def _(grad, feat_fixed, feat_moving, disp, lse, radius):
    like = [x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3) for x in (feat_fixed, feat_moving)]
    return like[0], like[1]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.radius = inputs[2]


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
    return *_match_backward(grad, *ctx.saved_tensors, ctx.radius), None


_match.register_autograd(_backward, setup_context=_setup)
