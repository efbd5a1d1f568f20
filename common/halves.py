"""Half of a displacement, and the two halves of a registration that was done both ways: for a space in the middle."""

import torch
from torch import Tensor

from common.fields import compose, invert


def half(disp: Tensor, *, iterations: int = 10, tolerance: float = 0.01) -> Tensor:
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


def halfway(forward: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """From the middle to either end, of a pair registered in both directions.

    a = (half(forward) + half(backward)^-1) / 2,   b = (half(backward) + half(forward)^-1) / 2

    moving(x + a(x)) and fixed(x + b(x)) meet in the middle. Swapping the scans swaps `forward` and `backward`, and so a
    and b: the middle stays.

    Args:
        forward: (B, 3, I, J, K) in voxels, of the moving scan onto the fixed one: moving(x + forward(x)).
        backward: likewise, of the fixed scan onto the moving one, on the same grid.
    """
    there, back = half(forward), half(backward)
    return torch.lerp(there, invert(back), 0.5), torch.lerp(back, invert(there), 0.5)
