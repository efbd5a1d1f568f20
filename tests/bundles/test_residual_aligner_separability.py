"""Motion separability: eq. 4-9 worked out by hand, and the measured pairs counted by brute force."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from common.run.cohort import CohortEvents
from residual_aligner import separability as sep
from residual_aligner.network import VARIANTS


def test_accessible_range_by_hand() -> None:
    """p = 2, |r| = 3: 2 * 7 = 14 voxels wide, 6.5 to each side."""
    assert sep.accessible_range([4, 2, 1], [1, 3, 2]) == [(4 * 3 - 1) / 2, 6.5, 2.0]


def test_accessible_range_rejects() -> None:
    with pytest.raises(ValueError, match=r"accessible_range\(\) 'pool' must not rise, got \(1, 2\)"):
        sep.accessible_range([1, 2], [1, 1])
    with pytest.raises(ValueError, match=r"'pool' must have the length of 'dilation_sum', got 1"):
        sep.accessible_range([1], [1, 1])


def test_separability_by_hand() -> None:
    """Two modules, a = 5.5 and 2: nothing below p_2 = 1, 4 up to p_1 + 2 a_2 = 8, 15 from there on."""
    found = sep.separability(np.array([0, 0.9, 1, 4, 7.9, 8, 100]), [4, 1], [1, 2])
    np.testing.assert_allclose(found, [0, 0, 4, 4, 4, 15, 15])


@pytest.mark.parametrize("variant", VARIANTS)
def test_separability_is_eq_9(variant: str) -> None:
    """Case by case as the paper writes it, k counted from 1."""
    pool, sums = VARIANTS[variant].pool, sep.dilation_sums(variant)
    a = [0, *sep.accessible_range(pool, sums)]
    p = [0, *pool]
    for distance in (0, 1, 2, 5, 9.5, 17, 30, 60, 100, 200, 1000):
        expected = 0.0
        if distance >= p[1] + 2 * sum(a[2:]):
            expected = 2 * sum(a[1:])
        for k in range(2, 6):
            if p[k] + 2 * sum(a[k + 1 :]) <= distance < p[k - 1] + 2 * sum(a[k:]):
                expected = 2 * sum(a[k:])
        assert float(sep.separability(distance, pool, sums)) == expected


def test_more_layers_separate_better() -> None:
    """Fig. 3 (c, d): with about the same ranges, the area under the curve grows with q."""
    variants = ("ran0", "ran3", "ran4")
    curves = {v: (VARIANTS[v].pool, sep.dilation_sums(v)) for v in variants}
    for largest in (16, 32, 64):
        area = [sep.separability(np.arange(largest), *curves[v]).sum() for v in variants]
        assert area[0] < area[1] < area[2]
    assert [round(sep.separability(np.arange(32), *curves[v]).sum()) for v in variants] == [643, 647, 740]
    curves_of_all = [(VARIANTS[v].pool, sep.dilation_sums(v, undilated=2)) for v in variants]
    areas = [round(sep.separability(np.arange(32), *curve).sum()) for curve in curves_of_all]
    assert areas == [727, 747, 744], "with the undilated layers there is next to no advantage, as the card says"
    reach = [sep.accessible_range(*curves[v]) for v in variants]
    np.testing.assert_allclose(reach[1:], [reach[0]] * 2, rtol=0.2)


def test_motion_pairs_against_all_pairs() -> None:
    """A small grid, every ordered pair of right voxels counted one by one, against the drawn ones."""
    torch.manual_seed(0)
    size, limit = (5, 6, 4), (3, 4)
    disp = 2 * torch.randn(1, 3, *size)
    fixed, warped = torch.randint(0, 3, size), torch.randint(0, 3, size)
    right = [x for x in np.ndindex(*size) if fixed[x] == warped[x] > 0]
    expected = np.zeros(limit)
    for x, y in itertools.permutations(right, 2):
        apart = max(abs(a - b) for a, b in zip(x, y))
        gap = float((disp[(0, slice(None), *x)] - disp[(0, slice(None), *y)]).abs().max())
        if apart <= limit[0] and gap < limit[1]:
            expected[apart - 1, int(gap)] += 1
    counts = sep.motion_pairs(disp, fixed, warped, distance=3, difference=4, pairs=400_000)
    assert counts.shape == limit and counts.sum() > 10_000
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), atol=0.01)


def test_sliding_organs_move_apart() -> None:
    """Two halves that move in opposite directions show at small distances, a field that is smooth does not."""
    label = torch.ones(12, 12, 12, dtype=torch.long)
    slide = torch.zeros(1, 3, 12, 12, 12)
    slide[0, 1, :6], slide[0, 1, 6:] = 3.0, -3.0
    smooth = torch.linspace(3, -3, 12).view(12, 1, 1) * torch.ones(1, 3, 12, 12, 12)
    shares = [sep.apart_share(sep.motion_pairs(d, label, label, distance=8), distance=4) for d in (slide, smooth)]
    assert shares[0] > 0.1 and shares[1] == 0


def test_motion_pairs_rejects() -> None:
    label = torch.ones(4, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"motion_pairs\(\) 'warped_label' must agree with 'fixed_label' somewhere"):
        sep.motion_pairs(torch.zeros(1, 3, 4, 4, 4), label, 2 * label)


def test_density() -> None:
    counts = np.zeros((6, 8), int)
    counts[3, 4] = 10
    smooth = sep.density(counts)
    assert smooth.sum() == pytest.approx(1) and smooth.argmax() == counts.argmax() and 0.1 < smooth.max() < 0.3
    assert sep.density(counts, sigma=0).max() == 1


def test_handler_counts_on_the_working_grid(tmp_path: Path) -> None:
    """Counts add up over the pairs of a run; labels of another grid come to that of the displacement, the moving one
    along it; a pair without labels or without a right voxel is left out."""
    disp = torch.zeros(3, 8, 8, 8)
    disp[1, 4:] = 5.0
    grid, fine = np.diag([2.0, 2.0, 2.0, 1.0]), torch.ones(1, 16, 32, 16)
    fixed, moving = torch.zeros(1, 16, 32, 16), torch.zeros(1, 16, 32, 16)
    fixed[:, :, 4:12] = 1
    moving[:, :8, 4:12], moving[:, 8:, 14:22] = 1, 1  # right only where the displacement brings it

    def item(fixed: torch.Tensor, moving: torch.Tensor) -> dict:
        named = {"fixed_label": fixed, "moving_label": moving}
        return bare | {"matrix": np.eye(4)} | {name: MetaTensor(x, affine=np.eye(4)) for name, x in named.items()}

    def run(folder: Path, *items: dict) -> None:
        engine = Engine(lambda engine, batch: [{"pred": disp} for _ in items])
        engine.register_events(*CohortEvents)
        sep.MotionPairs(str(folder), "ran3", **options).attach(engine)
        engine.run([list(items)] * 2)
        engine.fire_event(CohortEvents.ALL_PAIRS_COMPLETED)

    bare = {"image": MetaTensor(torch.zeros(2, 8, 8, 8), affine=grid)}
    options = {"distance": 6, "difference": 8, "pairs": 5000}
    run(tmp_path / "out", item(fixed, moving), bare, item(fixed, 2 * fine))
    counts = np.load(tmp_path / "out" / "motion_pairs.npy")
    label = torch.zeros(8, 8, 8)
    label[:, 2:6] = 1
    np.testing.assert_array_equal(counts, 2 * sep.motion_pairs(disp[None], label, label, **options))
    assert set(np.nonzero(counts.sum(0))[0]) == {0, 5} and (tmp_path / "out" / "motion_pairs.png").stat().st_size > 5000

    run(tmp_path / "none", bare)
    assert not (tmp_path / "none").exists(), "nothing measured, nothing written"


def test_picture() -> None:
    """Fig. 7: a column for a distance, dark where pairs are many, and the curve of eq. 9."""
    counts = np.zeros((6, 8), int)
    counts[:, 0], counts[5, 4] = 90, 10
    axes = sep.picture(counts, "ran3").axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape == (8, 6) and axes.images[0].get_extent() == [0.5, 6.5, 0, 8]
    assert shown[0, 2] > 0.8 and shown[4, 5] > shown[4, 1] and shown[4, 5] > shown[6, 5]
    (line,) = axes.lines
    expected = sep.separability(np.arange(1, 7), sep.VARIANTS["ran3"].pool, sep.dilation_sums("ran3"))
    np.testing.assert_array_equal(line.get_ydata(), expected)
