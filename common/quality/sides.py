"""Whether the moving scan would fit the fixed one better if its left were its right."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.fields import sample_at
from common.mind import PAIRS
from common.quality.metrics import concordance

POINTS = 2000  # voxels of the half-size grid by which the two are aligned; they are compared at all of them
STEPS, FACTORS = (6, 4), (2, 1)  # of Gauss and Newton, on features at a quarter and at half of the scans' size


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
    some = points[:, :: -(-points.shape[1] // POINTS)]
    places = [(some + 0.5) / factor - 0.5 for factor in FACTORS]
    targets = [sample_at(_pooled(fixed, factor), there) for factor, there in zip(FACTORS, places)]
    whole = fixed[:, inside]
    back = 2 * float(points[0].mean()) - (moving.shape[1] - 1)  # from a flip around the grid to one around the points
    turned = moving[_turned_pairs()].flip(1)
    found = (_fitted(x, places, targets, points, shift) for x, shift in ((moving, 0.0), (turned, -back)))
    return tuple(concordance(features, whole) for features in found)


@cache
def _turned_pairs() -> list[int]:
    """Of each pair of neighbours the one that it becomes where the first axis is turned round."""
    order = [frozenset(pair) for pair in PAIRS]
    return [order.index(frozenset((-i, j, k) for i, j, k in pair)) for pair in PAIRS]


def _pooled(features: Tensor, factor: int) -> Tensor:
    """Means over blocks; channel by channel in memory, so that a corner of a cell is one stretch of it."""
    if factor > 1:
        features = F.avg_pool3d(features[None], factor, ceil_mode=True, count_include_pad=False)[0]
    return features[None].contiguous(memory_format=torch.channels_last_3d)[0]


def _fitted(moving: Tensor, places: list[Tensor], targets: list[Tensor], points: Tensor, shift: float) -> Tensor:
    """Features (C, N) at points (3, N) after the affine alignment, begun `shift` to the left.

    Args:
        places, targets: some of the points, and the fixed features there, at each of FACTORS.
    """
    middle = points.mean(1, keepdim=True)
    radius = (points - middle).norm(dim=0).max().clamp(min=1)

    def basis(of: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(of[:1]), (of - middle) / radius])  # (4, N)

    weights = torch.zeros(3, 4)  # of the displacement weights @ basis
    weights[0, 0] = shift
    for steps, factor, there, target in zip(STEPS, FACTORS, places, targets):
        at = basis((there + 0.5) * factor - 0.5)
        weights = factor * _descend(_pooled(moving, factor), target, there, at, weights / factor, steps)
    return sample_at(_pooled(moving, 1), points + weights @ basis(points))


def _descend(moving: Tensor, target: Tensor, points: Tensor, basis: Tensor, weights: Tensor, steps: int) -> Tensor:
    """Levenberg's steps of the sum of squares; only what lowers it is taken."""
    damping, normal = 0.1, None
    nudges = torch.cat([torch.eye(3), -torch.eye(3)])[..., None]

    def error(at: Tensor) -> tuple[Tensor, float]:
        rest = sample_at(moving, points + at @ basis) - target
        return rest, float(rest.square().sum())

    rest, size = error(weights)
    for _ in range(steps):
        if normal is None:
            there = points + weights @ basis + nudges  # (6, 3, N)
            ahead, behind = sample_at(moving, there.transpose(0, 1).flatten(1)).unflatten(1, (2, 3, -1)).unbind(1)
            slopes = ((ahead - behind) / 2).transpose(0, 1)
            normal = torch.einsum("acn,bcn,pn,qn->apbq", slopes, slopes, basis, basis).reshape(12, 12)
            right = torch.einsum("acn,cn,pn->ap", slopes, rest, basis).reshape(12)
        damped = normal + damping * torch.diag(normal.diagonal() + 1e-6)
        trial = weights - torch.linalg.solve(damped, right).view(3, 4)
        new_rest, new_size = error(trial)
        if new_size < size:
            weights, rest, size, damping, normal = trial, new_rest, new_size, damping / 3, None
        else:
            damping *= 4
    return weights
