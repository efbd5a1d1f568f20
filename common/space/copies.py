"""Small copies of a scan for its alignment: the same ones, however a file orders its axes and rounds its origin."""

import nibabel as nib
import numpy as np

SLACK = np.float32(1e-4)  # of a voxel: where two grids coincide, rounding must not decide on which side a sample lies


class Scan:
    """A scan with the centre, reach and side of its foreground (Otsu), and small copies of it.

    Its origin is moved to a lattice, and `shift` (mm), less than two voxels, leads back: x = x_here + shift. A descent
    carries the rounding of an origin in a file, 1e-5 mm, on to 0.1 mm, and so must not see it.
    """

    def __init__(self, array: np.ndarray, affine_ras: np.ndarray) -> None:
        self.array, self.affine = _in_ras_order(np.asarray(array, np.float32), np.asarray(affine_ras, np.float64))
        array = self.array
        self.step = 2.0 ** np.ceil(np.log2(np.linalg.norm(self.affine[:3, :3], axis=0).min()))
        self.shift = self.affine[:3, 3] - on_lattice(self.affine[:3, 3], self.step)
        self.affine[:3, 3] -= self.shift
        box = abs(np.prod(array.shape) * np.linalg.det(self.affine[:3, :3])) ** (1 / 3)
        small, affine = self._pooled(box / 60)
        self.threshold = _otsu(small)
        inside = small > self.threshold
        self.low, self.high = float(small.min()), float(np.percentile(small[inside], 99))
        # `high`: a few bright voxels must not use up the bins. `background`: the darkest voxel may be noise.
        self.background = float(np.median(small[~inside]))
        points = np.argwhere(inside) @ affine[:3, :3].T + affine[:3, 3]
        weight = np.minimum(small[inside], self.high).astype(np.float64) - self.background
        self.centre = weight @ points / weight.sum()
        self.side = max(abs(inside.sum() * np.linalg.det(affine[:3, :3])) ** (1 / 3), 0.35 * box)
        self.reach = max(float(np.sqrt(np.square(points - self.centre).sum(1).mean())), 0.2 * self.side)
        self.middle = (self.affine @ np.append((np.array(array.shape) - 1) / 2, 1))[:3]

    def _pooled(self, mm: float) -> tuple[np.ndarray, np.ndarray]:
        """Means over blocks of about `mm` a side, and their affine."""
        array, sizes = self.array, np.array(self.array.shape)
        factors = np.round(mm / np.linalg.norm(self.affine[:3, :3], axis=0)).astype(int)
        factors = np.clip(factors, 1, np.maximum(sizes // 4, 1))
        first = sizes % factors // 2
        array = array[tuple(slice(a, a + n // f * f) for a, n, f in zip(first, sizes, factors))]
        for axis, factor in enumerate(factors):
            blocks = array.shape[:axis] + (-1, factor) + array.shape[axis + 1 :]
            array = array.reshape(blocks).mean(axis + 1) if factor > 1 else array
        step = np.diag([*factors, 1.0])
        step[:3, 3] = first + (factors - 1) / 2
        return array, self.affine @ step

    def copy(self, mm: float, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """Copy of about `mm` spacing. Where a face holds background, more background lies beyond it and is added."""
        array, affine = self._pooled(mm)
        widths = np.rint(margin * self.side / np.linalg.norm(affine[:3, :3], axis=0)).astype(int)
        outside = [[np.mean(array.take(end, axis) > self.threshold) < 0.1 for end in (0, -1)] for axis in range(3)]
        pads = np.array(outside) * widths[:, None]
        step = np.eye(4)
        step[:3, 3] = -pads[:, 0]
        return np.pad(np.clip(array, self.low, self.high), pads, constant_values=self.background), affine @ step


def _in_ras_order(array: np.ndarray, affine_ras: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scan with its axes in closest RAS order, in memory too: which voxels are pooled and drawn, and in which order
    they are added up, must not depend on how a file stores them."""
    order = nib.orientations.io_orientation(affine_ras)
    turned = nib.orientations.apply_orientation(array, order)
    return np.ascontiguousarray(turned), affine_ras @ nib.orientations.inv_ornt_aff(order, array.shape)


def on_lattice(values: np.ndarray, step: float) -> np.ndarray:
    """The values, each moved to a multiple of `step`: no round number lies at the border between two of them."""
    return np.floor(values / step + 0.3717) * step


def translation(by: np.ndarray) -> np.ndarray:
    """4x4 matrix of a translation (3)."""
    return nib.affines.from_matvec(np.eye(3), by)


def _otsu(array: np.ndarray) -> float:
    """Threshold with the largest variance between the classes; the outer percent at either end is set aside."""
    low, high = np.percentile(array, (1, 99))
    if low == high:
        low, high = array.min(), array.max()
    counts, edges = np.histogram(np.clip(array, low, high), 256, (low, high))
    values = (edges[1:] + edges[:-1]) / 2
    below, total = counts.cumsum()[:-1], counts.sum()
    sums = (counts * values).cumsum()
    between = (sums[-1] * below / total - sums[:-1]) ** 2 / np.maximum(below * (total - below), 1)
    return float(edges[1 + between.argmax()])


def mask_of(copy: tuple[np.ndarray, np.ndarray], mask: np.ndarray | None, affine: np.ndarray) -> np.ndarray | None:
    """A mask on the grid of a copy, by nearest neighbour; what lies beyond the mask is as its border."""
    if mask is None:
        return None
    array, onto = copy
    mask, affine = _in_ras_order(mask, affine)
    inner = np.linalg.inv(affine) @ onto
    voxels = np.indices(array.shape).reshape(3, -1).T @ inner[:3, :3].T + inner[:3, 3]
    i, j, k = np.clip(np.rint(voxels + SLACK).astype(np.int64), 0, np.array(mask.shape) - 1).T
    return (mask[i, j, k] > 0).reshape(array.shape)
