"""The space in the middle of two scans: swapping them leaves it where it is."""

import nibabel as nib
import numpy as np
import pytest

from common import InputError
from common.space.middle import box_of, middle_grid, ways_from_middle


def turned(x: float, y: float, z: float, shift: tuple[float, float, float], scale: float = 1.0) -> np.ndarray:
    return nib.affines.from_matvec(scale * nib.eulerangles.euler2mat(z, y, x), shift)


FORWARD = turned(0.3, -0.2, 0.5, (20, -7, 3), 1.1)


def test_half_of_a_matrix() -> None:
    half, back = ways_from_middle(FORWARD, np.linalg.inv(FORWARD))
    np.testing.assert_allclose(half @ half, FORWARD, atol=1e-9)
    np.testing.assert_allclose(half @ back, np.eye(4), atol=1e-9)
    whole, quarter = turned(0, 0, np.pi / 2, (0, 0, 0)), turned(0, 0, np.pi / 4, (0, 0, 0))
    np.testing.assert_allclose(ways_from_middle(whole, np.linalg.inv(whole))[0], quarter, atol=1e-9)


def test_mean_of_two_directions() -> None:
    """That do not agree; swapped, the two ways change places to the bit."""
    backward = np.linalg.inv(FORWARD) @ turned(0.02, 0.01, -0.03, (0.5, 0.2, -0.4))
    to_moving, to_fixed = ways_from_middle(FORWARD, backward)
    other = ways_from_middle(backward, FORWARD)
    assert np.array_equal(to_moving, other[1]) and np.array_equal(to_fixed, other[0])
    apart = to_moving @ to_moving - FORWARD
    assert np.abs(apart[:3, 3]).max() < 0.6 and np.abs(apart).max() > 0.05


@pytest.mark.parametrize("matrix", [np.diag([-1.0, 1, 1, 1]), turned(0, 0, np.pi, (1, 2, 3))], ids=["mirror", "turn"])
def test_no_middle(matrix: np.ndarray) -> None:
    with pytest.raises(InputError, match="--midspace: half a turn or a mirror image lies between the scans"):
        ways_from_middle(matrix, np.linalg.inv(matrix))


def test_grid_covers_both_and_favours_neither() -> None:
    ways = ways_from_middle(FORWARD, np.linalg.inv(FORWARD))
    fixed = (30, 40, 20), nib.affines.from_matvec(np.diag([2.0, 1.0, 3.0]), (-10, 5, 0))
    moving = (25, 30, 35), turned(0.1, 0.1, 0, (4, 4, 4)) @ np.diag([-1.0, 2.0, 1.0, 1.0])
    size, onto = middle_grid((moving, fixed), ways)
    other_size, other = middle_grid((fixed, moving), ways[::-1])
    assert size == other_size and np.array_equal(onto, other)
    np.testing.assert_allclose(onto[:3, :3], np.diag([np.sqrt(2), np.sqrt(2), np.sqrt(3)]), atol=1e-9)
    for (shape, affine), matrix in zip((moving, fixed), ways):
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
        voxels = nib.affines.apply_affine(np.linalg.inv(matrix @ onto) @ affine, corners)
        assert voxels.min() > -0.51 and (voxels < np.array(size) - 0.49).all()


def test_box_is_a_grid() -> None:
    size, affine = box_of((np.array([2, 3, 4]), np.array([5, 9, 4])), (10, 10, 10), FORWARD)
    assert size == (4, 7, 1)
    np.testing.assert_allclose(affine @ [0, 0, 0, 1], FORWARD @ [2, 3, 4, 1])
    assert box_of(None, (10, 11, 12), FORWARD)[0] == (10, 11, 12)
