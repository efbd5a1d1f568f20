"""Training on made-up anatomy: pairs with a known displacement, their dataset, the loss that knows the truth."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset

from common import InputError
from common.fields import identity
from common.losses import diffusion
from common.ops import warp
from common.train.contrasts import draw_images
from common.train.shapes import FAMILIES, Draws, draw_anatomy, draw_motion, move, uniform

SMALLEST = 32  # voxels along an axis
LABELS = 64  # a made-up anatomy has fewer: 9 sheets of 5 parcels, or 40 parts, with the outside and the rim


class ShapePair(NamedTuple):
    """Two images of one made-up anatomy, differently deformed."""

    image: Tensor  # (2, I, J, K), moving then fixed, in [0, 1]
    label: Tensor  # (2, I, J, K), whole numbers from 0
    disp: Tensor  # (3, I, J, K) in voxels, pull-back: moving(x + disp(x)) = fixed(x)
    family: str  # of `common.train.shapes.FAMILIES`
    shared: bool  # whether both have the same contrast


def draw_pair(generator: Generator, size: tuple[int, int, int], *, same_contrast: float = 0.4) -> ShapePair:
    """A pair on the generator's device.

    Args:
        size: (I, J, K), at least 32 each.
        same_contrast: share of the pairs whose images have the same contrast.
    """
    anatomy = draw_anatomy(generator, size)
    motion = draw_motion(generator, size)
    label = torch.stack([move(anatomy.label, motion.moving), move(anatomy.label, motion.fixed)])
    shared = uniform(generator, 0, 1) < same_contrast
    return ShapePair(draw_images(generator, anatomy, label, shared), label, motion.disp[0], anatomy.family, shared)


class ShapePairs(Dataset):
    """Made-up pairs: item n is drawn from a generator seeded by (seed, n), in whatever process and order.

    Args:
        length: number of pairs; so large that none comes twice, it costs nothing.
        size: (I, J, K) in voxels.
        seed: of the pairs.
        same_contrast: share of the pairs whose images have the same contrast.
        device: where they are drawn; the workers of a DataLoader need "cpu". The same seed gives other pairs on a GPU.

    Raises:
        InputError: a size that is not three whole numbers from 32, a share outside [0, 1].
    """

    def __init__(
        self,
        length: int,
        size: tuple[int, int, int] = (48, 48, 48),
        seed: int = 0,
        *,
        same_contrast: float = 0.4,
        device: torch.device | str = "cpu",
    ) -> None:
        whole = isinstance(size, (list, tuple)) and all(type(n) is int and n >= SMALLEST for n in size)
        if not whole or len(size) != 3:
            raise InputError(f"--size must be three whole numbers of voxels, each at least {SMALLEST}, got {size}")
        if not 0 <= same_contrast <= 1:
            raise InputError(f"--same_contrast must be a share from 0 to 1, got {same_contrast}")
        self.length, self.size, self.seed = length, tuple(size), seed
        self.same_contrast, self.device = same_contrast, device

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        """{"image", "label", "disp", "family" (its number), "shared" (0 or 1)}, see `ShapePair`; labels as float32."""
        state = np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1)
        pair = draw_pair(Draws(int(state), self.device), self.size, same_contrast=self.same_contrast)
        numbers = {"family": FAMILIES.index(pair.family), "shared": int(pair.shared)}
        return {"image": pair.image, "label": pair.label.float(), "disp": pair.disp} | numbers


def prepare_shapes(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> tuple:
    """Packed image, and as target (B, 5, I, J, K) the moving and fixed labels and the true displacement."""
    target = torch.cat([batch["label"], batch["disp"]], dim=1)
    return tuple(x.to(device, non_blocking=non_blocking, **kwargs) for x in (batch["image"], target))


def near_borders(label: Tensor, reach: int = 3) -> Tensor:
    """Whether another label lies within `reach` voxels along each axis: (B, 1, I, J, K) -> bool of that shape."""
    largest, smallest = label.float(), -label.float()
    for axis in range(3):
        width = [2 * reach + 1 if a == axis else 1 for a in range(3)]
        padding = [reach if a == axis else 0 for a in range(3)]
        largest, smallest = (F.max_pool3d(x, width, 1, padding) for x in (largest, smallest))
    return largest != -smallest


class KnownFlowLoss(nn.Module):
    """Labels that should meet, the displacement that is known, and smoothness.

    sum_k mean_x (warp([moving = k], d) - [fixed = k])^2 + a mean_w |d - u| + smoothness diffusion(d)

    over at most `labels` labels k below 64 of each fixed map, drawn anew each time; w is 1 within 3 voxels of a label's
    border in the fixed map, 0.1 elsewhere, 0 where x + u(x) is outside the grid. a is `early` in the first part of a
    training, `late` afterwards: the truth sets it going, the labels, which ignore what no image shows, make it fine.

    Args:
        labels: that are compared at most; each costs a volume.
        early, late: weight a.
        until: share of the training that counts as early, see `Progress`.
        smoothness: weight of the diffusion.

    Source: the squared difference of one-hot maps instead of a mean Dice, which ignores the labels' sizes, is what
        SynthMorph's authors use now; the known displacement is ours.
    """

    capturable = True  # in a CUDA graph: nothing waits for the host

    def __init__(
        self,
        labels: int = 16,
        *,
        early: float = 1.0,
        late: float = 0.2,
        until: float = 0.2,
        smoothness: float = 0.1,
    ) -> None:
        super().__init__()
        if labels < 1:
            raise ValueError(f"KnownFlowLoss() 'labels' must be >= 1, got {labels}")
        self.labels, self.early, self.late, self.until, self.smoothness = labels, early, late, until, smoothness
        self.progress = 0.0

    @property
    def progress(self) -> float:
        """Share of the training that is behind."""
        return self._progress

    @progress.setter
    def progress(self, share: float) -> None:
        self._progress, self.weight = share, self.early if share < self.until else self.late

    def forward(self, disp: Tensor, target: Tensor) -> Tensor:
        """disp (B, 3, I, J, K) in voxels, target (B, 5, I, J, K) of `prepare_shapes` -> scalar."""
        disp = disp.float()
        moving, fixed, truth = target[:, :1], target[:, 1:2], target[:, 2:]
        return (
            self.overlap(disp, moving, fixed)
            + self.weight * self.distance(disp, truth, fixed)
            + self.smoothness * diffusion(disp)
        )

    def overlap(self, disp: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
        """Sum over labels of the mean squared difference of the one-hot maps, mean over the pairs."""
        present = fixed.new_zeros(len(fixed), LABELS).scatter_(1, fixed.flatten(1).long(), 1.0)
        chances, drawn = (present * (1 + torch.rand_like(present))).topk(min(self.labels, LABELS))
        drawn = drawn[:, :, None, None, None]
        warped = warp((moving == drawn).to(disp.dtype), disp)
        squares = (warped - (fixed == drawn).to(disp.dtype)).square().mean(dim=(2, 3, 4))
        return (squares * (chances > 0)).sum() / len(disp)

    @staticmethod
    def distance(disp: Tensor, truth: Tensor, fixed: Tensor) -> Tensor:
        """Weighted mean of |disp - truth| in voxels."""
        here = identity(tuple(disp.shape[2:]), disp)
        there = here + truth
        inside = ((there >= 0) & (there <= here[..., -1:, -1:, -1:])).all(1, keepdim=True)
        weight = inside * (0.1 + 0.9 * near_borders(fixed))
        return (weight * (disp - truth).norm(dim=1, keepdim=True)).sum() / weight.sum().clamp(min=1)
