"""Working grids, and lengths in millimetres on them; the affine pre-alignment onto them is in prealign.py."""

import nibabel as nib
import numpy as np
from scipy.ndimage import correlate1d, distance_transform_edt

from common.space.headers import EXACT, skew, squared
from common.space.io import background, is_stripped
from common.space.mapping import affine_transform, resample

HALF = 0.5 + 1e-4  # of a brain's edge: clear of what lies halfway between two voxels, which rounding would decide
FEW, USUAL, MANY = 24, 80, 500  # voxels along the longest side of an organ; 80: a head's brain at 2 mm


def working_grid(
    size: tuple[int, int, int],
    affine_ras: np.ndarray,
    spacing: float | None,
    *,
    box: tuple[np.ndarray, np.ndarray] | None = None,
    divisor: int = 1,
    grid_size: tuple[int, int, int] | None = None,
) -> tuple[tuple[int, int, int], np.ndarray]:
    """The grid on which a network sees the fixed scan: axes in closest RAS order, isotropic, around its content.

    Args:
        size, affine_ras: grid of the fixed scan.
        spacing: voxel size in mm; None keeps the fixed scan's own.
        box: first and last voxel to cover, along each axis of the fixed scan; None covers all of it.
        divisor: sizes become multiples of this.
        grid_size: exactly so many voxels, in closest RAS order: a centre crop, or padding.

    Returns:
        Size and `affine_ras` of the working grid, centred on the box. Along an axis that has the wanted spacing already
        (to 0.1 %), voxels stay where they are. The axes are at right angles also where those of the scan are not: a
        network must not see a bent body.
    """
    order = nib.orientations.io_orientation(affine_ras)
    transform = nib.orientations.inv_ornt_aff(order, size)
    affine = affine_ras @ transform
    first, last = (np.zeros(3), np.array(size) - 1) if box is None else box
    ends = nib.affines.apply_affine(np.linalg.inv(transform), np.stack([first, last]))
    first, last = ends.min(0).round(), ends.max(0).round()
    if skew(affine) > EXACT:
        corners = np.array(np.meshgrid(*zip(first, last), indexing="ij")).reshape(3, -1).T
        corners = nib.affines.apply_affine(affine, corners)
        affine = squared(affine)
        ends = nib.affines.apply_affine(np.linalg.inv(affine), corners)
        first, last = ends.min(0), ends.max(0)
    old = nib.affines.voxel_sizes(affine)
    keep = np.ones(3, bool) if spacing is None else np.abs(old / spacing - 1) < 1e-3
    step = np.ones(3) if spacing is None else np.where(keep, 1.0, spacing / old)
    count = np.ceil((last - first) / step - 1e-6).astype(int) + 1
    count = -(-count // divisor) * divisor if grid_size is None else np.array(grid_size)
    start = (first + last) / 2 - (count - 1) / 2 * step
    start = np.where(keep, np.floor(start), start)
    return tuple(int(n) for n in count), affine @ nib.affines.from_matvec(np.diag(step), start)


def fitting_spacing(
    size: tuple[int, int, int],
    affine_ras: np.ndarray,
    spacing: float | None,
    box: tuple[np.ndarray, np.ndarray] | None = None,
) -> float | None:
    """The spacing of a working grid in mm: the wanted one, or another where the organ has another size altogether.

    An organ of fewer than FEW voxels along its longest side (the brain of a mouse on a grid for ours) gets a grid with
    USUAL of them, at most three to a voxel of its own; so does one (a cell in micrometres) with more than MANY that are
    not its own.

    Args:
        size, affine_ras: grid of the fixed scan.
        spacing: wanted, mm; None, the scan's own, is left.
        box: first and last voxel of the organ; None is all of the scan.
    """
    if spacing is None:
        return None
    first, last = (np.zeros(3), np.array(size) - 1) if box is None else box
    own = nib.affines.voxel_sizes(affine_ras)
    side = float(((last - first + 1) * own).max())
    if side / spacing >= FEW and not (side / spacing > MANY and spacing < own.min() / 4):
        return spacing
    return float(f"{max(side / USUAL, own.min() / 3):.2g}")


def overlap(
    size: tuple[int, int, int],
    affine_ras: np.ndarray,
    other: tuple[int, ...],
    other_ras: np.ndarray,
    matrix: np.ndarray,
) -> float:
    """Share of a grid's voxels that a point map (RAS mm, 4x4) takes into another scan's field of view."""
    steps = [np.linspace(0, n - 1, min(n, 32)) for n in size]
    voxels = np.stack(np.meshgrid(*steps, indexing="ij"), -1)
    there = nib.affines.apply_affine(np.linalg.inv(other_ras) @ matrix @ affine_ras, voxels)
    return float(((there >= -0.5) & (there <= np.array(other) - 0.5)).all(-1).mean())


def length_mm(disp: np.ndarray, affine_ras: np.ndarray) -> np.ndarray:
    """Length in mm of displacements (3, ...) in voxels of a grid: (...), as (I, J, K)."""
    return np.linalg.norm(np.tensordot(affine_ras[:3, :3], disp, 1), axis=0)


def foreground_floor(channel: np.ndarray) -> float:
    """Value above which a scan shows something: 0, or the smallest value of a scan that has values below 0 and no
    background of exactly 0 (CT in Hounsfield units: air)."""
    lowest = float(channel.min())
    return lowest if lowest < 0 and not is_stripped(channel) else 0.0


def foreground_range(channel: np.ndarray) -> tuple[float, float]:
    """`foreground_floor` (0 for skull-stripped MR, air for CT) and the 99.5th percentile of the voxels above it."""
    low = foreground_floor(channel)
    inside = channel[channel > low]
    return low, float(np.percentile(inside, 99.5)) if len(inside) else low + 1.0


def foreground_box(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last voxel of the foreground of a scan with background 0; None for any other scan."""
    if not is_stripped(channel) or not (channel > 0).any():
        return None
    inside = channel > 0
    spans = [np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([span[0] for span in spans]), np.array([span[-1] for span in spans])


def dilated(mask: np.ndarray, affine_ras: np.ndarray, mm: float) -> np.ndarray:
    """(I, J, K) voxels within `mm` of one that is above 0."""
    inside = mask > 0
    if mm <= 0 or not inside.any():
        return inside
    spacing = nib.affines.voxel_sizes(affine_ras)
    reach = np.ceil(mm / spacing).astype(int)
    spans = [np.flatnonzero(inside.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(span[0] - n, 0), span[-1] + n + 1) for span, n in zip(spans, reach))
    inside[box] = distance_transform_edt(~inside[box], sampling=spacing) <= mm + 1e-6
    return inside


def smoothed(channel: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Smooth (I, J, K) by the discrete Gaussian of so many voxels^2 along each axis, the border repeated outside.

    w(n) = exp(-t) I_n(t), cut where it holds 99 % of its sum, and scaled to 1; t the variance.

    Source: Lindeberg, Scale-space for discrete signals, PAMI 1990; the cut is that of ITK's DiscreteGaussian, whose
        numbers these are. exp(-t) I_n(t) are the Fourier coefficients of exp(t (cos a - 1)).
    """
    for axis, t in enumerate(variance):
        if t < 1e-6:
            continue
        angles = 2 * np.pi * np.arange(256) / 256
        half = np.fft.ifft(np.exp(t * (np.cos(angles) - 1))).real[:32]
        sums = half[0] + 2 * np.append(0, half[1:].cumsum())
        radius = int(np.argmax(sums >= 0.99)) if sums[-1] >= 0.99 else len(half) - 1
        kernel = np.concatenate([half[radius:0:-1], half[: radius + 1]]) / sums[radius]
        channel = correlate1d(channel.astype(np.float32, copy=False), kernel, axis, mode="nearest")
    return channel


def to_working_grid(
    array: np.ndarray,
    affine_ras: np.ndarray,
    size: tuple[int, int, int],
    onto_ras: np.ndarray,
    matrix_ras: np.ndarray | None = None,
    *,
    nearest: bool = False,
    outside: float | None = None,
) -> np.ndarray:
    """Resample (C, I, J, K) onto a working grid, smoothed where that grid is coarser.

    The Gaussian has sigma = 0.4 sqrt(new^2 - old^2) mm along an axis of old spacing: 0.7 mm for 1 mm to 2 mm, as the
    training scans were made. Where the background is exactly 0 (a skull-stripped scan), it is 0 again afterwards: no
    blurred rim.

    Args:
        matrix_ras: 4x4 point map (RAS mm) from the new grid's space to the scan's; None is the identity.
        nearest: for labels; then nothing is smoothed.
        outside: value where the scan does not reach; None: its background.
    """
    transform = None if matrix_ras is None else affine_transform(matrix_ras)
    old, new = nib.affines.voxel_sizes(affine_ras), nib.affines.voxel_sizes(onto_ras)
    target = np.full(3, new.min())
    variance = 0.16 * np.clip(target**2 - old**2, 0, None)
    channels = []
    for channel in array:
        both = [channel > 0] if not nearest and is_stripped(channel) else []
        if not nearest:
            channel = smoothed(channel, variance / old**2)
        beyond = (0.0 if nearest or both else background(channel)) if outside is None else outside
        channel = channel.astype(np.float32, copy=False)  # of labels too: networks take no other
        both = np.stack([channel, *both]) if both else channel
        values = resample(both, affine_ras, size, onto_ras, transform, nearest=nearest, outside=beyond)
        channels.append(values[0] * (values[1] > HALF) if values.ndim == 4 else values)
    return np.stack(channels)
