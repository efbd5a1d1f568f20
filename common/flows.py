"""Displacements that cannot fold: the flow of a stationary velocity, and the velocity of a displacement."""

import torch
from torch import Tensor

from common.fields import integrate, jacobian_determinant, smooth_near

SQUARINGS = 4  # while a velocity is searched for
FINE = 8  # of the result
ROUNDS = 10  # of `velocity_of`, and of the smoothing in `flow_of`


def velocity_of(disp: Tensor) -> Tensor:
    """The stationary velocity whose flow comes nearest to a displacement.

    v <- v + disp - integrate(v), from v = disp, as long as the rest falls: the first term of the
    Baker-Campbell-Hausdorff formula for exp(v) composed with what is left. A displacement that folds has no velocity;
    what is found then is smoother than it.

    Args:
        disp: (B, 3, I, J, K) in voxels.

    Returns:
        (B, 3, I, J, K) in voxels per unit time.

    Source: Bossa, Hernandez and Olmos, Contributions to 3D diffeomorphic atlas estimation, MICCAI 2007 (the logarithm
        by that series).
    """
    velocity = best = disp
    least = float("inf")
    for _ in range(ROUNDS):
        rest = disp - integrate(velocity, steps=SQUARINGS + 2)
        size = float(rest.square().mean())
        if not size < least:
            break
        best, least = velocity, size
        velocity = velocity + rest
    return best


def flow_of(velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Displacement without a fold on its grid, and its velocity.

    A flow does not fold, but between voxels that it draws far apart its samples can. There the velocity is smoothed,
    and integrated anew, so that the result stays a flow, whose inverse is integrate(-velocity).

    Args:
        velocity: (B, 3, I, J, K) in voxels per unit time.
    """
    disp = integrate(velocity, steps=FINE)
    for _ in range(ROUNDS):
        folded = (jacobian_determinant(disp) <= 0).to(disp.dtype)
        if not bool(folded.any()):
            break
        velocity = smooth_near(velocity, torch.nn.functional.max_pool3d(folded, 3, 1, 1))
        disp = integrate(velocity, steps=FINE)
    return disp, velocity
