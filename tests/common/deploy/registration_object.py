"""What others than this package say of a DICOM registration object: the standard's formula, and dciodvfy."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy.ndimage import map_coordinates

needs_dciodvfy = pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (dicom3tools) is not installed")


def by_the_standard(path: Path, points: np.ndarray) -> np.ndarray:
    """PS3.3 C.20.3 with pydicom and SciPy alone: x -> post (x + offset(x)), offsets with the grid's x index fastest."""
    (item,) = [
        i for i in pydicom.dcmread(path).DeformableRegistrationSequence if "DeformableRegistrationGridSequence" in i
    ]
    assert "PreDeformationMatrixRegistrationSequence" not in item
    grid = item.DeformableRegistrationGridSequence[0]
    across, down = np.array(grid.ImageOrientationPatient, float).reshape(2, 3)
    steps = np.array([across, down, np.cross(across, down)]) @ (points - np.array(grid.ImagePositionPatient, float)).T
    x, y, z = steps / np.array(grid.GridResolution, float)[:, None]
    columns, rows, planes = grid.GridDimensions
    offsets = np.frombuffer(grid.VectorGridData, "<f4").reshape(planes, rows, columns, 3)
    moved = points + np.stack([map_coordinates(offsets[..., c], [z, y, x], order=1) for c in range(3)], axis=1)
    post = item.PostDeformationMatrixRegistrationSequence[0].FrameOfReferenceTransformationMatrix
    return (np.c_[moved, np.ones(len(moved))] @ np.array(post, float).reshape(4, 4).T)[:, :3]


def errors_of_dciodvfy(path: Path) -> list[str]:
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    told = (done.stdout + done.stderr).splitlines()
    assert "DeformableSpatialRegistration" in told, told
    return [line for line in told if line.startswith("Error")]
