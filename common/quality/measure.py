"""What is known about a registered pair: similarity, overlap, landmarks, deformation, in one row and its details."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import InputError
from common.fields import jacobian_determinant, round_trip
from common.mind import mind_features
from common.ops import warp
from common.quality.metrics import (
    concordance,
    halved,
    label_overlap,
    mean_over_labels,
    ncc,
    nmi,
    regularity_of,
    ssim,
)
from common.quality.quick import against_quick
from common.quality.sides import both_ways
from common.space import geometry, io, mapping
from common.space.points import Points, read_matching
from common.space.transform_files import read_transform

FEW_LABELS = 20  # up to so many, surface distances are measured without being asked for
SAMPLE = 5000  # voxels at which the deformation is inverted: its share of failures to 1 %, for a hundredth of the whole
LATTICE = 2**21  # voxels; of a larger scan the similarity is that of every second voxel along each axis, or of fewer
PERCENTILES = (5, 50, 95, 99, 100)


@dataclass(frozen=True)
class Registration:
    """Two scans, each in its own space, and the point map found between them."""

    moving: np.ndarray  # (C, I, J, K)
    moving_affine: np.ndarray
    fixed: np.ndarray
    fixed_affine: np.ndarray
    start: mapping.Transform  # fixed -> moving before the registration: the pre-alignment
    whole: mapping.Transform  # fixed -> moving after it
    work: Tensor  # (2C, i, j, k) pre-aligned moving and fixed scan on the working grid, scaled
    disp: Tensor  # (3, i, j, k) displacement on that grid, voxels
    work_affine: np.ndarray
    moving_label: np.ndarray | None = None  # (I, J, K)
    fixed_label: np.ndarray | None = None
    moving_points: Points | None = None
    fixed_points: Points | None = None
    measured: np.ndarray | None = None  # (N,) which of the points are measured; the others have guided

    @property
    def before(self) -> str:
        """What "before" is of this pair, in words: in every report the scans after what is linear, if anything is."""
        still = not mapping.deforms(self.start) and np.allclose(mapping.matrix_of(self.start), np.eye(4), atol=1e-9)
        return "the scans as they lie, not aligned" if still else "the scans after the alignment"

    @property
    def inside(self) -> Tensor:
        """(i, j, k) voxels of the working grid where the fixed scan is above 0; all, if there are none."""
        inside = self.work[len(self.work) // 2] > 0
        return inside if inside.any() else torch.ones_like(inside)

    # What is measured and drawn, on the working grid; kept with the object.

    @cached_property
    def warped(self) -> Tensor:
        """(i, j, k) moving scan, first channel, at x + disp(x)."""
        return warp(self.work[None, :1].float(), self.disp[None])[0, 0]

    @cached_property
    def determinant(self) -> Tensor:
        """(i, j, k) float64, of the displacement's Jacobian."""
        return jacobian_determinant(self.disp[None].double())[0, 0]

    @cached_property
    def length(self) -> np.ndarray:
        """(i, j, k) of the displacement, mm."""
        return geometry.length_mm(self.disp.numpy(), self.work_affine)


def read_registration(
    moving: str,
    fixed: str,
    transform: str,
    *,
    moving_label: str | None = None,
    fixed_label: str | None = None,
    moving_points: str | None = None,
    fixed_points: str | None = None,
    spacing: float | None = None,
    start: str = "",
) -> Registration:
    """A registration made by any tool, from its files. "Before" is after the linear parts of its transform, if it also
    has others, else, as of one displacement image, the scans as they lie.

    Args:
        moving, fixed: scans, each in its own space.
        transform: what `read_transform` reads, fixed -> moving.
        spacing: of the grid on which the deformation is measured, mm; None keeps the fixed scan's.
        start: file of the alignment that is to be "before" instead, fixed -> moving.

    Raises:
        InputError: what the readers refuse.
    """
    (scan, affine), (target, target_affine) = io.read_scan(moving), io.read_scan(fixed)
    io.refuse_constant(scan, moving), io.refuse_constant(target, fixed)
    whole = read_transform(transform)
    linear = [part for part in mapping.parts(whole) if part.linear]
    deforms = len(linear) < len(mapping.parts(whole))
    if start:
        begin = read_transform(start)
        if mapping.deforms(begin):
            raise InputError(f"{start}: the alignment must be linear, as a rigid or affine one")
    else:
        begin = mapping.compose(*linear) if linear and deforms else mapping.affine_transform(np.eye(4))
    box = geometry.foreground_box(target[0])
    size, onto = geometry.working_grid(target.shape[1:], target_affine, spacing, box=box)
    work = []
    for array, own, matrix in ((scan, affine, mapping.matrix_of(begin)), (target, target_affine, None)):
        channel = geometry.to_working_grid(array[:1], own, size, onto, matrix)
        low, high = geometry.foreground_range(channel[0])
        work.append(np.clip((channel - low) / max(high - low, 1e-12), 0, 1))
    labels, marks = {}, {}
    if moving_label and fixed_label:
        labels["moving_label"] = io.read_beside(moving_label, "label map", moving, scan, affine)[0]
        labels["fixed_label"] = io.read_beside(fixed_label, "label map", fixed, target, target_affine)[0]
    if moving_points and fixed_points:
        both = read_matching(moving_points, affine, fixed_points, target_affine)
        marks = dict(zip(("moving_points", "fixed_points"), both))
    return Registration(
        *(scan, affine, target, target_affine),
        start=begin,
        whole=whole,
        work=torch.from_numpy(np.concatenate(work).astype(np.float32)),
        disp=torch.from_numpy(mapping.disp_of(mapping.compose(whole, mapping.invert(begin)), size, onto)).float(),
        work_affine=onto,
        **labels,
        **marks,
    )


class Warped(NamedTuple):
    """The moving scan and label map on the fixed grid, before (pre-aligned) and after."""

    before: np.ndarray  # first channel, on every `step`th voxel of the fixed grid along each axis
    step: int
    after: np.ndarray  # (C, I, J, K)
    label_before: np.ndarray | None
    label_after: np.ndarray | None


def warp_pair(pair: Registration, *, lattice: int = LATTICE) -> Warped:
    """One interpolation each, of the original files.

    Args:
        lattice: voxels on which the scan before the registration is wanted, at most: it is measured only.
    """
    step = 1
    while pair.fixed[0].size / step**3 > lattice:
        step += 1
    coarse = tuple(-(-n // step) for n in pair.fixed.shape[1:]), pair.fixed_affine @ np.diag([step, step, step, 1])
    onto = pair.fixed.shape[1:], pair.fixed_affine

    def bring(channel: np.ndarray, transform: mapping.Transform, grid: mapping.Grid, nearest=False) -> np.ndarray:
        outside = 0.0 if nearest else io.background(channel)
        options = {"nearest": nearest, "outside": outside}
        return mapping.resample(channel, pair.moving_affine, *grid, transform, **options)

    labels = [None, None]
    if pair.moving_label is not None:
        labels = [bring(pair.moving_label, t, onto, nearest=True) for t in (pair.start, pair.whole)]
    after = np.stack([bring(channel, pair.whole, onto) for channel in pair.moving])
    return Warped(bring(pair.moving[0], pair.start, coarse), step, after, *labels)


def measure(
    pair: Registration, warped: Warped, *, surface: bool | None = None, minimum: int = 0, groups: dict | None = None
) -> tuple[dict[str, float], dict[str, dict]]:
    """The row of a pair, and what does not fit into a row: every label, every landmark, percentiles.

    Args:
        surface: measure HD, HD95 and ASSD of the labels, and SSIM of the scans; None: the distances, of few labels.
        minimum: labels of at most this many voxels in the fixed map are left out of the means.
        groups: coarse label groups as {name: {"members": [...]}}; adds the mean Dice over them.

    Returns:
        {measure: value} for results.csv, and {"labels": ..., "landmarks": ..., "displacement_mm": ...}.
    """
    row, details = _similarity(pair, warped, bool(surface)) | _structure(pair), {}
    if warped.label_after is not None and pair.fixed_label is not None:
        found, details["labels"] = _overlap(pair, warped, surface, minimum, groups)
        row |= found
    some = pair.measured is None or pair.measured.any()
    if pair.fixed_points is not None and pair.moving_points is not None and some:
        found, details["landmarks"] = _landmarks(pair)
        row |= found
    length = pair.length[pair.inside.numpy()]
    details["before"] = pair.before
    details["displacement_mm"] = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(length, PERCENTILES).tolist()))
    row |= {"disp_mean_mm": float(length.mean()), "disp_max_mm": float(length.max())}
    return row | regularity_of(pair.determinant, pair.inside) | _one_to_one(pair), details


def _one_to_one(pair: Registration) -> dict[str, float]:
    """Whether the map is one-to-one: |x' - x| in mm, x' being sought until T(x') = T(x), of at most SAMPLE voxels of
    the working grid's foreground. An inverse in a file is less exact, see `inverse_error`.
    """
    points = pair.inside.nonzero().T.float()
    points = points[:, :: -(-points.shape[1] // SAMPLE)]
    return _error_row("inverse", geometry.length_mm(round_trip(pair.disp, points).numpy(), pair.work_affine), pair)


def inverse_error(pair: Registration, inverse: mapping.Transform) -> dict[str, float]:
    """|T^-1(T(x)) - x| in mm of an inverse that is written: mean, 99th percentile, share above half a voxel.

    The voxel is that of the working grid, on which displacement and inverse live.
    """
    error = inverse_error_inside(pair.whole, inverse, pair.fixed[0], pair.fixed_affine)
    return _error_row("inverse_file", error, pair)


def inverse_error_inside(
    transform: mapping.Transform, inverse: mapping.Transform, fixed: np.ndarray, fixed_affine: np.ndarray
) -> np.ndarray:
    """|T^-1(T(x)) - x| in mm at every voxel of the foreground of a scan (I, J, K): (N,). Without any, of all of it."""
    error = mapping.inverse_error_mm(transform, inverse, fixed.shape, fixed_affine)
    inside = fixed > geometry.foreground_floor(fixed)
    return error[inside] if inside.any() else error.ravel()


def _error_row(name: str, error: np.ndarray, pair: Registration) -> dict[str, float]:
    half = float(np.linalg.norm(pair.work_affine[:3, :3], axis=0).min()) / 2
    return {
        f"{name}_error_mm": float(error.mean()),
        f"{name}_error_p99_mm": float(np.percentile(error, 99)),
        f"{name}_failed_pct": 100 * float((error > half).mean()),
    }


def _similarity(pair: Registration, warped: Warped, structural: bool) -> dict[str, float]:
    fixed, moving, some = pair.fixed[0], pair.moving[0], (slice(None, None, warped.step),) * 3
    chosen = (fixed[some], warped.before, warped.after[0][some])
    f, s, w = (torch.from_numpy(np.ascontiguousarray(x)) for x in chosen)
    inside, there = f > geometry.foreground_floor(fixed), s > geometry.foreground_floor(moving)
    overlap = 2 * float((there & inside).sum()) / max(float(there.sum() + inside.sum()), 1.0)
    row, (target, *others) = {"overlap": overlap}, (x[inside] for x in (f, s, w))
    for name, of in (("ncc", ncc), ("nmi", nmi)):
        row |= {f"{name}_{when}": of(other, target) for when, other in zip(("before", "after"), others)}
    if structural:
        row |= {"ssim_before": ssim(_scaled(s), _scaled(f)), "ssim_after": ssim(_scaled(w), _scaled(f))}
    return row


def _structure(pair: Registration) -> dict[str, float]:
    """Agreement of MIND-SSC on the working grid, first channels; how much it would rise with left and right exchanged,
    both aligned alike; and whether a quick registration by it goes the same way."""
    moving, fixed = (half[0] for half in pair.work.float().chunk(2))
    inside = halved(pair.inside)
    target, before, after = (mind_features(x[None, None])[0] for x in (fixed, moving, pair.warped))
    row = {
        f"structure_{name}": concordance(features[:, inside], target[:, inside])
        for name, features in (("before", before), ("after", after))
    }
    as_it_is, turned = both_ways(before, target, inside)
    row |= {"structure_aligned": as_it_is, "structure_mirrored": turned}
    return row | dict(zip(("quick_agreement", "quick_gain"), against_quick(before, target, inside, pair.disp)))


def _overlap(
    pair: Registration, warped: Warped, surface: bool | None, minimum: int, groups: dict | None
) -> tuple[dict[str, float], dict]:
    maps = (pair.fixed_label, warped.label_before, warped.label_after, pair.moving_label)
    f, b, a, m = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in maps)
    if surface is None:
        surface = len(f.unique()) <= FEW_LABELS + 1
    spacing = tuple(np.linalg.norm(pair.fixed_affine[:3, :3], axis=0)) if surface else None
    scores = {
        name: label_overlap(f, label, m, spacing=spacing, minimum=minimum)
        for name, label in (("before", b), ("after", a))
    }
    left = set(a.unique().tolist())
    gone = [n for n in scores["after"] if n not in left]
    row = {"labels": len(scores["after"]), "labels_lost": len(gone)}
    if gone:
        row["labels_lost_pct"] = 100 * float(torch.isin(f, torch.tensor(gone)).sum() / (f > 0).sum())
    for name, other, label in (("before", "after", b), ("after", "before", a)):
        for kind in next(iter(scores[name].values()), {}):
            row[f"{kind}_{name}"] = mean_over_labels(scores[name], kind, beside=scores[other])
        if groups:
            coarse = (grouped(x, groups) for x in (f, label, m))
            row[f"dice_coarse_{name}"] = mean_over_labels(label_overlap(*coarse), "dice")
    each = {
        str(n): {f"{kind}_{name}": scores[name][n][kind] for kind in scores[name][n] for name in ("before", "after")}
        for n in scores["after"]
    }
    return row, each


def _landmarks(pair: Registration) -> tuple[dict[str, float], dict]:
    """Target registration error |T(x) - y| in mm of fixed landmarks x and moving landmarks y, in moving space."""
    some = np.ones(len(pair.fixed_points.lps), bool) if pair.measured is None else pair.measured
    fixed, moving = pair.fixed_points.lps[some], pair.moving_points.lps[some]
    errors = {
        name: np.linalg.norm(mapping.map_points(transform, fixed) - moving, axis=1)
        for name, transform in (("before", pair.start), ("after", pair.whole))
    }
    row = {"landmarks": len(fixed)}
    for name, error in errors.items():
        row |= {f"tre_mm_{name}": float(error.mean())}
    row["tre_max_mm_after"] = float(errors["after"].max())
    each = [
        {"name": str(name), "tre_mm_before": float(before), "tre_mm_after": float(after)}
        for name, before, after in zip(np.array(pair.fixed_points.names)[some], errors["before"], errors["after"])
    ]
    return row, each


def grouped(labels: Tensor, groups: dict) -> Tensor:
    """The number of its group (from 1) for every label, 0 for one of no group; labels may be of any size."""
    numbers = {int(n): k for k, group in enumerate(groups.values(), 1) for n in group["members"]}
    members = torch.tensor(sorted(numbers), dtype=torch.long)
    at = torch.searchsorted(members, labels).clamp(max=len(members) - 1)
    group = torch.tensor([numbers[n] for n in members.tolist()], dtype=torch.long)
    return torch.where(members[at] == labels, group[at], 0)


def _scaled(scan: Tensor) -> Tensor:
    """A scan (I, J, K) in [0, 1] as (1, 1, I, J, K), by its own smallest and largest value."""
    low, high = scan.min(), scan.max()
    return ((scan - low) / (high - low).clamp(min=1e-12))[None, None]
