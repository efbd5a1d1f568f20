"""The flow that lies between the two directions of a registration, and half of a displacement: for a middle space."""

import torch
from torch import Tensor

from common.fields import compose, integrate, inverse_error, smooth_near

ROUGH = 0.2  # voxels; the integration of smooth velocities is up to a tenth off


def flow_between(forward: Tensor, backward: Tensor, *, iterations: int = 20, tolerance: float = 0.02) -> Tensor:
    """Stationary velocity v whose flow is nearest to both directions: exp(v) to `forward`, exp(-v) to `backward`.

    v_0 = (forward - backward) / 2,  v <- v + s ((forward - exp(v)) - (backward - exp(-v))) / 2

    Swapped directions give -v to the last bit, so that exp(v) and exp(-v) are inverse whatever the two were. Where they
    fold, no flow is near to them: last, v is smoothed where exp(v) and exp(-v) are more than ROUGH apart from inverse,
    as long as there is such a place. The step s is halved where it did not help.

    Args:
        forward: (B, 3, I, J, K) in voxels, of the moving scan onto the fixed one: moving(x + forward(x)).
        backward: likewise, of the fixed scan onto the moving one, on the same grid.
        iterations: cap of the rounds, and of those that smooth.
        tolerance: voxels; it ends when no voxel would move further.

    Returns:
        (B, 3, I, J, K) in voxels per unit time, for `common.fields.integrate`.

    Source: symmetric log-domain demons, Vercauteren et al., MICCAI 2008, average the two directions in the domain of
        velocities as well; this iteration from finished fields is ours.
    """
    velocity, share = (forward - backward) / 2, 1.0
    rest = _apart(velocity, forward, backward)
    for _ in range(iterations):
        if float(rest.norm(dim=1).max()) < tolerance or share < 0.1:
            break
        trial = velocity + share * rest
        left = _apart(trial, forward, backward)
        if float(left.square().mean()) < float(rest.square().mean()):
            velocity, rest = trial, left
        else:
            share /= 2
    for _ in range(iterations):
        ways = integrate(velocity), integrate(-velocity)
        rough = torch.maximum(inverse_error(*ways), inverse_error(*ways[::-1])) > ROUGH
        if not bool(rough.any()):
            break
        velocity = smooth_near(velocity, rough.to(velocity.dtype))
    return velocity


def _apart(velocity: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """Half of what the flow lacks of both directions; of the swapped ones the negative, to the last bit."""
    return ((forward - integrate(velocity)) - (backward - integrate(-velocity))) / 2


def half(disp: Tensor, *, iterations: int = 20, tolerance: float = 0.01) -> Tensor:
    """The displacement h that is `disp` when done twice, compose(h, h) = disp, by a fixed point.

    h_0 = disp / 2,  h <- h + (disp - compose(h, h)) / 2

    A round leaves half of the slope of h of what was wrong, where linear interpolation does not blur it. Where `disp`
    folds there may be no such h.

    Args:
        disp: (B, 3, I, J, K) in voxels.
        iterations: cap of the rounds.
        tolerance: voxels; it ends when compose(h, h) is that near to `disp` everywhere.

    Source: the square root of a transformation of Arsigny et al., A log-Euclidean framework for statistics on
        diffeomorphisms, MICCAI 2006; this iteration, in place of theirs by gradient descent, is ours.
    """
    found = disp / 2
    for _ in range(iterations):
        rest = disp - compose(found, found)
        if float(rest.norm(dim=1).max()) < tolerance:
            break
        found = found + rest / 2
    return found
