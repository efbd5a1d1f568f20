"""Instance optimisation: improve any method's displacement for one pair, by the images alone."""

import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from common import RegistrationWarning
from common.fields import pool_disp, resize_disp, unfold, unpool_disp
from common.losses import box_sum, diffusion, lncc
from common.mind import mind_features
from common.ops import plain, warp


def smooth(disp: Tensor, *, times: int = 2) -> Tensor:
    """`times` 3x3x3 box means of (B, 3, I, J, K), borders repeated: nearly a cubic B-spline kernel for two and more."""
    for _ in range(times):
        disp = box_sum(F.pad(disp, (1,) * 6, mode="replicate"), 3)[:, :, 1:-1, 1:-1, 1:-1] / 27
    return disp


SIMILARITIES = ("lncc", "mind", "features")
POOLED = 2  # voxels along each axis of the blocks that MIND-SSC is averaged over
SMOOTHNESS = {"lncc": 0.5, "mind": 0.5, "features": 0.5}  # weights of the diffusion term, chosen on training pairs


@torch.enable_grad()
def refine(
    disp: Tensor,
    image: Tensor,
    steps: int,
    *,
    similarity: str = "lncc",
    features: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    window: int = 7,
    smoothness: float | None = None,
    learning_rate: float = 0.5,
    shrink: int = 2,
    coarse_share: float = 0.2,
    start_means: int = 8,
    progress: bool = True,
) -> Tensor:
    """Minimise dissimilarity(moving(x + disp(x)), fixed) + smoothness * diffusion(disp) over the displacement, by Adam.

    disp = disp_0 + smooth(update), `update` starting at 0, whose box means make it nearly a cubic B-spline. disp_0 is
    the given displacement, smoothed as well (by default nearly a Gaussian of 2.3 voxels): what is wrong in it from one
    voxel to the next a smooth update cannot take back. Where organs slide, that blurs the border of the motions too.
    Last, `common.fields.unfold` smooths the few places where the result folds.

    The dissimilarity is one of
      "lncc"      -LNCC of the scans. The first `coarse_share` of the steps work on scans and displacement reduced
                  `shrink` times, the rest on the full grid.
      "mind"      mean squared distance of MIND-SSC, averaged onto a grid of half resolution: for any two modalities.
      "features"  mean squared distance of what `features` makes of either scan, on its own grid.
    With features, they are taken once and warped, and the update lives on their grid.

    Args:
        disp: (B, 3, I, J, K) displacement to start from, in voxels.
        image: (B, 2C, I, J, K) moving and fixed scan, intensities near [0, 1].
        steps: number of Adam steps in all; 0 returns `disp`.
        similarity: see above.
        features: (B, C, I, J, K) -> (B, F, i, j, k), corners aligned.
        mask: (B, 2, I, J, K) weights >= 0 of the voxels of the moving and of the fixed scan in the similarity; the
            moving ones are carried along by the given `disp`. Without any weight left, a warning says that the mask is
            ignored.
        window: of the LNCC, in voxels.
        smoothness: weight of the diffusion term; None takes SMOOTHNESS[similarity].
        learning_rate: of Adam, in voxels of the grid of the update.
        shrink: reduction of the coarse stage.
        coarse_share: share of the steps spent there.
        start_means: 3x3x3 box means of the given displacement, 0 for none; 8 was chosen on two validation pairs.
        progress: show a bar.

    Returns:
        (B, 3, I, J, K) displacement, unfolded: the result, or the given one as it is where the loss of the last stage
        finds that better.

    Raises:
        ValueError: steps < 0, an unknown similarity, "features" without `features`, a mask of another shape.

    Source: instance optimisation as in ConvexAdam (MIND) and SAMConvex section 2.5 (SAM features, dot product, which
    for unit vectors is half the squared distance away from 1); LNCC with SACB-Net's loss (eq. 1).
    """
    if steps < 0:
        raise ValueError(f"refine() 'steps' must be >= 0, got {steps}")
    if similarity not in SIMILARITIES or (similarity == "features") != (features is not None):
        wanted = f"one of {', '.join(SIMILARITIES)}, with 'features' for the last only"
        raise ValueError(f"refine() 'similarity' must be {wanted}, got {similarity!r}")
    if mask is not None and mask.shape != (len(image), 2, *image.shape[2:]):
        shape = (len(image), 2, *image.shape[2:])
        raise ValueError(f"refine() 'mask' must have shape {shape}, moving then fixed, got {tuple(mask.shape)}")
    if steps == 0:
        return plain(disp)
    image, result = plain(image).detach().float(), plain(disp).detach().float()
    weight = None if mask is None else _weight(plain(mask).detach().float(), result)
    smoothness = SMOOTHNESS[similarity] if smoothness is None else smoothness
    size = tuple(image.shape[2:])

    def to_grid(field: Tensor, at: tuple[int, ...]) -> Tensor:
        return pool_disp(field, POOLED) if similarity == "mind" else resize_disp(field, at)

    def to_scan(field: Tensor) -> Tensor:
        return unpool_disp(field, POOLED, size) if similarity == "mind" else resize_disp(field, size)

    if similarity == "lncc":
        coarse = tuple(max(-(-n // shrink), 8) for n in size)
        counts = [(coarse, round(steps * coarse_share)), (size, steps - round(steps * coarse_share))]
        stages = [(_lncc_fit(_resize(image, at), _resize(weight, at), window), at, n) for at, n in counts if n]
    else:
        stages = [(*_feature_fit(image, weight, features), steps)]
    bar = trange(steps, desc="refine", unit="step", file=sys.stderr, leave=False, disable=not progress)
    start, result = result, smooth(result, times=start_means)
    for fit, at, count in stages:
        result = result + to_scan(_descend(fit, to_grid(result, at), count, smoothness, learning_rate, bar))
    bar.close()
    with torch.no_grad():
        before, after = (fit(d) + smoothness * diffusion(d) for d in (to_grid(d, at) for d in (start, result)))
    return unfold(result if after <= before else start)


def _weight(mask: Tensor, disp: Tensor) -> Tensor | None:
    """(B, 1, I, J, K) weights on the fixed grid, or None if nothing is left of them."""
    moving, fixed = mask.chunk(2, dim=1)
    weight = warp(moving, disp, padding="zeros") * fixed
    if not (weight > 0).any():
        text = "the masks leave no voxel to compare, so the refinement ignores them"
        warnings.warn(text, RegistrationWarning, stacklevel=3)
        return None
    return weight


def _resize(image: Tensor | None, size: tuple[int, ...]) -> Tensor | None:
    if image is None or image.shape[2:] == size:
        return image
    return F.interpolate(image, size=tuple(size), mode="trilinear", align_corners=True)


def _lncc_fit(image: Tensor, weight: Tensor | None, window: int) -> Callable[[Tensor], Tensor]:
    moving, fixed = image.chunk(2, dim=1)
    if weight is not None:  # a window that touches a masked voxel says nothing about its middle
        touched = box_sum((weight <= 0).float(), window) > 0
        weight = weight if touched.all() else weight * ~touched
    return lambda disp: lncc(warp(moving, disp), fixed, window=window, mask=weight)


def _feature_fit(
    image: Tensor, weight: Tensor | None, features: Callable[[Tensor], Tensor] | None
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Mean over voxels of |features(moving)(x + disp) - features(fixed)|^2, and their grid. None: MIND-SSC."""
    with torch.no_grad():
        if features is None:
            moving, fixed = (mind_features(scan, stride=POOLED) for scan in image.chunk(2, dim=1))
            if weight is not None:
                weight = F.avg_pool3d(weight, POOLED, ceil_mode=True, count_include_pad=False)
        else:
            moving, fixed = (features(scan).float() for scan in image.chunk(2, dim=1))
            weight = _resize(weight, fixed.shape[2:])

    def fit(disp: Tensor) -> Tensor:
        distance = (warp(moving, disp) - fixed).square().sum(1, keepdim=True)
        return distance.mean() if weight is None else (distance * weight).sum() / weight.sum().clamp(min=1)

    return fit, tuple(fixed.shape[2:])


def _descend(fit: Callable[[Tensor], Tensor], start: Tensor, steps: int, smoothness: float, rate: float, bar) -> Tensor:
    """Smoothed update of `start` after so many steps of Adam."""
    update = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([update], lr=rate)
    for _ in range(steps):
        disp = start + smooth(update)
        loss = fit(disp) + smoothness * diffusion(disp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    return smooth(update).detach()
