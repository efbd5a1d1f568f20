"""Instance optimisation: improve any method's displacement for one pair, by the images alone."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from common.fields import resize_disp, unfold
from common.losses import box_sum, diffusion, lncc
from common.ops import warp


def smooth(disp: Tensor, *, times: int = 2) -> Tensor:
    """`times` 3x3x3 box means of (B, 3, I, J, K), borders repeated: nearly a cubic B-spline kernel for two and more."""
    for _ in range(times):
        disp = box_sum(F.pad(disp, (1,) * 6, mode="replicate"), 3)[:, :, 1:-1, 1:-1, 1:-1] / 27
    return disp


@torch.enable_grad()
def refine(
    disp: Tensor,
    image: Tensor,
    steps: int,
    *,
    window: int = 7,
    smoothness: float = 0.5,
    learning_rate: float = 0.5,
    shrink: int = 2,
    coarse_share: float = 0.2,
    progress: bool = True,
) -> Tensor:
    """Minimise -LNCC(moving(x + disp(x)), fixed) + smoothness * diffusion(disp) over the displacement, by Adam.

    disp = disp_0 + smooth(update), `update` starting at 0. The first `coarse_share` of the steps work on scans and
    displacement reduced `shrink` times, the rest on the full grid: coarse to fine. Last, `common.fields.unfold` smooths
    the few places where the result folds.

    Args:
        disp: (B, 3, I, J, K) displacement to start from, in voxels.
        image: (B, 2C, I, J, K) moving and fixed scan, intensities near [0, 1].
        steps: number of Adam steps in all; 0 returns `disp`.
        window: of the LNCC, in voxels.
        smoothness: weight of the diffusion term.
        learning_rate: of Adam, in voxels.
        shrink: reduction of the coarse stage.
        coarse_share: share of the steps spent there.
        progress: show a bar.

    Returns:
        (B, 3, I, J, K) displacement: the better of start and end by the loss, unfolded.

    Raises:
        ValueError: steps < 0.

    Source: instance optimisation as in ConvexAdam and uniGradICON, with SACB-Net's loss (eq. 1).
    """
    if steps < 0:
        raise ValueError(f"refine() 'steps' must be >= 0, got {steps}")
    if steps == 0:
        return disp
    image, start = image.detach().float(), disp.detach().float()
    bar = trange(steps, desc="refine", unit="step", file=sys.stderr, leave=False, disable=not progress)
    size = start.shape[2:]
    coarse = tuple(max(-(-n // shrink), 8) for n in size)
    result = start
    coarse_steps = round(steps * coarse_share)
    if coarse_steps:
        low = F.interpolate(image, size=coarse, mode="trilinear", align_corners=True)
        begin = resize_disp(start, coarse)
        change = _descend(begin, low, coarse_steps, window, smoothness, learning_rate, bar) - begin
        result = start + resize_disp(change, size)
    if steps > coarse_steps:
        result = _descend(result, image, steps - coarse_steps, window, smoothness, learning_rate, bar)
    bar.close()
    with torch.no_grad():
        before, after = (_loss(d, image, window, smoothness) for d in (start, result))
    return unfold(result if after <= before else start)


def _loss(disp: Tensor, image: Tensor, window: int, smoothness: float) -> Tensor:
    moving, fixed = image.chunk(2, dim=1)
    return lncc(warp(moving, disp), fixed, window=window) + smoothness * diffusion(disp)


def _descend(start: Tensor, image: Tensor, steps: int, window: int, smoothness: float, rate: float, bar) -> Tensor:
    update = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([update], lr=rate)
    for _ in range(steps):
        loss = _loss(start + smooth(update), image, window, smoothness)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    return (start + smooth(update)).detach()
