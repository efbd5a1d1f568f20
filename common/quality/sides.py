"""Whether the moving scan would fit the fixed one better if its left were its right."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.fields import sample_at
from common.mind import PAIRS
from common.quality.metrics import concordance

POINTS = 2000  # voxels of the half-size grid by which the two are aligned; they are compared at all of them
STEPS = (6, 4)  # of Gauss and Newton, on features at a quarter and at half of the scans' size


def both_ways(moving: Tensor, fixed: Tensor, inside: Tensor) -> tuple[float, float]:
    """Agreement of structure of the fixed scan with the moving one, and with the moving one turned left to right.

    Either is aligned to the fixed scan anew, alike, by the affine map A that minimises sum |M(A x) - F(x)|^2 of their
    MIND-SSC: what is asked is which of them can be brought nearer, not which happens to lie nearer.

    Args:
        moving, fixed: (12, i, j, k) of `mind_features`, of pre-aligned scans on a grid whose first axis runs from left
            to right.
        inside: (i, j, k) voxels that count.

    Returns:
        Lin's concordance, as `common.quality.metrics.structure`, as it is and turned.
    """
    points = inside.nonzero().T.float()
    if not points.numel():
        return float("nan"), float("nan")
    back = 2 * float(points[0].mean()) - (moving.shape[1] - 1)  # from a flip around the grid to one around the points
    turned = moving[_turned_pairs()].flip(1)
    return _fitted(moving, fixed, points, 0.0), _fitted(turned, fixed, points, -back)


@cache
def _turned_pairs() -> list[int]:
    """Of each pair of neighbours the one that it becomes where the first axis is turned round."""
    order = [frozenset(pair) for pair in PAIRS]
    return [order.index(frozenset((-i, j, k) for i, j, k in pair)) for pair in PAIRS]


def _fitted(moving: Tensor, fixed: Tensor, points: Tensor, shift: float) -> float:
    """Concordance of features (C, i, j, k) at points (3, N) after the affine alignment, begun `shift` to the left."""
    away = points - points.mean(1, keepdim=True)
    basis = torch.cat([torch.ones_like(points[:1]), away / away.norm(dim=0).max().clamp(min=1)])  # (4, N)
    weights = torch.zeros(3, 4)  # of the displacement weights @ basis
    weights[0, 0] = shift
    some = slice(None, None, -(-points.shape[1] // POINTS))
    for steps, factor in zip(STEPS, (2, 1)):
        f, m = (F.avg_pool3d(x[None], factor, ceil_mode=True, count_include_pad=False)[0] for x in (fixed, moving))
        there = (points[:, some] + 0.5) / factor - 0.5
        weights = factor * _descend(m, sample_at(f, there), there, basis[:, some], weights / factor, steps)
    return concordance(sample_at(moving, points + weights @ basis), sample_at(fixed, points))


def _descend(moving: Tensor, target: Tensor, points: Tensor, basis: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Levenberg's steps of the sum of squares; only what lowers it is taken."""
    damping, unit = 0.1, torch.eye(3)[..., None]

    def error(at: Tensor) -> tuple[Tensor, float]:
        rest = sample_at(moving, points + at @ basis) - target
        return rest, float(rest.square().sum())

    rest, size = error(weights)
    for _ in range(steps):
        there = points + weights @ basis
        slopes = torch.stack([(sample_at(moving, there + e) - sample_at(moving, there - e)) / 2 for e in unit])
        normal = torch.einsum("acn,bcn,pn,qn->apbq", slopes, slopes, basis, basis).reshape(12, 12)
        right = torch.einsum("acn,cn,pn->ap", slopes, rest, basis).reshape(12)
        damped = normal + damping * torch.diag(normal.diagonal() + 1e-6)
        trial = weights - torch.linalg.solve(damped, right).view(3, 4)
        new_rest, new_size = error(trial)
        if new_size < size:
            weights, rest, size, damping = trial, new_rest, new_size, damping / 3
        else:
            damping *= 4
    return weights
