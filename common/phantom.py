"""A synthetic, brain-like pair with known displacement, labels and landmarks: the input when none is given.

The anatomy is a function of a point in mm, so that both scans are sampled from it exactly, each on its own grid: the
fixed scan is anatomy(x), the moving one anatomy(back(y)) on an oblique, anisotropic grid. `back` is an affine map
followed by a smooth displacement, and the truth T(x) that a registration should find is its inverse.
"""

from typing import NamedTuple

import numpy as np

RADII = np.array([62.0, 78.0, 58.0])  # of the brain, mm
LABELS = {
    1: "left cortex",
    2: "right cortex",
    3: "left white matter",
    4: "right white matter",
    5: "ventricles",
    6: "thalamus",
    7: "putamen",
    8: "cerebellum",
    9: "cerebrospinal fluid",
}
INTENSITY = {1: 0.58, 2: 0.58, 3: 0.88, 4: 0.88, 5: 0.22, 6: 0.68, 7: 0.62, 8: 0.52, 9: 0.25}
LANDMARKS = {  # of the fixed scan, RAS mm
    "left putamen": (-26.0, 6.0, 2.0),
    "right putamen": (26.0, 6.0, 2.0),
    "left thalamus": (-11.0, -8.0, 4.0),
    "right thalamus": (11.0, -8.0, 4.0),
    "left ventricle": (-9.0, 30.0, 19.0),
    "right ventricle": (9.0, 30.0, 19.0),
    "cerebellum": (0.0, -46.0, -34.0),
    "left temporal": (-48.0, 0.0, -12.0),
    "right temporal": (48.0, 0.0, -12.0),
    "frontal": (0.0, 62.0, 0.0),
    "occipital": (4.0, -64.0, 8.0),
    "vertex": (6.0, -6.0, 48.0),
}
_WAVES = np.random.default_rng(7).normal(size=(5, 3))
_WAVES *= (2 * np.pi / np.array([22.0, 26.0, 19.0, 30.0, 24.0]) / np.linalg.norm(_WAVES, axis=1))[:, None]


def anatomy(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intensity (0..1) and label of points (..., 3) in mm; both 0 outside the brain.

    An ellipsoid whose outer 20 mm are folded: waves of about 28 mm make sulci (fluid), a grey ribbon around them and
    white gyri; a midline fissure, ventricles, thalamus, putamen and cerebellum lie inside.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    radius = np.sqrt((x / RADII[0]) ** 2 + (y / RADII[1]) ** 2 + (z / RADII[2]) ** 2)
    depth = (1 - radius) * 65  # mm below the surface, nearly
    folds = np.sin(points @ _WAVES.T + np.arange(5)).sum(-1) / 1.5 - depth / 25
    side = (x > 0).astype(int)
    label = np.where((folds > -0.2) | (depth < 3), 1 + side, 3 + side)
    label[((folds > 0.55) & (depth < 22)) | ((np.abs(x) < 1.6) & (z > 8))] = 9

    def blob(centre: tuple[float, float, float], radii: tuple[float, float, float], tilt: float = 0.0) -> np.ndarray:
        u, v, w = np.abs(x) - centre[0], y - centre[1], z - centre[2]
        return ((u - tilt * v) / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2 < 1

    label[blob((0, -46, -34), (36, 24, 20))] = 8
    label[blob((11, -8, 4), (9, 13, 9))] = 6
    label[blob((26, 6, 2), (6, 16, 11), 0.15)] = 7
    label[blob((9, 8, 19), (6, 30, 9), 0.1)] = 5
    label[depth < 0] = 0
    intensity = np.array([0.0, *INTENSITY.values()])[label]
    shading = 1 + 0.04 * np.sin(x / 21 + 1) * np.sin(y / 27) * np.sin(z / 23 + 2)
    return intensity * shading, label


class Deformation:
    """y -> back(y): affine map of moving space into fixed space, then a smooth displacement of up to `amplitude` mm."""

    def __init__(self, seed: int = 0, *, amplitude: float = 12.0) -> None:
        rng = np.random.default_rng(seed)
        angles = rng.uniform(-0.12, 0.12, 3)
        rotation = np.linalg.multi_dot([_rotation(axis, angle) for axis, angle in enumerate(angles)])
        self.matrix = rotation * rng.uniform(0.92, 1.08, 3)
        self.shift = rng.uniform(-12, 12, 3)
        self.waves = rng.uniform(-1, 1, (6, 3)) * 0.07  # wavelengths of 50 mm and more
        self.phases = rng.uniform(0, 2 * np.pi, 6)
        self.vectors = rng.normal(size=(6, 3))
        self.vectors *= amplitude / np.linalg.norm(self.vectors, axis=1).sum()

    def wave(self, points: np.ndarray) -> np.ndarray:
        return np.sin(points @ self.waves.T + self.phases) @ self.vectors

    def back(self, moving_points: np.ndarray) -> np.ndarray:
        """Points of the moving space (..., 3), RAS mm -> fixed space."""
        affine = moving_points @ self.matrix.T + self.shift
        return affine + self.wave(affine)

    def truth(self, fixed_points: np.ndarray) -> np.ndarray:
        """T: points of the fixed space (..., 3), RAS mm -> moving space; the inverse of `back` by fixed point."""
        affine = fixed_points.copy()
        for _ in range(60):
            affine = fixed_points - self.wave(affine)
        return (affine - self.shift) @ np.linalg.inv(self.matrix).T


class Motion(Deformation):
    """One moment of a motion in time: `share` of a smooth displacement, without an affine map."""

    def __init__(self, share: float, seed: int = 3, *, amplitude: float = 16.0) -> None:
        super().__init__(seed, amplitude=amplitude)
        self.matrix, self.shift, self.vectors = np.eye(3), np.zeros(3), share * self.vectors


def cycle(count: int, **options: float) -> list[Motion]:
    """Phases of a breath or a heartbeat: from nothing to the whole motion and back, as a cosine."""
    return [Motion(0.5 - 0.5 * np.cos(2 * np.pi * n / count), **options) for n in range(count)]


def _rotation(axis: int, angle: float) -> np.ndarray:
    matrix = np.eye(3)
    i, j = [n for n in range(3) if n != axis]
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def sample(
    size: tuple[int, int, int],
    affine_ras: np.ndarray,
    deformation: Deformation | None = None,
    *,
    noise: float = 0.02,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Scan and label map of the phantom on a grid, deformed if asked: (I, J, K) float32 and uint8.

    Intensities average 2x2x2 points a voxel (partial volume) and carry Gaussian noise inside the brain.
    """
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1).astype(np.float64)
    total = np.zeros(size)
    for corner in np.ndindex(2, 2, 2):
        total += _at(grid + (np.array(corner) - 0.5) / 2, affine_ras, deformation)[0]
    image = total / 8
    image = np.where(image > 0, np.clip(image + noise * np.random.default_rng(seed).normal(size=size), 1e-3, 1), 0)
    label = _at(grid, affine_ras, deformation)[1]
    return (1000 * image).astype(np.float32), label.astype(np.uint8)


def _at(voxels: np.ndarray, affine_ras: np.ndarray, deformation: Deformation | None) -> tuple[np.ndarray, np.ndarray]:
    points = voxels @ affine_ras[:3, :3].T + affine_ras[:3, 3]
    return anatomy(points if deformation is None else deformation.back(points))


def grids() -> dict[str, tuple[tuple[int, int, int], np.ndarray]]:
    """Grids of the pair: fixed 2 mm, RAS; moving 2.2 x 2 x 2.5 mm, oblique, axes i and j stored the other way."""
    fixed = np.eye(4)
    fixed[:3, :3] *= 2.0
    fixed[:3, 3] = -np.array([71.0, 87.0, 67.0])
    moving = np.eye(4)
    moving[:3, :3] = _rotation(2, 0.25) @ _rotation(0, -0.1) @ np.diag([-2.2, -2.0, 2.5])
    size = (72, 98, 62)
    moving[:3, 3] = np.array([4.0, -6.0, 5.0]) - moving[:3, :3] @ ((np.array(size) - 1) / 2)
    return {"fixed": ((72, 88, 68), fixed), "moving": (size, moving)}


class SlidingPair(NamedTuple):
    """Two organs that slide along each other, and the truth; all on one grid."""

    image: np.ndarray  # (2, I, J, K) float32, moving then fixed, in [0, 1]
    disp: np.ndarray  # (3, I, J, K) float32, voxels; known inside the organs, 0 elsewhere
    moving_label: np.ndarray  # (I, J, K) uint8: 1 and 2, the organs below and above the interface
    fixed_label: np.ndarray
    depth: np.ndarray  # (I, J, K) float32, distance of a voxel centre from the interface, voxels


def sliding_pair(
    size: tuple[int, int, int] = (32, 48, 32),
    seed: int = 0,
    *,
    shift: float = 4.0,
    wander: float = 0.0,
    noise: float = 0.01,
) -> SlidingPair:
    """Two textured half ellipsoids that meet in the plane i = (I - 1) / 2 + w and move in opposite directions along it.

    disp = +t in organ 1, -t in organ 2, with t in the plane of the interface, |t| in [shift / 2, shift]

    The displacement jumps by 2 t at the interface. Texture, direction, length and w in [-wander, wander] depend on the
    seed. Without `wander`, and with I a multiple of 32, the interface lies on a border of the cells of every pyramid.
    """
    rng = np.random.default_rng(seed)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1) * shift
    motion = length * np.array([0, np.cos(angle), np.sin(angle)])
    waves = rng.normal(size=(2, 6, 3))
    waves *= rng.uniform(0.5, 1.1, (2, 6, 1)) / np.linalg.norm(waves, axis=-1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, (2, 6))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1).astype(np.float64)
    centred = grid - (np.array(size) - 1) / 2 - np.array([wander * rng.uniform(-1, 1), 0, 0])
    radii = 0.42 * np.array(size) - np.array([wander, shift, shift])

    def scan(sign: float) -> tuple[np.ndarray, np.ndarray]:
        image, label = np.full(size, 0.1), np.zeros(size, np.uint8)
        for organ, side in enumerate((centred[..., 0] < 0, centred[..., 0] >= 0)):
            own = centred + sign * (1 - 2 * organ) * motion  # where in the organ a voxel lies
            inside = side & (((own / radii) ** 2).sum(-1) < 1)
            texture = np.sin(own @ waves[organ].T + phases[organ]).sum(-1) / 12
            image[inside], label[inside] = (0.4 + 0.25 * organ + texture)[inside], organ + 1
        image = image + noise * rng.normal(size=size)
        return np.clip(image, 0, 1).astype(np.float32), label

    # Fixed organs lie half a motion to one side, moving ones half to the other.
    (moving, moving_label), (fixed, fixed_label) = scan(-0.5), scan(0.5)
    sign = np.select([fixed_label == 1, fixed_label == 2], [1.0, -1.0], 0.0)
    disp = (motion[:, None, None, None] * sign).astype(np.float32)
    return SlidingPair(
        np.stack([moving, fixed]), disp, moving_label, fixed_label, np.abs(centred[..., 0]).astype(np.float32)
    )
