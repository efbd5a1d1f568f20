"""Half of a displacement, and the middle of two directions."""

import pytest
import torch
from torch import Tensor

from common.fields import compose, integrate, inverse_error, invert
from common.halves import half, halfway


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


def test_the_middle_favours_neither() -> None:
    """Two directions that disagree: swapped, the halves are swapped to the bit, and lead from end to end."""
    forward = integrate(smooth(0, 3.0))
    backward = invert(forward) + 0.3 * smooth(1, 1.0)
    to_moving, to_fixed = halfway(forward, backward)
    other = halfway(backward, forward)
    assert torch.equal(to_moving, other[1]) and torch.equal(to_fixed, other[0])
    through = compose(to_moving, invert(to_fixed))
    ends = forward, invert(backward)
    apart = (ends[0] - ends[1]).norm(dim=1).max()
    assert apart > 0.3 and (through - sum(ends) / 2).norm(dim=1).max() < 0.2 * apart


def test_the_middle_of_one_map() -> None:
    """Directions that agree: both halves are those of the map."""
    forward = integrate(smooth(2, 3.0))
    to_moving, to_fixed = halfway(forward, invert(forward))
    assert (to_moving - half(forward)).norm(dim=1).max() < 0.05
    assert inverse_error(to_moving, to_fixed).max() < 0.05
