"""The quick registration: it finds a known move, and tells who follows it from who does not."""

import pytest
import torch

from common import phantom
from common.mind import mind_features
from common.ops import warp
from common.quality import quick
from common.quality.metrics import halved

SIZE, SPACE = (48, 56, 44), torch.diag(torch.tensor([4.0, 4, 4, 1])).numpy()


@pytest.fixture(scope="module")
def moved() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the phantom moved by a smooth field and of itself, where they count, and the way back to it."""
    space = SPACE.copy()
    space[:3, 3] = [-94, -110, -86]
    scan = torch.from_numpy(phantom.sample(SIZE, space)[0]).float()[None, None]
    wave = torch.sin(torch.arange(SIZE[1]) / 7)[None, None, :, None].expand(1, 1, *SIZE)
    field = torch.cat([2 * wave, -wave, wave], 1)
    moving, fixed = (mind_features(image)[0] for image in (warp(scan, field), scan))
    return moving, fixed, halved(scan[0, 0] > 0), -field[0]  # to first order


def test_the_truth_agrees_and_the_reverse_does_not(moved: tuple) -> None:
    *scans, back = moved
    agreement, gain = quick.against_quick(*scans, back)
    assert agreement > 0.8 and gain < 0.02
    agreement, gain = quick.against_quick(*scans, -back)
    assert agreement < -0.8 and gain > 0.1


def test_nothing_moves(moved: tuple) -> None:
    """Of two equal scans the quick one stays at home."""
    _, fixed, inside, back = moved
    agreement, gain = quick.against_quick(fixed, fixed, inside, torch.zeros_like(back))
    assert agreement == 0 and gain == pytest.approx(0, abs=1e-6)


def test_large_grids_are_coarsened(moved: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = quick._lucas_kanade
    monkeypatch.setattr(quick, "_lucas_kanade", lambda *a: sizes.append(tuple(a[2].shape)) or own(*a))
    quick.against_quick(*moved)
    monkeypatch.setattr(quick, "VOXELS", 1000)
    agreement, _ = quick.against_quick(*moved)
    assert sizes == [(12, 14, 11), (6, 7, 6)] and agreement > 0.5


def test_nothing_inside(moved: tuple) -> None:
    *scans, inside, back = moved
    agreement, gain = quick.against_quick(*scans, torch.zeros_like(inside), back)
    assert agreement == 0 and gain != gain
