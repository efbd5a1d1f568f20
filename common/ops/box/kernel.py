"""Box sums in Triton: a launch an axis, in any dense layout, each value read from memory once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import on_device, tile_of, wide

BLOCK = 1024


@triton.jit
def box_sum_kernel(p_x, p_out, count, size, stride, RADIUS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Along an axis of `size` values, which lie `stride` apart."""
    at = tile_of(BLOCK, WIDE)
    valid = at < count
    place = at // stride % size
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(-RADIUS, RADIUS + 1):
        inside = valid & (place + step >= 0) & (place + step < size)
        total += tl.load(p_x + at + step * stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + at, total, mask=valid)


@custom_op("monai_registration::box_sum_triton")
@on_device
def box_sum_triton(x: Tensor, window: int) -> Tensor:
    """See `common.ops.box.box_sum`."""
    dtype = x.dtype
    x = x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous()
    for axis in (2, 3, 4):
        out = torch.empty_like(x, dtype=torch.float32 if axis < 4 else dtype)
        box_sum_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, out, x.numel(), x.shape[axis], x.stride(axis), RADIUS=window // 2, BLOCK=BLOCK, WIDE=wide(x)
        )
        x = out
    return x


@box_sum_triton.register_fake
def _(x, window):
    return torch.empty_like(x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous())


def _setup(ctx, inputs, output) -> None:
    ctx.window = inputs[1]


box_sum_triton.register_autograd(lambda ctx, grad: (box_sum_triton(grad, ctx.window), None), setup_context=_setup)
