"""The space in the middle of two scans: swapping them leaves it where it is."""

import nibabel as nib
import numpy as np
import pytest

from common import InputError
from common.space.middle import box_of, half_matrix, mean_matrix, middle_grid


def turned(x: float, y: float, z: float, shift: tuple[float, float, float], scale: float = 1.0) -> np.ndarray:
    return nib.affines.from_matvec(scale * nib.eulerangles.euler2mat(z, y, x), shift)


FORWARD = turned(0.3, -0.2, 0.5, (20, -7, 3), 1.1)


def test_half_of_a_matrix() -> None:
    half = half_matrix(FORWARD)
    np.testing.assert_allclose(half @ half, FORWARD, atol=1e-9)
    quarter = turned(0, 0, np.pi / 4, (0, 0, 0))
    np.testing.assert_allclose(half_matrix(turned(0, 0, np.pi / 2, (0, 0, 0))), quarter, atol=1e-9)


def test_mean_of_two_directions() -> None:
    backward = np.linalg.inv(FORWARD) @ turned(0.02, 0.01, -0.03, (0.5, 0.2, -0.4))
    mean = mean_matrix(FORWARD, backward)
    np.testing.assert_allclose(mean_matrix(backward, FORWARD), np.linalg.inv(mean), atol=1e-9)
    np.testing.assert_allclose(mean_matrix(FORWARD, np.linalg.inv(FORWARD)), FORWARD, atol=1e-9)
    assert np.abs(mean - FORWARD)[:3, 3].max() < 0.6 and np.abs(mean - FORWARD).max() > 0.05


@pytest.mark.parametrize("matrix", [np.diag([-1.0, 1, 1, 1]), turned(0, 0, np.pi, (1, 2, 3))], ids=["mirror", "turn"])
def test_no_middle(matrix: np.ndarray) -> None:
    with pytest.raises(InputError, match="--midspace: half a turn or a mirror image lies between the scans"):
        half_matrix(matrix)


def test_grid_covers_both_and_favours_neither() -> None:
    half = half_matrix(FORWARD)
    fixed = (30, 40, 20), nib.affines.from_matvec(np.diag([2.0, 1.0, 3.0]), (-10, 5, 0))
    moving = (25, 30, 35), turned(0.1, 0.1, 0, (4, 4, 4)) @ np.diag([-1.0, 2.0, 1.0, 1.0])
    ways = half, np.linalg.inv(half)
    size, onto = middle_grid((fixed, moving), ways)
    other_size, other = middle_grid((moving, fixed), ways[::-1])
    assert size == other_size
    np.testing.assert_allclose(onto, other, atol=1e-9)
    np.testing.assert_allclose(onto[:3, :3], np.diag([np.sqrt(2), np.sqrt(2), np.sqrt(3)]), atol=1e-9)
    for (shape, affine), matrix in zip((fixed, moving), ways):
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
        voxels = nib.affines.apply_affine(np.linalg.inv(onto) @ matrix @ affine, corners)
        assert voxels.min() > -0.51 and (voxels < np.array(size) - 0.49).all()


def test_box_is_a_grid() -> None:
    size, affine = box_of((np.array([2, 3, 4]), np.array([5, 9, 4])), (10, 10, 10), FORWARD)
    assert size == (4, 7, 1)
    np.testing.assert_allclose(affine @ [0, 0, 0, 1], FORWARD @ [2, 3, 4, 1])
    assert box_of(None, (10, 11, 12), FORWARD)[0] == (10, 11, 12)
