"""The flow between two directions, and half of a displacement."""

import pytest
import torch
from torch import Tensor

from common.fields import compose, integrate, inverse_error, invert, jacobian_determinant
from common.halves import flow_between, half


def smooth(seed: int, voxels: float) -> Tensor:
    """A velocity of long waves, 0 at the border, up to so many voxels."""
    torch.manual_seed(seed)
    field = torch.nn.functional.interpolate(torch.randn(1, 3, 2, 2, 2), size=(24, 26, 28), mode="trilinear")
    for axis, n in ((2, 24), (3, 26), (4, 28)):
        window = torch.sin(torch.linspace(0, torch.pi, n)) ** 2
        field = field * window.view([-1 if a == axis else 1 for a in range(5)])
    return field * voxels / field.norm(dim=1).max()


@pytest.mark.parametrize("voxels", [0.5, 4.0])
def test_half_of_a_flow(voxels: float) -> None:
    """The flow of half the time, which is not half of the displacement."""
    velocity = smooth(0, voxels)
    whole, truth = integrate(velocity), integrate(velocity / 2)
    found = half(whole)
    assert (found - truth).norm(dim=1).max() < 0.02 * voxels
    assert (compose(found, found) - whole).norm(dim=1).max() < 0.02
    if voxels > 1:
        assert (whole / 2 - truth).norm(dim=1).max() > 5 * (found - truth).norm(dim=1).max()


def test_the_flow_of_one_map() -> None:
    """Directions that agree: their flow is found."""
    velocity = smooth(2, 3.0)
    found = flow_between(integrate(velocity), integrate(-velocity))
    assert (found - velocity).norm(dim=1).max() < 0.05
    assert (half(integrate(found)) - integrate(velocity / 2)).norm(dim=1).max() < 0.05


def test_the_flow_favours_neither_direction() -> None:
    """Two that disagree: swapped, its sign changes and nothing else; it is no further from the one than the other."""
    forward = integrate(smooth(0, 3.0))
    backward = invert(forward) + 0.3 * smooth(1, 1.0)
    found, other = flow_between(forward, backward), flow_between(backward, forward)
    assert torch.equal(found, -other)
    there, back = integrate(found), integrate(other)
    error = inverse_error(there, back)  # of linear interpolation alone: a known flow of this size has it as well
    assert error.mean() < 0.01 and error.max() < 0.1
    ends = forward, invert(backward)
    apart = (ends[0] - ends[1]).norm(dim=1).max()
    assert apart > 0.25 and (there - sum(ends) / 2).norm(dim=1).max() < 0.2 * apart


def test_a_fold_has_no_flow() -> None:
    """A direction that folds: what is found does not, and has an inverse; away from the fold it is as it was."""
    plain = integrate(smooth(0, 2.0))
    forward = plain.clone()
    forward[:, 0, 10:14, 10:16, 10:16] -= torch.tensor([0.0, 3.0, -3.0, 0.0]).view(1, 4, 1, 1)
    assert jacobian_determinant(forward).min() < 0
    found = flow_between(forward, invert(plain))
    assert torch.equal(found, -flow_between(invert(plain), forward))
    there = integrate(found)
    assert jacobian_determinant(there).min() > 0 and inverse_error(there, integrate(-found)).max() <= 0.2
    assert (there - plain)[..., :5].norm(dim=1).max() < 0.05
