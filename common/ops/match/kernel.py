"""match in Triton: online softmax over the window; the backward gathers, so that it needs no atomics.

Neither holds anything per offset: forward keeps disp and the log-sum-exp, backward recomputes the scores from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded, rows, tile_of, volume, voxel_of, wide


@triton.jit
def match_fwd_kernel(
    p_fixed, p_moving, p_disp, p_lse, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, RADIUS: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    _, i, j, k = voxel_of(v, I, J, K)
    c = tl.arange(0, C_PAD)[None, :]
    fixed = tl.load(p_fixed + v[:, None] * C + c, mask=valid[:, None] & (c < C), other=0.0).to(tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_i, sum_j, sum_k = total, total, total
    WIDTH: tl.constexpr = 2 * RADIUS + 1
    for n in range(WIDTH * WIDTH * WIDTH):
        a, b, d = n // (WIDTH * WIDTH) - RADIUS, (n // WIDTH) % WIDTH - RADIUS, n % WIDTH - RADIUS
        inside = valid & (i + a >= 0) & (i + a < I) & (j + b >= 0) & (j + b < J) & (k + d >= 0) & (k + d < K)
        near = v + (a * J + b) * K + d
        moving = tl.load(p_moving + near[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0).to(tl.float32)
        score = tl.sum(fixed * moving, 1)  # 0 outside
        larger = tl.maximum(top, score)
        shrink, weight = tl.exp(top - larger), tl.exp(score - larger)
        total = total * shrink + weight
        sum_i = sum_i * shrink + weight * a
        sum_j = sum_j * shrink + weight * b
        sum_k = sum_k * shrink + weight * d
        top = larger
    tl.store(p_disp + v * 3, sum_i / total, mask=valid)
    tl.store(p_disp + v * 3 + 1, sum_j / total, mask=valid)
    tl.store(p_disp + v * 3 + 2, sum_k / total, mask=valid)
    tl.store(p_lse + v, top + tl.log(total), mask=valid)


@triton.jit
def match_bwd_kernel(
    p_fixed, p_moving, p_lse, p_grad, p_disp, p_grad_fixed, p_grad_moving, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, RADIUS: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_fixed(v) gathers moving(v + d); grad_moving(v) gathers fixed(v - d), whose window holds v at offset d."""
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    _, i, j, k = voxel_of(v, I, J, K)
    c = tl.arange(0, C_PAD)[None, :]
    here = v[:, None] * C + c
    in_row = valid[:, None] & (c < C)
    fixed = tl.load(p_fixed + here, mask=in_row, other=0.0).to(tl.float32)
    moving = tl.load(p_moving + here, mask=in_row, other=0.0).to(tl.float32)
    lse = tl.load(p_lse + v, mask=valid, other=0.0)
    grad_i = tl.load(p_grad + v * 3, mask=valid, other=0.0)
    grad_j = tl.load(p_grad + v * 3 + 1, mask=valid, other=0.0)
    grad_k = tl.load(p_grad + v * 3 + 2, mask=valid, other=0.0)
    mean = grad_i * tl.load(p_disp + v * 3, mask=valid, other=0.0)
    mean += grad_j * tl.load(p_disp + v * 3 + 1, mask=valid, other=0.0)
    mean += grad_k * tl.load(p_disp + v * 3 + 2, mask=valid, other=0.0)
    grad_fixed = tl.zeros([BLOCK, C_PAD], tl.float32)
    grad_moving = tl.zeros([BLOCK, C_PAD], tl.float32)
    WIDTH: tl.constexpr = 2 * RADIUS + 1
    for n in range(WIDTH * WIDTH * WIDTH):
        a, b, d = n // (WIDTH * WIDTH) - RADIUS, (n // WIDTH) % WIDTH - RADIUS, n % WIDTH - RADIUS
        step = (a * J + b) * K + d
        inside = valid & (i + a >= 0) & (i + a < I) & (j + b >= 0) & (j + b < J) & (k + d >= 0) & (k + d < K)
        other = tl.load(p_moving + (v + step)[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0).to(
            tl.float32
        )
        weight = tl.exp(tl.sum(fixed * other, 1) - lse)
        grad_score = weight * (a * grad_i + b * grad_j + d * grad_k - mean)
        grad_fixed += grad_score[:, None] * other

        inside = valid & (i - a >= 0) & (i - a < I) & (j - b >= 0) & (j - b < J) & (k - d >= 0) & (k - d < K)
        u = v - step
        other = tl.load(p_fixed + (v - step)[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(moving * other, 1) - tl.load(p_lse + u, mask=inside, other=0.0))
        dot = tl.load(p_grad + u * 3, mask=inside, other=0.0) * (a - tl.load(p_disp + u * 3, mask=inside, other=0.0))
        dot += tl.load(p_grad + u * 3 + 1, mask=inside, other=0.0) * (
            b - tl.load(p_disp + u * 3 + 1, mask=inside, other=0.0)
        )
        dot += tl.load(p_grad + u * 3 + 2, mask=inside, other=0.0) * (
            d - tl.load(p_disp + u * 3 + 2, mask=inside, other=0.0)
        )
        grad_moving += (weight * dot)[:, None] * other  # `other` is 0 outside
    tl.store(p_grad_fixed + here, grad_fixed, mask=in_row)
    tl.store(p_grad_moving + here, grad_moving, mask=in_row)


def match_triton(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
    """See `common.ops.match`."""
    disp, _ = _match(feat_fixed, feat_moving, radius)
    return disp


@custom_op("monai_registration::match_triton")
@on_device
def _match(feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """disp (B, 3, I, J, K) and the log-sum-exp of the scores (B, I, J, K), both float32."""
    fixed, moving = rows(feat_fixed), rows(feat_moving)
    batch, *size, channels = fixed.shape
    disp = torch.empty(batch, *size, 3, device=fixed.device)
    lse = torch.empty(batch, *size, device=fixed.device)
    block = block_of(padded(channels))
    match_fwd_kernel[(triton.cdiv(lse.numel(), block),)](
        fixed, moving, disp, lse, lse.numel(), *size,
        C=channels, RADIUS=radius, C_PAD=padded(channels), BLOCK=block, WIDE=wide(fixed, disp),
    )  # fmt: skip
    return volume(disp), lse


@_match.register_fake
def _(feat_fixed, feat_moving, radius):
    batch, _, *size = feat_fixed.shape
    disp = feat_fixed.new_empty(batch, *size, 3, dtype=torch.float32)
    return volume(disp), feat_fixed.new_empty(batch, *size, dtype=torch.float32)


@custom_op("monai_registration::match_triton_backward")
@on_device
def _match_backward(
    grad: Tensor, feat_fixed: Tensor, feat_moving: Tensor, disp: Tensor, lse: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Gradients to both features, in their shape and dtype."""
    fixed, moving, g, out = map(rows, (feat_fixed, feat_moving, grad, disp))
    *size, channels = fixed.shape[1:]
    grad_fixed, grad_moving = torch.empty_like(fixed), torch.empty_like(moving)
    block = block_of(2 * padded(channels))
    match_bwd_kernel[(triton.cdiv(lse.numel(), block),)](
        fixed, moving, lse, g, out, grad_fixed, grad_moving, lse.numel(), *size,
        C=channels, RADIUS=radius, C_PAD=padded(channels), BLOCK=block, WIDE=wide(fixed, out),
    )  # fmt: skip
    return volume(grad_fixed), volume(grad_moving)


@_match_backward.register_fake
def _(grad, feat_fixed, feat_moving, disp, lse, radius):
    return volume(torch.empty_like(rows(feat_fixed))), volume(torch.empty_like(rows(feat_moving)))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *output)
    ctx.radius = inputs[2]


def _backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
    return *_match_backward(grad, *ctx.saved_tensors, ctx.radius), None


_match.register_autograd(_backward, setup_context=_setup)
