"""Random mirroring and rotation of a packed training pair, both scans and their classes alike; deformation of each."""

import math
from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common.fields import identity
from common.ops import warp
from common.train.labels import UNKNOWN


def random_rotation(degrees: float) -> Tensor:
    """Rotation matrix (3, 3) about a random axis by an angle uniform in [-degrees, degrees]."""
    axis = F.normalize(torch.randn(3), dim=0)
    angle = math.radians(float(2 * torch.rand(1) - 1) * degrees)
    cross = torch.linalg.cross(torch.eye(3), axis.expand(3, 3))  # cross @ v = axis x v
    return torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def rotation_displacement(matrix: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(R - 1)(x - c) about the centre c of the grid: (1, 3, I, J, K) in voxels."""
    x = identity(size, matrix)
    centre = (torch.tensor(size).to(matrix) - 1).view(1, 3, 1, 1, 1) / 2
    return torch.einsum("ab,nb...->na...", matrix - torch.eye(3).to(matrix), x - centre)


class SamePersond(Transform):
    """Now and then, register a scan with itself: "fixed" becomes "moving", "fixed_label" its label.

    With `DeformPaird` behind it, small known motions are trained on, so that a network learns to do little where there
    is little to do.

    Args:
        prob: how often.
    """

    def __init__(self, prob: float = 0.0) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"SamePersond() 'prob' must be from 0 to 1, got {prob}")
        self.prob = prob

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        if float(torch.rand(1)) < self.prob:
            data |= {
                fixed: data[moving]
                for moving, fixed in (("moving", "fixed"), ("moving_label", "fixed_label"))
                if moving in data
            }
        return data


class MirrorPaird(Transform):
    """Mirror "image" (2C, I, J, K) and, if there, the classes "label" (2, I, J, K) of a pair along random axes.

    Mirrored along the first axis (left to right), the classes in `mirrored` change places: a left thalamus is still
    the one on the left side of the grid.

    Args:
        prob: for each axis, or three of them.
        mirrored: pairs of classes, see `common.train.labels.LabelTable`; None, where they are not known, is said.
    """

    def __init__(
        self, prob: float | tuple[float, float, float] = 0.5, mirrored: list[tuple[int, int]] | None = None
    ) -> None:
        self.prob = (float(prob),) * 3 if isinstance(prob, (int, float)) else tuple(prob)
        if len(self.prob) != 3 or not all(0 <= p <= 1 for p in self.prob):
            raise ValueError(f"MirrorPaird() 'prob' must be one or three numbers from 0 to 1, got {prob}")
        self.mirrored = [tuple(pair) for pair in mirrored or []]
        if mirrored is None and self.prob[0] > 0:
            text = "scans are mirrored left to right, and which classes then change places is not known"
            print(f"{text}: give --mirrored_classes, [] if there are no sides, or --mirror_prob [0,p,p]", flush=True)

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        for axis, prob in enumerate(self.prob, 1):
            if float(torch.rand(1)) < prob:
                data |= {key: data[key].flip(axis) for key in ("image", "label") if key in data}
                if axis == 1 and "label" in data:
                    data["label"] = self._swap(data["label"])
        return data

    def _swap(self, label: Tensor) -> Tensor:
        swapped = label.clone()
        for a, b in self.mirrored:
            swapped[label == a], swapped[label == b] = b, a
        return swapped


class RotatePaird(Transform):
    """Rotate "image" and, if there, "label" of a pair about the centre of their grid, by `random_rotation`.

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
        image = data["image"]
        matrix = random_rotation(self.degrees).to(image.device)
        disp = rotation_displacement(matrix, tuple(image.shape[1:]))
        return data | {key: _pulled(data[key], key, [disp]) for key in ("image", "label") if key in data}


class DeformPaird(Transform):
    """Deform each scan of "image" and, if there, its half of "label" by a random displacement of its own.

    The displacement is interpolated, linearly along each axis, from normal numbers at control points. Outside the old
    grid scans are 0 and classes unknown.

    Args:
        amplitude: standard deviation at the control points, in voxels; 0 leaves the pair as it is.
        distance: of the control points, in voxels, at most.
    """

    def __init__(self, amplitude: float = 0.0, *, distance: int = 16) -> None:
        if amplitude < 0:
            raise ValueError(f"DeformPaird() 'amplitude' must be >= 0, got {amplitude}")
        if distance < 1:
            raise ValueError(f"DeformPaird() 'distance' must be >= 1, got {distance}")
        self.amplitude, self.distance = amplitude, distance

    def __call__(self, data: Mapping[Hashable, object]) -> dict:
        data = dict(data)
        if not self.amplitude:
            return data
        disps = [self._displacement(data["image"]) for _ in ("moving", "fixed")]
        return data | {key: _pulled(data[key], key, disps) for key in ("image", "label") if key in data}

    def _displacement(self, image: Tensor) -> Tensor:
        size = tuple(image.shape[1:])
        points = self.amplitude * torch.randn(1, 3, *(1 + math.ceil((n - 1) / self.distance) for n in size))
        return F.interpolate(points.to(image.device), size=size, mode="trilinear", align_corners=True)


def _pulled(value: MetaTensor, key: str, disps: list[Tensor]) -> MetaTensor:
    """A packed "image" or "label", as many parts as displacements, each sampled along its own."""
    parts, label = value.as_tensor()[None].chunk(len(disps), dim=1), key == "label"
    shift = UNKNOWN if label else 0  # what warp fills the outside with, 0, means unknown in a label
    mode = "nearest" if label else "linear"
    moved = [warp(part - shift, disp, mode=mode, padding="zeros") + shift for part, disp in zip(parts, disps)]
    return MetaTensor(torch.cat(moved, dim=1)[0], meta=dict(value.meta))
