"""Pairs of grids around the phantom brain: oblique, flipped, anisotropic, of different sizes."""

from pathlib import Path

import nibabel as nib
import numpy as np

from common import phantom
from common.space import io
from common.space.points import Points, write_points

Grid = tuple[tuple[int, int, int], np.ndarray]


def grid(size: tuple[int, int, int], columns: np.ndarray, angles: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    """A grid around the brain: `columns` are the voxel steps in mm, turned by `angles`."""
    linear = nib.eulerangles.euler2mat(*angles) @ np.asarray(columns, dtype=float)
    centre = linear @ ((np.array(size) - 1) / 2)
    return size, nib.affines.from_matvec(linear, np.array([3.0, -4.0, 2.0]) - centre)


PLAIN = grid((40, 46, 38), np.diag([4, 4, 4]))
PERMUTED = [[0, 4, 0], [0, 0, -4], [-4, 0, 0]]  # i runs down, j to the right, k to the back
GRIDS = {
    "oblique": (grid((46, 52, 44), np.diag([4, 4, 4]), (0.35, -0.25, 0.2)), PLAIN),
    "flipped and permuted": (grid((42, 44, 50), PERMUTED), grid((40, 46, 38), np.diag([-4, -4, 4]))),
    "anisotropic": (grid((60, 44, 30), np.diag([2.7, 4, 6])), grid((44, 60, 30), np.diag([4, 3, 5.2]))),
    "fixed oblique, sizes differ": (
        grid((58, 49, 41), np.diag([-3, 4, 4.2]), (0.0, 0.15, -0.3)),
        grid((47, 40, 53), np.array(PERMUTED) * [0.9, 1.0, 1.1], (-0.2, 0.3, 0.1)),
    ),
}


def voxels_of(size: tuple[int, ...]) -> np.ndarray:
    """Indices (I, J, K, 3) of a grid."""
    return np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)


def write_pair(folder: Path, moving: Grid, fixed: Grid) -> dict[str, Path]:
    """Phantom files on two grids."""
    paths = {"moving": folder / "moving.nii.gz", "fixed": folder / "fixed.nii.gz"}
    for seed, (role, (size, affine), deformation) in enumerate(
        (("fixed", fixed, None), ("moving", moving, phantom.Deformation(0)))
    ):
        image, label = phantom.sample(size, affine, deformation, seed=seed)
        paths[f"{role}_label"] = folder / f"{role}_label.nii.gz"
        io.write_scan(image, affine, paths[role])
        io.write_label(label, affine, paths[f"{role}_label"])
        paths[f"{role}_points"] = folder / f"{role}.csv"
        marks = np.array(list(phantom.LANDMARKS.values()))
        marks = marks if deformation is None else deformation.truth(marks)
        write_points(Points(marks * [-1, -1, 1], list(phantom.LANDMARKS)), paths[f"{role}_points"])
    return paths
