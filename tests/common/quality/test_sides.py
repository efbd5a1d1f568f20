"""Whether left and right are exchanged: found in a scan that has sides, also where it lies turned and shifted."""

import nibabel as nib
import numpy as np
import pytest
import torch

from common import phantom
from common.mind import mind_features
from common.ops import warp
from common.quality.metrics import halved
from common.quality.sides import _turned_pairs, both_ways, sample_both_ways

SIZE, SPACE = (36, 44, 34), nib.affines.from_matvec(np.diag([4.0, 4, 4]), [-70, -86, -66])


def features(scan: torch.Tensor) -> torch.Tensor:
    return mind_features(scan[None, None])[0]


@pytest.fixture(scope="module")
def scan() -> torch.Tensor:
    return torch.from_numpy(phantom.sample(SIZE, SPACE)[0])


def test_features_of_a_turned_scan(scan: torch.Tensor) -> None:
    torch.testing.assert_close(features(scan.flip(0)), features(scan)[_turned_pairs()].flip(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("contrast", [1, -1])
def test_exchanged_sides_are_found(scan: torch.Tensor, contrast: int) -> None:
    """Of a scan that lies 1.5 voxels off and a few degrees turned, in the same contrast and turned over to dark."""
    other = scan if contrast > 0 else torch.where(scan > 0, 1.1 * scan.max() - scan, 0)
    i, j, _ = torch.meshgrid(*(torch.arange(n) - n / 2 for n in SIZE), indexing="ij")
    disp = torch.stack([1.5 + 0.08 * j, -0.08 * i, torch.zeros(SIZE)])
    moved = warp(other[None, None], disp[None])[0, 0]
    inside = halved(scan > 0)
    right, wrong = both_ways(features(moved), features(scan), inside)
    assert right > 0.8 and wrong < right - 0.2
    wrong, right = both_ways(features(moved.flip(0)), features(scan), inside)
    assert right > 0.8 and wrong < right - 0.2


def test_nothing_inside(scan: torch.Tensor) -> None:
    assert all(np.isnan(both_ways(features(scan), features(scan), torch.zeros(18, 22, 17, dtype=torch.bool))))


@pytest.mark.parametrize("size", [SIZE, (35, 43, 33)])
def test_scans_both_ways(scan: torch.Tensor, size: tuple[int, int, int]) -> None:
    """What is shown of a scan, shifted by 1.5 voxels and exchanged, is the fixed scan where it is mirrored."""
    scan = scan[: size[0], : size[1], : size[2]]
    shift = torch.tensor([1.5, 0, 0]).view(1, 3, 1, 1, 1).expand(1, 3, *scan.shape)
    moved = warp(scan[None, None], shift)[0, 0].flip(0)
    points = (scan > 0).nonzero().T.float()
    as_it_is, mirrored = sample_both_ways(moved, scan, scan > 0, points)
    truth = scan[scan > 0]
    assert (mirrored - truth).abs().mean() < 0.3 * (as_it_is - truth).abs().mean()
    as_it_is, mirrored = sample_both_ways(moved.flip(0), scan, scan > 0, points)
    assert (as_it_is - truth).abs().mean() < 0.3 * (mirrored - truth).abs().mean()
