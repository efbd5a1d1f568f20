"""halve, double and box_mean in Triton: one gather each, gradients too, so that nothing is added in varying order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded, rows, tile_of, volume, voxel_of, wide


@triton.jit
def halve_kernel(
    p_x, p_out, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, BACK: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean of 8 voxels; BACK: an eighth of the gradient to each of them. I, J, K are of the result."""
    v = tile_of(BLOCK, WIDE)
    b, i, j, k = voxel_of(v, I, J, K)
    c = tl.arange(0, C_PAD)[None, :]
    mask = (v < voxels)[:, None] & (c < C)
    out = tl.zeros([BLOCK, C_PAD], tl.float32)
    if BACK:
        row = ((b * (I // 2) + i // 2) * (J // 2) + j // 2) * (K // 2) + k // 2
        out = tl.load(p_x + row[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
    else:
        for n in tl.static_range(8):
            row = ((b * 2 * I + 2 * i + n // 4) * 2 * J + 2 * j + (n // 2) % 2) * 2 * K + 2 * k + n % 2
            out += tl.load(p_x + row[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + v[:, None] * C + c, out * 0.125, mask=mask)


@triton.jit
def below(o, n):
    """Voxel below place o (n - 1) / (2 n - 1) of an axis of n voxels, and how far o lies beyond it."""
    half, odd = o // 2, o % 2 == 1
    width = 2.0 * n - 1.0
    part = tl.where(odd, (n - 1 - half).to(tl.float32) / width, 1.0 - half.to(tl.float32) / width)
    return tl.where(odd, half, half - 1), part


@triton.jit
def double_kernel(
    p_x, p_out, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """I, J, K are of the input; voxels of the result."""
    v = tile_of(BLOCK, WIDE)
    b, i, j, k = voxel_of(v, 2 * I, 2 * J, 2 * K)
    c = tl.arange(0, C_PAD)[None, :]
    mask = (v < voxels)[:, None] & (c < C)
    i, fi = below(i, I)
    j, fj = below(j, J)
    k, fk = below(k, K)
    out = tl.zeros([BLOCK, C_PAD], tl.float32)
    for n in tl.static_range(8):
        a, e, d = i + n // 4, j + (n // 2) % 2, k + n % 2
        weight = (fi if n // 4 else 1 - fi) * (fj if (n // 2) % 2 else 1 - fj) * (fk if n % 2 else 1 - fk)
        inside = (a >= 0) & (a < I) & (e >= 0) & (e < J) & (d >= 0) & (d < K)
        row = ((b * I + a) * J + e) * K + d
        value = tl.load(p_x + row[:, None] * C + c, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        out += weight[:, None] * value
    tl.store(p_out + v[:, None] * C + c, 2 * out, mask=mask)


@triton.jit
def share_of(o, m, n):
    """Weight of voxel m of an axis in result o."""
    low, part = below(o, n)
    inside = (o >= 0) & (o < 2 * n)
    return tl.where(inside, tl.where(low == m, 1 - part, tl.where(low + 1 == m, part, 0.0)), 0.0)


@triton.jit
def double_grad_kernel(
    p_grad, p_out, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Voxel m of an axis takes part in results 2 m - 1 to 2 m + 2."""
    v = tile_of(BLOCK, WIDE)
    b, i, j, k = voxel_of(v, I, J, K)
    c = tl.arange(0, C_PAD)[None, :]
    mask = (v < voxels)[:, None] & (c < C)
    out = tl.zeros([BLOCK, C_PAD], tl.float32)
    for n in range(64):  # not unrolled, which on an H200 took 3.1 ms for 2.4
        a, e, d = 2 * i - 1 + n // 16, 2 * j - 1 + (n // 4) % 4, 2 * k - 1 + n % 4
        weight = share_of(a, i, I) * share_of(e, j, J) * share_of(d, k, K)
        inside = (a >= 0) & (a < 2 * I) & (e >= 0) & (e < 2 * J) & (d >= 0) & (d < 2 * K)
        row = ((b * 2 * I + a) * 2 * J + e) * 2 * K + d
        grad = tl.load(p_grad + row[:, None] * C + c, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        out += weight[:, None] * grad
    tl.store(p_out + v[:, None] * C + c, 2 * out, mask=mask)


@triton.jit
def box_mean_kernel(
    p_x, p_out, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    v = tile_of(BLOCK, WIDE)
    _, i, j, k = voxel_of(v, I, J, K)
    c = tl.arange(0, C_PAD)[None, :]
    mask = (v < voxels)[:, None] & (c < C)
    out = tl.zeros([BLOCK, C_PAD], tl.float32)
    for n in range(27):
        a, e, d = n // 9 - 1, (n // 3) % 3 - 1, n % 3 - 1
        inside = (i + a >= 0) & (i + a < I) & (j + e >= 0) & (j + e < J) & (k + d >= 0) & (k + d < K)
        row = v + (a * J + e) * K + d
        out += tl.load(p_x + row[:, None] * C + c, mask=mask & inside[:, None], other=0.0).to(tl.float32)
    tl.store(p_out + v[:, None] * C + c, out * (1 / 27), mask=mask)


def _grid(x: Tensor, out: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Of an input and its result (B, I, J, K, C): programs, voxels, constants."""
    channels, voxels = out.shape[4], out[..., 0].numel()
    width = padded(channels)
    block = block_of(width)
    return (triton.cdiv(voxels, block),), voxels, {"C": channels, "C_PAD": width, "BLOCK": block, "WIDE": wide(x, out)}


def _sized(x: Tensor, numerator: int, denominator: int = 1) -> tuple[int, ...]:
    """(B, I, J, K, C) of a volume (B, C, I, J, K) with its grid scaled."""
    return (x.shape[0], *(n * numerator // denominator for n in x.shape[2:]), x.shape[1])


@custom_op("monai_registration::halve_triton")
@on_device
def halve_triton(x: Tensor) -> Tensor:
    out = x.new_empty(_sized(x, 1, 2))
    grid, voxels, widths = _grid(x, out)
    halve_kernel[grid](rows(x), out, voxels, *out.shape[1:4], BACK=False, **widths)
    return volume(out)


@custom_op("monai_registration::halve_triton_backward")
@on_device
def _halve_backward(grad: Tensor) -> Tensor:
    out = grad.new_empty(_sized(grad, 2))
    grid, voxels, widths = _grid(grad, out)
    halve_kernel[grid](rows(grad), out, voxels, *out.shape[1:4], BACK=True, **widths)
    return volume(out)


@custom_op("monai_registration::double_triton")
@on_device
def double_triton(x: Tensor) -> Tensor:
    out = x.new_empty(_sized(x, 2))
    grid, voxels, widths = _grid(x, out)
    double_kernel[grid](rows(x), out, voxels, *x.shape[2:], **widths)
    return volume(out)


@custom_op("monai_registration::double_triton_backward")
@on_device
def _double_backward(grad: Tensor) -> Tensor:
    out = grad.new_empty(_sized(grad, 1, 2))
    grid, voxels, widths = _grid(grad, out)
    double_grad_kernel[grid](rows(grad), out, voxels, *out.shape[1:4], **widths)
    return volume(out)


@custom_op("monai_registration::box_mean_triton")
@on_device
def box_mean_triton(x: Tensor) -> Tensor:
    out = x.new_empty(_sized(x, 1), dtype=torch.float32)
    grid, voxels, widths = _grid(x, out)
    box_mean_kernel[grid](rows(x), out, voxels, *x.shape[2:], **widths)
    return volume(out)


@halve_triton.register_fake
def _(x):
    return volume(x.new_empty(_sized(x, 1, 2)))


@_halve_backward.register_fake
@double_triton.register_fake
def _(x):
    return volume(x.new_empty(_sized(x, 2)))


@_double_backward.register_fake
def _(x):
    return volume(x.new_empty(_sized(x, 1, 2)))


@box_mean_triton.register_fake
def _(x):
    return volume(x.new_empty(_sized(x, 1), dtype=torch.float32))


halve_triton.register_autograd(lambda ctx, grad: _halve_backward(grad))
double_triton.register_autograd(lambda ctx, grad: _double_backward(grad))
