"""Measures on cases with known answers."""

import math

import pytest
import torch

from common.fields import identity
from common.quality import metrics


def cube(begin: int, size: int = 4, label: int = 3) -> torch.Tensor:
    out = torch.zeros(16, 16, 16, dtype=torch.long)
    out[begin : begin + size, 4 : 4 + size, 4 : 4 + size] = label
    return out


def test_dice_and_distances_of_a_shifted_cube() -> None:
    scores = metrics.label_overlap(cube(4), cube(5), spacing=(2.0, 1.0, 1.0))
    assert scores[3]["dice"] == pytest.approx(0.75)
    assert scores[3]["hd"] == pytest.approx(2.0) and scores[3]["hd95"] == pytest.approx(2.0)
    assert 0 < scores[3]["assd"] < 2.0


def test_cropping_does_not_change_distances_at_the_volume_border() -> None:
    from monai.metrics import compute_average_surface_distance

    a, b = cube(0), cube(2)
    scores = metrics.label_overlap(a, b, spacing=(1.0, 1.0, 1.0))
    onehot = [(x == 3)[None, None].float() for x in (b, a)]
    whole = compute_average_surface_distance(*onehot, include_background=True, symmetric=True)
    assert scores[3]["assd"] == pytest.approx(float(whole), abs=1e-6)


def test_a_lost_label_counts_in_dice_and_in_no_distance() -> None:
    """Its distances are nan, and means over two maps to be compared use the labels that both have."""
    fixed, before = cube(4) + cube(10, 3, 7), cube(5) + cube(10, 3, 7).roll(2, 1)
    after = cube(5)  # label 7 is lost
    scores = [metrics.label_overlap(fixed, warped, spacing=(1.0, 1.0, 1.0)) for warped in (before, after)]
    assert scores[1][7]["dice"] == 0.0
    assert all(math.isnan(scores[1][7][name]) for name in metrics.DISTANCES)
    for name in metrics.DISTANCES:
        means = [metrics.mean_over_labels(a, name, beside=b) for a, b in (scores, scores[::-1])]
        assert means[0] == pytest.approx(means[1]) and math.isfinite(means[0])
        assert metrics.mean_over_labels(scores[0], name) > means[0]


def test_labels_left_out() -> None:
    fixed = cube(4) + cube(10, 2, 7)
    assert set(metrics.label_overlap(fixed, fixed)) == {3, 7}
    assert set(metrics.label_overlap(fixed, fixed, minimum=8)) == {3}
    assert set(metrics.label_overlap(fixed, fixed, cube(4))) == {3}
    assert metrics.label_overlap(fixed, cube(4))[7]["dice"] == 0.0
    assert metrics.mean_over_labels(metrics.label_overlap(fixed, cube(4)), "dice") == pytest.approx(0.5)
    assert math.isnan(metrics.mean_over_labels({}, "dice"))


def test_regularity_of_scaling_and_folding() -> None:
    coords = identity((12, 12, 12), torch.zeros(1))
    measures = metrics.regularity(0.2 * coords)
    assert measures["folding_pct"] == 0.0 and measures["sdlogj"] == pytest.approx(0.0, abs=1e-6)
    flipped = torch.zeros_like(coords)
    flipped[:, 0] = -2 * coords[:, 0]
    assert metrics.regularity(flipped)["folding_pct"] == 100.0
    half = torch.where(coords[:, :1] < 6, 0.0, 1.0) * flipped
    assert 0 < metrics.regularity(half)["folding_pct"] < 100
    assert math.isnan(metrics.regularity(flipped, torch.zeros(12, 12, 12, dtype=torch.bool))["folding_pct"])


def test_similarities() -> None:
    x = torch.rand(1, 1, 16, 16, 16)
    assert metrics.ssim(x, x) == pytest.approx(1.0, abs=1e-5)
    assert metrics.ncc(x, 3 * x + 2) == pytest.approx(1.0) and metrics.ncc(x, -x) == pytest.approx(-1.0)
    assert math.isnan(metrics.ncc(x, torch.ones_like(x)))
