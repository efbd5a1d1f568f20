"""SAMConvex (Li et al., MICCAI 2023): image pyramid, cost volume, coupled convex optimisation, composition."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.fields import compose, resize_disp
from common.ops import cost_volume, warp
from samconvex.convex import THETAS, coupled_convex, inverse_consistent
from samconvex.mind import box_mean, mind_ssc

COUPLINGS = ("voxel", "normalised")


class MIND(nn.Module):
    """MIND-SSC averaged onto a coarser grid: training-free features for any modality.

    Args:
        radius, dilation: of `mind_ssc`.
        stride: voxels of the scan to one of the features, along each axis.
    """

    def __init__(self, radius: int = 1, dilation: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.radius, self.dilation, self.stride = radius, dilation, stride

    def forward(self, image: Tensor, finest: bool) -> Tensor:
        """(B, C, I, J, K) -> (B, 12 C, I/2, J/2, K/2); every channel of the scan has its own descriptor."""
        feats = [mind_ssc(channel, radius=self.radius, dilation=self.dilation) for channel in image.split(1, 1)]
        return F.avg_pool3d(torch.cat(feats, 1), self.stride, ceil_mode=True, count_include_pad=False)


class SAMConvex(nn.Module):
    """Displacement by discrete optimisation, coarse to fine.

    Per level: warp the moving scan by what is known, take features of both, cost volume, coupled convex optimisation,
    and compose.

    Args:
        channels: C of each scan.
        features: module (image, finest) -> (B, F, i, j, k) features on a coarser grid of the same field of view.
        radii: half width of the window at each level, coarse to fine; level number l of n works on scans reduced
            2^(n-1-l) times.
        thetas, smoothing: of `coupled_convex`, for the sum of squared differences as cost. The released code takes half
            of it, so that its thetas count twice here, and smooths 3 times.
        coupling: "voxel" couples in voxels of the features, so that it regularises; "normalised" as the released code.
        padding: of `cost_volume`, outside the moving features.
        cost_smoothing: number of 3x3x3 box means of the cost in space (ConvexAdam takes 2).
        consistent: also register fixed to moving at each level, and make the two inverses of each other.

    Source: SAMConvex section 3; Table 3 varies `radii`. The released code takes features of the warped scan anew at
    each level, as here.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        features: nn.Module | None = None,
        radii: Sequence[int] = (2, 3, 3),
        thetas: Sequence[float] = THETAS,
        smoothing: int = 1,
        coupling: str = "voxel",
        padding: str = "border",
        cost_smoothing: int = 0,
        consistent: bool = False,
    ) -> None:
        super().__init__()
        if not radii or min(radii) < 1:
            raise ValueError(f"SAMConvex() 'radii' must be one number >= 1 a level, got {tuple(radii)}")
        if coupling not in COUPLINGS:
            raise ValueError(f"SAMConvex() 'coupling' must be one of {COUPLINGS}, got {coupling!r}")
        self.channels, self.features = channels, MIND() if features is None else features
        self.radii, self.thetas, self.smoothing = tuple(radii), tuple(thetas), smoothing
        self.coupling, self.consistent = coupling, consistent
        self.padding, self.cost_smoothing = padding, cost_smoothing

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, 2C, I, J, K), first C channels moving, last C fixed -> displacement (B, 3, I, J, K) in voxels."""
        if image.ndim != 5 or image.shape[1] != 2 * self.channels:
            shape = f"(B, {2 * self.channels}, I, J, K), moving then fixed"
            raise ValueError(f"SAMConvex() 'image' must have shape {shape}, got {tuple(image.shape)}")
        levels = [image]
        for _ in self.radii[1:]:
            levels.append(F.avg_pool3d(levels[-1], 3, stride=2, padding=1, count_include_pad=False))
        disp = None
        for radius in self.radii:
            moving, fixed = levels.pop().chunk(2, dim=1)
            start = None if disp is None else resize_disp(disp, fixed.shape[2:])
            moved = moving if start is None else warp_onto_background(moving, start)
            update = self.step(moved, fixed, radius, finest=not levels)
            disp = update if start is None else compose(start, update)
        return box_mean(disp, times=3)

    def step(self, moving: Tensor, fixed: Tensor, radius: int, *, finest: bool) -> Tensor:
        """One level: features, cost, coupled convex, and the result on the grid of the scans."""
        feat_moving, feat_fixed = self.features(moving, finest), self.features(fixed, finest)
        disp = self.solve(feat_fixed, feat_moving, radius)
        if self.consistent:
            disp, _ = inverse_consistent(disp, self.solve(feat_moving, feat_fixed, radius))
        return box_mean(resize_disp(disp, fixed.shape[2:]), times=3)

    def solve(self, feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
        """Displacement on the grid of the features."""
        cost = cost_volume(feat_fixed, feat_moving, radius, similarity="ssd", padding=self.padding)
        cost = box_mean(cost, times=self.cost_smoothing)
        size = torch.tensor(feat_fixed.shape[2:], device=cost.device)
        step = 2 / (size - 1).clamp(min=1) if self.coupling == "normalised" else None
        return coupled_convex(cost, radius, thetas=self.thetas, smoothing=self.smoothing, step=step)


def warp_onto_background(image: Tensor, disp: Tensor) -> Tensor:
    """Warp a scan; where it does not reach, its smallest value, channel by channel."""
    low = image.amin((2, 3, 4), keepdim=True)
    return warp(image - low, disp, padding="zeros") + low
