"""cost_volume in Triton: one program holds a block of fixed voxels and walks over the offsets of the window."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops._dispatch import custom_op
from common.ops._triton import block_of, on_device, padded, rows, tile_of, volume, voxel_of, wide
from common.ops.cost_volume.lean import cost_volume_lean

WIDEST = 256  # channels of a tile; more are taken in turns


@triton.jit
def nearest_inside(i, size, BORDER: tl.constexpr):
    """Index to read at, and whether it counts."""
    inside = (i >= 0) & (i < size)
    if BORDER:
        i = tl.minimum(tl.maximum(i, 0), size - 1)
        inside = i >= 0
    return i, inside


@triton.jit
def cost_volume_kernel(
    p_fixed, p_moving, p_disp, p_out, voxels, GI, GJ, GK, I, J, K,  # noqa: E741
    C: tl.constexpr, RADIUS: tl.constexpr, LOOKUP: tl.constexpr, SSD: tl.constexpr, BORDER: tl.constexpr,
    C_PAD: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    v = tile_of(BLOCK, WIDE)
    valid = v < voxels
    batch, i, j, k = voxel_of(v, GI, GJ, GK)
    fx = tl.zeros([BLOCK], tl.float32)
    fy, fz = fx, fx
    if LOOKUP:
        x = i.to(tl.float32) + tl.load(p_disp + v * 3, mask=valid, other=0.0)
        y = j.to(tl.float32) + tl.load(p_disp + v * 3 + 1, mask=valid, other=0.0)
        z = k.to(tl.float32) + tl.load(p_disp + v * 3 + 2, mask=valid, other=0.0)
        x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
        fx, fy, fz = x - x0, y - y0, z - z0
        i, j, k = x0.to(v.dtype), y0.to(v.dtype), z0.to(v.dtype)
    WIDTH: tl.constexpr = 2 * RADIUS + 1
    CORNERS: tl.constexpr = 8 if LOOKUP else 1
    for n in range(WIDTH * WIDTH * WIDTH):
        a, e, d = n // (WIDTH * WIDTH) - RADIUS, (n // WIDTH) % WIDTH - RADIUS, n % WIDTH - RADIUS
        score = tl.zeros([BLOCK], tl.float32)
        for first in tl.static_range(0, C, C_PAD):
            c = first + tl.arange(0, C_PAD)[None, :]
            in_row = valid[:, None] & (c < C)
            fixed = tl.load(p_fixed + v[:, None] * C + c, mask=in_row, other=0.0).to(tl.float32)
            sample = tl.zeros([BLOCK, C_PAD], tl.float32)
            for corner in tl.static_range(CORNERS):
                ca, ce, cd = corner // 4, (corner // 2) % 2, corner % 2
                weight = (fx if ca else 1 - fx) * (fy if ce else 1 - fy) * (fz if cd else 1 - fz)
                ni, in_i = nearest_inside(i + a + ca, I, BORDER)
                nj, in_j = nearest_inside(j + e + ce, J, BORDER)
                nk, in_k = nearest_inside(k + d + cd, K, BORDER)
                row = ((batch * I + ni) * J + nj) * K + nk
                mask = in_row & (in_i & in_j & in_k)[:, None]
                value = tl.load(p_moving + row[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
                sample += weight[:, None] * value
            if SSD:
                score += tl.sum((fixed - sample) * (fixed - sample), 1)
            else:
                score += tl.sum(fixed * sample, 1)
        tl.store(p_out + v * (WIDTH * WIDTH * WIDTH) + n, score, mask=valid)


def cost_volume_triton(
    feat_fixed: Tensor, feat_moving: Tensor, radius: int, disp: Tensor | None, similarity: str, padding: str
) -> Tensor:
    """See `common.ops.cost_volume`; where a gradient is wanted, the lean layer computes it on the same device."""
    inputs = [feat_fixed, feat_moving] + ([] if disp is None else [disp])
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return cost_volume_lean(feat_fixed, feat_moving, radius, disp, similarity, padding)
    return _cost_volume(feat_fixed, feat_moving, disp, radius, similarity == "ssd", padding == "border")


@custom_op("monai_registration::cost_volume_triton")
@on_device
def _cost_volume(
    feat_fixed: Tensor, feat_moving: Tensor, disp: Tensor | None, radius: int, ssd: bool, border: bool
) -> Tensor:
    fixed, moving = rows(feat_fixed), rows(feat_moving)
    batch, *grid, channels = fixed.shape
    out = fixed.new_empty(batch, *grid, (2 * radius + 1) ** 3)
    width = min(padded(channels), WIDEST)
    voxels, block = batch * grid[0] * grid[1] * grid[2], block_of(width)
    step = fixed if disp is None else rows(disp).float()  # not read without a displacement
    cost_volume_kernel[(triton.cdiv(voxels, block),)](
        fixed, moving, step, out, voxels, *grid, *moving.shape[1:4],
        C=channels, RADIUS=radius, LOOKUP=disp is not None, SSD=ssd, BORDER=border, C_PAD=width, BLOCK=block,
        WIDE=wide(fixed, moving, step, out),
    )  # fmt: skip
    return volume(out)


@_cost_volume.register_fake
def _(feat_fixed, feat_moving, disp, radius, ssd, border):
    batch, _, *size = feat_fixed.shape
    return volume(feat_fixed.new_empty(batch, *size, (2 * radius + 1) ** 3))
