"""Stage 1 of the training: one scan, displaced by a known rigid motion and a smooth deformation."""

import math
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor, nn

from common.fields import identity
from common.losses import diffusion
from common.ops import plain, warp
from common.train.augment import random_rotation
from residual_aligner.network import Registration


def smooth_displacement(
    size: tuple[int, int, int], *, amplitude: float, sigma: tuple[float, float] = (5.0, 16.0), seeds: int = 20
) -> Tensor:
    """Random vectors at `seeds` random voxels, spread by a Gaussian: (1, 3, I, J, K) in voxels.

    The longest vector has length min(a, s), with a uniform in [0, amplitude] and s, the Gaussian's width, uniform in
    `sigma`: steps of less than a width hardly fold.

    Source: the paper's training details (20 seeds, and a thin-plate spline, which is left out here). Widths as in the
    released code, which smooths 10 impulses and leaves them so, which makes the deformation shorter than 0.003 voxel;
    here it has the length that is asked for.
    """
    width = float(torch.empty(1).uniform_(*sigma))
    length = min(float(torch.rand(1)) * amplitude, width)
    places = [torch.randint(n, (seeds,)) for n in size]
    values = torch.zeros(1, 3, *size)
    values[0, :, places[0], places[1], places[2]] = 2 * torch.rand(3, seeds) - 1
    for axis in (2, 3, 4):
        values = _blur(values, width, axis)
    longest = values.norm(dim=1).max().clamp(min=1e-12)
    return values * (length / longest)


def _blur(x: Tensor, width: float, axis: int) -> Tensor:
    """Gaussian along one axis, zeros outside."""
    radius = math.ceil(3 * width)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / width).square()).to(x.dtype)
    rows = x.movedim(axis, -1)
    out = F.conv1d(rows.reshape(-1, 1, rows.shape[-1]), kernel.view(1, 1, -1), padding=radius)
    return out.view(rows.shape).movedim(-1, axis)


def rigid_matrix(rotation: float, translation: float) -> tuple[Tensor, Tensor]:
    """Rotation (3, 3) about a random axis by an angle uniform in [-rotation, rotation] degrees, and a shift (3,)."""
    matrix = random_rotation(rotation)
    return matrix, (2 * torch.rand(3) - 1) * translation


def synthetic_displacement(
    size: tuple[int, int, int], *, rotation: float = 45.0, translation: float = 8.0, amplitude: float = 16.0
) -> Tensor:
    """Smooth deformation, then a rigid motion about the centre of the grid: (1, 3, I, J, K) in voxels.

    disp(x) = R (x + s(x) - c) + c + t - x

    Args:
        rotation: largest angle in degrees.
        translation: largest shift along each axis, voxels.
        amplitude: largest length of the smooth part s, voxels.

    Source: paper section 4.2 and its appendix: rotations up to 45 degrees, as here (the released code: 180).
    """
    smooth = smooth_displacement(size, amplitude=amplitude)
    matrix, shift = rigid_matrix(rotation, translation)
    x = identity(size, smooth)
    centre = (torch.tensor(size) - 1).view(1, 3, 1, 1, 1) / 2
    moved = torch.einsum("ab,nb...->na...", matrix, x + smooth - centre)
    return moved + centre + shift.view(1, 3, 1, 1, 1) - x


class SyntheticPaird(Transform):
    """Make the "moving" scan of a pair to one with itself: "fixed" = moving(x + disp(x)), and adds "disp".

    Args: see `synthetic_displacement`.
    """

    def __init__(self, *, rotation: float = 45.0, translation: float = 8.0, amplitude: float = 16.0) -> None:
        self.options = {"rotation": rotation, "translation": translation, "amplitude": amplitude}

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        moving = data["moving"]
        disp = synthetic_displacement(tuple(moving.shape[1:]), **self.options)
        warped = warp(moving.as_tensor()[None], disp, padding="zeros")[0]
        fixed = MetaTensor(warped, meta=dict(moving.meta))  # which holds the affine
        return {"id": data["id"], "moving": moving, "fixed": fixed, "disp": disp[0]}


class SyntheticLoss(nn.Module):
    """mse(disp, truth) where there is something to see + smoothness * diffusion(disp), for a `TrainingStep`.

    disp is that of the fixed grid, (B, 3, I, J, K) in voxels, the target (B, 4, I, J, K) of `prepare_synthetic`: the
    truth and where it counts. Of the other direction no truth is known.

    Source: paper section 4.2 and its appendix; the foreground is ours: where both scans are empty no network can know.
    """

    def __init__(self, smoothness: float = 0.1) -> None:
        super().__init__()
        self.smoothness = smoothness

    def forward(self, found: Registration, image: Tensor, target: Tensor) -> Tensor:
        disp, truth, seen = found.disp, target[:, :3], target[:, 3:]
        error = ((disp - truth).square() * seen).sum() / (3 * seen.sum()).clamp(min=1)
        return error + self.smoothness * diffusion(disp)


def prepare_synthetic(batch: dict, device: torch.device, non_blocking: bool = False, **kwargs: object) -> tuple:
    """Input and target of a synthetic pair: known displacement, then 1 where a scan is not 0; for a `TrainingStep`."""
    image = plain(batch["image"])
    target = torch.cat([batch["disp"], (image != 0).any(1, keepdim=True).to(batch["disp"])], 1)
    image, target = (x.to(device, non_blocking=non_blocking, **kwargs) for x in (image, target))
    return image, target, (target,), {}
