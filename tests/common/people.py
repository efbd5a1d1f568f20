"""Small synthetic people for the tests of the hosts: scans with labels on grids of their own."""

from pathlib import Path

import nibabel as nib
import numpy as np

from common import phantom
from common.space import io

SPACING = 8.0  # mm of the networks' grid in these tests: little work


def write_person(folder: Path, name: str, seed: int) -> Path:
    """FOLDER/NAME.nii.gz, a person on an oblique grid, and its label map FOLDER/labels/final/NAME.nii.gz."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(34, 44, 3))
    linear = nib.eulerangles.euler2mat(*rng.uniform(-0.2, 0.2, 3)) @ np.diag([-5.0, 4.5, 5])
    affine = nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))
    scan, label = phantom.sample(size, affine, phantom.Deformation(seed, amplitude=8), seed=seed)
    (folder / "labels" / "final").mkdir(parents=True, exist_ok=True)
    io.write_scan(scan, affine, folder / f"{name}.nii.gz")
    io.write_label(label, affine, label_of(folder, name))
    return folder / f"{name}.nii.gz"


def label_of(folder: Path, name: str, tag: str = "final") -> Path:
    return folder / "labels" / tag / f"{name}.nii.gz"
