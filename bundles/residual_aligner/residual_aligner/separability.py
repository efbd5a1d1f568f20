"""How different the motions of two neighbouring points can be: the paper's section 2, predicted and measured."""

from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.run.cohort import CohortEvents
from common.space import mapping
from residual_aligner.network import VARIANTS


def dilation_sums(variant: str, *, undilated: int = 0) -> list[int]:
    """|r_k|_1 of the five modules of a variant, for the functions below.

    Args:
        variant: of `RAN`.
        undilated: how many of the 3x3x3 convolutions that never have a dilation count too. The paper's design rule,
            |r_k(q)|_1 = 2^(q-k) |r_k(0)|_1, holds for the two others of each regressor only, so that 0 gives its
            figure. All layers between the features and the heads are 2 more: they reach far on a coarse grid, and the
            advantage of a high q in the predicted curve nearly vanishes.
    """
    return [2 * dilation + undilated for dilation in VARIANTS[variant].dilation]


def accessible_range(pool: Sequence[int], dilation_sum: Sequence[int]) -> list[float]:
    """Accessible motion range a_k of every module, in voxels of the image.

    a_k = (s_k - 1) / 2,  s_k = p_k (1 + 2 |r_k|_1)

    Args:
        pool: p_k, voxels of the image a voxel of module k along an axis; not rising.
        dilation_sum: |r_k|_1, sum of the dilations of its 3x3x3 convolutions.

    Raises:
        ValueError: lists of other lengths, or a pool size that rises.

    Source: Definition 1 and eq. 5.
    """
    if len(pool) != len(dilation_sum) or not pool:
        raise ValueError(f"accessible_range() 'pool' must have the length of 'dilation_sum', got {len(pool)}")
    if any(a < b for a, b in zip(pool, pool[1:])):
        raise ValueError(f"accessible_range() 'pool' must not rise, got {tuple(pool)}")
    return [(p * (1 + 2 * r) - 1) / 2 for p, r in zip(pool, dilation_sum)]


def separability(distance: np.ndarray, pool: Sequence[int], dilation_sum: Sequence[int]) -> np.ndarray:
    """Largest difference of the motions of two points at a Chebyshev distance, in voxels of the image.

    delta(p) = 2 sum_(k'>=k) a_k'  for  p_k + 2 sum_(k'>k) a_k' <= p < p_(k-1) + 2 sum_(k'>=k) a_k',  0 for p < p_K

    Args:
        distance: p, any shape.
        pool, dilation_sum: see `accessible_range`.

    Source: Theorem 1 and eq. 9.
    """
    ranges = accessible_range(pool, dilation_sum)
    delta = np.zeros(np.shape(distance))
    rest = 0.0  # twice the ranges of the modules after k
    for p, a in zip(reversed(pool), reversed(ranges)):
        delta = np.where(np.asarray(distance) >= p + rest, rest + 2 * a, delta)
        rest += 2 * a
    return delta


def motion_pairs(
    disp: Tensor,
    fixed_label: Tensor,
    warped_label: Tensor,
    *,
    distance: int = 16,
    difference: int = 16,
    pairs: int = 200_000,
    seed: int = 0,
) -> np.ndarray:
    """How often pairs of correctly registered voxels have a distance and a difference of their motions.

    Over pairs x, y of voxels whose label is right after the registration, drawn evenly from all that are at most
    `distance` apart.

    Args:
        disp: (1, 3, I, J, K) in voxels.
        fixed_label, warped_label: (I, J, K) integer labels; 0 is background and takes no part.
        distance: largest Chebyshev distance |x - y|.
        difference: largest Chebyshev difference |disp(x) - disp(y)| that is counted.
        pairs: number drawn; those that meet a wrong voxel or leave the grid are lost.
        seed: of the draw.

    Returns:
        (distance, difference) counts: row d - 1 for distance d, column m for differences in [m, m + 1).

    Raises:
        ValueError: no voxel is right.

    Source: Fig. 7 (a); add up over pairs of scans, then `density`.
    """
    right = ((fixed_label == warped_label) & (fixed_label > 0)).cpu()
    places = right.nonzero()
    if not len(places):
        raise ValueError("motion_pairs() 'warped_label' must agree with 'fixed_label' somewhere, got no such voxel")
    random = torch.Generator().manual_seed(seed)
    first = places[torch.randint(len(places), (pairs,), generator=random)]
    second = first + torch.randint(-distance, distance + 1, (pairs, 3), generator=random)
    apart = (second - first).abs().amax(1)
    size = torch.tensor(right.shape)
    kept = ((second >= 0) & (second < size)).all(1) & (apart > 0)
    kept &= right[tuple(torch.minimum(second.clamp(min=0), size - 1).unbind(1))]
    first, second, apart = first[kept], second[kept], apart[kept]
    motion = disp[0].cpu().movedim(0, -1)
    gap = (motion[tuple(first.unbind(1))] - motion[tuple(second.unbind(1))]).abs().amax(1)
    counted = gap < difference
    flat = (apart[counted] - 1) * difference + gap[counted].long()
    return torch.bincount(flat, minlength=distance * difference).view(distance, difference).numpy()


def density(counts: np.ndarray, *, sigma: float = 1.0) -> np.ndarray:
    """Counts of `motion_pairs` as a density that sums to 1, smoothed by a Gaussian of `sigma` bins (Fig. 7)."""
    share = counts / counts.sum()
    return gaussian_filter(share, sigma, mode="reflect") if sigma else share  # reflected, so that nothing is lost


def apart_share(counts: np.ndarray, *, distance: int = 4, difference: int = 4) -> float:
    """Share of the pairs up to `distance` apart that move at least `difference` voxels unlike: Fig. 7's upper left."""
    near = counts[:distance]
    return float(near[:, difference:].sum() / max(near.sum(), 1))


def picture(counts: np.ndarray, variant: str | None = None) -> Figure:
    """Fig. 7 (a): pairs of right voxels over distance and difference of motions, dark where they are many.

    Shares of each column's own pairs, square root (the paper: the joint density); with a variant, its separability
    curve (eq. 9) as a red line.
    """
    share = density(counts)
    share = np.sqrt(share / share.sum(1, keepdims=True).clip(1e-12)).T
    distance, difference = counts.shape
    figure = Figure(figsize=(5.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    edges = (0.5, distance + 0.5, 0, difference)
    image = axes.imshow(share, cmap="Greys", origin="lower", extent=edges, aspect="auto", vmin=0)
    figure.colorbar(image, label="square root of the share of the pairs at this distance")
    if variant:
        steps = np.arange(1, distance + 1)
        curve = separability(steps, VARIANTS[variant].pool, dilation_sums(variant))
        axes.step(steps, curve, where="mid", color="red", label=f"separability of {variant} (eq. 9)")
        axes.legend(loc="upper left")
    axes.set(ylim=(0, difference), title="Pairs of correctly registered voxels")
    axes.set(xlabel="distance of the two voxels", ylabel="difference of their motions, voxels")
    return figure


class MotionPairs:
    """Handler of a `common.run.cohort.run`: `motion_pairs` of its pairs with labels, added up, on the working grid.

    Writes motion_pairs.npy and .png of the pairs that this run has registered; neither if no voxel of them is right.

    Args:
        output_dir: where the two files go.
        variant: whose curve the picture shows.
        distance, difference, pairs: of `motion_pairs`.
    """

    def __init__(
        self,
        output_dir: str,
        variant: str | None = None,
        *,
        distance: int = 16,
        difference: int = 16,
        pairs: int = 200_000,
    ) -> None:
        self.folder, self.variant = Path(output_dir), variant
        self.options = {"distance": distance, "difference": difference, "pairs": pairs}
        self.counts = np.zeros((distance, difference), np.int64)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(CohortEvents.ALL_PAIRS_COMPLETED, self._write)

    def _add(self, engine: Engine) -> None:
        for pair, found in zip(engine.state.batch, engine.state.output):
            if "fixed_label" in pair and "moving_label" in pair:
                disp, fixed, warped = _on_working_grid(pair | found)
                if ((fixed == warped) & (fixed > 0)).any():
                    self.counts += motion_pairs(disp, fixed, warped, **self.options)

    def _write(self, engine: Engine) -> None:
        counts = idist.all_reduce(torch.from_numpy(self.counts)).numpy()  # of all processes
        if idist.get_rank() > 0:
            return
        for name in ("motion_pairs.npy", "motion_pairs.png"):  # of an earlier run
            (self.folder / name).unlink(missing_ok=True)
        if not counts.any():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / "motion_pairs.npy", counts)
        picture(counts, self.variant).savefig(self.folder / "motion_pairs.png")
        share = f"{100 * apart_share(counts):.2f} % of those up to 4 voxels apart move 4 voxels or more unlike"
        print(f"{counts.sum()} pairs of correct voxels, {share}; in {self.folder}", flush=True)


def _on_working_grid(item: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Displacement (1, 3, I, J, K), fixed and warped labels (I, J, K) of a pair that a bundle has registered."""
    disp, grid = torch.as_tensor(item["pred"]).cpu(), np.asarray(item["image"].affine, np.float64)
    start = mapping.affine_transform(np.asarray(item["matrix"], np.float64))
    whole = mapping.compose(mapping.displacement_transform(disp.numpy(), grid), start)
    labels = []
    for name, transform in (("fixed_label", None), ("moving_label", whole)):
        label = item[name][0].cpu().numpy(), np.asarray(item[name].affine, np.float64)
        labels.append(mapping.resample(*label, tuple(disp.shape[1:]), grid, transform, nearest=True))
    return disp[None], *(torch.from_numpy(label).round() for label in labels)
