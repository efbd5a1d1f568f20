"""cost_volume block by block, so that nothing beside the result grows with the volume.

Without a displacement, a cube of (r+1)^3 fixed voxels meets the (3r+1)^3 moving voxels around it in one matrix product,
of which the windows are a strided view: 2.4 to 3 times the needed products, at the speed of a matrix product. With a
displacement the moving features are sampled offset by offset, a slab of the grid at a time.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.ops._dispatch import custom_op
from common.ops._patches import channels_last
from common.ops.match.reference import offsets
from common.ops.warp import warp

BUDGET = 32 << 20  # bytes of the buffers beside the result
BLOCK = 4 << 20  # the same on a CPU without a displacement, where products that stay in the cache are quicker


def cost_volume_lean(
    feat_fixed: Tensor, feat_moving: Tensor, radius: int, disp: Tensor | None, similarity: str, padding: str
) -> Tensor:
    """See `common.ops.cost_volume`."""
    dtype = torch.promote_types(feat_fixed.dtype, torch.float32)
    fixed, moving = feat_fixed.to(dtype), feat_moving.to(dtype)
    if disp is None:
        out = _cost_volume(fixed, moving, radius, similarity == "ssd", padding == "border")
    else:
        out = _lookup(fixed, moving, disp.to(dtype), radius, similarity, padding)
    return out.to(feat_fixed.dtype)


def pad_volume(x: Tensor, before: tuple[int, ...], after: tuple[int, ...], border: bool) -> Tensor:
    """(I, J, K, C) with so many voxels added in front and behind, repeated from the border or zero."""
    sides = [n for pair in zip(reversed(before), reversed(after)) for n in pair]
    if not border:
        return F.pad(x, [0, 0, *sides])
    return F.pad(x.permute(3, 0, 1, 2)[None], sides, mode="replicate")[0].permute(1, 2, 3, 0).contiguous()


@custom_op("monai_registration::cost_volume")
def _cost_volume(fixed: Tensor, moving: Tensor, radius: int, ssd: bool, border: bool) -> Tensor:
    last, other = channels_last(fixed), channels_last(moving)
    if ssd:  # |f - m|^2 = |f|^2 + (-2 f, 1) . (m, |m|^2)
        squares = last.square().sum(-1, keepdim=True)
        last = torch.cat([last * -2, torch.ones_like(squares)], -1)
        other = torch.cat([other, other.square().sum(-1, keepdim=True)], -1)
    batch, *size, channels = last.shape
    width, side = 2 * radius + 1, radius + 1
    halo = side + 2 * radius
    out = last.new_empty(batch, *size, width**3)
    count = [-(-n // side) for n in size]
    rest = tuple(c * side - n for c, n in zip(count, size))
    per_cube = last.element_size() * (side**3 * (channels + halo**3 + width**3) + halo**3 * channels)
    budget = BLOCK if last.device.type == "cpu" else BUDGET
    cubes = max(budget // per_cube, 1)  # in a block: several rows along axis k, or a part of one
    rows, columns = max(cubes // count[2], 1), -(-count[2] // -(-count[2] // cubes))
    for b in range(batch):
        f = pad_volume(last[b], (0, 0, 0), rest, border=False)
        m = pad_volume(pad_volume(other[b], (radius,) * 3, (radius,) * 3, border), (0, 0, 0), rest, border=False)
        f_cubes = f.unfold(0, side, side).unfold(1, side, side).unfold(2, side, side).movedim(3, -1)
        m_cubes = m.unfold(0, halo, side).unfold(1, halo, side).unfold(2, halo, side).movedim(3, -1)
        for i, j, k in itertools.product(*map(range, (0, 0, 0), count, (1, rows, columns))):
            at = i, slice(j, j + rows), slice(k, k + columns)
            queries = f_cubes[at].reshape(-1, side**3, channels)
            keys = m_cubes[at].reshape(-1, halo**3, channels)
            scores = torch.bmm(queries, keys.transpose(1, 2))
            where = tuple(slice(n * side, (n + step) * side) for n, step in zip((i, j, k), (1, rows, columns)))
            part = out[b][where]
            cubes = [-(-n // side) for n in part.shape[:3]]
            filled = *(n * side for n in cubes), width**3
            found = part if part.shape == filled else part.new_empty(filled)
            view = found.view(side, cubes[1], side, cubes[2], side, *(width,) * 3).permute(1, 3, 0, 2, 4, 5, 6, 7)
            view.copy_(_windows(scores, side, halo, width).unflatten(0, cubes[1:]))
            if found is not part:
                part.copy_(found[: part.shape[0], : part.shape[1], : part.shape[2]])
            if ssd:
                part.add_(squares[b][where]).clamp_(min=0)
    return out.permute(0, 4, 1, 2, 3)


def _windows(scores: Tensor, side: int, halo: int, width: int) -> Tensor:
    """View of (M, side^3, halo^3) products: those in the window of each query, (M, side, side, side, w, w, w)."""
    cube, row = halo**3, side * halo**3
    inner = (halo * halo, halo, 1)  # one step of the key along each axis
    outer = [step * cube + key for step, key in zip((side * side, side, 1), inner)]  # query and window move together
    return scores.as_strided((len(scores), *(side,) * 3, *(width,) * 3), (side * side * row, *outer, *inner))


@_cost_volume.register_fake
def _(fixed, moving, radius, ssd, border):
    batch, _, *size = fixed.shape
    return fixed.new_empty(batch, *size, (2 * radius + 1) ** 3).permute(0, 4, 1, 2, 3)


@custom_op("monai_registration::cost_volume_backward")
def _cost_volume_backward(
    grad: Tensor, fixed: Tensor, moving: Tensor, radius: int, ssd: bool, border: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to both features, offset by offset."""
    g, last = channels_last(grad), channels_last(fixed)
    other = channels_last(moving)
    size = last.shape[1:4]
    grad_fixed, grad_moving = torch.zeros_like(last), torch.zeros_like(other)
    for b in range(len(last)):
        m = pad_volume(other[b], (radius,) * 3, (radius,) * 3, border)
        total = torch.zeros_like(m)
        for n, (i, j, k) in enumerate(itertools.product(range(2 * radius + 1), repeat=3)):
            at = slice(i, i + size[0]), slice(j, j + size[1]), slice(k, k + size[2])
            weight = g[b, ..., n : n + 1]
            if ssd:
                change = (last[b] - m[at]).mul_(2 * weight)
                grad_fixed[b] += change
                total[at] -= change
            else:
                grad_fixed[b].addcmul_(weight, m[at])
                total[at].addcmul_(weight, last[b])
        grad_moving[b] = _fold_border(total, radius) if border else _inner(total, radius)
    return grad_fixed.permute(0, 4, 1, 2, 3), grad_moving.permute(0, 4, 1, 2, 3)


def _inner(x: Tensor, radius: int) -> Tensor:
    inside = slice(radius, -radius or None)
    return x[inside, inside, inside]


def _fold_border(x: Tensor, radius: int) -> Tensor:
    """Transpose of repeating the border: what lies outside is added to the nearest voxel inside."""
    for axis in range(3):
        size = x.shape[axis] - 2 * radius
        inner = x.narrow(axis, radius, size).clone()
        inner.narrow(axis, 0, 1).add_(x.narrow(axis, 0, radius).sum(axis, keepdim=True))
        inner.narrow(axis, size - 1, 1).add_(x.narrow(axis, radius + size, radius).sum(axis, keepdim=True))
        x = inner
    return x


@_cost_volume_backward.register_fake
def _(grad, fixed, moving, radius, ssd, border):
    like = [x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 4, 1, 2, 3) for x in (fixed, moving)]
    return like[0], like[1]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *_cost_volume_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_cost_volume.register_autograd(_backward, setup_context=_setup)


def _lookup(fixed: Tensor, moving: Tensor, disp: Tensor, radius: int, similarity: str, padding: str) -> Tensor:
    """Slabs along axis i; a slab's samples are computed again in the backward pass instead of being kept."""
    width = (2 * radius + 1) ** 3
    per_plane = disp[:, :1, 0].numel() * (4 * fixed.shape[1] + 2 * width) * fixed.element_size()
    planes = max(BUDGET // per_plane, 1)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (fixed, moving, disp))
    out = None if grad else fixed.new_empty(fixed.shape[0], width, *fixed.shape[2:])
    slabs = []
    for begin in range(0, fixed.shape[2], planes):
        start = disp[:, :, begin : begin + planes].clone()
        start[:, 0] += begin  # no new tensor of [begin, 0, 0], which a GPU would wait for
        arguments = fixed[:, :, begin : begin + planes], moving, start, radius, similarity, padding
        if out is None:
            slabs.append(checkpoint(_lookup_slab, *arguments, use_reentrant=False))
        else:
            out[:, :, begin : begin + planes] = _lookup_slab(*arguments)
    return torch.cat(slabs, 2) if out is None else out


def _lookup_slab(fixed: Tensor, moving: Tensor, start: Tensor, radius: int, similarity: str, padding: str) -> Tensor:
    scores = []
    for step in offsets(radius, start):
        sample = warp(moving, start + step.view(1, 3, 1, 1, 1), padding=padding)
        scores.append((fixed * sample if similarity == "dot" else (fixed - sample).square()).sum(1))
    return torch.stack(scores, 1)
