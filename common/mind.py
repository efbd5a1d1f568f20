"""MIND-SSC: what a voxel's neighbourhood looks like to itself, the same in every modality; nothing to train."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The 12 pairs of face neighbours at distance sqrt(2), in the order of the descriptor's authors.
PAIRS = (
    ((0, -1, 0), (1, 0, 0)), ((0, 1, 0), (-1, 0, 0)), ((0, -1, 0), (-1, 0, 0)), ((0, 1, 0), (1, 0, 0)),
    ((0, 0, -1), (0, -1, 0)), ((0, 0, 1), (0, 1, 0)), ((0, 0, -1), (-1, 0, 0)), ((0, 0, 1), (1, 0, 0)),
    ((0, 0, -1), (0, 1, 0)), ((0, 0, 1), (0, -1, 0)), ((0, 0, -1), (1, 0, 0)), ((0, 0, 1), (-1, 0, 0)),
)  # fmt: skip


def mind_ssc(image: Tensor, *, radius: int = 1, dilation: int = 2) -> Tensor:
    """Self-similarity context of a scan.

    D_p(x) = mean over the (2r+1)^3 patch of (I(x + d a_p) - I(x + d b_p))^2, for the 12 pairs (a_p, b_p)
    MIND_p = exp(-(D_p - min_q D_q) / V),  V = mean_q (D_q - min D), clamped to [0.001, 1000] times its mean over x

    Args:
        image: (B, 1, I, J, K) scan; its border is repeated.
        radius: r of the patch, voxels.
        dilation: d, distance of the neighbours in voxels.

    Returns:
        (B, 12, I, J, K) in (0, 1].

    Raises:
        ValueError: more than one channel, radius < 0 or dilation < 1.

    Source: Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013; channel order as in ConvexAdam's code.
    """
    if image.ndim != 5 or image.shape[1] != 1:
        raise ValueError(f"mind_ssc() 'image' must have shape (B, 1, I, J, K), got {tuple(image.shape)}")
    if radius < 0 or dilation < 1:
        raise ValueError(f"mind_ssc() needs 'radius' >= 0 and 'dilation' >= 1, got {radius} and {dilation}")
    padded = F.pad(image, (dilation,) * 6, mode="replicate")

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        begin = [dilation * (1 + step) for step in offset]
        i, j, k = (slice(b, b + n) for b, n in zip(begin, image.shape[2:]))
        return padded[:, :, i, j, k]

    distance = image.new_empty(len(image), len(PAIRS), *image.shape[2:])
    for n, (a, b) in enumerate(PAIRS):  # volume by volume: what does not fit a CPU's cache takes it longest
        apart = box_mean((shifted(a) - shifted(b)).square(), radius=radius, padding="border")
        distance[:, n] = apart[:, 0]
    distance -= distance.amin(1, keepdim=True)
    spread = distance.mean(1, keepdim=True)
    level = spread.mean((1, 2, 3, 4), keepdim=True)
    spread = torch.minimum(torch.maximum(spread, level * 1e-3), level * 1e3).clamp(min=1e-12)  # a constant scan: all 1
    return distance.div_(-spread).exp_()


def mind_features(image: Tensor, *, radius: int = 1, dilation: int = 2, stride: int = 2) -> Tensor:
    """(B, C, I, J, K) -> (B, 12 C, I/stride, ...): MIND-SSC of each channel, averaged over blocks of stride^3 voxels.

    The faces of the two grids are aligned, not their corners: `common.fields.pool_disp` and `unpool_disp` lead over.
    """
    options = {"ceil_mode": True, "count_include_pad": False}
    channels = (mind_ssc(channel, radius=radius, dilation=dilation) for channel in image.split(1, 1))
    return torch.cat([F.avg_pool3d(channel, stride, **options) for channel in channels], 1)


def box_mean(x: Tensor, *, radius: int = 1, padding: str = "zeros", times: int = 1) -> Tensor:
    """`times` means over the (2r+1)^3 cube of (B, C, I, J, K): zeros outside counted, or the border repeated."""
    width = 2 * radius + 1
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # the same in a few nodes of the graph, but slower
        for _ in range(times):
            for axis in range(3):
                kernel, sides = [1, 1, 1], [0, 0, 0]
                kernel[axis], sides[axis] = width, radius
                if padding == "border":
                    around = [n for side in reversed(sides) for n in (side, side)]
                    x = F.avg_pool3d(F.pad(x, around, mode="replicate"), kernel, stride=1)
                else:
                    x = F.avg_pool3d(x, kernel, stride=1, padding=sides)
        return x
    for _ in range(times):
        for axis in (2, 3, 4):
            total, size = x.clone(), x.shape[axis]
            for shift in range(1, radius + 1):
                inner, beyond = max(size - shift, 0), min(shift, size)
                total.narrow(axis, 0, inner).add_(x.narrow(axis, size - inner, inner))
                total.narrow(axis, size - inner, inner).add_(x.narrow(axis, 0, inner))
                if padding == "border":
                    total.narrow(axis, 0, beyond).add_(x.narrow(axis, 0, 1))
                    total.narrow(axis, size - beyond, beyond).add_(x.narrow(axis, size - 1, 1))
            x = total
        x /= width**3
    return x
