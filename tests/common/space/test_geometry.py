"""Working grids: they cover the scan, keep a ramp a ramp, and smooth before they get coarser."""

import nibabel as nib
import numpy as np
import pytest
from grids import GRIDS, voxels_of

from common.space import geometry

ALL_GRIDS = [pytest.param(*pair[n], id=f"{name}-{n}") for name, pair in GRIDS.items() for n in (0, 1)]


@pytest.mark.parametrize("size, affine", ALL_GRIDS)
@pytest.mark.parametrize("spacing", [None, 2.0, 4.0, 5.0])
def test_working_grid_covers_the_scan_in_closest_ras(size, affine, spacing) -> None:
    count, onto = geometry.working_grid(size, affine, spacing)
    assert nib.aff2axcodes(onto) == ("R", "A", "S")
    order = nib.orientations.io_orientation(affine)[:, 0].argsort().astype(int)
    old = nib.affines.voxel_sizes(affine)[order]
    expected = old if spacing is None else np.full(3, spacing)
    np.testing.assert_allclose(nib.affines.voxel_sizes(onto), expected, rtol=1e-3)
    corners = nib.affines.apply_affine(affine, [np.array(c) * (np.array(size) - 1) for c in np.ndindex(2, 2, 2)])
    voxels = nib.affines.apply_affine(np.linalg.inv(onto), corners)
    assert (voxels > -1e-6).all() and (voxels < np.array(count) - 1 + 1e-6).all()
    slack = (np.array(count) - 1) * expected - (np.array(size)[order] - 1) * old
    assert (slack < expected + 1e-6).all(), "the grid is larger than it need be"
    for axis in np.flatnonzero(np.isclose(old, expected, rtol=1e-3)):
        assert count[axis] == size[order[axis]]
        np.testing.assert_allclose(voxels[:, axis], np.rint(voxels[:, axis]), atol=1e-6)


@pytest.mark.parametrize("spacing", [4.0, 6.0])
def test_ramp_stays_a_ramp(spacing: float) -> None:
    """Resampling, smoothed or not, leaves a linear function of space as it is; with a matrix it is f(M p)."""
    (size, affine), _ = GRIDS["oblique"]
    slope = np.array([0.7, -1.1, 0.4])

    def ramp(points: np.ndarray) -> np.ndarray:
        return points @ slope + 50

    scan = ramp(nib.affines.apply_affine(affine, voxels_of(size)))[None].astype(np.float32)
    matrix = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.02, -0.04), [3, -2, 1])
    onto_size, onto = geometry.working_grid(size, affine, spacing)
    inner = tuple(slice(n // 2 - 4, n // 2 + 5) for n in onto_size)
    for move in (None, matrix):
        found = geometry.to_working_grid(scan, affine, onto_size, onto, move)[0]
        target = nib.affines.apply_affine(onto, voxels_of(onto_size))
        expected = ramp(target if move is None else nib.affines.apply_affine(move, target))
        np.testing.assert_allclose(found[inner], expected[inner], atol=2e-2)


def test_a_rim_halfway_between_voxels_is_not_decided_by_rounding() -> None:
    """A skull-stripped scan whose edge lies just there, its origin rounded up or down as another file has it."""
    scan = np.zeros((1, 12, 12, 12), np.float32)
    scan[:, 3:9, 3:9, 3:9] = np.random.default_rng(0).uniform(50, 100, (6, 6, 6))
    size, onto = (24,) * 3, np.diag([0.5, 0.5, 0.5, 1])
    found = []
    for off in (0.0, 1e-6, -1e-6):
        affine = np.eye(4)
        affine[:3, 3] = off
        found.append(geometry.to_working_grid(scan, affine, size, onto))
    assert (found[0][0, 5:18, 10, 10] > 0).sum() == 11  # from voxel 3 to voxel 8: what is half outside is outside
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-2)


def test_coarser_grid_is_smoothed_and_labels_are_not() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 24, 24, 24)).astype(np.float32)
    size, onto = geometry.working_grid((24,) * 3, np.eye(4), 2.0)
    smoothed = geometry.to_working_grid(noise, np.eye(4), size, onto)
    assert smoothed[:, 2:-2, 2:-2, 2:-2].std() < 0.25
    label = (noise > 0).astype(np.float32) * 5
    assert set(np.unique(geometry.to_working_grid(label, np.eye(4), size, onto, nearest=True))) == {0, 5}
