"""Point maps from fixed to moving space: compose, invert, apply to scans and points. In numpy and torch alone.

A transform T takes a point of the fixed space to its place in the moving space, so that warped(x) = moving(T(x)). It is
a row of parts that a point goes through: affine maps, displacement fields, and whatever else ITK has read. Matrices,
grids and arrays are RAS mm, as everywhere here; points are LPS mm, as in files. Files: `transform_files`. Points are
mapped without torch, which takes seconds to load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from common import InputError, Later
from common.space.io import LPS_FROM_RAS

if TYPE_CHECKING:
    from torch import Tensor

torch, F, fields = Later("torch"), Later("torch.nn.functional"), Later("common.fields")
Grid = tuple[tuple[int, int, int], np.ndarray]  # size and affine_ras
CONVERGED_MM = 1e-3  # a point counts as inverted when its image is this close to the target
LARGEST = 2**31  # voxels of a grid that anybody could mean
SLAB = 2**18  # voxels worked on at a time, so that their coordinates stay in the cache of a CPU


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> M x."""

    matrix: np.ndarray  # (4, 4), RAS mm


@dataclass(frozen=True, eq=False)
class Field:
    """x -> x + u(x), u linear between the voxels of a grid, and 0 beyond half a voxel outside of it (as in ITK)."""

    disp: np.ndarray  # (3, I, J, K), in voxels of the grid
    affine_ras: np.ndarray


@dataclass(frozen=True, eq=False)
class Foreign:
    """A transform of another kind (B-spline, ...), as ITK has read it."""

    itk: object


@dataclass(frozen=True, eq=False)
class Transform:
    """What a point goes through, first to last."""

    parts: tuple[Affine | Field | Foreign, ...]

    @property
    def linear(self) -> bool:
        """Whether one matrix says it all."""
        return all(isinstance(part, Affine) for part in self.parts)


def affine_transform(matrix_ras: np.ndarray) -> Transform:
    """4x4 point map in RAS mm -> transform."""
    return Transform((Affine(np.asarray(matrix_ras, np.float64)),))


def displacement_transform(disp: np.ndarray, affine_ras: np.ndarray) -> Transform:
    """(3, I, J, K) displacement in voxels of the grid `affine_ras` -> transform."""
    return Transform((Field(np.asarray(disp), np.asarray(affine_ras, np.float64)),))


def parts(transform: Transform) -> list[Transform]:
    """The transforms that a point goes through, first to last, each with one part."""
    return [Transform((part,)) for part in transform.parts]


def compose(*transforms: Transform) -> Transform:
    """x -> last(...(first(x))): a point goes through the transforms in the order given."""
    return Transform(tuple(part for transform in transforms for part in transform.parts))


def matrix_of(transform: Transform) -> np.ndarray:
    """The 4x4 point map (RAS mm) of a linear transform."""
    matrix = np.eye(4)
    for part in transform.parts:
        if not isinstance(part, Affine):
            raise ValueError(f"matrix_of() 'transform' must be linear, got a {type(part).__name__}")
        matrix = part.matrix @ matrix
    return matrix


def field_of(transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Displacement (3, I, J, K) in voxels of its grid and `affine_ras` of that grid, of a transform that is one field.

    Raises:
        ValueError: it is not.
    """
    if len(transform.parts) != 1 or not isinstance(transform.parts[0], Field):
        raise ValueError(f"field_of() 'transform' must be one displacement field, got {len(transform.parts)} parts")
    return transform.parts[0].disp, transform.parts[0].affine_ras


def split(transform: Transform) -> tuple[np.ndarray, Transform | None]:
    """A transform as what comes last, a 4x4 matrix (RAS mm), and what a point meets before; None for nothing."""
    count = len(transform.parts)
    while count and isinstance(transform.parts[count - 1], Affine):
        count -= 1
    return matrix_of(Transform(transform.parts[count:])), Transform(transform.parts[:count]) if count else None


def deforms(transform: Transform) -> bool:
    """Whether any part is more than a matrix."""
    return not transform.linear


def reach(transform: Transform, size: tuple[int, int, int], affine_ras: np.ndarray) -> float:
    """Share of a grid's voxels, of some 30,000 at most, that come to lie in one of the transform's displacement fields:
    elsewhere these change nothing. 1 without any."""
    steps = [np.linspace(0, n - 1, min(n, 32)) for n in size]
    voxels = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 3)
    points, shares = nib.affines.apply_affine(LPS_FROM_RAS @ affine_ras, voxels), []
    for part in transform.parts:
        if isinstance(part, Field):
            there = nib.affines.apply_affine(np.linalg.inv(LPS_FROM_RAS @ part.affine_ras), points)
            shares.append(float(((there > -0.5) & (there < np.array(part.disp.shape[1:]) - 0.5)).all(1).mean()))
        points = map_points(Transform((part,)), points)
    return max(shares, default=1.0)


# ---- points ---------------------------------------------------------------------------------------------------------


def map_points(transform: Transform, points_lps: np.ndarray) -> np.ndarray:
    """T(x) of points (N, 3) in LPS mm: from fixed to moving space for the transform of a registration. In float64."""
    flip = np.diag(LPS_FROM_RAS)[:3]
    points = np.asarray(points_lps, np.float64).reshape(-1, 3) * flip
    for part in transform.parts:
        if isinstance(part, Affine):
            points = nib.affines.apply_affine(part.matrix, points)
        elif isinstance(part, Field):
            voxels = nib.affines.apply_affine(np.linalg.inv(part.affine_ras), points)
            points = nib.affines.apply_affine(part.affine_ras, voxels + _interpolated(part.disp, voxels))
        else:
            there = [part.itk.TransformPoint(point) for point in (points * flip).tolist()]
            points = np.array(there).reshape(-1, 3) * flip
    return points * flip


def _interpolated(disp: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Displacement (3, I, J, K) at voxels (N, 3), linear; 0 beyond half a voxel outside."""
    size = np.array(disp.shape[1:])
    inside = ((voxels >= -0.5) & (voxels < size - 0.5)).all(1)
    at = np.clip(voxels[inside], 0, size - 1)
    low = np.minimum(at.astype(np.int64), np.maximum(size - 2, 0))
    share, high = at - low, np.minimum(low + 1, size - 1)
    total = np.zeros((len(at), 3))
    for corner in np.ndindex(2, 2, 2):
        i, j, k = np.where(corner, high, low).T
        total += np.where(corner, share, 1 - share).prod(1)[:, None] * disp[:, i, j, k].T
    found = np.zeros_like(voxels)
    found[inside] = total
    return found


# ---- scans ----------------------------------------------------------------------------------------------------------


def resample(
    array: np.ndarray,
    affine_ras: np.ndarray,
    size: tuple[int, int, int],
    onto_ras: np.ndarray,
    transform: Transform | None = None,
    *,
    nearest: bool = False,
    voted: bool = False,
    outside: float = 0.0,
) -> np.ndarray:
    """Values of a scan at transform(x) for every voxel x of another grid. One interpolation.

    Args:
        array: (I, J, K) scan on the grid `affine_ras`; where it is linear also (C, I, J, K), all at once.
        size, onto_ras: the grid to fill.
        transform: point map from the new grid's space to the scan's; None is the identity.
        nearest: nearest neighbour, for labels, whose type is kept; else linear.
        voted: for labels too: of the labels at the eight corners, the one whose linear weights have the largest sum,
            argmax_l sum_c w_c [label_c = l]. That is each label interpolated linearly, and the largest taken.
        outside: value where the scan does not reach: beyond half a voxel outside of it, as in ITK.

    Returns:
        ([C,] I', J', K') float32, or with `nearest` or `voted` in the type of `array`.
    """
    size = _size(size)
    source = torch.from_numpy(np.ascontiguousarray(array, dtype=None if nearest or voted else np.float32))
    out = torch.empty(source.shape[:-3] + size, dtype=source.dtype)
    to_voxel = np.linalg.inv(affine_ras)
    if size == source.shape[-3:] and (transform is None or transform.linear):
        matrix = np.eye(4) if transform is None else matrix_of(transform)
        if np.allclose(to_voxel @ matrix @ onto_ras, np.eye(4), rtol=0, atol=1e-6):
            return source.numpy().copy()  # the same grid: every bit is kept
    for rows, coords, frame in _places(transform, size, onto_ras):
        voxels = _moved(to_voxel @ frame, coords)
        out[..., rows, :, :] = (_nearest if nearest else _voted if voted else _linear)(source, voxels, outside)
    return out.numpy()


def _size(size: tuple[int, ...]) -> tuple[int, ...]:
    """As integers of Python; refused where no machine holds such a grid."""
    size = tuple(int(n) for n in size)
    if math.prod(size) > LARGEST:
        raise InputError(f"a grid of {' x '.join(map(str, size))} voxels is too large")
    return size


def displacement_mm(transform: Transform, size: tuple[int, int, int], affine_ras: np.ndarray) -> np.ndarray:
    """The whole point map as vectors transform(x) - x (LPS mm) on a grid, (3, I, J, K) float32: ANTs' warp."""
    size = _size(size)
    found = torch.empty((3, *size), dtype=torch.float32)
    for rows, coords, frame in _places(transform, size, affine_ras):
        start = _lattice(size, rows)
        if isinstance(coords, torch.Tensor):
            there = _moved(LPS_FROM_RAS @ frame, coords)
            found[:, rows] = there - _moved(LPS_FROM_RAS @ affine_ras, start)
        else:  # linear: one matrix, whose difference is exact
            found[:, rows] = _moved(LPS_FROM_RAS @ (frame - affine_ras), start)
    return found.numpy()


def disp_of(transform: Transform, size: tuple[int, int, int], affine_ras: np.ndarray) -> np.ndarray:
    """Any point map as displacement (3, I, J, K) in voxels of a grid."""
    linear = np.linalg.inv((LPS_FROM_RAS @ affine_ras)[:3, :3])
    return np.einsum("ab,bijk->aijk", linear, displacement_mm(transform, size, affine_ras))


Lattice = tuple[np.ndarray, np.ndarray, np.ndarray]  # voxel numbers along each axis: of all voxels between them


def _lattice(size: tuple[int, int, int], rows: slice) -> Lattice:
    return np.arange(rows.start, rows.stop, dtype=np.float64), *(np.arange(n, dtype=np.float64) for n in size[1:])


def _places(
    transform: Transform | None, size: tuple[int, int, int], onto_ras: np.ndarray
) -> Iterator[tuple[slice, Tensor | Lattice, np.ndarray]]:
    """Where transform takes the voxels of a grid, slab by slab: rows, coordinates, and a matrix to RAS mm for them.

    Coordinates are (3, rows, J, K) float32, or the voxel numbers themselves as long as all parts are linear: then the
    matrix holds everything. Matrices are multiplied before they meet a coordinate, so that float32 only ever holds
    voxel numbers of one grid: a few 1e-5 of a voxel.
    """
    chain = () if transform is None else transform.parts
    if any(isinstance(part, Foreign) for part in chain):
        from common.space.itk_maps import field_on  # of ITK: seconds to load

        chain = (field_on(transform, size, onto_ras),)
    step = max(SLAB // (size[1] * size[2]), 1)
    for begin in range(0, size[0], step):
        rows = slice(begin, min(begin + step, size[0]))
        coords, frame = _lattice(size, rows), onto_ras
        for part in chain:
            if isinstance(part, Affine):
                frame = part.matrix @ frame
                continue
            to_own, own = np.linalg.inv(part.affine_ras) @ frame, part.disp.shape[1:] == size
            own = own and not isinstance(coords, torch.Tensor) and np.allclose(to_own, np.eye(4), rtol=0, atol=1e-6)
            coords = _moved(to_own, coords)
            moved = torch.from_numpy(part.disp[:, rows]).float() if own else _displaced(part.disp, coords)
            coords, frame = coords + moved, part.affine_ras
        yield rows, coords, frame


def _moved(matrix: np.ndarray, coords: Tensor | Lattice) -> Tensor:
    """The 4x4 map of coordinates: (3, I, J, K) float32."""
    if isinstance(coords, torch.Tensor):
        linear = torch.from_numpy(matrix[:3, :3]).float()
        shift = torch.from_numpy(matrix[:3, 3]).float().view(3, 1, 1, 1)
        return torch.einsum("ab,bijk->aijk", linear, coords) + shift
    i, j, k = (torch.from_numpy(matrix[:3, axis, None] * numbers) for axis, numbers in enumerate(coords))
    plane = (j[:, :, None] + k[:, None, :] + torch.from_numpy(matrix[:3, 3]).view(3, 1, 1)).float()
    return i.float()[:, :, None, None] + plane[:, None]


def _inside(voxels: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Where (3, ...) voxels are within half a voxel of a grid."""
    inside = [(v >= -0.5) & (v < n - 0.5) for v, n in zip(voxels, size)]
    return inside[0] & inside[1] & inside[2]


def _grid_sample(values: Tensor, voxels: Tensor) -> Tensor:
    """Values (C, I, J, K) at voxels (3, i, j, k): (C, i, j, k), linear, the border repeated outside."""
    scale = voxels.new_tensor([2 / max(n - 1, 1) for n in values.shape[1:]]).view(3, 1, 1, 1)
    unit = (voxels * scale - 1).flip(0).permute(1, 2, 3, 0)  # grid_sample has the last axis first
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    return F.grid_sample(values[None], unit[None], **options)[0]


def _displaced(disp: np.ndarray, voxels: Tensor) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(disp, dtype=np.float32))
    return _grid_sample(values, voxels) * _inside(voxels, values.shape[1:])


def _linear(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    size = source.shape[-3:]
    found = _grid_sample(source.view(-1, *size), voxels).masked_fill_(~_inside(voxels, size), outside)
    return found.view(source.shape[:-3] + found.shape[1:])


def _nearest(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    """Halves go up, as in ITK."""
    inside = _inside(voxels, source.shape)
    index = torch.zeros(voxels.shape[1:], dtype=torch.int64)
    for v, n in zip(voxels, source.shape):
        index.mul_(n).add_((v + 0.5).floor_().long().clamp_(0, n - 1))
    return source.flatten()[index].masked_fill_(~inside, outside)


def _voted(source: Tensor, voxels: Tensor, outside: float) -> Tensor:
    labels, weights = [], []
    at = [v.clamp(0, n - 1) for v, n in zip(voxels, source.shape)]
    low = [v.floor().long().clamp(0, max(n - 2, 0)) for v, n in zip(at, source.shape)]
    share = [v - first for v, first in zip(at, low)]
    for corner in np.ndindex(2, 2, 2):
        i, j, k = ((first + step).clamp(max=n - 1) for first, step, n in zip(low, corner, source.shape))
        labels.append(source[i, j, k])
        parts = [x if step else 1 - x for x, step in zip(share, corner)]
        weights.append(parts[0] * parts[1] * parts[2])
    best, found = torch.full_like(weights[0], -1), labels[0]
    for label in labels:
        votes = sum(weight * (other == label) for weight, other in zip(weights, labels))
        found, best = torch.where(votes > best, label, found), torch.maximum(votes, best)
    return found.masked_fill(~_inside(voxels, source.shape), outside)


# ---- inverses -------------------------------------------------------------------------------------------------------


def invert(transform: Transform, *, iterations: int = 60) -> Transform:
    """T^-1, part by part in reverse order: matrices exactly, displacement fields on a grid.

    A field y = x + u(x) is written as y = A(x + w(x)), A the affine map nearest to it, so that w has no large common
    motion; then T^-1 = (x + w)^-1 after A^-1, with (x + w)^-1 by `fields.invert` on the grid of u, widened by the
    largest w: points that leave the grid find back.

    Args:
        iterations: cap for the fixed point of each field.

    Raises:
        InputError: a part that is neither linear nor a displacement field, or a singular matrix.
    """
    backwards = []
    for part in reversed(transform.parts):
        if isinstance(part, Affine):
            backwards.append(affine_transform(_inverse_matrix(part.matrix)))
        elif isinstance(part, Field):
            backwards += _invert_field(part.disp, part.affine_ras, iterations)
        else:
            name = part.itk.GetNameOfClass()
            raise InputError(f"{name}: only affine maps and displacement fields can be inverted; turn it into a field")
    return compose(*backwards)


def _inverse_matrix(matrix: np.ndarray) -> np.ndarray:
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
        raise InputError(f"a matrix with determinant {np.linalg.det(matrix[:3, :3]):.1e} has no inverse")
    return np.linalg.inv(matrix)


def _invert_field(disp: np.ndarray, affine_ras: np.ndarray, iterations: int) -> list[Transform]:
    """Inverse of the affine map nearest to x + disp(x), then of the rest."""
    size = disp.shape[1:]
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in size], indexing="ij"))
    step = max(int((np.prod(size) / 20000) ** (1 / 3)), 1)
    some = (slice(None), *[slice(None, None, step)] * 3)
    x = np.append(grid[some].reshape(3, -1), np.ones((1, grid[some][0].size)), 0)
    near = np.eye(4)
    near[:3] = np.linalg.lstsq(x.T, (grid + disp)[some].reshape(3, -1).T, rcond=None)[0].T
    back = _inverse_matrix(near)
    rest = np.einsum("ab,bijk->aijk", back[:3, :3], grid + disp) + back[:3, 3, None, None, None] - grid
    wide = [min(int(np.ceil(np.abs(component).max())) + 1, n) for component, n in zip(rest, size)]
    padded = np.pad(rest, [(0, 0), *[(n, n) for n in wide]], mode="edge")
    inverse = fields.invert(torch.from_numpy(padded).float()[None], iterations=iterations)[0].numpy()
    shifted = np.eye(4)
    shifted[:3, 3] = [-n for n in wide]
    world = affine_ras @ back @ np.linalg.inv(affine_ras)
    return [affine_transform(world), displacement_transform(inverse, affine_ras @ shifted)]


def inverse_error_mm(
    transform: Transform, inverse: Transform, size: tuple[int, int, int], affine_ras: np.ndarray
) -> np.ndarray:
    """|T^-1(T(x)) - x| in mm at every voxel of a grid: (I, J, K)."""
    return np.linalg.norm(displacement_mm(compose(transform, inverse), size, affine_ras), axis=0)


def invert_at(transform: Transform, points_lps: np.ndarray, *, iterations: int = 50) -> np.ndarray:
    """The x with T(x) = y for points y (N, 3) in LPS mm, by Newton's method with numerical slopes and damped steps.

    Starts from the inverse of the linear parts alone. Exact where T is invertible, up to CONVERGED_MM; nan where no
    such x is found, as beyond a fold.
    """
    target = np.asarray(points_lps, np.float64).reshape(-1, 3)
    linear = Transform(tuple(part for part in transform.parts if isinstance(part, Affine)))
    x = map_points(affine_transform(_inverse_matrix(matrix_of(linear))), target)
    error = target - map_points(transform, x)
    going = np.linalg.norm(error, axis=1) >= CONVERGED_MM
    found = np.where(going[:, None], np.nan, x)
    for _ in range(iterations):
        which = np.flatnonzero(going)
        if not len(which):
            break
        step = _newton_step(transform, x[which], error[which])
        size = np.linalg.norm(error[which], axis=1)
        left = np.arange(len(which))  # those that no share of the step has improved yet
        for share in (1.0, 0.5, 0.25, 0.1, 0.02):
            trial = x[which[left]] + share * step[left]
            new = target[which[left]] - map_points(transform, trial)
            better = np.linalg.norm(new, axis=1) < size[left]
            chosen = which[left[better]]
            x[chosen], error[chosen] = trial[better], new[better]
            left = left[~better]
            if not len(left):
                break
        going[which[left]] = False
        done = which[np.linalg.norm(error[which], axis=1) < CONVERGED_MM]
        found[done], going[done] = x[done], False
    return found


def _newton_step(transform: Transform, x: np.ndarray, error: np.ndarray) -> np.ndarray:
    """(N, 3): the pseudo-inverse of the slopes of T, by differences over 0.05 mm, times the error."""
    nudged = map_points(transform, (x[:, None] + 0.05 * np.vstack([np.zeros(3), np.eye(3)])).reshape(-1, 3))
    nudged = nudged.reshape(-1, 4, 3)
    slope = ((nudged[:, 1:] - nudged[:, :1]) / 0.05).transpose(0, 2, 1)
    return np.einsum("nab,nb->na", np.linalg.pinv(slope, rcond=1e-3), error)
