"""SAMConvex (Li et al., MICCAI 2023): image pyramid, cost volume, coupled convex optimisation, composition."""

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import RegistrationWarning
from common.fields import compose, resize_disp, unpool_disp
from common.mind import box_mean, mind_features
from common.ops import CorrelationPyramid, warp
from samconvex.convex import THETAS, coupled_convex, inverse_consistent
from samconvex.sam import SAM

COUPLINGS = ("voxel", "normalised")


class MIND(nn.Module):
    """MIND-SSC averaged onto a coarser grid: training-free features for any modality.

    Args:
        radius, dilation: of `mind_ssc`.
        stride: voxels of the scan to one of the features, along each axis.
    """

    def __init__(self, radius: int = 1, dilation: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.radius, self.dilation, self.pooled = radius, dilation, stride

    def forward(self, image: Tensor, finest: bool = True) -> Tensor:
        """(B, C, I, J, K) -> (B, 12 C, I/stride, J/stride, K/stride); every channel has its own descriptor."""
        return mind_features(image, radius=self.radius, dilation=self.dilation, stride=self.pooled)


class SAMConvex(nn.Module):
    """Displacement by discrete optimisation, coarse to fine.

    Per level: warp the moving scan by what is known, take features of both, cost volume, coupled convex optimisation,
    and compose.

    Args:
        channels: C of each scan.
        features: "sam" (`samconvex.sam.SAM`, needs weights), "mind" (`MIND`, training-free) or a module
            (image, finest) -> (B, F, i, j, k) features on a coarser grid, corners aligned as in the released code; or,
            if it has an attribute `pooled`, averaged over blocks of so many voxels along each axis.
        radii: half width of the window at each level, coarse to fine; level number l of n works on scans reduced
            2^(n-1-l) times.
        thetas, smoothing: of `coupled_convex`, for the sum of squared differences as cost. The released code takes half
            of it, so that its thetas count twice here, and smooths 3 times.
        coupling: "voxel" couples in voxels of the features, so that it regularises; "normalised" as the released code.
        padding: of `cost_volume`, outside the moving features.
        cost_smoothing: number of 3x3x3 box means of the cost in space (ConvexAdam takes 2).
        budget: GiB that a cost volume may take. A larger one is never held: its slabs are computed anew in each of the
            seven rounds, which is slower. The other buffers are those of `cost_volume` and the features.
        consistent: also register fixed to moving at each level, and make the two inverses of each other.

    Source: SAMConvex section 2; Table 3 varies `radii`. The released code takes features of the warped scan anew at
    each level, as here.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        features: str | nn.Module = "mind",
        radii: Sequence[int] = (2, 3, 3),
        thetas: Sequence[float] = THETAS,
        smoothing: int = 1,
        coupling: str = "voxel",
        padding: str = "border",
        cost_smoothing: int = 0,
        consistent: bool = False,
        budget: float = 4.0,
    ) -> None:
        super().__init__()
        if not radii or min(radii) < 1:
            raise ValueError(f"SAMConvex() 'radii' must be one number >= 1 a level, got {tuple(radii)}")
        if coupling not in COUPLINGS:
            raise ValueError(f"SAMConvex() 'coupling' must be one of {COUPLINGS}, got {coupling!r}")
        if isinstance(features, str) and features not in ("sam", "mind"):
            raise ValueError(f"SAMConvex() 'features' must be 'sam', 'mind' or a module, got {features!r}")
        named = {"sam": lambda: SAM(channels), "mind": MIND}
        self.channels, self.features = channels, named[features]() if isinstance(features, str) else features
        self.radii, self.thetas, self.smoothing = tuple(radii), tuple(thetas), smoothing
        self.coupling, self.consistent, self.budget = coupling, consistent, budget
        self.padding, self.cost_smoothing = padding, cost_smoothing

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, 2C, I, J, K), first C channels moving, last C fixed -> displacement (B, 3, I, J, K) in voxels."""
        if image.ndim != 5 or image.shape[1] != 2 * self.channels:
            shape = f"(B, {2 * self.channels}, I, J, K), moving then fixed"
            raise ValueError(f"SAMConvex() 'image' must have shape {shape}, got {tuple(image.shape)}")
        levels = [image]
        for _ in self.radii[1:]:
            levels.append(halve(levels[-1]))
        disp = None
        for radius in self.radii:
            moving, fixed = levels.pop().chunk(2, dim=1)
            start = None if disp is None else resize_disp(disp, fixed.shape[2:])
            moved = moving if start is None else warp_onto_background(moving, start)
            found = self.features(torch.cat([moved, fixed]), not levels)
            feat_moving, feat_fixed = found.to(torch.promote_types(found.dtype, torch.float32)).chunk(2)
            with torch.autocast(image.device.type, enabled=False):  # displacements are float32
                update = self.solve(feat_fixed, feat_moving, radius)
            if start is None and not _traced():
                _warn_of_constants((moving, feat_moving), (fixed, feat_fixed))
                _warn_of_range(update, fixed, radius)
            update = box_mean(self.onto_scan(update, fixed.shape[2:]), times=3)
            disp = update if start is None else compose(start, update)
        return box_mean(disp, times=3)

    def solve(self, feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
        """One level: displacement on the grid of the features, by both directions if `consistent`."""
        disp = self.direction(feat_fixed, feat_moving, radius)
        if self.consistent:
            disp, _ = inverse_consistent(disp, self.direction(feat_moving, feat_fixed, radius))
        return disp

    def onto_scan(self, disp: Tensor, size: tuple[int, int, int]) -> Tensor:
        """From the grid of the features to that of the scan they were taken of, in its voxels."""
        factor = getattr(self.features, "pooled", None)
        return resize_disp(disp, size) if factor is None else unpool_disp(disp, factor, size)

    def direction(self, feat_fixed: Tensor, feat_moving: Tensor, radius: int) -> Tensor:
        """Cost volume and coupled convex optimisation; a volume above `budget` in slabs, computed in every round."""
        size = feat_fixed.shape[2:]
        step = None
        if self.coupling == "normalised":
            sizes = [torch.as_tensor(n, device=feat_fixed.device) for n in size]  # which a trace keeps as sizes
            step = 2 / (torch.stack(sizes) - 1).clamp(min=1)
        pyramid = CorrelationPyramid(
            [feat_fixed], [feat_moving], [radius], similarity="ssd", padding=self.padding, backend=None
        )
        volumes = 3 if self.cost_smoothing else 1  # a box mean holds two beside its result
        per_plane = 4 * (2 * radius + 1) ** 3 * feat_fixed[:, 0, 0].numel() * volumes
        planes = max(int(self.budget * 2**30 / per_plane), 1)
        if planes >= size[0] or torch.jit.is_tracing():  # a trace would keep the slabs of the size that it has seen
            cost = box_mean(pyramid(0), times=self.cost_smoothing)
        else:
            planes = max(planes - 2 * (radius + self.cost_smoothing), 1)  # what a slab looks at beside it
            cost = [
                functools.partial(self.slab, pyramid, begin, min(begin + planes, size[0]))
                for begin in range(0, size[0], planes)
            ]
        return coupled_convex(cost, radius, thetas=self.thetas, smoothing=self.smoothing, step=step)

    def slab(self, pyramid: CorrelationPyramid, begin: int, end: int) -> Tensor:
        """Costs of the planes begin..end along axis I."""
        first = max(begin - self.cost_smoothing, 0)
        last = min(end + self.cost_smoothing, pyramid.fixed[0].shape[2])
        cost = box_mean(pyramid.planes(0, first, last), times=self.cost_smoothing)
        return cost[:, :, begin - first : end - first].clone()  # the rest is let go


def _traced() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _warn_of_constants(moving: tuple[Tensor, Tensor], fixed: tuple[Tensor, Tensor]) -> None:
    """Say so if a scan, or what became of it, is the same everywhere up to rounding; each as (scan, features)."""
    for name, found in (("moving", moving), ("fixed", fixed)):
        spreads = [x.amax((2, 3, 4)) - x.amin((2, 3, 4)) <= 1e-5 * x.abs().amax((2, 3, 4)) for x in found]
        if any(bool(same.all()) for same in spreads):
            text = f"the features of the {name} scan are the same everywhere, so nothing says where to move"
            warnings.warn(text, RegistrationWarning, stacklevel=3)


def _warn_of_range(disp: Tensor, fixed: Tensor, radius: int, *, share: float = 0.05) -> None:
    """Say so if the coarsest level's displacement reaches the edge of its window in more than `share` of the scan."""
    inside = F.interpolate((fixed > fixed.amin()).float().amax(1, keepdim=True), size=disp.shape[2:]) > 0
    found = float(((disp.abs().amax(1, keepdim=True) >= radius - 0.5) & inside).sum() / inside.sum().clamp(min=1))
    if found > share:
        text = f"{100 * found:.0f} % of the fixed scan moves to the edge of the search range, or farther"
        warnings.warn(f"{text}; align the scans first or widen network_def::radii", RegistrationWarning, stacklevel=3)


def halve(image: Tensor) -> Tensor:
    """The next level of the image pyramid: voxel v of it is the 3x3x3 mean around voxel 2 v."""
    return F.avg_pool3d(image, 3, stride=2, padding=1, count_include_pad=False)


def warp_onto_background(image: Tensor, disp: Tensor) -> Tensor:
    """Warp a scan; where it does not reach, its smallest value, channel by channel."""
    low = image.amin((2, 3, 4), keepdim=True)
    return warp(image - low, disp, padding="zeros") + low
