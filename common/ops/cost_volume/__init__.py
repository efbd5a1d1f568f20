"""Cost volumes: the scores of each fixed voxel against a window of moving voxels, and a pyramid of them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from common.ops import _checks
from common.ops._dispatch import choose, on_plain_tensors, scripted_as
from common.ops.cost_volume import reference
from common.ops.cost_volume.lean import cost_volume_lean
from common.ops.cost_volume.reference import cost_volume_reference
from common.ops.warp.reference import voxel_coords

SIMILARITIES = ("dot", "ssd")
PADDINGS = ("border", "zeros")


@scripted_as(reference.cost_volume)
@on_plain_tensors
def cost_volume(
    feat_fixed: Tensor,
    feat_moving: Tensor,
    radius: int,
    disp: Tensor | None = None,
    *,
    similarity: str = "dot",
    padding: str = "border",
    backend: str | None = None,
) -> Tensor:
    """Score of each fixed voxel with the moving features at x + disp(x) + d, for every offset d of a window.

    dot: out[d](x) = <feat_fixed(x), feat_moving(x + disp(x) + d)>,  d in {-r..r}^3
    ssd: out[d](x) = |feat_fixed(x) - feat_moving(x + disp(x) + d)|^2

    Beside the result, the lean layer holds the padded features and buffers of at most `lean.BLOCK` (4 MiB on a CPU, or
    one cube of (r+1)^3 voxels); with a `disp`, of `lean.BUDGET` (32 MiB, or one plane of the grid), and with gradients
    the result once more. The triton layer holds nothing, and
    leaves gradients to the lean one, which samples by `common.ops.warp`: on CUDA as deterministic as that.

    Args:
        feat_fixed: (B, C, I, J, K) features.
        feat_moving: (B, C, I, J, K) features; with a `disp`, any grid (B, C, I', J', K').
        radius: half width r of the window in voxels of the moving grid.
        disp: (B, 3, I, J, K) displacement in voxels, to the middle of each voxel's window (sampled linearly), or None.
        similarity: "dot" or "ssd".
        padding: outside the moving grid take the nearest voxel ("border") or zeros ("zeros").
        backend: "reference", "lean", "triton", or None to choose by device.

    Returns:
        (B, (2r+1)^3, I, J, K) in the dtype of `feat_fixed`; offsets ordered i slowest, k fastest.

    Raises:
        ValueError: shapes, radius, similarity or padding are not as above.

    Source: SAMConvex sections 2.2 and 2.3 (its released code takes "ssd" with padding "border"); ConvexAdam takes "ssd"
    with "zeros" and orders the offsets the other way round. With `disp`: the look-up of RAFT section 3.2, in 3-D.
    """
    op = "cost_volume"
    _checks.volume(op, "feat_fixed", feat_fixed)
    _checks.volume(op, "feat_moving", feat_moving, channels=feat_fixed.shape[1])
    _checks.require(isinstance(radius, int) and radius >= 0, op, "radius", "be >= 0", radius)
    _checks.require(similarity in SIMILARITIES, op, "similarity", f"be one of {SIMILARITIES}", repr(similarity))
    _checks.require(padding in PADDINGS, op, "padding", f"be one of {PADDINGS}", repr(padding))
    if disp is None:
        _checks.same_grid(op, "feat_fixed", feat_fixed, "feat_moving", feat_moving)
    else:
        batches = len(feat_fixed), len(feat_moving)
        _checks.require(batches[0] == batches[1], op, "feat_moving", f"have batch {batches[0]}", batches[1])
        devices = feat_fixed.device, feat_moving.device
        must = f"be on the device of 'feat_fixed' ({devices[0]})"
        _checks.require(devices[0] == devices[1], op, "feat_moving", must, devices[1])
        _checks.volume(op, "disp", disp, channels=3)
        _checks.same_grid(op, "feat_fixed", feat_fixed, "disp", disp)
    layer = choose(op, feat_fixed, backend)
    if layer == "reference":
        return cost_volume_reference(feat_fixed, feat_moving, radius, disp, similarity, padding)
    if layer == "triton":
        from common.ops.cost_volume.kernel import cost_volume_triton

        return cost_volume_triton(feat_fixed, feat_moving, radius, disp, similarity, padding)
    return cost_volume_lean(feat_fixed, feat_moving, radius, disp, similarity, padding)


class CorrelationPyramid:
    """The features of a pair at several resolutions, built once; a call looks up one level's window of scores.

        pyramid = CorrelationPyramid.pooled(feat_fixed, feat_moving, levels=3, radius=3)
        for level in reversed(range(3)):
            scores = pyramid(level, disp)      # (B, 343, I, J, K) around x + disp(x)

    Nothing of the size of a cost volume is stored: a look-up computes its window.

    Args:
        feats_fixed, feats_moving: one (B, C, I, J, K) tensor a level. Where the moving grid is coarser by whole
            factors, the middle of a window is mapped onto it: ((x + disp(x)) + 0.5) / factor - 0.5.
        radii: half width of the window at each level.
        similarity, padding, backend: of `cost_volume`.

    Raises:
        ValueError: different numbers of levels.

    Source: the correlation block of RAFT (section 3.2), whose all-pairs volume is too large in 3-D, so that scores are
    computed on look-up; SAMConvex section 2.4 reads one level after the other.
    """

    def __init__(
        self,
        feats_fixed: Sequence[Tensor],
        feats_moving: Sequence[Tensor],
        radii: Sequence[int],
        *,
        similarity: str = "dot",
        padding: str = "border",
        backend: str | None = None,
    ) -> None:
        counts = len(feats_fixed), len(feats_moving), len(radii)
        _checks.require(
            len(set(counts)) == 1 and counts[0] > 0, "CorrelationPyramid", "radii", "have one entry a level", counts
        )
        self.fixed, self.moving, self.radii = list(feats_fixed), list(feats_moving), list(radii)
        sizes = [zip(fixed.shape[2:], moving.shape[2:]) for fixed, moving in zip(feats_fixed, feats_moving)]
        self.factors = [[-(-n // m) for n, m in size] for size in sizes]  # fixed voxels to a moving voxel
        self.options = {"similarity": similarity, "padding": padding, "backend": backend}

    @classmethod
    def pooled(
        cls, feat_fixed: Tensor, feat_moving: Tensor, levels: int, radius: int, **options: str
    ) -> "CorrelationPyramid":
        """As in RAFT: every level keeps the fixed grid, the moving features are halved by averaging."""
        _checks.require(levels >= 1, "CorrelationPyramid.pooled", "levels", "be >= 1", levels)
        moving = [feat_moving]
        for _ in range(levels - 1):
            moving.append(F.avg_pool3d(moving[-1], 2, ceil_mode=True, count_include_pad=False))
        pyramid = cls([feat_fixed] * levels, moving, [radius] * levels, **options)
        # not the ratio of the sizes, which are rounded up at every level: 9, 5, 3; an axis of one voxel stays
        pyramid.factors = [[min(2**level, n) for n in feat_fixed.shape[2:]] for level in range(levels)]
        return pyramid

    def __len__(self) -> int:
        return len(self.radii)

    def planes(self, level: int, begin: int, end: int) -> Tensor:
        """The scores of the planes begin..end of axis I alone, of a level whose two grids are one and without `disp`.

        Takes these planes and r beside them, so that a volume too large to be kept is had in slabs.
        """
        radius, size = self.radii[level], self.fixed[level].shape[2]
        first = max(begin - radius, 0)
        near = slice(first, min(end + radius, size))
        part = self.fixed[level][:, :, near], self.moving[level][:, :, near]
        return cost_volume(*part, radius, **self.options)[:, :, begin - first : end - first]

    def __call__(self, level: int, disp: Tensor | None = None) -> Tensor:
        """Scores (B, (2r+1)^3, I, J, K) at one level; `disp` is in voxels of that level's fixed grid."""
        fixed, moving = self.fixed[level], self.moving[level]
        if max(self.factors[level]) > 1:
            disp = _onto_coarser(fixed, self.factors[level], disp)
        return cost_volume(fixed, moving, self.radii[level], disp, **self.options)


def _onto_coarser(fixed: Tensor, factors: list[int], disp: Tensor | None) -> Tensor:
    """Displacement from the fixed index to the index on the coarser moving grid."""
    zero = fixed.new_zeros(1).expand(len(fixed), 3, *fixed.shape[2:]) if disp is None else disp
    factor = zero.new_tensor(factors).view(1, 3, 1, 1, 1)
    return (voxel_coords(zero) + 0.5) / factor - 0.5 - voxel_coords(zero * 0)
