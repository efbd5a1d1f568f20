"""Instance optimisation: improve any method's displacement for one pair, by the images alone."""

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from tqdm import trange

from common import RegistrationWarning
from common.fields import integrate, pool_disp, resize_disp, sample_at, unfold, unpool_disp
from common.flows import SQUARINGS, flow_of, velocity_of
from common.graphs import Graphed
from common.losses import diffusion, lncc
from common.mind import mind_features
from common.ops import box_sum, plain, warp


def smooth(disp: Tensor, *, times: int = 2) -> Tensor:
    """`times` 3x3x3 box means of (B, 3, I, J, K), borders repeated: nearly a cubic B-spline kernel for two and more."""
    for _ in range(times):
        disp = box_sum(F.pad(disp, (1,) * 6, mode="replicate"), 3)[:, :, 1:-1, 1:-1, 1:-1] / 27
    return disp


SIMILARITIES = ("lncc", "mind", "features")
HUBER = 2.0  # mm: up to so far apart a pair of points counts by its square, beyond in proportion
LATTICES = (16, 8, 4)  # voxels from knot to knot of the grids on which points first draw the displacement
LEAST_FORETELLING = 2  # points of a half that say whether the others foretell them
POOLED = 2  # voxels along each axis of the blocks that MIND-SSC is averaged over
# Weights of the diffusion term: of LNCC and features chosen on training pairs of one contrast; of MIND on T2 and FLAIR
# moved by known fields to T1 (tests/bench/bench_universal.py): with 0.5 it follows what differs between the contrasts.
SMOOTHNESS = {"lncc": 0.5, "mind": 4.0, "features": 0.5}


class Guide(NamedTuple):
    """Pairs of points that belong together, on the grid of the scans."""

    fixed: Tensor  # (N, 3) in voxels
    moving: Tensor  # (N, 3) in voxels: where x + disp(x) should lead
    to_mm: Tensor  # (3, 3), mm of a step of a voxel along each axis
    weight: float


@torch.enable_grad()
def refine(
    disp: Tensor,
    image: Tensor,
    steps: int,
    *,
    similarity: str = "lncc",
    features: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    guide: Guide | None = None,
    window: int = 7,
    smoothness: float | None = None,
    learning_rate: float = 0.5,
    shrink: int = 2,
    coarse_share: float = 0.2,
    start_means: int = 8,
    progress: bool | Callable[[int, int], None] = True,
    graphs: bool = False,
    diffeomorphic: bool = False,
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

    If it is to be diffeomorphic, disp = integrate(v), v = v_0 + smooth(update): the flow of a stationary velocity,
    which cannot fold; v_0 is the velocity of disp_0 (`common.flows`). A step then takes three to four times as long.

    With a guide, guide.weight * mean_n huber(|to_mm (fixed_n + disp(fixed_n) - moving_n)|) is added, of which a pair
    that does not belong together draws with a limited force; before the first step the points alone draw the
    displacement, on up to three coarse grids: as long as one half of them, drawing, brings the other half nearer. So
    points that agree with each other carry the scans over a large motion, and scattered ones leave the start alone.

    Args:
        disp: (B, 3, I, J, K) displacement to start from, in voxels.
        image: (B, 2C, I, J, K) moving and fixed scan, intensities near [0, 1].
        steps: number of Adam steps in all; 0 returns `disp`.
        similarity: see above.
        features: (B, C, I, J, K) -> (B, F, i, j, k), corners aligned.
        mask: (B, 2, I, J, K) weights >= 0 of the voxels of the moving and of the fixed scan in the similarity; the
            moving ones are carried along by the given `disp`. Without any weight left, a warning says that the mask is
            ignored.
        guide: points of the one pair of the batch.
        window: of the LNCC, in voxels.
        smoothness: weight of the diffusion term; None takes SMOOTHNESS[similarity].
        learning_rate: of Adam, in voxels of the grid of the update.
        shrink: reduction of the coarse stage.
        coarse_share: share of the steps spent there.
        start_means: 3x3x3 box means of the given displacement, 0 for none; 8 was chosen on two validation pairs.
        progress: show a bar, in a terminal only; or a function that is told the steps done and their number.
        graphs: on a GPU, replay the steps as a CUDA graph (`common.graphs`), which spares the host their launches.
        diffeomorphic: see above; without steps, the flow that comes nearest to the given displacement.

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
        return flow_of(velocity_of(plain(disp).detach().float()))[0] if diffeomorphic else plain(disp)
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
    if guide is not None:
        pulls = [_pull(guide, size, at, pooled=similarity == "mind") for _, at, _ in stages]
        stages = [(_both(fit, pull, guide.weight), at, n) for (fit, at, n), pull in zip(stages, pulls)]
    shown = None if progress is True else True  # to tqdm, None is: not in a log
    bar = trange(steps, desc="refine", unit="step", file=sys.stderr, leave=False, disable=shown)
    done = itertools.count(1)

    def follow(loss: Tensor) -> None:
        bar.update()
        if not bar.disable:  # to read it is to wait for a GPU
            bar.set_postfix_str(f"loss {loss.item():.4f}")
        if callable(progress):
            progress(next(done), steps)

    start, result = result, smooth(result, times=start_means)
    result = result if guide is None else _drawn(guide, result, smoothness)
    field, flow = (velocity_of(result), _flow) if diffeomorphic else (result, _itself)
    for fit, at, count in stages:
        begin = to_grid(field, at)
        field = field + to_scan(_descend(fit, flow, begin, count, smoothness, learning_rate, follow, graphs))
    bar.close()
    result = flow_of(field)[0] if diffeomorphic else field
    with torch.no_grad():
        before, after = (fit(d) + smoothness * diffusion(d) for d in (to_grid(d, at) for d in (start, result)))
    if diffeomorphic:
        return result if after <= before else flow_of(velocity_of(start))[0]
    return unfold(result if after <= before else start)


def _flow(velocity: Tensor) -> Tensor:
    return integrate(velocity, steps=SQUARINGS)


def _itself(disp: Tensor) -> Tensor:
    return disp


def _both(fit: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], weight: float) -> Callable:
    return lambda disp: fit(disp) + weight * pull(disp)


def _pull(
    guide: Guide, size: tuple[int, ...], at: tuple[int, ...], *, pooled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Mean Huber distance of the points in mm, under a displacement on a grid of the size `at`, in its voxels."""
    if pooled:
        scale = guide.fixed.new_full((3,), float(POOLED))
        where = (guide.fixed + 0.5) / POOLED - 0.5
    else:
        scale = guide.fixed.new_tensor([(n - 1) / max(m - 1, 1) for n, m in zip(size, at)])
        where = guide.fixed / scale
    goal = guide.moving - guide.fixed

    def pull(disp: Tensor) -> Tensor:
        rest = (goal - sample_at(disp[0], where.T).T * scale) @ guide.to_mm.T
        length = (rest.square().sum(1) + 1e-6).sqrt()
        return torch.where(length < HUBER, length.square() / (2 * HUBER), length - HUBER / 2).mean()

    return pull


def _drawn(guide: Guide, disp: Tensor, smoothness: float) -> Tensor:
    """`disp` as the points alone draw it, from coarse to fine, as far as one half of them foretells the other."""
    size = tuple(disp.shape[2:])
    for knots in LATTICES:
        at = tuple(max(-(-n // knots), 4) for n in size)
        left = guide._replace(moving=guide.moving - sample_at(disp[0], guide.fixed.T).T)
        halves = [left._replace(fixed=left.fixed[n::2], moving=left.moving[n::2]) for n in (0, 1)]
        if len(left.fixed) < 2 * LEAST_FORETELLING:
            break
        pulls = [_pull(half, size, at) for half in halves]
        nothing = torch.zeros((1, 3, *at), device=disp.device)
        told = sum(pull(_draw(half, size, at, smoothness)) for half, pull in zip(halves[::-1], pulls))
        if not told < sum(pull(nothing) for pull in pulls):
            break
        disp = disp + resize_disp(_draw(left, size, at, smoothness), size)
    return disp


def _draw(guide: Guide, size: tuple[int, ...], at: tuple[int, ...], smoothness: float) -> Tensor:
    """The displacement on a grid of the size `at` that brings the points together, in its voxels."""
    update = torch.zeros((1, 3, *at), device=guide.fixed.device, requires_grad=True)
    pull, optimizer = _pull(guide, size, at), _Adam(update, 0.1)
    for _ in range(60):
        optimizer.step(pull(update) + smoothness * diffusion(update))
    return update.detach()


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


def _descend(
    fit: Callable[[Tensor], Tensor],
    flow: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    smoothness: float,
    rate: float,
    follow: Callable[[Tensor], None],
    graphs: bool,
) -> Tensor:
    """Smoothed update of `start`, of which `flow` makes a displacement, after so many steps of Adam."""
    update = torch.zeros_like(start, requires_grad=True)
    optimizer = _Adam(update, rate)

    def step() -> Tensor:
        disp = flow(start + smooth(update))
        loss = fit(disp) + smoothness * diffusion(disp)
        optimizer.step(loss)
        return loss.detach()

    run = Graphed(step, start.device, on=graphs)
    for _ in range(steps):
        follow(run())
    return smooth(update).detach()


class _Adam:
    """torch.optim.Adam of one tensor, without its class: that loads torch's compiler, which takes two CPU-seconds."""

    def __init__(self, parameter: Tensor, rate: float) -> None:
        self.parameter, self.rate = parameter, rate
        self.means, self.squares = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self.count = torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")  # there a graph counts

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        (slope,) = torch.autograd.grad(loss, self.parameter)
        state = [self.parameter], [slope], [self.means], [self.squares], [], [self.count]
        options = {"amsgrad": False, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
        adam(*state, lr=self.rate, foreach=False, capturable=self.count.is_cuda, **options)
