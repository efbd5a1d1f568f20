"""The phantom: its truth is the truth, both scans show the same anatomy, the same call gives the same files."""


import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from common import phantom
from common.ops import warp

FIXED = ((32, 40, 30), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-62, -78, -58]))


@pytest.fixture(scope="module")
def brain_points() -> np.ndarray:
    points = np.random.default_rng(0).uniform(-1, 1, (3000, 3)) * phantom.RADII
    return points[phantom.anatomy(points)[1] > 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_truth_inverts_back(brain_points: np.ndarray, seed: int) -> None:
    deformation = phantom.Deformation(seed)
    np.testing.assert_allclose(deformation.back(deformation.truth(brain_points)), brain_points, atol=1e-6)
    moved = deformation.truth(brain_points)
    np.testing.assert_allclose(deformation.truth(deformation.back(moved)), moved, atol=1e-6)
    assert np.linalg.norm(moved - brain_points, axis=1).mean() > 5, "the truth moves nothing"


def test_deformation_does_not_fold(brain_points: np.ndarray) -> None:
    deformation = phantom.Deformation(0)
    step = 1e-3 * np.eye(3)
    columns = [(deformation.truth(brain_points + e) - deformation.truth(brain_points - e)) / 2e-3 for e in step]
    assert np.linalg.det(np.stack(columns, -1)).min() > 0.3


def test_fixed_scan_is_the_moving_scan_at_the_truth() -> None:
    """fixed(x) = moving(T(x)): a moving scan on a fine grid around T(x) holds the same values and labels."""
    deformation = phantom.Deformation(3)
    size, affine = FIXED
    image, label = phantom.sample(size, affine, noise=0)
    target = nib.affines.from_matvec(np.diag([2.0, 2, 2]), [-95, -110, -95])
    moving, moving_label = phantom.sample((96, 112, 96), target, deformation, noise=0)
    index = np.argwhere(label > 0)
    points = nib.affines.apply_affine(affine, index)

    def at(places: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.rint(nib.affines.apply_affine(np.linalg.inv(target), places)).astype(int).T)

    there = at(deformation.truth(points))
    fixed_values, found = image[tuple(index.T)], moving[there]
    # The voxel is up to 1.7 mm off and the two average over different cubes: edges differ, interiors do not.
    assert np.median(np.abs(fixed_values - found)) < 20
    assert np.corrcoef(fixed_values, found)[0, 1] > 0.8
    assert (label[tuple(index.T)] == moving_label[there]).mean() > 0.8
    assert np.corrcoef(fixed_values, moving[at(points)])[0, 1] < 0.4, "the truth makes no difference"


def test_noise_is_small_and_inside_only() -> None:
    size, affine = FIXED
    clean, noisy = (phantom.sample(size, affine, noise=noise)[0] for noise in (0, 0.02))
    assert not noisy[clean == 0].any() and (noisy[clean > 0] > 0).all()
    assert 15 < (noisy - clean)[(clean > 100) & (clean < 900)].std() < 25
    assert noisy.dtype == np.float32 and 0 <= noisy.min() and noisy.max() <= 1000


def test_every_label_is_there_on_both_grids() -> None:
    size, affine = FIXED
    for deformation in (None, phantom.Deformation(0)):
        image, label = phantom.sample(size, affine, deformation)
        assert label.dtype == np.uint8 and set(np.unique(label)) == {0, *phantom.LABELS}
        counts = np.bincount(label.ravel())
        assert counts[1:].min() > 15, f"a label of {counts[1:].min()} voxels cannot be measured"
    assert set(phantom.INTENSITY) == set(phantom.LABELS)


def test_same_seed_same_phantom() -> None:
    size, affine = FIXED
    first, again, other = (phantom.sample(size, affine, phantom.Deformation(s), seed=s)[0] for s in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 10


@pytest.mark.parametrize("seed", range(3))
def test_sliding_pair_truth(seed: int) -> None:
    """Sampling the moving scan at x + disp(x) gives the fixed one inside the organs, label for label."""
    pair = phantom.sliding_pair(seed=seed, noise=0.0)
    disp, image = torch.from_numpy(pair.disp)[None], torch.from_numpy(pair.image)
    for label in (1, 2):
        own = torch.from_numpy((pair.moving_label == label).astype(np.float32))[None, None]
        again = warp(own, disp, mode="nearest", padding="zeros")[0, 0].numpy()
        inner = ndimage.binary_erosion(pair.fixed_label == label)  # at the rim, rounding may meet the background
        assert inner.sum() > 1000 and (again[inner] == 1).all()
    core = ndimage.binary_erosion(pair.fixed_label == 1, iterations=3)
    core |= ndimage.binary_erosion(pair.fixed_label == 2, iterations=3)
    error = (warp(image[None, :1], disp)[0, 0] - image[1]).abs().numpy()
    start = (image[0] - image[1]).abs().numpy()
    assert error[core].mean() < 0.15 * start[core].mean() and core.sum() > 500
    assert (pair.disp[:, pair.fixed_label == 0] == 0).all()


def test_sliding_pair_geometry() -> None:
    """The organs touch in the plane between the halves, move against each other in it, and are of some size."""
    pair = phantom.sliding_pair((20, 32, 24), seed=1, shift=3.0)
    assert pair.image.shape == (2, 20, 32, 24) and 0 <= pair.image.min() < pair.image.max() <= 1
    one, two = (pair.disp[:, pair.fixed_label == n] for n in (1, 2))
    np.testing.assert_array_equal(one[:, :1], -two[:, :1])
    assert (one == one[:, :1]).all() and one[0, 0] == 0 and 1.5 <= np.linalg.norm(one[:, 0]) <= 3
    for label in (pair.moving_label, pair.fixed_label):
        assert set(np.unique(label)) == {0, 1, 2}
        assert set(np.unique(label[:10])) == {0, 1} and set(np.unique(label[10:])) == {0, 2}
        assert ((label[9] == 1) & (label[10] == 2)).sum() > 80, "the organs share a face"
    np.testing.assert_array_equal(pair.depth[:, 0, 0], np.abs(np.arange(20) - 9.5))


def test_sliding_pair_wanders() -> None:
    """The interface leaves the middle by up to `wander` voxels, to either side, and the truth goes with it."""
    places = []
    for seed in range(8):
        pair = phantom.sliding_pair((24, 24, 24), seed, shift=2.0, wander=4.0, noise=0.0)
        rows = [np.unique(label[label > 0]).tolist() for label in pair.fixed_label if (label > 0).any()]
        assert rows == sorted(rows) and [1] in rows and [2] in rows and [1, 2] not in rows
        places.append(float(pair.depth[:, 0, 0].argmin()) - 11.5)
        first = min(i for i in range(24) if (pair.fixed_label[i] == 2).any())
        assert pair.depth[first, 0, 0] + pair.depth[first - 1, 0, 0] == pytest.approx(1, abs=1e-5)
    assert -4.5 <= min(places) < -1 and 1 < max(places) <= 4.5


def test_sliding_pair_depends_on_its_seed() -> None:
    first, again, other = (phantom.sliding_pair((16, 24, 16), seed).image for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.02
