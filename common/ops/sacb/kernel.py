"""modulated_conv3d in Triton: an implicit GEMM over 27 taps, each tile of voxels scaled by its clusters' modulation.

The data gradient is the same kernel with the taps mirrored, channels exchanged and the modulation of the SOURCE voxel.
The weight and modulation gradients share one pass: with P = patch, g = gradient and T = g W_t^T of a tile,
dW_t = (a P)^T g and da[n, t] = sum of P . T over the voxels of cluster n. Partial sums of a program go to memory of
their own and are added afterwards: no atomics, so that every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded, precision, rows, taps_of, tile_of, volume, voxel_of, wide
from common.ops.conv.lean import by_halves
from common.ops.sacb.half import half_weight_gradients

WIDEST = 64  # channels of a tile: wider ones do not fit the memory that a program may share; more are taken in turns
WIDEST_GRAD = 32  # outputs of the weight gradient, which holds nine taps of 16 channels
BLOCK_GRAD = 32  # its voxels at a time
PROGRAMS = 512  # of the weight gradient, about: each leaves sums of its own behind


@triton.jit
def modulated_conv3d_kernel(
    p_x, p_weight, p_bias, p_modulation, p_labels, p_out, voxels, I, J, K, N,  # noqa: E741
    C: tl.constexpr, O: tl.constexpr, TO_DATA: tl.constexpr, PRECISION: tl.constexpr,  # noqa: E741
    C_PAD: tl.constexpr, O_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Forward, and with TO_DATA the data gradient (x is then the gradient, no bias); program (voxels, outputs)."""
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    b, i, j, k = voxel_of(v, I, J, K)
    o = tl.program_id(1) * O_PAD + tl.arange(0, O_PAD)
    cluster = b * N + tl.load(p_labels + v, mask=valid, other=0).to(v.dtype)
    total = tl.zeros([BLOCK, O_PAD], tl.float32)
    for t in range(27):
        step, inside = taps_of(i, j, k, t, -1 if TO_DATA else 1, I, J, K)
        inside = inside & valid
        near = v + step
        if TO_DATA:
            cluster = b * N + tl.load(p_labels + near, mask=inside, other=0).to(v.dtype)
        scale = tl.load(p_modulation + cluster * 27 + t, mask=inside, other=0.0).to(tl.float32)
        for first in tl.static_range(0, C, C_PAD):
            c = first + tl.arange(0, C_PAD)
            patch = tl.load(p_x + near[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            kernel = tl.load(
                p_weight + (t * C + c[:, None]) * O + o[None, :], mask=(c < C)[:, None] & (o < O)[None, :], other=0.0
            )
            scaled = patch.to(tl.float32) * scale[:, None]
            total = tl.dot(scaled, kernel.to(tl.float32), total, input_precision=PRECISION)
    at = v[:, None] * O + o[None, :]
    mask = valid[:, None] & (o < O)[None, :]
    if not TO_DATA:
        bias = tl.load(p_bias + cluster[:, None] * O + o[None, :], mask=mask, other=0.0)
        total += bias.to(tl.float32)
    tl.store(p_out + at, total, mask=mask)


@triton.jit
def modulated_conv3d_weight_kernel(
    p_x, p_grad, p_weight, p_modulation, p_labels, p_grad_weight, p_grad_modulation, p_grad_bias,
    voxels, steps, I, J, K, N, BN,  # noqa: E741
    C: tl.constexpr, O: tl.constexpr, PRECISION: tl.constexpr,  # noqa: E741
    C_PAD: tl.constexpr, O_PAD: tl.constexpr, BN_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, plane of nine taps, tile of dW): partial dW (9, C, O), da (9, B N), db (B N, O), `steps` tiles.

    The nine taps of one offset along I are rows of one product, so that a tile of the gradient is read once for them.
    """
    TAPS: tl.constexpr = 16  # nine, padded
    chunk, plane, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = chunk.to(tl.int64) * steps if WIDE else chunk * steps
    parts: tl.constexpr = (O + O_PAD - 1) // O_PAD
    c, o = part // parts * C_PAD + tl.arange(0, C_PAD), part % parts * O_PAD + tl.arange(0, O_PAD)
    n, t = tl.arange(0, BN_PAD), tl.arange(0, TAPS)
    tap = plane * 9 + t
    used = (t < 9)[:, None] & (c < C)[None, :]
    at_kernel = (tap[:, None, None] * C + c[None, :, None]) * O + o[None, None, :]
    in_kernel = used[:, :, None] & (o < O)[None, None, :]
    kernel = tl.load(p_weight + at_kernel, mask=in_kernel, other=0.0).to(tl.float32)
    kernel = tl.reshape(kernel, [TAPS * C_PAD, O_PAD])
    grad_weight = tl.zeros([TAPS * C_PAD, O_PAD], tl.float32)
    grad_modulation = tl.zeros([TAPS, BN_PAD], tl.float32)
    grad_bias = tl.zeros([BN_PAD, O_PAD], tl.float32)
    with_bias = (plane == 1) & (part < parts)  # once for each tile of outputs
    for tile in tl.range(0, steps, num_stages=1):  # ahead of time they would be fetched by fours of bytes
        v = (first + tile) * BLOCK + tl.arange(0, BLOCK)
        valid = v < voxels
        b, i, j, k = voxel_of(v, I, J, K)
        step, inside = taps_of(i[None, :], j[None, :], k[None, :], tap[:, None], 1, I, J, K)
        inside = inside & valid[None, :] & (t < 9)[:, None]
        cluster = b * N + tl.load(p_labels + v, mask=valid, other=0).to(v.dtype)
        scale = tl.load(p_modulation + cluster[None, :] * 27 + tap[:, None], mask=inside, other=0.0).to(tl.float32)
        near = (v[None, :] + step)[:, None, :] * C + c[None, :, None]
        patch = tl.load(p_x + near, mask=inside[:, None, :] & (c < C)[None, :, None], other=0.0).to(tl.float32)
        at = v[:, None] * O + o[None, :]
        grad = tl.load(p_grad + at, mask=valid[:, None] & (o < O)[None, :], other=0.0).to(tl.float32)
        scaled = tl.reshape(patch * scale[:, None, :], [TAPS * C_PAD, BLOCK])
        grad_weight = tl.dot(scaled, grad, grad_weight, input_precision=PRECISION)
        pulled = tl.dot(kernel, tl.trans(grad), input_precision=PRECISION)
        share = tl.sum(patch * tl.reshape(pulled, [TAPS, C_PAD, BLOCK]), 1)
        member = ((cluster[:, None] == n[None, :]) & valid[:, None]).to(tl.float32)
        grad_modulation = tl.dot(share, member, grad_modulation, input_precision="ieee")
        if with_bias:
            grad_bias = tl.dot(tl.trans(member), grad, grad_bias, input_precision="ieee")
    grad_weight = tl.reshape(grad_weight, [TAPS, C_PAD, O_PAD])
    tl.store(p_grad_weight + chunk * 27 * C * O + at_kernel, grad_weight, mask=in_kernel)
    at = ((chunk * 27 + tap) * tl.num_programs(2) + part)[:, None] * BN + n[None, :]
    tl.store(p_grad_modulation + at, grad_modulation, mask=(t < 9)[:, None] & (n < BN)[None, :])
    if with_bias:
        at_bias = (chunk * BN + n[:, None]) * O + o[None, :]
        tl.store(p_grad_bias + at_bias, grad_bias, mask=(n < BN)[:, None] & (o < O)[None, :])


def modulated_conv3d_triton(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor) -> Tensor:
    """See `common.ops.sacb.modulated_conv3d`."""
    return _modulated_conv3d(x, weight, bias, modulation, labels.long())


def _convolve(
    x: Tensor, matrix: Tensor, bias: Tensor | None, modulation: Tensor, labels: Tensor, *, to_data: bool
) -> Tensor:
    """Rows (B, I, J, K, C) and taps (27, C, O) -> (B, I, J, K, O) in the dtype of x."""
    batch, *size, channels = x.shape
    outputs = matrix.shape[2]
    out = x.new_empty(batch, *size, outputs)
    c_pad, o_pad = min(padded(channels, 16), WIDEST), min(padded(outputs, 16), WIDEST)
    block = block_of(max(c_pad, o_pad))
    modulated_conv3d_kernel[(triton.cdiv(labels.numel(), block), triton.cdiv(outputs, o_pad))](
        x, matrix.contiguous(), bias, modulation.contiguous(), labels.contiguous(), out, labels.numel(), *size,
        modulation.shape[1], C=channels, O=outputs, TO_DATA=to_data, PRECISION=precision(),
        C_PAD=c_pad, O_PAD=o_pad, BLOCK=block, WIDE=wide(x, out), num_warps=4 if max(c_pad, o_pad) < 64 else 8,
    )  # fmt: skip
    return out


@custom_op("monai_registration::modulated_conv3d_triton")
@on_device
def _modulated_conv3d(x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor) -> Tensor:
    taps = weight.permute(2, 3, 4, 1, 0).reshape(27, x.shape[1], -1)
    return volume(_convolve(rows(x), taps, bias.contiguous(), modulation, labels, to_data=False))


@_modulated_conv3d.register_fake
def _(x, weight, bias, modulation, labels):
    return volume(x.new_empty(x.shape[0], *x.shape[2:], weight.shape[0]))


@custom_op("monai_registration::modulated_conv3d_triton_backward")
@on_device
def _modulated_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and modulation, in their dtypes."""
    last, g = rows(x), rows(grad)
    batch, *size, channels = last.shape
    outputs, clusters = weight.shape[0], modulation.shape[1]
    matrix = weight.permute(2, 3, 4, 1, 0).reshape(27, channels, outputs)
    grad_x = volume(_convolve(g, matrix.transpose(1, 2), None, modulation, labels, to_data=True)).to(x.dtype)
    if by_halves(x):
        found = half_weight_gradients(volume(g), volume(last), weight, modulation, labels)
        return grad_x, *(slope.to(value.dtype) for slope, value in zip(found, (weight, bias, modulation)))

    c_pad, o_pad = 16, min(padded(outputs, 16), WIDEST_GRAD)
    tiles = triton.cdiv(channels, c_pad) * triton.cdiv(outputs, o_pad)
    steps = triton.cdiv(labels.numel(), BLOCK_GRAD * max(PROGRAMS // (3 * tiles), 1))
    chunks = triton.cdiv(labels.numel(), BLOCK_GRAD * steps)
    grad_weight = torch.empty(chunks, 27, channels, outputs, device=x.device)
    grad_modulation = torch.empty(chunks, 27, tiles, batch * clusters, device=x.device)
    grad_bias = torch.empty(chunks, batch * clusters, outputs, device=x.device)
    modulated_conv3d_weight_kernel[(chunks, 3, tiles)](
        last, g, matrix.contiguous(), modulation.contiguous(), labels.contiguous(),
        grad_weight, grad_modulation, grad_bias,
        labels.numel(), steps, *size, clusters, batch * clusters, C=channels, O=outputs, PRECISION=precision(),
        C_PAD=c_pad, O_PAD=o_pad, BN_PAD=padded(batch * clusters, 16), BLOCK=BLOCK_GRAD, WIDE=wide(last, g),
        num_warps=8,
    )  # fmt: skip
    grad_weight = grad_weight.sum(0).view(3, 3, 3, channels, outputs).permute(4, 3, 0, 1, 2).contiguous()
    grad_modulation = grad_modulation.sum((0, 2)).t().contiguous().view(batch, clusters, 27)
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.sum(0).view(batch, clusters, outputs).to(bias.dtype),
        grad_modulation.to(modulation.dtype),
    )


@_modulated_conv3d_backward.register_fake
def _(grad, x, weight, bias, modulation, labels):
    return (
        volume(torch.empty_like(rows(x))),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        (modulation.new_empty(modulation.shape)),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    return *_modulated_conv3d_backward(grad, *ctx.saved_tensors), None


_modulated_conv3d.register_autograd(_backward, setup_context=_setup)
