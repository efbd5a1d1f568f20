"""Coupled convex optimisation: the displacement that a cost volume wants, made smooth by turns."""

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.mind import box_mean
from common.ops.match.reference import offsets
from common.ops.warp import warp

THETAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SLAB = 1 << 19  # scores looked at together, as a CPU's cache holds


def coupled_convex(
    cost: Tensor | Sequence[Callable[[], Tensor]],
    radius: int,
    *,
    thetas: tuple[float, ...] = THETAS,
    smoothing: int = 3,
    step: Tensor | None = None,
) -> Tensor:
    """Alternate between the best offset of each voxel and a smooth field.

    v_0 = argmin_d cost(d),                              u_0 = box(v_0)
    v_t = argmin_d cost(d) + theta_t |s (d - u_{t-1})|^2,  u_t = box^n(v_t),  t = 1..6

    Args:
        cost: (B, (2r+1)^3, I, J, K) cost of every offset, smaller is better; offsets i slowest, k fastest. Or its slabs
            along axis I, each a function that gives one: a volume too large to be kept is computed in every round.
        radius: r.
        thetas: weights of the coupling, growing.
        smoothing: n, number of 3x3x3 box means after each round (zeros outside counted).
        step: (3,) size s of one offset in the units of the coupling; None is 1, voxels of this grid, with which it
            regularises. The released code of SAMConvex couples in [-1, 1] coordinates, s = 2 / (size - 1).

    Returns:
        (B, 3, I, J, K) displacement u in voxels of this grid.

    Source: SAMConvex eq. 3-5, after Heinrich et al., MICCAI 2014; six rounds as in the released code (the paper says
    five and lists six weights). Ours: of equal costs the shortest offset wins v_0, not the first.
    """
    slabs = [lambda: cost] if isinstance(cost, Tensor) else cost
    disp = box_mean(torch.cat([_shortest(slab(), radius) for slab in slabs], 2))
    for theta in thetas:
        parts, at = [], 0
        for slab in slabs:
            part = slab()
            parts.append(_coupled(part, disp[:, :, at : at + part.shape[2]], radius, theta, step))
            at += part.shape[2]
        disp = box_mean(torch.cat(parts, 2), times=smoothing)
    return disp


def _shortest(cost: Tensor, radius: int) -> Tensor:
    """v_0 as a field: of equal costs the shortest offset, so that a background of nothing stays where it is."""
    table = offsets(radius, cost)
    lengths, far = table.square().sum(1), torch.full_like(table[:1, 0], torch.inf)
    rows = cost.flatten(2).transpose(1, 2)
    parts = rows.split(_length(cost), dim=1)
    best = [_smallest(torch.where(part == part.amin(-1, keepdim=True), lengths, far)) for part in parts]
    return _field(torch.cat(best, 1), table, cost.shape[2:])


def _coupled(cost: Tensor, disp: Tensor, radius: int, theta: float, step: Tensor | None) -> Tensor:
    """v_t as a field, given u_{t-1}."""
    table = offsets(radius, cost)
    scaled = table if step is None else table * step.to(table)
    # |d - u|^2 without its |u|^2, which is the same for every d: (u, 1) . (-2 d, |d|^2)
    weights = theta * torch.cat([-2 * scaled, scaled.square().sum(1, keepdim=True)], 1).t()
    pull = disp if step is None else disp * step.to(disp).view(1, 3, 1, 1, 1)
    pull = torch.cat([pull, torch.ones_like(pull[:, :1])], 1)
    rows, pull = (x.permute(0, 2, 3, 4, 1).flatten(1, 3) for x in (cost, pull))
    best = torch.empty(rows.shape[:2], dtype=torch.int64, device=cost.device)
    for b, at in itertools.product(range(len(cost)), range(0, rows.shape[1], _length(cost))):
        part = slice(at, at + _length(cost))
        best[b, part] = _smallest(torch.addmm(rows[b, part], pull[b, part], weights))
    return _field(best, table, cost.shape[2:])


def _smallest(scores: Tensor) -> Tensor:
    """argmin over the last axis, the first of equals; on a CPU by NumPy, whose loop is vectorised as torch's is not."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if traced or scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.argmin(-1)
    return torch.from_numpy(scores.detach().numpy().argmin(-1))


def _length(cost: Tensor) -> int:
    """Voxels whose scores are looked at together: in a trace all, as it would keep the number of parts it has seen."""
    slab = SLAB if cost.device.type == "cpu" else 64 * SLAB
    return sys.maxsize if torch.jit.is_tracing() else max(slab // cost.shape[1], 1)


def _field(index: Tensor, table: Tensor, size: Sequence[int]) -> Tensor:
    """Offsets number `index` (B, V) as a field (B, 3, I, J, K)."""
    return table[index].view(len(index), *size, 3).permute(0, 4, 1, 2, 3)


def inverse_consistent(forward: Tensor, backward: Tensor, *, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Bring two displacements closer to being each other's inverse.

    f <- (f - b(x + f)) / 2,  b <- (b - f(x + b)) / 2, both from the previous pair

    Source: ConvexAdam. Here in voxels, outside 0.
    """
    for _ in range(iterations):
        first = 0.5 * (forward - warp(backward, forward, padding="zeros"))
        second = 0.5 * (backward - warp(forward, backward, padding="zeros"))
        forward, backward = first, second
    return forward, backward
