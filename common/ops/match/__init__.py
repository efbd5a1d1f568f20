"""Similarity matching: where in its neighbourhood does each fixed voxel find its like?"""

from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.match import reference
from common.ops.match.lean import match_lean
from common.ops.match.reference import match_reference


@scripted_as(reference.match)
@on_plain_tensors
def match(feat_fixed: Tensor, feat_moving: Tensor, radius: int = 1, *, backend: str | None = None) -> Tensor:
    """Expected displacement under a softmax over the dot products with the neighbourhood.

    disp(x) = sum_d d * softmax_d( <feat_fixed(x), feat_moving(x + d)> ),  d in {-r..r}^3

    Args:
        feat_fixed: (B, C, I, J, K) features at the query voxels.
        feat_moving: (B, C, I, J, K) features searched; voxels outside are zero vectors, so that they
            keep the score 0 and take part in the softmax.
        radius: half width r of the search window in voxels.
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, 3, I, J, K) displacement in voxels of this grid, each component within [-r, r]; at least float32.

    Raises:
        ValueError: shapes differ or radius < 0.

    Source: SACB-Net eq. 8-10; no temperature, no division by sqrt(C), as in the released code.
    """
    _checks.volume("match", "feat_fixed", feat_fixed)
    _checks.volume("match", "feat_moving", feat_moving, channels=feat_fixed.shape[1])
    _checks.same_grid("match", "feat_fixed", feat_fixed, "feat_moving", feat_moving)
    _checks.require(isinstance(radius, int) and radius >= 0, "match", "radius", "be >= 0", radius)
    layer = choose("match", feat_fixed, backend)
    if layer == "reference":
        return match_reference(feat_fixed, feat_moving, radius)
    if layer == "triton":
        from common.ops.match.kernel import match_triton

        return match_triton(feat_fixed, feat_moving, radius)
    return match_lean(feat_fixed, feat_moving, radius)
