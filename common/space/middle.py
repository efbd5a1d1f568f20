"""The space in the middle of two scans: half of the matrix between them, and a grid that favours neither."""

import nibabel as nib
import numpy as np
from scipy.linalg import expm, logm, sqrtm

from common import InputError
from common.space.mapping import Grid


def mean_matrix(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """exp((log forward - log backward) / 2) of two 4x4 maps found in opposite directions; swapped, its inverse.

    Raises:
        InputError: half a turn or a mirror image lies between the scans.
    """
    return np.real(expm((_checked(logm, forward) - _checked(logm, backward)) / 2))


def half_matrix(matrix: np.ndarray) -> np.ndarray:
    """H with H H = matrix, 4x4, RAS mm: from the fixed space to the middle, and from there to the moving one.

    Raises:
        InputError: as of `mean_matrix`.
    """
    return np.real(_checked(sqrtm, matrix))


def _checked(function, matrix: np.ndarray) -> np.ndarray:
    found = function(np.asarray(matrix, np.float64))
    if not np.isfinite(found).all() or np.abs(np.imag(found)).max() > 1e-6:
        raise InputError("--midspace: half a turn or a mirror image lies between the scans, they have no middle")
    return found


def box_of(box: tuple[np.ndarray, np.ndarray] | None, size: tuple[int, int, int], affine_ras: np.ndarray) -> Grid:
    """The part of a grid from the first to the last voxel of a box, as a grid; None is all of it."""
    first, last = (np.zeros(3), np.array(size) - 1) if box is None else box
    return tuple(int(n) for n in last - first + 1), affine_ras @ nib.affines.from_matvec(np.eye(3), first)


def middle_grid(grids: tuple[Grid, Grid], to_middle: tuple[np.ndarray, np.ndarray]) -> Grid:
    """A grid in the middle space that covers both scans: axes along RAS, along each the geometric mean of the spacings.

    Args:
        grids: of the two scans, or of boxes in them.
        to_middle: the 4x4 map (RAS mm) of each into the middle.
    """
    corners, spacings = [], []
    for (size, affine), matrix in zip(grids, to_middle):
        ends = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1).T
        corners.append(nib.affines.apply_affine(matrix @ affine, ends))
        axes = np.argsort(nib.orientations.io_orientation(affine)[:, 0])  # which axis of the scan lies along R, A, S
        spacings.append(nib.affines.voxel_sizes(affine)[axes])
    low, high = np.concatenate(corners).min(0), np.concatenate(corners).max(0)
    spacing = np.sqrt(spacings[0] * spacings[1])
    size = np.ceil((high - low) / spacing - 1e-6).astype(int) + 1
    first = (low + high) / 2 - (size - 1) / 2 * spacing
    return tuple(int(n) for n in size), nib.affines.from_matvec(np.diag(spacing), first)
