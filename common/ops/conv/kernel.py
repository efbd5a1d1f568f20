"""A 3x3x3 convolution with few channels in Triton: the nine taps of a plane are columns, or rows, of one product.

The gradient of the input is the same kernel with the taps mirrored and channels exchanged.

Partial sums of a program go to memory of their own and are added afterwards: every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import on_device, padded, precision, rows, taps_of, tile_of, volume, voxel_of, wide

HELD = 8192  # values of nine (padded to 16) taps of a tile that one program holds
WIDEST = 32  # inputs of a tile, and outputs
PROGRAMS = 1024  # about: each leaves sums of its own behind


@triton.jit
def conv3d_kernel(
    p_x, p_weight, p_bias, p_out, voxels, I, J, K,  # noqa: E741
    C: tl.constexpr, O: tl.constexpr, PRECISION: tl.constexpr,  # noqa: E741
    C_PAD: tl.constexpr, O_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (voxels, outputs): three products, each of the nine taps of one offset along I."""
    TAPS: tl.constexpr = 16  # nine, padded
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    _, i, j, k = voxel_of(v, I, J, K)
    o, t = tl.program_id(1) * O_PAD + tl.arange(0, O_PAD), tl.arange(0, TAPS)
    total = tl.zeros([BLOCK, O_PAD], tl.float32)
    for plane in tl.static_range(3):
        tap = plane * 9 + t
        step, inside = taps_of(i[:, None], j[:, None], k[:, None], tap[None, :], 1, I, J, K)
        inside = inside & valid[:, None] & (t < 9)[None, :]
        for first in tl.static_range(0, C, C_PAD):
            c = first + tl.arange(0, C_PAD)
            near = (v[:, None] + step)[:, :, None] * C + c[None, None, :]
            patch = tl.load(p_x + near, mask=inside[:, :, None] & (c < C)[None, None, :], other=0.0).to(tl.float32)
            at = (tap[:, None, None] * C + c[None, :, None]) * O + o[None, None, :]
            used = ((t < 9)[:, None] & (c < C)[None, :])[:, :, None] & (o < O)[None, None, :]
            kernel = tl.load(p_weight + at, mask=used, other=0.0).to(tl.float32)
            patch = tl.reshape(patch, [BLOCK, TAPS * C_PAD])
            total = tl.dot(patch, tl.reshape(kernel, [TAPS * C_PAD, O_PAD]), total, input_precision=PRECISION)
    if p_bias is not None:
        total += tl.load(p_bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + v[:, None] * O + o[None, :], total, mask=valid[:, None] & (o < O)[None, :])


@triton.jit
def conv3d_weight_kernel(
    p_x, p_grad, p_out, voxels, steps, I, J, K,  # noqa: E741
    C: tl.constexpr, O: tl.constexpr, PRECISION: tl.constexpr,  # noqa: E741
    C_PAD: tl.constexpr, O_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, plane of nine taps, tile of dW): partial dW (9, C, O) over `steps` tiles of voxels."""
    TAPS: tl.constexpr = 16  # nine, padded
    chunk, plane, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = chunk.to(tl.int64) * steps if WIDE else chunk * steps
    parts: tl.constexpr = (O + O_PAD - 1) // O_PAD
    c, o = part // parts * C_PAD + tl.arange(0, C_PAD), part % parts * O_PAD + tl.arange(0, O_PAD)
    t = tl.arange(0, TAPS)
    tap = plane * 9 + t
    total = tl.zeros([TAPS * C_PAD, O_PAD], tl.float32)
    for tile in tl.range(0, steps, num_stages=1):  # ahead of time they would be fetched by fours of bytes
        v = (first + tile) * BLOCK + tl.arange(0, BLOCK)
        valid = v < voxels
        _, i, j, k = voxel_of(v, I, J, K)
        step, inside = taps_of(i[None, :], j[None, :], k[None, :], tap[:, None], 1, I, J, K)
        inside = inside & valid[None, :] & (t < 9)[:, None]
        near = (v[None, :] + step)[:, None, :] * C + c[None, :, None]
        patch = tl.load(p_x + near, mask=inside[:, None, :] & (c < C)[None, :, None], other=0.0)
        at = v[:, None] * O + o[None, :]
        grad = tl.load(p_grad + at, mask=valid[:, None] & (o < O)[None, :], other=0.0)
        patch = tl.reshape(patch.to(tl.float32), [TAPS * C_PAD, BLOCK])
        total = tl.dot(patch, grad.to(tl.float32), total, input_precision=PRECISION)
    at_tap = ((chunk * 27 + tap[:, None, None]) * C + c[None, :, None]) * O + o[None, None, :]
    mask = ((t < 9)[:, None] & (c < C)[None, :])[:, :, None] & (o < O)[None, None, :]
    tl.store(p_out + at_tap, tl.reshape(total, [TAPS, C_PAD, O_PAD]), mask=mask)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, I, J, K) and taps (27, C, O) -> (B, O, I, J, K), channels last."""
    last = rows(x)
    batch, *size, channels = last.shape
    outputs, voxels = taps.shape[2], batch * size[0] * size[1] * size[2]
    out = x.new_empty(batch, *size, outputs)
    c_pad, o_pad = min(padded(channels), 8), min(padded(outputs, 16), WIDEST)  # of more, registers would not do
    block = min(2 * HELD // (16 * c_pad), 256)
    conv3d_kernel[(triton.cdiv(voxels, block), triton.cdiv(outputs, o_pad))](
        last, taps.contiguous(), bias, out, voxels, *size, C=channels, O=outputs, PRECISION=precision(),
        C_PAD=c_pad, O_PAD=o_pad, BLOCK=block, WIDE=wide(last, out), num_warps=8,
    )  # fmt: skip
    return volume(out)


@custom_op("monai_registration::conv3d_triton")
@on_device
def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolve(x, weight.permute(2, 3, 4, 1, 0).reshape(27, x.shape[1], -1), bias)


@_conv3d.register_fake
def _(x, weight, bias):
    return volume(x.new_empty(x.shape[0], *x.shape[2:], weight.shape[0]))


@custom_op("monai_registration::conv3d_triton_input")
@on_device
def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    taps = weight.flip(2, 3, 4).permute(2, 3, 4, 0, 1)
    return _convolve(grad, taps.reshape(27, weight.shape[0], -1), None)


@_input_gradient.register_fake
def _(grad, weight):
    return volume(grad.new_empty(grad.shape[0], *grad.shape[2:], weight.shape[1]))


@custom_op("monai_registration::conv3d_triton_weight")
@on_device
def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) in float32."""
    last, g = rows(x), rows(grad)
    batch, *size, channels = last.shape
    outputs, voxels = g.shape[4], batch * size[0] * size[1] * size[2]
    c_pad, o_pad = min(padded(channels), WIDEST), min(padded(outputs, 16), WIDEST)
    block = min(HELD // (16 * c_pad), 128)
    tiles = triton.cdiv(channels, c_pad) * triton.cdiv(outputs, o_pad)
    steps = triton.cdiv(voxels, block * max(PROGRAMS // (3 * tiles), 1))
    chunks = triton.cdiv(voxels, block * steps)
    out = torch.empty(chunks, 27, channels, outputs, device=x.device)
    conv3d_weight_kernel[(chunks, 3, tiles)](
        last, g, out, voxels, steps, *size, C=channels, O=outputs, PRECISION=precision(),
        C_PAD=c_pad, O_PAD=o_pad, BLOCK=block, WIDE=wide(last, g), num_warps=8,
    )  # fmt: skip
    return out.sum(0).view(3, 3, 3, channels, outputs).permute(4, 3, 0, 1, 2).contiguous()


@_weight_gradient.register_fake
def _(x, grad):
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3, 3, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = _input_gradient(grad, weight)
    if ctx.needs_input_grad[1]:
        to_weight = _weight_gradient(x, grad).to(weight.dtype)
    if ctx.has_bias:
        to_bias = grad.sum((0, 2, 3, 4), dtype=torch.float32).to(weight.dtype)
    return to_x, to_weight, to_bias


_conv3d.register_autograd(_backward, setup_context=_setup)


def conv3d_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `common.ops.conv.conv3d`."""
    return _conv3d(x, weight, bias)
