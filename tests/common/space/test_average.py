"""Means over people: of maps, fields of view, scans and label maps."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common import fields
from common.space import average, mapping

GRID = (24, 28, 20), nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), [-20.0, 10.0, 5.0])


def moved(angles: tuple[float, float, float], stretch: tuple[float, float, float], shift: float) -> np.ndarray:
    """Stretched about the middle of the grid, turned, and shifted into a scanner elsewhere."""
    middle = average.middle_of(GRID)
    linear = nib.eulerangles.euler2mat(*angles) @ np.diag(stretch)
    return nib.affines.from_matvec(linear, middle + shift - linear @ middle)


def bent(seed: int, amplitude: float = 2.0) -> mapping.Transform:
    """A smooth displacement of up to so many voxels, 0 at the border."""
    rng = np.random.default_rng(seed)
    disp = np.stack([gaussian_filter(rng.normal(size=GRID[0]), 3) for _ in range(3)])
    window = np.prod(np.meshgrid(*(np.sin(np.pi * np.arange(n) / (n - 1)) for n in GRID[0]), indexing="ij"), axis=0)
    return mapping.displacement_transform(amplitude * disp * window / np.abs(disp).max(), GRID[1])


@pytest.mark.parametrize("deform", [False, True], ids=["linear", "deforming"])
def test_mean_is_the_identity_afterwards(deform: bool) -> None:
    """1/n sum P_i T_i m^-1 = id: whatever the poses, the mean shape has been found."""
    matrices = [
        moved((0.3, -0.1, 0.2), (1.2, 1.0, 0.9), 50.0),
        moved((-0.2, 0.4, 0.0), (1.1, 1.1, 1.1), -30.0),
        moved((0.0, 0.0, 1.0), (0.9, 1.2, 1.0), 7.0),
    ]
    maps = [mapping.affine_transform(matrix) for matrix in matrices]
    poses = [mapping.affine_transform(average._unposed(matrix, GRID)) for matrix in matrices]
    if deform:
        maps = [mapping.compose(bent(seed), the_map) for seed, the_map in enumerate(maps)]
    mean = average.mean_map(maps, GRID)
    assert mean.linear is not deform
    before = np.linalg.norm(mapping.displacement_mm(mean, *GRID), axis=0)
    back = mapping.invert(mean)
    whole = [mapping.compose(back, the_map, pose) for the_map, pose in zip(maps, poses)]
    left = np.linalg.norm(np.mean([mapping.displacement_mm(one, *GRID) for one in whole], axis=0), axis=0)
    inner = (slice(4, -4),) * 3  # the mean is larger than the grid that it is sampled on
    assert before[inner].mean() > 1.0 and left[inner].max() < (0.02 if deform else 1e-3)  # mm, of voxels of 2 mm


def test_size_is_the_mean_and_pose_is_left_out() -> None:
    """Of three people 0.8, 1.0 and 1.5 as large, turned and shifted at will: 1.1."""
    people = [moved((0.1 * n, n, -n), (size,) * 3, 40.0 * n) for n, size in enumerate((0.8, 1.0, 1.5))]
    matrix = mapping.matrix_of(average.mean_map(map(mapping.affine_transform, people), GRID))
    np.testing.assert_allclose(matrix[:3, :3], np.eye(3) * 1.1, atol=1e-9)
    np.testing.assert_allclose(nib.affines.apply_affine(matrix, average.middle_of(GRID)), average.middle_of(GRID))


def test_linear_ones_among_deforming_ones_count() -> None:
    field = bent(3)
    mean = average.mean_map([mapping.affine_transform(np.eye(4)), field, mapping.affine_transform(np.eye(4))], GRID)
    half = torch.from_numpy(mapping.field_of(mean)[0] * 3)
    np.testing.assert_allclose(half, mapping.field_of(field)[0], atol=1e-4)
    assert fields.jacobian_determinant(half[None].float()).min() > 0


def test_faded_falls_to_nothing_around_its_grid() -> None:
    """The same inside, half as large half way out, 0 further on; and it does not fold there."""
    disp = np.zeros((3, 8, 8, 8), np.float32)
    disp[0] = np.random.default_rng(0).uniform(2.5, 3, (8, 8, 8))
    disp[1, 3, 4, 5] = 9.0  # inside: the ramp asks for the border alone
    turned = mapping.affine_transform(moved((0.1, 0, 0), (1, 1, 1), 3.0))
    torn = mapping.compose(mapping.displacement_transform(disp, GRID[1]), turned)
    whole = average.faded(torn)
    wide, affine = mapping.field_of(mapping.parts(whole)[0])
    assert wide.shape[1:] == (20, 20, 20) and (wide[:, [0, -1]] == 0).all()
    np.testing.assert_array_equal(wide[:, 6:-6, 6:-6, 6:-6], disp)
    np.testing.assert_allclose(wide[0, 3, 6:-6, 6:-6], disp[0, 0] / 2)
    np.testing.assert_allclose(nib.affines.apply_affine(affine, [6, 6, 6]), GRID[1][:3, 3])
    wide[1] = 0
    assert fields.jacobian_determinant(torch.from_numpy(wide)[None]).min() > 0.2
    assert mapping.matrix_of(mapping.parts(whole)[1]).tolist() == mapping.matrix_of(turned).tolist()


def test_grid_of_people_on_one_grid_is_theirs() -> None:
    size, affine = average.mean_grid(GRID, [(GRID, np.eye(4))] * 3, 2.0)
    assert size == GRID[0]
    np.testing.assert_allclose(affine, GRID[1])


def test_grid_is_as_wide_as_the_median_scan() -> None:
    """Of 40, 60 and 80 mm: 60, from the median of the low ends to that of the high ones, in finer voxels."""
    scans = [((20 * n, 20, 20), nib.affines.from_matvec(np.eye(3) * 2, [-20.0 * n, 0, 0])) for n in (1, 2, 3)]
    size, affine = average.mean_grid(scans[0], [(grid, np.eye(4)) for grid in scans], 1.0)
    ends = nib.affines.apply_affine(affine, [[0, 0, 0], np.array(size) - 1])
    np.testing.assert_allclose(ends, [[-40, 0, 0], [38, 38, 38]], atol=1.0)
    np.testing.assert_allclose(np.diag(affine)[:3], 1.0)


def scans(count: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    plain = gaussian_filter(rng.normal(size=(20, 20, 20)), 1.2)
    shifts = [np.roll(plain, (n % 2, n // 2 % 2, n // 4), (0, 1, 2)) for n in range(count)]
    return [(x[None] + 0.2).astype(np.float32) for x in shifts]


def blended(of: list[np.ndarray]) -> average.Blend:
    blend = average.Blend()
    for scan in of:
        blend.add(scan, np.nan_to_num(scan[0], nan=-1) > 0)
    return blend


def test_mean_and_spread_leave_out_what_is_not_seen() -> None:
    some = [x.copy() for x in scans()]
    some[0][:, :5] = np.nan
    for x in some:
        x[:, :, -1] = np.nan
    blend, stack = blended(some), np.stack(some)
    np.testing.assert_allclose(blend.mean[..., :-1, :], np.nanmean(stack[..., :-1, :], 0), atol=1e-6)
    np.testing.assert_allclose(blend.spread[..., :-1, :], np.nanstd(stack[..., :-1, :], 0), atol=1e-5)
    assert np.isfinite(blend.sharpened()).all() and (blend.mean[..., -1, :] == blend.mean.min()).all()


def test_inside_is_where_half_of_the_scans_show_something() -> None:
    some = scans()
    np.testing.assert_array_equal(blended(some).inside, (np.stack(some)[:, 0] > 0).mean(0) >= 0.5)


def test_sharpened_as_the_scans_are_and_within_their_range() -> None:
    some = scans()
    blend = blended(some)
    sharp, inside = blend.sharpened(), blend.inside
    slopes = [average.steepness(x[0])[inside].mean() for x in (blend.mean, sharp)]
    assert slopes[0] < 0.95 * blend.steepness
    assert slopes[0] < slopes[1] <= blend.steepness * 1.02
    stack = np.stack(some)
    assert (sharp >= stack.min(0) - 1e-6).all() and (sharp <= stack.max(0) + 1e-6).all()
    alone = blended(some[:1])
    np.testing.assert_allclose(alone.sharpened(), some[0], atol=1e-6)  # of one scan nothing else is in the range


def test_vote() -> None:
    """The most frequent code, the smallest of equals: by counting each code."""
    labels = np.random.default_rng(1).choice([0, 3, 7, 2**40], (5, 6, 7, 8))
    codes = np.unique(labels)
    counts = np.stack([(labels == code).sum(0) for code in codes])
    np.testing.assert_array_equal(average.vote(labels), codes[counts.argmax(0)])
    assert average.vote(labels).dtype == labels.dtype
