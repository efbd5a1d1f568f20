"""Label maps of made-up anatomy in three families, and maps between two deformations of one: no scan, no file.

Lengths are in voxels, of a grid of some 2 mm. Everything is drawn from the generator that is given, volumes on its
device. Single numbers and small tables are drawn on the CPU (`Draws`), so that nobody waits for a GPU to learn what to
do next, but once, for the labels that are present.

Source: Hoffmann et al., SynthMorph, IEEE TMI 2022 (label maps from noise, two deformations of one); Dey et al.,
    anatomix, ICLR 2025 (parts painted over one another, foreground ball with a rim). The nested layers, the solids of
    the parts and the splines are ours.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from common.fields import compose, identity, integrate
from common.ops import warp

FAMILIES = ("blobs", "layers", "parts")
SHARES = (0.5, 0.3, 0.2)  # how often each family is drawn
RIM = 1000  # code of the rim of a body, above all others
SQUARINGS = 5  # of `integrate`: velocities here stay below 8 voxels, a step of a quarter of one


class Draws(Generator):
    """Random numbers of a seed: volumes on a device, and `single` numbers on the CPU; there the two are one stream."""

    def __new__(cls, seed: int, device: torch.device | str = "cpu") -> "Draws":
        return super().__new__(cls, device=device)

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.manual_seed(seed)
        self.single = self if self.device.type == "cpu" else Generator().manual_seed(seed)


def single(generator: Generator) -> Generator:
    """The generator of single numbers: that of `Draws`, or a generator on the CPU itself."""
    return getattr(generator, "single", generator)


def put(table: Tensor, generator: Generator) -> Tensor:
    """A small table of the CPU where the volumes are; the host does not wait until it is there."""
    return table.to(generator.device, non_blocking=True)


class Anatomy(NamedTuple):
    """A label map and what its labels have in common."""

    label: Tensor  # (I, J, K) whole numbers from 0, none left out
    tissue: Tensor  # (labels,), on the CPU: labels of one number are one tissue, of nearly one grey value
    outside: bool  # whether label 0 is what lies outside of a body
    family: str  # one of FAMILIES


def uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=single(generator)))


def integer(generator: Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=single(generator)))


def chance(generator: Generator, probability: float) -> bool:
    return uniform(generator, 0, 1) < probability


def along_axes(x: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Apply a matrix (new size, old size) along each of the last three axes of (C, I, J, K)."""
    x = torch.einsum("ia,nabc->nibc", matrices[0], x)
    x = torch.einsum("jb,nibc->nijc", matrices[1], x)
    return torch.einsum("kc,nijc->nijk", matrices[2], x)


def noise(generator: Generator, channels: int, size: tuple[int, int, int], scale: float) -> Tensor:
    """Smooth normal noise (channels, I, J, K) of variance 1 at each voxel: a cubic B-spline of normal coefficients.

    Args:
        scale: width of its hills in voxels; knots lie 0.7 of that apart, from a random place, so that the hills are as
            wide as those of linear interpolation between points `scale` apart.
    """
    matrices = []
    for n in size:
        place = torch.arange(n) / (0.7 * scale) + uniform(generator, 0, 1)
        away = (place[:, None] - torch.arange(-1, int(place[-1]) + 3)).abs()
        near, far = 2 / 3 - away**2 * (1 - away / 2), (2 - away).clamp(min=0) ** 3 / 6
        weights = torch.where(away < 1, near, far)
        matrices.append(put(weights / weights.norm(dim=1, keepdim=True), generator))
    shape = (channels, *(matrix.shape[1] for matrix in matrices))
    return along_axes(torch.randn(shape, generator=generator, device=generator.device), tuple(matrices))


def mixed_noise(
    generator: Generator, channels: int, size: tuple[int, int, int], scales: tuple[float, ...], largest: float = 1.0
) -> Tensor:
    """Sum over scales of `noise`, each channel and scale weighted by a number uniform in [0, largest]."""
    total = torch.zeros(channels, *size, device=generator.device)
    for scale in scales:
        weight = largest * torch.rand(channels, 1, 1, 1, generator=generator, device=generator.device)
        total += weight * noise(generator, channels, size, scale)
    return total


# ---- label maps -----------------------------------------------------------------------------------------------------


def _blobs(generator: Generator, size: tuple[int, int, int]) -> tuple[Tensor, int]:
    """Which of 8 to 26 noises is largest."""
    return mixed_noise(generator, integer(generator, 8, 26), size, (8, 16, 32)).argmax(0), 1


def _layers(generator: Generator, size: tuple[int, int, int]) -> tuple[Tensor, int]:
    """Level sets of one noise, thin sheets inside one another; half of the time parcelled by blobs.

    Returns:
        Labels, and the number of parcels: labels of the same sheet have the same label // parcels.
    """
    sheets, parcels = integer(generator, 4, 9), integer(generator, 2, 5) if chance(generator, 0.5) else 1
    hills = mixed_noise(generator, 1, size, (8, 16, 32))[0]
    cuts = torch.randn(sheets - 1, generator=single(generator)).sort().values
    label = torch.bucketize((hills - hills.mean()) / hills.std().clamp(min=1e-6), put(cuts, generator))
    if parcels > 1:
        label = label * parcels + mixed_noise(generator, parcels, size, (12, 24)).argmax(0)
    return label, parcels


def _parts(generator: Generator, size: tuple[int, int, int]) -> tuple[Tensor, int]:
    """20 to 40 solids painted over one another: ellipsoids, tubes and boxes with round edges, all of them bent."""
    device = generator.device
    where = identity(size, torch.empty((), device=device))[0].flatten(1)
    where = where + uniform(generator, 0, 4) * noise(generator, 3, size, 20).flatten(1)
    label = torch.zeros(where.shape[1], dtype=torch.long, device=device)
    matrices, centres, powers = [], [], []
    for _ in range(integer(generator, 20, 40)):
        axes = torch.tensor([uniform(generator, 3, 20) for _ in range(3)])
        if chance(generator, 0.25):  # a tube: as long as the grid
            axes[0], axes[1:] = 2.0 * max(size), 2 + axes[1:] / 4
        shear = torch.eye(3)
        shear[0, 1] = uniform(generator, -0.5, 0.5)
        centres.append(torch.tensor([[uniform(generator, 0, n - 1)] for n in size]))
        powers.append(2 ** integer(generator, 1, 3))  # 2 is an ellipsoid, 8 nearly a box
        matrices.append(shear @ _rotation(generator, 180) / axes[:, None])
    tables = zip(*(put(torch.stack(table), generator) for table in (matrices, centres)), powers)
    for number, (matrix, centre, power) in enumerate(tables, 1):
        label.masked_fill_(((matrix @ (where - centre)) ** power).sum(0) < 1, number)
    return label.view(size), 1


def _rotation(generator: Generator, degrees: float) -> Tensor:
    """Rotation matrix (3, 3) about a random axis by an angle uniform in [-degrees, degrees]."""
    axis = torch.randn(3, generator=single(generator))
    turn = axis / axis.norm() * math.radians(uniform(generator, -degrees, degrees))
    zero = turn.new_zeros(())
    rows = [zero, -turn[2], turn[1], turn[2], zero, -turn[0], -turn[1], turn[0], zero]
    return torch.linalg.matrix_exp(torch.stack(rows).view(3, 3))


def _body(generator: Generator, size: tuple[int, int, int]) -> Tensor:
    """How far inside a wavy ball each voxel lies, in voxels, below 0 outside: (I, J, K)."""
    radius = torch.tensor([uniform(generator, 0.38, 0.56) * n for n in size])
    centre = torch.tensor([(0.5 + uniform(generator, -0.1, 0.1)) * (n - 1) for n in size])
    where = identity(size, torch.empty((), device=generator.device))[0]
    middle, half = (put(x.view(3, 1, 1, 1), generator) for x in (centre, radius))
    away = ((where - middle) / half).norm(dim=0)
    waves = uniform(generator, 0.3, 2.5) * noise(generator, 1, size, uniform(generator, 8, 20))[0]
    return (1 - away) * radius.mean() + waves


def draw_anatomy(generator: Generator, size: tuple[int, int, int]) -> Anatomy:
    """A label map of one of the FAMILIES: of two thirds only what lies within a body, half of these with a rim."""
    draw = uniform(generator, 0, 1)
    family = FAMILIES[sum(draw >= edge for edge in (SHARES[0], SHARES[0] + SHARES[1]))]
    codes, split = {"blobs": _blobs, "layers": _layers, "parts": _parts}[family](generator, size)
    codes = codes + 1
    if outside := chance(generator, 0.67):
        depth = _body(generator, size)
        if chance(generator, 0.5):
            codes = codes.masked_fill(depth < uniform(generator, 2, 4), RIM)
        codes = codes.masked_fill(depth < 0, 0)
    present = _present(codes)
    ranks = torch.zeros(RIM + 1, dtype=torch.long)
    ranks[present] = torch.arange(len(present))
    label = put(ranks, generator)[codes]
    tissue = torch.where((present > 0) & (present < RIM), 1 + (present - 1) // split, present)
    groups = tissue.unique(return_inverse=True)[1]
    if split == 1 and chance(generator, 0.4):  # a few tissues, as in an organ of many parts
        few = torch.randint(integer(generator, 2, 6), groups.shape, generator=single(generator))
        groups = torch.where(groups == 0, 0, few + 1) if outside else few
    elif split > 1 and chance(generator, 0.3):  # parcels of a sheet that can be told apart
        groups = torch.arange(len(present))
    return Anatomy(label, groups, outside and bool(present[0] == 0), family)


def _present(codes: Tensor) -> Tensor:
    """The codes from 0 to RIM that occur, in order, on the CPU: here the host waits for the volumes."""
    seen = torch.zeros(RIM + 1, dtype=torch.bool, device=codes.device)
    return seen.index_fill_(0, codes.flatten(), True).cpu().nonzero()[:, 0]


# ---- two deformations of one ----------------------------------------------------------------------------------------


class Motion(NamedTuple):
    """Two places of the same anatomy, and the way from the one to the other; (1, 3, I, J, K) in voxels each."""

    moving: Tensor  # the moving map is the anatomy warped by this
    fixed: Tensor
    disp: Tensor  # pull-back: moving(x + disp(x)) = fixed(x)


def draw_motion(generator: Generator, size: tuple[int, int, int], *, strength: float | None = None) -> Motion:
    """Flows p1, p2 of two random velocities; in half of the cases the moving anatomy is also moved by an affine map A.

    moving(y) = L(p1(A y)),  fixed(x) = L(p2(x)),  x + disp(x) = A^-1 p1^-1 p2(x)

    with p1^-1 the flow of the opposite velocity. Velocities are noises of 6, 12 and 24 voxels, up to 1.2 voxels each.

    Args:
        strength: of the velocities, 1 as said; None draws it from 0.1 to 1.2, so that small motions are learned, too.
    """
    strength = uniform(generator, 0.1, 1.2) if strength is None else strength
    first, second = (strength * mixed_noise(generator, 3, size, (6, 12, 24), 1.2) for _ in range(2))
    onto, back, fixed = integrate(torch.stack([first, -first, second]), steps=SQUARINGS).split(1)
    disp, moving = compose(back, fixed), onto
    if chance(generator, 0.5):
        scale = torch.tensor([uniform(generator, 0.9, 1.1) for _ in range(3)]).diag()
        matrix, reach = _rotation(generator, 10) @ scale, 5 * min(1.0, min(size) / 48)
        shift = torch.tensor([uniform(generator, -reach, reach) for _ in range(3)]).view(1, 3, 1, 1, 1)
        onward, backward, shift = (put(x, generator) for x in (matrix, matrix.inverse(), shift))
        here = identity(size, disp)
        centre = here.mean(dim=(2, 3, 4), keepdim=True)
        by_affine = _times(onward, here - centre) + centre + shift - here
        moving = compose(onto, by_affine)
        disp = _times(backward, here + disp - centre - shift) + centre - here
    return Motion(moving, fixed, disp)


def _times(matrix: Tensor, points: Tensor) -> Tensor:
    return torch.einsum("ab,nb...->na...", matrix, points)


def move(label: Tensor, disp: Tensor) -> Tensor:
    """A label map (I, J, K) warped by (1, 3, I, J, K) in voxels, nearest; the border repeated outside."""
    return warp(label[None, None].float(), disp, mode="nearest").long()[0, 0]
