"""The space in the middle of two scans: half of the matrix between them, and a grid that favours neither."""

import warnings

import nibabel as nib
import numpy as np
from scipy.linalg import expm, logm

from common import InputError
from common.space.mapping import Grid


def ways_from_middle(forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the middle to the moving space and to the fixed one, of two 4x4 maps (RAS mm) found in opposite directions.

    H = exp((log forward - log backward) / 4) and H^-1; H H is their mean. Swapped, they change places to the last bit.

    Args:
        forward: from the fixed to the moving space.
        backward: from the moving to the fixed space.

    Raises:
        InputError: half a turn or a mirror image lies between the scans.
    """
    quarter = (_log(forward) - _log(backward)) / 4
    return expm(quarter), expm(-quarter)


def _log(matrix: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a matrix that has none, which is refused here
        found = logm(np.asarray(matrix, np.float64))
    if not np.isfinite(found).all() or np.abs(np.imag(found)).max() > 1e-6:
        raise InputError("--midspace: half a turn or a mirror image lies between the scans, they have no middle")
    return np.real(found)


def box_of(box: tuple[np.ndarray, np.ndarray] | None, size: tuple[int, int, int], affine_ras: np.ndarray) -> Grid:
    """The part of a grid from the first to the last voxel of a box, as a grid; None is all of it."""
    first, last = (np.zeros(3), np.array(size) - 1) if box is None else box
    return tuple(int(n) for n in last - first + 1), affine_ras @ nib.affines.from_matvec(np.eye(3), first)


def middle_grid(grids: tuple[Grid, Grid], from_middle: tuple[np.ndarray, np.ndarray]) -> Grid:
    """A grid in the middle space that covers both scans: axes along RAS, along each the geometric mean of the spacings.

    Args:
        grids: of the two scans, or of boxes in them.
        from_middle: the 4x4 map (RAS mm) from the middle into the space of each.
    """
    lows, highs, spacings = [], [], []
    for (size, affine), matrix in zip(grids, from_middle):
        ends = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1).T
        corners = nib.affines.apply_affine(np.linalg.inv(matrix) @ affine, ends)
        lows.append(corners.min(0))
        highs.append(corners.max(0))
        axes = np.argsort(nib.orientations.io_orientation(affine)[:, 0])  # which axis of the scan lies along R, A, S
        spacings.append(nib.affines.voxel_sizes(affine)[axes])
    low, high = np.minimum(*lows), np.maximum(*highs)
    spacing = np.sqrt(spacings[0] * spacings[1])
    size = np.ceil((high - low) / spacing - 1e-6).astype(int) + 1
    first = (low + high) / 2 - (size - 1) / 2 * spacing
    return tuple(int(n) for n in size), nib.affines.from_matvec(np.diag(spacing), first)
