"""Means over people: of point maps, of fields of view, of scans and of label maps, all seen from one template space."""

from collections.abc import Iterable

import nibabel as nib
import numpy as np

from common.space import geometry, mapping

STRONGEST = 4.0  # times the detail that sharpening may add
HALVINGS = 8  # of the range in which its strength lies: to a 64th


def middle_of(grid: mapping.Grid) -> np.ndarray:
    """RAS mm of the middle of a grid."""
    return nib.affines.apply_affine(grid[1], (np.array(grid[0]) - 1) / 2)


def mean_map(maps: Iterable[mapping.Transform], grid: mapping.Grid) -> mapping.Transform:
    """m, the mean place of a template's points in n people, each turned and shifted onto the template first.

    m(x) = 1/n sum_i P_i T_i(x),   P_i = the rigid map with P_i A_i = a stretch that leaves the middle of the grid

    T_i takes a point of the template to person i, A_i = R_i S_i is its linear part (rotation R_i, symmetric stretch
    S_i), so that size and shape are averaged, and where a person lay in the scanner is not. After it, the maps T_i m^-1
    have a mean of their own that is the identity: the template that they make has the mean shape.

    Args:
        maps: T_i.
        grid: of the template; where m is sampled, unless all T_i are linear: then so is m.

    Source: Guimond, Meunier, Thirion, Average brain models: a convergence study, CVIU 2000: the mean of the residual
        deformations, inverted. P_i is ours: their maps are without an affine part.
    """
    size, affine = grid
    count, straight, disp, matrix = 0, 0, np.zeros((3, *size)), np.zeros((4, 4))
    for the_map in maps:
        linear = mapping.Transform(tuple(part for part in the_map.parts if isinstance(part, mapping.Affine)))
        posed = mapping.compose(the_map, mapping.affine_transform(_unposed(mapping.matrix_of(linear), grid)))
        count += 1
        if the_map.linear:
            straight, matrix = straight + 1, matrix + mapping.matrix_of(posed)
        else:
            disp += mapping.disp_of(posed, size, affine)
    if straight == count:
        return mapping.affine_transform(matrix / count)
    if straight:
        disp += straight * mapping.disp_of(mapping.affine_transform(matrix / straight), size, affine)
    return mapping.displacement_transform(disp / count, affine)


def _unposed(matrix: np.ndarray, grid: mapping.Grid) -> np.ndarray:
    """P: rigid, with P A(middle) = middle, and P A without rotation."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rotation = left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right
    middle = middle_of(grid)
    there = nib.affines.apply_affine(matrix, middle)
    return nib.affines.from_matvec(rotation.T, middle - rotation.T @ there)


def faded(the_map: mapping.Transform) -> mapping.Transform:
    """A map whose displacements fall to 0 around their grids, and do not end there at once.

    A network sees a template's foreground and little around it; a person who reaches further would be torn there, and
    the template with them. Each field is widened by a linear ramp from its border to 0, twice as long as the largest
    displacement at the border: that cannot fold.
    """
    parts = []
    for part in the_map.parts:
        if isinstance(part, mapping.Field):
            faces = [np.abs(part.disp.take(end, axis)).max() for axis in (1, 2, 3) for end in (0, -1)]
            width = int(np.ceil(2 * max(faces)))
            disp = np.pad(part.disp, [(0, 0), *[(width, width)] * 3], mode="linear_ramp")
            part = mapping.Field(disp, part.affine_ras @ nib.affines.from_matvec(np.eye(3), [-width] * 3))
        parts.append(part)
    return mapping.Transform(tuple(parts))


def mean_grid(reference: mapping.Grid, fields: list[tuple[mapping.Grid, np.ndarray]], spacing: float) -> mapping.Grid:
    """The grid of a template: axes in closest RAS order as the reference's, isotropic, as wide as its people's scans
    are along each axis in the median.

    Args:
        fields: the grid of each scan, and the matrix (RAS mm) that takes a point of the template to it.
        spacing: mm.
    """
    _, affine = geometry.working_grid(*reference, spacing)
    ends = []
    for (size, own), matrix in fields:
        corners = np.array(np.meshgrid(*((0, n - 1) for n in size), indexing="ij")).reshape(3, -1).T
        voxels = nib.affines.apply_affine(np.linalg.inv(matrix @ affine) @ own, corners)
        ends.append((voxels.min(0), voxels.max(0)))
    low, high = (np.median(end, axis=0).round(3) for end in zip(*ends))
    first = np.floor(low)
    size = tuple(int(n) for n in np.ceil(high - first) + 1)
    return size, affine @ nib.affines.from_matvec(np.eye(3), first)


class Blend:
    """Mean, spread and range of scans (C, I, J, K) on one grid, taken in one after the other; NaN is not seen."""

    def __init__(self) -> None:
        self.scans = 0

    def add(self, scan: np.ndarray, shown: np.ndarray) -> None:
        """Take in a scan.

        Args:
            shown: (I, J, K) bool, where it shows something.
        """
        seen = np.isfinite(scan)
        values = np.where(seen, scan, 0).astype(np.float64)
        slope = np.stack([steepness(channel) for channel in scan])
        if not self.scans:
            self.count, self.sum, self.squares, self.slopes = (np.zeros(scan.shape) for _ in range(4))
            self.low, self.high = np.full(scan.shape, np.inf), np.full(scan.shape, -np.inf)
            self.shown = np.zeros(scan.shape[1:])
        self.scans += 1
        self.count += seen
        self.sum += values
        self.squares += values**2
        self.slopes += np.where(np.isfinite(slope), slope, 0)
        self.low, self.high = np.fmin(self.low, scan), np.fmax(self.high, scan)
        self.shown += shown

    @property
    def inside(self) -> np.ndarray:
        """(I, J, K) where half of the scans or more show something; all, if there is no such place."""
        inside = self.shown >= self.scans / 2
        return inside if inside.any() else np.ones_like(inside)

    @property
    def mean(self) -> np.ndarray:
        """(C, I, J, K) float32; where no scan reaches, the smallest mean."""
        mean = self.sum / np.maximum(self.count, 1)
        return np.where(self.count > 0, mean, mean[self.count > 0].min()).astype(np.float32)

    @property
    def spread(self) -> np.ndarray:
        """(C, I, J, K) float32: standard deviation from scan to scan."""
        count = np.maximum(self.count, 1)
        return np.sqrt(np.maximum(self.squares / count - (self.sum / count) ** 2, 0)).astype(np.float32)

    @property
    def steepness(self) -> float:
        """Mean slope of the scans themselves inside: how sharp they are, each alone."""
        inside = np.broadcast_to(self.inside, self.count.shape)
        return float((self.slopes / np.maximum(self.count, 1))[inside].mean())

    def sharpened(self) -> np.ndarray:
        """(C, I, J, K) float32: the mean, made as sharp as the scans are and no sharper, each channel by itself.

        J = clip(M + a (M - G M), lowest scan, highest scan)

        G is a Gaussian of one voxel; a, up to STRONGEST, such that the mean slope |grad J| inside is that of the scans.
        The clipping at each voxel leaves nothing that no scan shows.
        """
        inside, result = self.inside, []
        for number, mean in enumerate(self.mean):
            detail = mean - geometry.smoothed(mean, np.ones(3))
            reached = self.count[number] > 0
            low, high = (np.where(reached, end[number], mean).astype(np.float32) for end in (self.low, self.high))
            target = (self.slopes[number] / np.maximum(self.count[number], 1))[inside].mean()
            least, most = 0.0, STRONGEST
            for _ in range(HALVINGS):
                strength = (least + most) / 2
                sharp = np.clip(mean + np.float32(strength) * detail, low, high)
                least, most = (strength, most) if steepness(sharp)[inside].mean() < target else (least, strength)
            result.append(np.clip(mean + np.float32(least) * detail, low, high))
        return np.stack(result)


def steepness(channel: np.ndarray) -> np.ndarray:
    """|grad| per voxel of (I, J, K), by central differences."""
    return np.sqrt(sum(slope.astype(np.float64) ** 2 for slope in np.gradient(channel)))


def vote(labels: np.ndarray) -> np.ndarray:
    """(I, J, K): the most frequent code of N label maps (N, I, J, K) at each voxel; of equals the smallest."""
    ordered = np.sort(labels, axis=0)
    best, run, most = ordered[0].copy(), np.ones(labels.shape[1:], np.int32), np.ones(labels.shape[1:], np.int32)
    for before, here in zip(ordered, ordered[1:]):
        run = np.where(here == before, run + 1, 1)
        longer = run > most
        best[longer], most[longer] = here[longer], run[longer]
    return best
