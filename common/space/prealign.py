"""Affine pre-alignment of a pair of scans: mutual information, coarse to fine, in numpy.

Everything is in RAS millimetres; a matrix (4, 4) maps a point of the fixed scan to its place in the moving scan.
"""

import itertools
from collections.abc import Callable

import numpy as np

from common.space.copies import SLACK, Scan, mask_of, on_lattice, translation

LEVELS = (12, 18, 24)  # voxels along the side of the foreground: 9, 6 and 4.5 mm for a brain
BINS = 32
SAMPLES = 2**16  # of the fixed copy, at most
SIEVE = 2**11, 16  # samples by which many starts are told apart first, and how many are left then
DEGREES = (-25.0, 0.0, 25.0)  # about each axis, tried at the coarsest level
MARGIN = {"fixed": 0.07, "moving": 0.2}  # of background around the copies, in sides of the foreground


def prealign(
    fixed: np.ndarray,
    fixed_affine_ras: np.ndarray,
    moving: np.ndarray,
    moving_affine_ras: np.ndarray,
    mode: str = "affine",
    *,
    fixed_mask: np.ndarray | None = None,
    moving_mask: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """4x4 matrix (RAS, mm) that maps a point of the fixed scan to its place in the moving scan.

    M = argmax_M I(fixed(x), moving(M x)),   I = sum_ab p(a, b) log(p(a, b) / (p(a) p(b)))

    The same input gives the same bits; stored in another order of axes, the same but for the rounding of its affine. No
    overlap of the two scans in world space is needed.

    Args:
        fixed, moving: (I, J, K) scans, of any size, spacing, orientation and contrast.
        fixed_affine_ras, moving_affine_ras: (4, 4) voxel -> mm (RAS).
        mode: "affine" (12 parameters), "rigid" (6) or "none" (the identity, or `start`).
        fixed_mask, moving_mask: (I, J, K) on the grids of the scans, above 0 where the mutual information looks: a
            voxel counts where both say so. Where to begin is found without them.
        start: (4, 4) to begin from, as of landmarks, instead of what is tried otherwise.

    Returns:
        (4, 4) float64.

    Raises:
        ValueError: unknown mode, a scan that is not 3-D, a single slice, constant or not finite, a singular affine.

    Source: Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI 2003, for the
        metric (32 bins, box window for fixed, cubic B-spline for moving). Ours: the starts and the BFGS descent.
    """
    if mode not in ("affine", "rigid", "none"):
        raise ValueError(f"prealign() 'mode' must be 'affine', 'rigid' or 'none', got {mode!r}")
    if mode == "none":
        return np.eye(4) if start is None else np.asarray(start, np.float64)
    _check("fixed", fixed, fixed_affine_ras)
    _check("moving", moving, moving_affine_ras)
    fixed_scan, moving_scan = Scan(fixed, fixed_affine_ras), Scan(moving, moving_affine_ras)
    onto, back = translation(-moving_scan.shift), translation(fixed_scan.shift)
    if start is None:
        tried = _starts(fixed_scan, moving_scan, scaled=mode == "affine")
    else:
        tried = [onto @ np.asarray(start, np.float64) @ back]
    for level, side in enumerate(LEVELS):
        mm = min(fixed_scan.side, moving_scan.side) / side
        copies = fixed_scan.copy(mm, MARGIN["fixed"]), moving_scan.copy(mm, MARGIN["moving"])
        masks = ((fixed_mask, np.linalg.inv(back) @ fixed_affine_ras), (moving_mask, onto @ moving_affine_ras))
        metric = _Information(*copies, *(mask_of(copy, *mask) for copy, mask in zip(copies, masks)))
        motion = "rigid" if mode == "rigid" else "similarity" if level == 0 else "affine"
        ranked = metric.rank(tried)
        ends = [_descend(metric, motion, matrix, fixed_scan, mm) for matrix in ranked[: 3 if level == 0 else 1]]
        tried = ranked[:1] + ends  # what a level was given stays in the race: it may win at the next, finer one
    return np.linalg.inv(onto) @ metric.rank(tried)[0] @ np.linalg.inv(back)


def fit_points(fixed: np.ndarray, moving: np.ndarray, *, scaled: bool = False) -> np.ndarray | None:
    """4x4 rigid map, or similarity, of points (N, 3) onto their counterparts, in RAS mm; None of fewer than three, or
    of points on a line.

    Least squares by Umeyama's formula, weights min(1, 2 m / r) of the residuals r with the median m, ten times over: a
    pair that does not belong together hardly counts.

    Source: Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991.
    """
    fixed, moving = np.asarray(fixed, np.float64), np.asarray(moving, np.float64)
    if len(fixed) < 3 or np.linalg.matrix_rank(fixed - fixed.mean(0), tol=1e-3 * np.ptp(fixed)) < 2:
        return None
    weight = np.ones((len(fixed), 1))
    for _ in range(10):
        centres = [(weight * points).sum(0) / weight.sum() for points in (fixed, moving)]
        one, other = fixed - centres[0], moving - centres[1]
        left, sizes, right = np.linalg.svd((weight * other).T @ one)
        signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
        size = (sizes * signs).sum() / (weight * one**2).sum() if scaled else 1.0
        linear = size * (left * signs) @ right
        rest = np.linalg.norm(other - one @ linear.T, axis=1, keepdims=True)
        weight = np.minimum(1.0, 2 * np.median(rest) / np.maximum(rest, 1e-9))
        if not weight.any():  # all fit exactly
            break
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, centres[1] - linear @ centres[0]
    return matrix


def _check(name: str, array: np.ndarray, affine_ras: np.ndarray) -> None:
    if array.ndim != 3 or min(array.shape) < 2:
        raise ValueError(f"prealign() {name!r} must be (I, J, K) with at least 2 voxels each, got {array.shape}")
    low, high = array.min(), array.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"prealign() {name!r} must be finite, got values from {low} to {high}")
    if low == high:
        raise ValueError(f"prealign() {name!r} must not be constant, got {low} everywhere")
    if np.shape(affine_ras) != (4, 4) or abs(np.linalg.det(np.asarray(affine_ras)[:3, :3])) < 1e-12:
        raise ValueError(f"prealign() '{name}_affine_ras' must be an invertible (4, 4), got {affine_ras}")


class _Information:
    """Negative mutual information of two small copies under a matrix, where their masks say so, and its gradient."""

    def __init__(
        self,
        fixed: tuple[np.ndarray, np.ndarray],
        moving: tuple[np.ndarray, np.ndarray],
        fixed_mask: np.ndarray | None = None,
        moving_mask: np.ndarray | None = None,
    ) -> None:
        (fixed, affine), (self.moving, moving_affine) = fixed, moving
        self.mask = moving_mask
        chosen = _drawn(np.arange(fixed.size), SAMPLES)
        if fixed_mask is not None and fixed_mask.any():  # of the same draw, so that a small mask changes little
            kept, others = chosen[fixed_mask.flat[chosen]], np.setdiff1d(np.flatnonzero(fixed_mask), chosen)
            chosen = np.sort(np.append(kept, _drawn(others, SAMPLES - len(kept))))
        index = np.stack(np.unravel_index(chosen, fixed.shape), 1)
        self.points = np.append(index @ affine[:3, :3].T + affine[:3, 3], np.ones((len(index), 1)), 1)
        levels = BINS - 4  # two bins at either end for the reach of the cubic window
        self.bins = np.minimum(_unit(fixed, fixed_mask).flat[chosen] * levels, levels - 1).astype(np.int64) + 2
        self.moving = (_unit(self.moving, moving_mask) * levels + 2).astype(np.float32)
        self.to_voxel = np.linalg.inv(moving_affine)
        self.least = 1

    def rank(self, matrices: list[np.ndarray]) -> list[np.ndarray]:
        """The matrices, best first. Those with less than half of the largest overlap come last, and later too.

        Of many, those that a few of the samples place last are left out; the first one, the headers, never is.
        """
        samples, left = SIEVE
        if len(matrices) > 2 * left and len(self.points) > 2 * samples:
            whole, step = (self.points, self.bins), len(self.points) // samples
            self.points, self.bins = self.points[::step], self.bins[::step]
            best = self._ranked(matrices)[:left]
            self.points, self.bins = whole
            matrices = [matrices[i] for i in dict.fromkeys([*best, 0])]
        return [matrices[i] for i in self._ranked(matrices)]

    def _ranked(self, matrices: list[np.ndarray]) -> np.ndarray:
        overlaps = [self._inside(matrix)[1].sum() for matrix in matrices]
        self.least = max(max(overlaps) // 2, 1)
        return np.argsort([self(matrix, slope=False)[0] for matrix in matrices], kind="stable")

    def _inside(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the samples come to lie, voxels (3, N) of the moving copy, and which of them count."""
        voxels = np.ascontiguousarray((self.points @ (self.to_voxel @ matrix)[:3].T).T, np.float32)
        inside = np.ones(len(self.points), bool)
        for v, n in zip(voxels, self.moving.shape):
            inside &= (v >= -SLACK) & (v <= n - 1 + SLACK)
        if self.mask is not None:
            inside[inside] = self.mask[tuple(np.rint(voxels[:, inside] + SLACK).astype(np.int64))]
        return voxels, inside

    def __call__(self, matrix: np.ndarray, *, slope: bool = True) -> tuple[float, np.ndarray]:
        """Value and its gradient (3, 4) to the rows of the matrix (0 unless `slope`); 0 with too little overlap."""
        voxels, inside = self._inside(matrix)
        count = int(inside.sum())
        if count < self.least:
            return 0.0, np.zeros((3, 4))
        points, bins = self.points, self.bins
        if count < len(points):
            voxels, points, bins = voxels[:, inside], points[inside], bins[inside]
        values, slopes = _sample(self.moving, voxels, slope)
        low = np.minimum(values.astype(np.int64), BINS - 3)
        t = values - low.astype(np.float32)
        u, t2 = 1 - t, t * t
        u2 = u * u
        window = u2 * u / 6, (t / 2 - 1) * t2 + np.float32(2 / 3), (u / 2 - 1) * u2 + np.float32(2 / 3), t2 * t / 6
        cells = bins * BINS + low - 1
        joint = sum(np.bincount(cells + tap, weight, BINS * BINS) for tap, weight in enumerate(window)) / count
        joint = joint.reshape(BINS, BINS)
        alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        filled = joint > 0
        log = np.log(np.where(filled, joint, 1) / np.where(filled, alone, 1))
        if not slope:
            return -float((joint * log).sum()), np.zeros((3, 4))
        window_slope = u2 / -2, 1.5 * t2 - 2 * t, 2 * u - 1.5 * u2, t2 / 2
        # dI/dp(a, b) is the log up to a constant, which the window's slopes, summing to 0, cancel.
        force = sum(log.take(cells + tap) * slope for tap, slope in enumerate(window_slope)) / count
        return -float((joint * log).sum()), -self.to_voxel[:3, :3].T @ (slopes * force) @ points


def _drawn(numbers: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the numbers, in order, drawn with a fixed seed."""
    if len(numbers) <= most:
        return numbers
    return np.sort(np.random.default_rng(0).choice(numbers, most, replace=False))


def _unit(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Scaled so that what counts is in [0, 1], and cut there."""
    some = array if mask is None or not mask.any() else array[mask]
    low, high = some.min(), some.max()
    return ((array - low) / (high - low if high > low else 1)).clip(0, 1)


def _sample(array: np.ndarray, voxels: np.ndarray, slope: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Trilinear values (N) at voxels (3, N) inside the grid, and their slopes (3, N) along the axes if wanted."""
    first = [np.minimum((v + SLACK).astype(np.int64), n - 2) for v, n in zip(voxels, array.shape)]
    i, j, k = (v - low for v, low in zip(voxels, first))
    strides = (array.shape[1] * array.shape[2], array.shape[2], 1)
    base, flat = sum(low * stride for low, stride in zip(first, strides)), array.ravel()
    near, far = ([[flat.take(base + np.dot(strides, (a, b, c))) for c in (0, 1)] for b in (0, 1)] for a in (0, 1))
    rows = [[c0 + (c1 - c0) * k for c0, c1 in plane] for plane in (near, far)]
    faces = [b0 + (b1 - b0) * j for b0, b1 in rows]
    if not slope:
        return faces[0] * (1 - i) + faces[1] * i, None
    along_j = [b1 - b0 for b0, b1 in rows]
    along_k = [(c1 - c0) * (1 - j) + (d1 - d0) * j for (c0, c1), (d0, d1) in (near, far)]
    mix = [near_face * (1 - i) + far_face * i for near_face, far_face in (faces, along_j, along_k)]
    return mix[0], np.stack([faces[1] - faces[0], mix[1], mix[2]])


def _starts(fixed: Scan, moving: Scan, scaled: bool) -> list[np.ndarray]:
    """Where to begin: the headers as they are, centres of mass and of the boxes, turned and scaled."""
    scale = float(np.clip(moving.side / fixed.side, 0.5, 2.0))
    starts = [translation(on_lattice(fixed.shift - moving.shift, fixed.step / 256))]
    for size, degrees in itertools.product((1.0, scale) if scaled else (1.0,), itertools.product(DEGREES, repeat=3)):
        for centre, target in ((fixed.centre, moving.centre), (fixed.middle, moving.middle)):
            starts.append(_about(centre, size * _rotation(np.radians(degrees)), target - centre))
    return starts


def _descend(metric: Callable, motion: str, start: np.ndarray, fixed: Scan, mm: float) -> np.ndarray:
    """BFGS from `start`; parameters are in mm of mean shift, a step is at most 2 `mm` long, the value never rises."""
    size = {"rigid": 6, "similarity": 7, "affine": 12}[motion]

    def at(params: np.ndarray) -> np.ndarray:
        return start @ _moved(motion, params, fixed)

    def evaluate(params: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = metric(at(params))
        nudges = 1e-4 * np.eye(size)
        return value, np.array([(slope * (at(params + n) - at(params - n))[:3]).sum() / 2e-4 for n in nudges])

    params, inverse = np.zeros(size), None
    value, slope = evaluate(params)
    for _ in range(30):
        fresh = inverse is None
        step = -0.5 * mm * slope / max(np.linalg.norm(slope), 1e-30) if fresh else -inverse @ slope
        step *= min(1.0, 2 * mm / max(np.linalg.norm(step), 1e-30))
        new_value, new_slope = evaluate(params + step)
        while new_value > value + 1e-4 * step @ slope and np.linalg.norm(step) > 0.02 * mm:
            step *= 0.4
            new_value, new_slope = evaluate(params + step)
        if new_value >= value:
            if fresh:
                break
            inverse = None  # once more along the plain slope
            continue
        change, moved = new_slope - slope, step @ (new_slope - slope)
        params, value, slope = params + step, new_value, new_slope
        if np.linalg.norm(step) < 0.02 * mm:
            break
        if moved > 1e-12:
            inverse = np.eye(size) * moved / (change @ change) if fresh else inverse
            half = np.eye(size) - np.outer(step, change) / moved
            inverse = half @ inverse @ half.T + np.outer(step, step) / moved
    return at(params)


def _moved(motion: str, params: np.ndarray, fixed: Scan) -> np.ndarray:
    """Matrix of parameters in mm, about the centre of the fixed foreground; the identity at 0."""
    if motion == "affine":
        return _about(fixed.centre, np.eye(3) + params[:9].reshape(3, 3) / fixed.reach, params[9:])
    scale = np.exp(params[6] / fixed.reach) if motion == "similarity" else 1.0
    return _about(fixed.centre, scale * _rotation(params[:3] / fixed.reach), params[3:6])


def _about(centre: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, centre - linear @ centre + shift
    return matrix


def _rotation(radians: np.ndarray) -> np.ndarray:
    """Turn about the third axis, then the second, then the first."""
    (ci, cj, ck), (si, sj, sk) = np.cos(radians), np.sin(radians)
    about_i = np.array([[1, 0, 0], [0, ci, -si], [0, si, ci]])
    about_j = np.array([[cj, 0, sj], [0, 1, 0], [-sj, 0, cj]])
    about_k = np.array([[ck, -sk, 0], [sk, ck, 0], [0, 0, 1]])
    return about_i @ about_j @ about_k
