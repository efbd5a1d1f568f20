"""Instance optimisation finds a known displacement, keeps the better result and respects its arguments."""

import pytest
import torch

from common.fields import identity, jacobian_determinant
from common.losses import lncc
from common.ops import warp
from common.refine import refine, smooth


def blobs(size: int = 32) -> torch.Tensor:
    coords = identity((size,) * 3, torch.zeros(1))
    wave = torch.sin(coords / 2.3).prod(1, keepdim=True) + torch.sin(coords / 3.9 + 1).prod(1, keepdim=True)
    return (wave - wave.min()) / (wave.max() - wave.min())


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    coords = identity((32,) * 3, torch.zeros(1))
    disp = 1.5 * torch.sin(coords.flip(1) / 6)
    moving = blobs()
    return torch.cat([moving, warp(moving, disp)], dim=1), disp


def test_finds_a_known_displacement() -> None:
    image, truth = pair()
    found = refine(torch.zeros_like(truth), image, 60, progress=False, smoothness=0.1)
    inner = (slice(None), slice(None), *[slice(4, -4)] * 3)
    before, after = (float((truth - d).norm(dim=1)[inner[1:]].mean()) for d in (torch.zeros_like(truth), found))
    moving, fixed = image.chunk(2, dim=1)
    assert after < 0.5 * before
    assert lncc(warp(moving, found), fixed, window=5) < lncc(moving, fixed, window=5) - 0.1
    assert float((jacobian_determinant(found) <= 0).float().mean()) < 0.005


def test_zero_steps_and_rejects() -> None:
    image, truth = pair()
    assert refine(truth, image, 0) is truth
    with pytest.raises(ValueError, match="'steps' must be >= 0, got -1"):
        refine(truth, image, -1)


def test_never_worse_than_the_start() -> None:
    image, truth = pair()
    kept = refine(truth, image, 2, learning_rate=50.0, progress=False)
    assert torch.equal(kept, truth)


def test_works_under_no_grad_and_repeats_itself() -> None:
    image, truth = pair()
    with torch.no_grad():
        first, second = (refine(torch.zeros_like(truth), image, 4, progress=False) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad


def test_smooth_keeps_constants() -> None:
    constant = torch.full((1, 3, 6, 7, 8), 2.0)
    torch.testing.assert_close(smooth(constant), constant)
