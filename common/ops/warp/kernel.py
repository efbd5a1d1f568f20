"""warp in Triton: coordinates, corners and channels of a block of voxels in one pass, without a sampling grid.

The image gradient is added with atomics, whose order varies; under torch.use_deterministic_algorithms(True) it is
summed by sorting instead (index_put_), which repeats bit for bit.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded, rows, tile_of, volume, voxel_of, wide
from common.ops.warp.reference import voxel_coords


@triton.jit
def coords_of(p_disp, v, valid, GI, GJ, GK):
    """Batch entry of voxel v, and v + disp(v)."""
    b, i, j, k = voxel_of(v, GI, GJ, GK)
    x = i.to(tl.float32) + tl.load(p_disp + v * 3, mask=valid, other=0.0).to(tl.float32)
    y = j.to(tl.float32) + tl.load(p_disp + v * 3 + 1, mask=valid, other=0.0).to(tl.float32)
    z = k.to(tl.float32) + tl.load(p_disp + v * 3 + 2, mask=valid, other=0.0).to(tl.float32)
    return b, x, y, z


@triton.jit
def at_border(x, size):
    """The coordinate clamped to the volume."""
    return tl.minimum(tl.maximum(x, 0.0), size - 1.0)  # a size of 1 arrives as a constant, which has no .to()


@triton.jit
def to_nearest(x):
    """Nearest integer; halves go to the even one, as torch.round does."""
    up = tl.floor(x + 0.5)
    odd = up - 2.0 * tl.floor(up * 0.5) != 0.0
    return tl.where((up - x == 0.5) & odd, up - 1.0, up)


@triton.jit
def row_at(b, i, j, k, I, J, K):  # noqa: E741
    """Row of voxel (b, i, j, k), and whether it is inside."""
    inside = (i >= 0) & (i < I) & (j >= 0) & (j < J) & (k >= 0) & (k < K)
    return ((b * I + i) * J + j) * K + k, inside


@triton.jit
def warp_fwd_kernel(
    p_image, p_disp, p_out, voxels, GI, GJ, GK, I, J, K,  # noqa: E741
    C: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    c = tl.arange(0, C_PAD)[None, :]
    b, x, y, z = coords_of(p_disp, v, valid, GI, GJ, GK)
    if BORDER:
        x, y, z = at_border(x, I), at_border(y, J), at_border(z, K)
    if NEAREST:
        x, y, z = to_nearest(x), to_nearest(y), to_nearest(z)
    x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
    fx, fy, fz = x - x0, y - y0, z - z0
    i, j, k = x0.to(v.dtype), y0.to(v.dtype), z0.to(v.dtype)
    out = tl.zeros([BLOCK, C_PAD], tl.float32)
    CORNERS: tl.constexpr = 1 if NEAREST else 8
    for n in tl.static_range(CORNERS):
        a, e, d = n // 4, (n // 2) % 2, n % 2
        weight = (fx if a else 1 - fx) * (fy if e else 1 - fy) * (fz if d else 1 - fz)
        row, inside = row_at(b, i + a, j + e, k + d, I, J, K)
        mask = (valid & inside)[:, None] & (c < C)
        out += weight[:, None] * tl.load(p_image + row[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + v[:, None] * C + c, out, mask=valid[:, None] & (c < C))


@triton.jit
def warp_bwd_kernel(
    p_grad, p_image, p_disp, p_grad_image, p_grad_disp, voxels, GI, GJ, GK, I, J, K,  # noqa: E741
    C: tl.constexpr, BORDER: tl.constexpr, TO_IMAGE: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    c = tl.arange(0, C_PAD)[None, :]
    b, x, y, z = coords_of(p_disp, v, valid, GI, GJ, GK)
    free_x, free_y, free_z = x == x, y == y, z == z  # where the coordinate may move: not at or past a border
    if BORDER:
        free_x = (x > 0) & (x < I - 1)
        free_y = (y > 0) & (y < J - 1)
        free_z = (z > 0) & (z < K - 1)
        x, y, z = at_border(x, I), at_border(y, J), at_border(z, K)
    x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
    fx, fy, fz = x - x0, y - y0, z - z0
    i, j, k = x0.to(v.dtype), y0.to(v.dtype), z0.to(v.dtype)
    grad = tl.load(p_grad + v[:, None] * C + c, mask=valid[:, None] & (c < C), other=0.0).to(tl.float32)
    grad_x = tl.zeros([BLOCK], tl.float32)
    grad_y, grad_z = grad_x, grad_x
    for n in tl.static_range(8):
        a, e, d = n // 4, (n // 2) % 2, n % 2
        wx, wy, wz = (fx if a else 1 - fx), (fy if e else 1 - fy), (fz if d else 1 - fz)
        row, inside = row_at(b, i + a, j + e, k + d, I, J, K)
        mask = (valid & inside)[:, None] & (c < C)
        value = tl.sum(grad * tl.load(p_image + row[:, None] * C + c, mask=mask, other=0.0).to(tl.float32), 1)
        grad_x += (2 * a - 1) * wy * wz * value
        grad_y += (2 * e - 1) * wx * wz * value
        grad_z += (2 * d - 1) * wx * wy * value
        if TO_IMAGE:
            share = (wx * wy * wz)[:, None] * grad
            tl.atomic_add(p_grad_image + row[:, None] * C + c, share, mask=mask, sem="relaxed")  # else: a fence each
    tl.store(p_grad_disp + v * 3, tl.where(free_x, grad_x, 0.0), mask=valid)
    tl.store(p_grad_disp + v * 3 + 1, tl.where(free_y, grad_y, 0.0), mask=valid)
    tl.store(p_grad_disp + v * 3 + 2, tl.where(free_z, grad_z, 0.0), mask=valid)


def warp_triton(image: Tensor, disp: Tensor, mode: str, padding: str) -> Tensor:
    """See `common.ops.warp`."""
    return _warp(image, disp, mode == "nearest", padding == "border")


@custom_op("monai_registration::warp_triton")
@on_device
def _warp(image: Tensor, disp: Tensor, nearest: bool, border: bool) -> Tensor:
    source, step = rows(image), rows(disp)
    batch, *grid, _ = step.shape
    out = source.new_empty(batch, *grid, source.shape[4])
    voxels, width = batch * grid[0] * grid[1] * grid[2], padded(source.shape[4])
    block = block_of(2 * width)  # of more, registers would not do
    warp_fwd_kernel[(triton.cdiv(voxels, block),)](
        source, step, out, voxels, *grid, *source.shape[1:4],
        C=source.shape[4], NEAREST=nearest, BORDER=border, C_PAD=width, BLOCK=block,
        WIDE=wide(source, step, out),
    )  # fmt: skip
    return volume(out)


@_warp.register_fake
def _(image, disp, nearest, border):
    return volume(image.new_empty(image.shape[0], *disp.shape[2:], image.shape[1]))


@custom_op("monai_registration::warp_triton_backward")
@on_device
def _warp_backward(
    grad: Tensor, image: Tensor, disp: Tensor, nearest: bool, border: bool, to_image: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to image (without voxels unless asked) and displacement (zeros for "nearest")."""
    source, step, g = rows(image), rows(disp), rows(grad)
    batch, *grid, _ = step.shape
    grad_image = torch.zeros(source.shape if to_image else (0,) * 5, device=source.device)
    grad_disp = torch.zeros(step.shape, device=step.device)
    by_sorting = to_image and (nearest or torch.are_deterministic_algorithms_enabled())
    if not nearest:
        voxels, width = batch * grid[0] * grid[1] * grid[2], padded(source.shape[4])
        block = block_of(2 * width)
        warp_bwd_kernel[(triton.cdiv(voxels, block),)](
            g, source, step, grad_image, grad_disp, voxels, *grid, *source.shape[1:4],
            C=source.shape[4], BORDER=border, TO_IMAGE=to_image and not by_sorting, C_PAD=width, BLOCK=block,
            WIDE=wide(source, step, g),
        )  # fmt: skip
    if by_sorting:
        _add_by_sorting(grad_image, g, disp, nearest, border)
    return volume(grad_image.to(image.dtype)), volume(grad_disp.to(disp.dtype))


def _add_by_sorting(total: Tensor, grad: Tensor, disp: Tensor, nearest: bool, border: bool) -> None:
    """Transpose of the interpolation, corner by corner; `index_put_` sorts and repeats bit for bit."""
    coords = voxel_coords(disp)
    size = torch.tensor(total.shape[1:4], device=total.device).view(1, 3, 1, 1, 1)
    if border:
        coords = torch.minimum(coords.clamp(min=0), (size - 1).to(coords.dtype))
    cell = coords.round() if nearest else coords.floor()
    batch = torch.arange(total.shape[0], device=total.device).view(-1, 1, 1, 1).expand(grad.shape[:4])
    for corner in itertools.product((0,) if nearest else (0, 1), repeat=3):
        side = torch.tensor(corner, device=total.device).view(1, 3, 1, 1, 1)
        index = cell.long() + side
        inside = ((index >= 0) & (index < size)).all(1)
        weight = 1 - (coords - cell - side).abs() if not nearest else torch.ones_like(coords)
        value = grad.float() * weight.prod(1).unsqueeze(-1)
        i, j, k = index.unbind(1)
        total.index_put_((batch[inside], i[inside], j[inside], k[inside]), value[inside], accumulate=True)


@_warp_backward.register_fake
def _(grad, image, disp, nearest, border, to_image):
    like = rows(image) if to_image else image.new_empty((0,) * 5)
    return volume(torch.empty_like(like)), volume(torch.empty_like(rows(disp)))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[2:]


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    to_image, to_disp = ctx.needs_input_grad[:2]
    grad_image, grad_disp = _warp_backward(grad, *ctx.saved_tensors, *ctx.options, to_image)
    return (grad_image if to_image else None), (grad_disp if to_disp else None), None, None


_warp.register_autograd(_backward, setup_context=_setup)
