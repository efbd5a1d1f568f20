"""Whether the moving scan would fit the fixed one better if its left were its right."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.fields import sample_at
from common.mind import PAIRS, mind_features
from common.quality.metrics import concordance, halved

Fit = Callable[[Tensor], Tensor]  # points (3, N) of the fixed features -> those of the moving ones

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
    if not inside.any():
        return float("nan"), float("nan")
    points, whole = inside.nonzero().T.float(), fixed[:, inside]
    ways = zip((moving, _turned(moving)), _fits(moving, fixed, inside))
    return tuple(concordance(sample_at(_pooled(features, 1), fit(points)), whole) for features, fit in ways)


def sample_both_ways(moving: Tensor, fixed: Tensor, inside: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The moving scan as `both_ways` compares it, as it is and turned left to right, at points of the fixed one.

    Args:
        moving, fixed: (I, J, K) pre-aligned scans, the first axis from left to right.
        inside: (I, J, K) voxels that count.
        points: (3, N) voxels of the fixed scan.

    Returns:
        (N,) values each.
    """
    fits = _fits(*(mind_features(scan[None, None])[0] for scan in (moving, fixed)), halved(inside))
    found, last = [], -(-moving.shape[0] // 2) - 1
    for fit, turned in zip(fits, (False, True)):
        there = fit((points - 0.5) / 2)  # the features' voxels are blocks of two
        if turned:
            there[0] = last - there[0]
        found.append(sample_at(moving[None], 2 * there + 0.5)[0])
    return tuple(found)


def _fits(moving: Tensor, fixed: Tensor, inside: Tensor) -> tuple[Fit, Fit]:
    """The two alignments of `both_ways`; the second leads to the features of the scan turned left to right."""
    points = inside.nonzero().T.float()
    some = points[:, :: -(-points.shape[1] // POINTS)]
    places = [(some + 0.5) / factor - 0.5 for factor in FACTORS]
    targets = [sample_at(_pooled(fixed, factor), there) for factor, there in zip(FACTORS, places)]
    back = 2 * float(points[0].mean()) - (moving.shape[1] - 1)  # from a flip around the grid to one around the points
    ways = ((moving, 0.0), (_turned(moving), -back))
    return tuple(_fitted(features, places, targets, points, shift) for features, shift in ways)


def _turned(features: Tensor) -> Tensor:
    """(12, i, j, k) of the scan turned left to right."""
    return features[_turned_pairs()].flip(1)


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


def _fitted(moving: Tensor, places: list[Tensor], targets: list[Tensor], points: Tensor, shift: float) -> Fit:
    """The affine alignment, begun `shift` to the left.

    Args:
        places, targets: some of the points (3, N) that count, and the fixed features there, at each of FACTORS.
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
    return lambda of: of + weights @ basis(of)


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
