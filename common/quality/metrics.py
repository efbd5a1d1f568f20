"""How good a registration is: overlap and surface distances by MONAI, regularity and landmarks by our own formulas.

MONAI takes seconds to load: it is imported where labels are measured.
"""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import find_objects
from torch import Tensor

from common.fields import jacobian_determinant
from common.mind import mind_features

DISTANCES = ("hd", "hd95", "assd")


def label_overlap(
    fixed: Tensor,
    warped: Tensor,
    moving: Tensor | None = None,
    *,
    spacing: tuple[float, float, float] | None = None,
    minimum: int = 0,
) -> dict[int, dict[str, float]]:
    """Dice of every label, and surface distances where `spacing` is given.

    Args:
        fixed, warped: (I, J, K) integer labels on one grid; 0 is background.
        moving: the label map before warping, any grid; a label that it lacks is left out.
        spacing: mm along i, j, k; adds hd, hd95 and assd in mm (slow).
        minimum: labels of at most this many voxels in `fixed` are left out.

    Returns:
        {label: {"dice": ..., "hd": ..., "hd95": ..., "assd": ...}}; distances are nan where `warped` lacks the label.
    """
    from monai.metrics import compute_dice

    known = None if moving is None else set(torch.unique(moving).tolist())
    scores, boxes = {}, [_bounding_boxes(x) for x in (fixed, warped)]
    labels, counts = torch.unique(fixed, return_counts=True)
    for label, count in zip(labels.tolist(), counts.tolist()):
        if label == 0 or count <= minimum or (known is not None and label not in known):
            continue
        box = _around([found[label] for found in boxes if label in found])
        a, b = ((x[box] == label)[None, None].float() for x in (warped, fixed))
        scores[int(label)] = row = {"dice": float(compute_dice(a, b))}
        if spacing is not None:
            step = [float(s) for s in spacing]
            row |= _surface_distances(a, b, step) if a.any() else dict.fromkeys(DISTANCES, float("nan"))
    return scores


def _surface_distances(a: Tensor, b: Tensor, spacing: list[float]) -> dict[str, float]:
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    options = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)  # MONAI 1.6 warns of itself
        found = (
            compute_hausdorff_distance(a, b, **options),
            compute_hausdorff_distance(a, b, percentile=95, **options),
            compute_average_surface_distance(a, b, symmetric=True, **options),
        )
    return dict(zip(DISTANCES, map(float, found)))


def mean_over_labels(
    scores: dict[int, dict[str, float]], name: str, *, beside: dict[int, dict[str, float]] | None = None
) -> float:
    """Mean of one measure over the labels, nan entries left out; nan for no label.

    Args:
        beside: scores to compare with; a label that is nan there is left out here, so that both use the same labels.
    """
    values = torch.tensor([row[name] for row in scores.values()], dtype=torch.float64)
    if beside is not None:
        values[torch.tensor([beside[label][name] for label in scores]).isnan()] = float("nan")
    return float(values.nanmean()) if len(values) else float("nan")


def _bounding_boxes(labels: Tensor) -> dict[int, tuple[slice, slice, slice]]:
    """Smallest box around each label but 0, all in one pass over (I, J, K)."""
    present, index = torch.unique(labels, return_inverse=True)
    boxes = find_objects(index.numpy() + 1)
    return {label: box for label, box in zip(present.tolist(), boxes) if label}


def _around(boxes: list[tuple[slice, slice, slice]]) -> tuple[slice, ...]:
    """Smallest box around `boxes`, one voxel wider, so that surfaces do not touch its faces."""
    return tuple(
        slice(max(min(s.start for s in sides) - 1, 0), max(s.stop for s in sides) + 1) for sides in zip(*boxes)
    )


def ssim(warped: Tensor, fixed: Tensor) -> float:
    """Structural similarity of (B, C, I, J, K) scans in [0, 1], Gaussian window 11, by MONAI."""
    from monai.metrics import SSIMMetric

    return float(SSIMMetric(spatial_dims=3, data_range=1.0)(warped, fixed).mean())


def ncc(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Pearson correlation of two scans of one shape, within `mask` where given."""
    if mask is not None:
        a, b = a[mask], b[mask]
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def nmi(a: Tensor, b: Tensor, mask: Tensor | None = None, *, bins: int = 32) -> float:
    """Normalised mutual information 2 I(a, b) / (H(a) + H(b)) of two scans of one shape, within `mask` where given.

    0 for scans that say nothing about each other, 1 for a one-to-one relation of intensities. Bins are equally wide
    between the 1st and the 99th percentile, so that a few bright voxels do not use them up.
    """
    if mask is not None:
        a, b = a[mask], b[mask]
    if not a.numel():
        return float("nan")
    levels = [_levels(x.double().flatten(), bins) for x in (a, b)]
    joint = torch.bincount(levels[0] * bins + levels[1], minlength=bins * bins).double().view(bins, bins) / a.numel()

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum()

    alone = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return float(2 * (alone - entropy(joint)) / alone) if alone > 0 else float("nan")


def _levels(x: Tensor, bins: int) -> Tensor:
    some = x[:: max(len(x) // 100000, 1)]
    ranks = [share * (len(some) - 1) for share in (0.01, 0.99)]
    near = [(math.floor(rank), math.ceil(rank)) for rank in ranks]
    parted = torch.from_numpy(np.partition(some.numpy(), sorted({*near[0], *near[1]})))  # a quarter of a sort's time
    low, high = (parted[a].lerp(parted[b], rank - a) for (a, b), rank in zip(near, ranks))
    return ((x - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(0, bins - 1)


def structure(scans: Tensor, fixed: Tensor, mask: Tensor) -> list[float]:
    """How well the structure of scans agrees with that of the fixed one, whatever the contrast of either.

    Lin's concordance of their MIND-SSC F and G (blocks of 2^3 voxels, all channels as one) inside `mask`:
    1 - mean |F - G|^2 / (var F + var G + |mean F - mean G|^2), 1 for one structure, 0 for what chance gives.

    Args:
        scans: (N, 1, I, J, K) on the grid of `fixed`.
        fixed: (1, 1, I, J, K).
        mask: (I, J, K).

    Source: Lin, Biometrics 1989 (concordance); MIND-SSC as `common.mind` says.
    """
    inside = halved(mask)
    target, *others = (mind_features(scan[None])[0][:, inside] for scan in (fixed[0], *scans))
    return [concordance(other, target) for other in others]


def halved(mask: Tensor) -> Tensor:
    """(I, J, K) -> (I/2, ...): blocks of 2^3 voxels of which more than half count; the grid of `mind_features`."""
    return F.avg_pool3d(mask[None, None].float(), 2, ceil_mode=True, count_include_pad=False)[0, 0] > 0.5


def concordance(one: Tensor, other: Tensor) -> float:
    """Lin's concordance of (C, N), all channels as one, as in `structure`; nan of nothing."""
    if not one.shape[1]:
        return float("nan")
    a, b = one.double(), other.double()
    chance = a.var(1, correction=0) + b.var(1, correction=0) + (a.mean(1) - b.mean(1)).square()
    return 1 - float((a - b).square().mean(1).sum() / chance.sum().clamp(min=1e-12))


def regularity(disp: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Folding share and spread of volume change of a displacement.

    folding_pct = 100 * share of voxels with det J <= 0,  sdlogj = std of log(clip(det J, 1e-9, 1e9))

    Args:
        disp: (1, 3, I, J, K) in voxels.
        mask: (I, J, K) voxels that count; None takes all. Two voxels along the border are always left out, where the
            differences are one-sided.

    Source: SACB-Net section 4 counts det <= 0; SDlogJ as in the Learn2Reg challenges.
    """
    return regularity_of(jacobian_determinant(disp.double())[0, 0], mask)


def regularity_of(determinant: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """`regularity` of a displacement whose Jacobian's determinant (I, J, K) is known."""
    inner = (slice(2, -2),) * 3
    det = determinant[inner]
    if mask is not None:
        det = det[mask[inner]]
    if det.numel() == 0:
        return {"folding_pct": float("nan"), "sdlogj": float("nan")}
    return {
        "folding_pct": 100 * float((det <= 0).double().mean()),
        "sdlogj": float(det.clamp(1e-9, 1e9).log().std(unbiased=False)),
    }
