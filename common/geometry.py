"""Working grids, in millimetres; the affine pre-alignment onto them is in prealign.py."""

import itk
import nibabel as nib
import numpy as np

from common.io import affine_transform, resample, to_array, to_itk


def working_grid(
    size: tuple[int, int, int], affine_ras: np.ndarray, spacing: float | None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """The grid on which a network sees the fixed scan: its field of view, axes in closest RAS order, isotropic.

    Args:
        size, affine_ras: grid of the fixed scan.
        spacing: voxel size in mm; None keeps the fixed scan's own.

    Returns:
        Size and `affine_ras` of the working grid. Along an axis that has the wanted spacing already (to 0.1 %), voxels
        stay where they are; else the new grid has the old one's centre and covers its voxel centres.
    """
    order = nib.orientations.io_orientation(affine_ras)
    transform = nib.orientations.inv_ornt_aff(order, size)
    affine = affine_ras @ transform
    size = tuple(int(size[int(np.flatnonzero(order[:, 0] == axis)[0])]) for axis in range(3))
    if spacing is None:
        return size, affine
    old = np.linalg.norm(affine[:3, :3], axis=0)
    keep = np.abs(old / spacing - 1) < 1e-3
    count = np.where(keep, size, np.ceil((np.array(size) - 1) * old / spacing - 1e-6) + 1).astype(int)
    step = np.where(keep, 1.0, spacing / old)
    start = (np.array(size) - 1) / 2 - (count - 1) / 2 * step
    return tuple(int(n) for n in count), affine @ nib.affines.from_matvec(np.diag(step), start)


def to_working_grid(
    array: np.ndarray,
    affine_ras: np.ndarray,
    size: tuple[int, int, int],
    onto_ras: np.ndarray,
    matrix_ras: np.ndarray | None = None,
    *,
    nearest: bool = False,
) -> np.ndarray:
    """Resample (C, I, J, K) onto a working grid, smoothed where that grid is coarser.

    The Gaussian has sigma = 0.4 sqrt(new^2 - old^2) mm along an axis of old spacing: 0.7 mm for 1 mm to 2 mm, as the
    training scans were made.

    Args:
        matrix_ras: 4x4 point map (RAS mm) from the new grid's space to the scan's; None is the identity.
        nearest: for labels; then nothing is smoothed.
    """
    transform = None if matrix_ras is None else affine_transform(matrix_ras)
    old, new = nib.affines.voxel_sizes(affine_ras), nib.affines.voxel_sizes(onto_ras)
    target = np.full(3, new.min())
    variance = 0.16 * np.clip(target**2 - old**2, 0, None)
    channels = []
    for channel in array:
        if not nearest and variance.max() > 1e-6:
            image = to_itk(channel, affine_ras)
            channel = to_array(
                itk.discrete_gaussian_image_filter(image, variance=variance.tolist(), maximum_kernel_width=64)
            )
        channels.append(resample(channel, affine_ras, size, onto_ras, transform, nearest=nearest))
    return np.stack(channels)
