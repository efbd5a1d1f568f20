"""Flows of stationary velocities: they do not fold, and the velocity of a displacement gives it back."""

import torch

from common.fields import compose, integrate, jacobian_determinant
from common.flows import flow_of, velocity_of
from common.refine import smooth


def velocity(length: float, *, times: int = 6, size: int = 28) -> torch.Tensor:
    """A smooth random one, up to so many voxels."""
    draw = torch.randn(1, 3, size, size, size, generator=torch.Generator().manual_seed(3))
    field = smooth(draw, times=times)
    return length * field / field.norm(dim=1).max()


def test_known_values_of_a_velocity() -> None:
    """A constant velocity flows as far as it is long; and a displacement of zero has none."""
    constant = torch.tensor([0.5, -1.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, 8, 8, 8)
    torch.testing.assert_close(velocity_of(constant), constant)
    torch.testing.assert_close(flow_of(constant)[0], constant)
    assert not velocity_of(torch.zeros(1, 3, 8, 8, 8)).any()


def test_velocity_of_a_flow() -> None:
    truth = velocity(4.0, times=12)
    disp = integrate(truth, steps=8)
    found = velocity_of(disp)
    inner = (..., *[slice(5, -5)] * 3)  # beyond, values come from outside
    assert (disp - truth).norm(dim=1)[inner].max() > 0.3, "a displacement is not its own velocity"
    assert (found - truth).norm(dim=1)[inner].max() < 0.06
    assert (flow_of(found)[0] - disp).norm(dim=1)[inner].max() < 0.03
    back = compose(disp, integrate(-truth, steps=8)).norm(dim=1)
    assert back[inner].mean() < 0.02


def test_a_folded_displacement_becomes_a_flow() -> None:
    """As near as it can be, without a fold."""
    folded = velocity(9.0, times=3)
    assert (jacobian_determinant(folded) <= 0).float().mean() > 0.01
    disp, flown = flow_of(velocity_of(folded))
    torch.testing.assert_close(disp, integrate(flown, steps=8))
    assert jacobian_determinant(disp).min() > 0
    assert (disp - folded).norm(dim=1).mean() < 0.5 * folded.norm(dim=1).mean()
