"""Random mirroring and rotation of a training pair, both scans and their classes alike."""

import math
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common.fields import identity
from common.labels import UNKNOWN
from common.ops import warp

SCANS, LABELS = ("moving", "fixed"), ("moving_label", "fixed_label")


def random_rotation(degrees: float) -> Tensor:
    """Rotation matrix (3, 3) about a random axis by an angle uniform in [-degrees, degrees]."""
    axis = F.normalize(torch.randn(3), dim=0)
    angle = math.radians(float(2 * torch.rand(1) - 1) * degrees)
    cross = torch.linalg.cross(torch.eye(3), axis.expand(3, 3))  # cross @ v = axis x v
    return torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def rotation_displacement(matrix: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(R - 1)(x - c) about the centre c of the grid: (1, 3, I, J, K) in voxels."""
    x = identity(size, matrix)
    centre = (torch.tensor(size, dtype=matrix.dtype) - 1).view(1, 3, 1, 1, 1) / 2
    return torch.einsum("ab,nb...->na...", matrix - torch.eye(3), x - centre)


class MirrorPaird(Transform):
    """Mirror both scans and label maps of a pair along each axis with probability `prob`.

    Mirrored along the first axis (left to right), the classes in `mirrored` change places: a left thalamus is still
    the one on the left side of the grid.

    Args:
        prob: for each axis, or three of them.
        mirrored: pairs of classes, see `common.labels.LabelTable`.
    """

    def __init__(
        self, prob: float | tuple[float, float, float] = 0.5, mirrored: list[tuple[int, int]] | None = None
    ) -> None:
        self.prob = (float(prob),) * 3 if isinstance(prob, (int, float)) else tuple(prob)
        if len(self.prob) != 3 or not all(0 <= p <= 1 for p in self.prob):
            raise ValueError(f"MirrorPaird() 'prob' must be one or three numbers from 0 to 1, got {prob}")
        self.mirrored = [tuple(pair) for pair in mirrored or []]

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        for axis, prob in enumerate(self.prob):
            if float(torch.rand(1)) < prob:
                for key in SCANS + tuple(key for key in LABELS if key in data):
                    data[key] = data[key].flip(axis + 1)
                if axis == 0:
                    data |= {key: self._swap(data[key]) for key in LABELS if key in data}
        return data

    def _swap(self, label: Tensor) -> Tensor:
        swapped = label.clone()
        for a, b in self.mirrored:
            swapped[label == a], swapped[label == b] = b, a
        return swapped


class RotatePaird(Transform):
    """Rotate both scans and label maps of a pair about the centre of their grid, by `random_rotation`.

    Outside the old grid scans are 0 and classes unknown.

    Args:
        degrees: largest angle; 0 leaves the pair as it is.
    """

    def __init__(self, degrees: float = 25.0) -> None:
        if degrees < 0:
            raise ValueError(f"RotatePaird() 'degrees' must be >= 0, got {degrees}")
        self.degrees = degrees

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        if not self.degrees:
            return data
        disp = rotation_displacement(random_rotation(self.degrees), tuple(data["fixed"].shape[1:]))
        for key in SCANS:
            data[key] = self._like(data[key], warp(_plain(data[key]), disp, padding="zeros"))
        for key in LABELS:
            if key in data:
                classes = warp(_plain(data[key]) - UNKNOWN, disp, mode="nearest", padding="zeros") + UNKNOWN
                data[key] = self._like(data[key], classes)
        return data

    @staticmethod
    def _like(old: Tensor, new: Tensor) -> Tensor:
        return MetaTensor(new[0], meta=dict(old.meta)) if isinstance(old, MetaTensor) else new[0]


def _plain(x: Tensor) -> Tensor:
    return torch.as_tensor(x.as_tensor() if isinstance(x, MetaTensor) else x)[None].float()
