"""CorrelationPyramid: every level looks up the right place."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pairs import off_grid, pair
from torch import Tensor

from common.ops import CorrelationPyramid, cost_volume

FEAT = torch.zeros(2, 4, 3, 4, 5)


def nested(size: tuple[int, int, int], levels: int) -> Tensor:
    """Features with a code for each cube of 1, 2, 4, ... voxels: each level of a pooled pyramid knows its own cubes."""
    codes = []
    for level in range(levels):
        count = [-(-n // 2**level) for n in size]
        code = F.normalize(torch.randn(1, 48, *count), dim=1)
        for axis in (2, 3, 4):
            code = code.repeat_interleave(2**level, axis).narrow(axis, 0, size[axis - 2])
        codes.append(code)
    return torch.cat(codes, 1)


def best_offset(scores: Tensor) -> Tensor:
    """(1, 27, I, J, K) -> (3, I, J, K): the offset of the best score."""
    steps = torch.tensor(list(itertools.product((-1, 0, 1), repeat=3)))
    return steps[scores[0].argmax(0)].permute(3, 0, 1, 2)


@pytest.mark.parametrize("similarity", ("dot", "ssd"))
def test_pyramid_one_level(similarity: str) -> None:
    given, disp = pair((4, 5, 6)), off_grid((4, 5, 6))
    pyramid = CorrelationPyramid.pooled(**given, levels=1, radius=2, similarity=similarity, padding="zeros")
    assert len(pyramid) == 1
    for step in (None, disp):
        expected = cost_volume(**given, radius=2, disp=step, similarity=similarity, padding="zeros")
        assert torch.equal(pyramid(0, step), expected)


def test_pyramid_of_given_levels() -> None:
    """Each level has its own features, grid and radius."""
    fine, coarse = pair((4, 5, 6)), pair((2, 3, 3), channels=3)
    features = [[level[name] for level in (fine, coarse)] for name in ("feat_fixed", "feat_moving")]
    pyramid = CorrelationPyramid(*features, [1, 2], similarity="ssd")
    assert len(pyramid) == 2
    assert torch.equal(pyramid(0), cost_volume(**fine, radius=1, similarity="ssd"))
    assert torch.equal(pyramid(1), cost_volume(**coarse, radius=2, similarity="ssd"))


@pytest.mark.parametrize("level", (0, 1, 2))
@pytest.mark.parametrize("step", ((0, 0, 0), (1, 0, -1), (-1, 1, 1)))
def test_pyramid_looks_up_the_right_place(step: tuple[int, int, int], level: int) -> None:
    """fixed(x) = moving(x + shift): at x + disp(x), the best offset leads on to x + shift, in voxels of the level."""
    shift = torch.tensor([4, -3, 2])
    moving = nested((16, 16, 16), 3)
    fixed = moving.roll([-int(n) for n in shift], dims=(2, 3, 4))
    pyramid = CorrelationPyramid.pooled(fixed, moving, levels=3, radius=1)
    assert len(pyramid) == 3
    disp = (shift - 2**level * torch.tensor(step)).float().view(1, 3, 1, 1, 1).expand(1, 3, 16, 16, 16)
    found = best_offset(pyramid(level, disp))
    # only where x + shift is one of the two middle voxels of its cube of four, which no other cube's code reaches
    targets = (5, 6, 9, 10)
    i, j, k = ([t - int(n) for t in targets] for n in shift)
    found = found[:, i][:, :, j][:, :, :, k]
    assert torch.equal(found, torch.tensor(step).view(3, 1, 1, 1).expand_as(found))


@pytest.mark.parametrize("size", ((16, 12, 8), (9, 6, 16), (13, 10, 7)))
def test_pyramid_without_displacement(size: tuple[int, int, int]) -> None:
    """An image matched with itself stays where it is, also where halving rounds up (9, 5, 3 and 6, 3, 2)."""
    feat = nested(size, 3)
    pyramid = CorrelationPyramid.pooled(feat, feat, levels=3, radius=1, padding="zeros")
    for level in range(3):
        found = best_offset(pyramid(level))
        inner = [[x for x in range(n // 4 * 4) if x % 4 in (1, 2)] for n in size]
        found = found[:, inner[0]][:, :, inner[1]][:, :, :, inner[2]]
        assert found.numel() > 0 and not found.any(), f"level {level}"


def test_pyramid_gradients() -> None:
    """Every level teaches both features and the displacement."""
    fixed, moving = (x.requires_grad_() for x in pair((4, 5, 6)).values())
    disp = off_grid((4, 5, 6)).requires_grad_()
    pyramid = CorrelationPyramid.pooled(fixed, moving, levels=2, radius=1)
    for level in range(2):
        for gradient in torch.autograd.grad(pyramid(level, disp).square().sum(), (fixed, moving, disp)):
            assert gradient.isfinite().all() and gradient.any()


def test_pyramid_rejects() -> None:
    with pytest.raises(
        ValueError, match=r"CorrelationPyramid\(\) 'radii' must have one entry a level, got \(2, 2, 1\)"
    ):
        CorrelationPyramid([FEAT, FEAT], [FEAT, FEAT], [1])
    with pytest.raises(
        ValueError, match=r"CorrelationPyramid\(\) 'radii' must have one entry a level, got \(0, 0, 0\)"
    ):
        CorrelationPyramid([], [], [])
    with pytest.raises(ValueError, match=r"CorrelationPyramid.pooled\(\) 'levels' must be >= 1, got 0"):
        CorrelationPyramid.pooled(FEAT, FEAT, 0, 1)
    with pytest.raises(IndexError):
        CorrelationPyramid.pooled(FEAT, FEAT, 2, 1)(2)
