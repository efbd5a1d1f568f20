"""prealign on two phantom brains whose relation is known."""

import nibabel as nib
import numpy as np
import pytest
from grids import GRIDS

from common import phantom
from common.space import prealign as module
from common.space.prealign import prealign

SOME = phantom.Deformation(0)


@pytest.fixture(scope="module")
def brains() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    moving, fixed = GRIDS["oblique"]
    return {
        "fixed": (phantom.sample(*fixed)[0], fixed[1]),
        "moving": (phantom.sample(*moving, phantom.Deformation(0), seed=1)[0], moving[1]),
    }


def residual(matrix: np.ndarray, brains: dict, offset: tuple[float, float, float] = (0, 0, 0)) -> float:
    """Mean distance in mm, inside the fixed brain, between the matrix and the true map."""
    scan, affine = brains["fixed"]
    points = nib.affines.apply_affine(affine, np.argwhere(scan > 0))
    truth = phantom.Deformation(0).truth(points) + offset
    return float(np.linalg.norm(nib.affines.apply_affine(matrix, points) - truth, axis=1).mean())


def best_residual(brains: dict) -> float:
    """Of the least-squares affine map to the truth: 3.1 mm, as the phantom's displacement is not affine."""
    scan, affine = brains["fixed"]
    points = nib.affines.apply_affine(affine, np.argwhere(scan > 0))
    columns = np.c_[points, np.ones(len(points))]
    rows = np.linalg.lstsq(columns, phantom.Deformation(0).truth(points))[0].T
    return residual(np.vstack([rows, [0, 0, 0, 1]]), brains)


def test_prealign_finds_the_phantom(brains: dict) -> None:
    matrix = prealign(*brains["fixed"], *brains["moving"])
    assert np.linalg.det(matrix[:3, :3]) > 0 and np.array_equal(matrix[3], [0, 0, 0, 1])
    assert residual(matrix, brains) < best_residual(brains) + 0.5 < residual(np.eye(4), brains) / 2
    np.testing.assert_array_equal(matrix, prealign(*brains["fixed"], *brains["moving"]))


def test_prealign_needs_no_overlap(brains: dict) -> None:
    scan, affine = brains["moving"]
    offset = (700.0, -900.0, 500.0)
    matrix = prealign(*brains["fixed"], scan, nib.affines.from_matvec(np.eye(3), offset) @ affine)
    assert residual(matrix, brains, offset) < best_residual(brains) + 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_the_axes_changes_nothing(masked: bool) -> None:
    """Copies in other orders, their affines rounded to 32 bits as in files, of two scans whose voxels coincide."""
    linear = nib.eulerangles.euler2mat(0.3, -0.2, 0.25) * 5
    affine = nib.affines.from_matvec(linear, -linear @ [14.5, 17.5, 13.5])
    scans = [phantom.sample((30, 36, 28), affine, there, seed=seed)[0] for there, seed in ((None, 0), (SOME, 1))]
    found, reach = [], np.array([*np.ndindex(2, 2, 2)]) * 140.0 - 70
    orders = [[[0, 1], [1, 1], [2, 1]]] * 2, [[[2, -1], [0, 1], [1, -1]], [[1, 1], [0, -1], [2, 1]]]
    for order in (*orders, orders[1][::-1]):
        turned = [nib.Nifti1Image(scan, affine).as_reoriented(np.array(axes)) for scan, axes in zip(scans, order)]
        pair = [part for image in turned for part in (np.asarray(image.dataobj), image.affine.astype(np.float32))]
        masks = {f"{role}_mask": pair[at] > 0 for role, at in (("fixed", 0), ("moving", 2)) if masked}
        found.append(nib.affines.apply_affine(prealign(*pair, **masks), reach))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-3)  # mm; 0.1 with the rounding left in


def test_prealign_modes(brains: dict) -> None:
    rigid = prealign(*brains["fixed"], *brains["moving"], "rigid")
    np.testing.assert_allclose(rigid[:3, :3] @ rigid[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rigid[:3, :3]) > 0 and residual(rigid, brains) < 0.6 * residual(np.eye(4), brains)
    np.testing.assert_array_equal(prealign(*brains["fixed"], *brains["moving"], "none"), np.eye(4))


def test_prealign_rejects(brains: dict) -> None:
    scan, affine = brains["fixed"]
    with pytest.raises(ValueError, match=r"prealign\(\) 'mode' must be 'affine', 'rigid' or 'none', got 'elastic'"):
        prealign(scan, affine, scan, affine, "elastic")
    faults = {
        "must be .I, J, K.": (scan[0], affine),
        "at least 2 voxels": (scan[:1], affine),
        "must not be constant": (np.ones_like(scan), affine),
        "must be finite": (np.where(scan > 900, np.nan, scan), affine),
        "must be an invertible": (scan, np.diag([1.0, 1, 0, 1])),
    }
    for words, (array, space) in faults.items():
        with pytest.raises(ValueError, match=f"'moving.*{words}"):
            prealign(scan, affine, array, space)


def test_the_sieve_of_starts_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples leave out most of the starts, and the same one comes first as by all samples of all of them."""
    size, affine = (48, 56, 46), nib.affines.from_matvec(np.diag([3.0, 3, 3]), [-70, -84, -69])
    scans = [module.Scan(phantom.sample(size, affine, deformation)[0], affine) for deformation in (None, SOME)]
    metric = module._Information(*(scan.copy(7.0, 0.1) for scan in scans))
    starts = module._starts(*scans, scaled=True)
    assert len(metric.points) > 2 * module.SIEVE[0] and len(starts) > 2 * module.SIEVE[1]
    sieved = metric.rank(starts)
    monkeypatch.setattr(module, "SIEVE", (1, len(starts)))
    everything = metric.rank(starts)
    assert len(sieved) <= 17 < len(everything) == len(starts)
    np.testing.assert_array_equal(sieved[0], everything[0])


def test_masks_say_where_the_metric_looks(brains: dict) -> None:
    """What the fixed mask leaves out may hold anything; where the moving one does, nothing counts."""
    scan, affine = brains["fixed"]
    mask = np.ones(scan.shape, np.uint8)
    mask[: scan.shape[0] // 2] = 0
    spoilt = np.where(mask > 0, scan, -7 * scan.max())
    found = [module._Information((s, affine), (scan, affine), mask > 0)(np.eye(4))[0] for s in (scan, spoilt)]
    assert found[0] == found[1] < 0
    half = module._Information((scan, affine), (scan, affine), None, mask > 0)
    inside = half._inside(np.eye(4))[1]
    assert 0.4 < inside.mean() < 0.6 and (half.points[inside] @ np.linalg.inv(affine)[0] > scan.shape[0] // 2 - 1).all()
    finer = np.ones(tuple(2 * n for n in scan.shape), np.uint8)
    half_size = affine @ np.diag([0.5, 0.5, 0.5, 1])
    assert module.mask_of((scan, affine), finer, half_size).all()
    every = {"fixed_mask": mask**0, "moving_mask": np.ones(brains["moving"][0].shape, np.uint8)}
    both = brains["fixed"], brains["moving"]
    np.testing.assert_array_equal(prealign(*both[0], *both[1], **every), prealign(*both[0], *both[1]))


def test_points_say_where_to_begin() -> None:
    """Rigid or with a scale, one wrong pair aside; too few, or on a line, say nothing."""
    rng = np.random.default_rng(3)
    points = rng.uniform(-80, 80, (20, 3))
    truth = nib.affines.from_matvec(1.1 * nib.eulerangles.euler2mat(0.4, -0.3, 1.2), [300.0, -20.0, 7.0])
    there = nib.affines.apply_affine(truth, points)
    there[4] += 200
    found = module.fit_points(points, there, scaled=True)
    np.testing.assert_allclose(found, truth, atol=0.2)
    rigid = module.fit_points(points, nib.affines.apply_affine(truth @ np.diag([1 / 1.1] * 3 + [1]), points))
    np.testing.assert_allclose(rigid @ np.diag([1.1] * 3 + [1]), truth, atol=1e-6)
    assert module.fit_points(points[:2], points[:2]) is None
    assert module.fit_points(np.outer(np.arange(5), [1.0, 2, 3]), np.outer(np.arange(5), [1.0, 2, 3])) is None


def test_begins_where_it_is_told(brains: dict) -> None:
    start = nib.affines.from_matvec(np.eye(3), [3.0, -2.0, 1.0])
    np.testing.assert_array_equal(prealign(*brains["fixed"], *brains["moving"], "none", start=start), start)
    near = residual(prealign(*brains["fixed"], *brains["moving"], start=np.eye(4)), brains)
    assert near < best_residual(brains) + 1
