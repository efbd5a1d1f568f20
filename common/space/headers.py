"""What a header says about where a scan is: NIfTI's two answers, faults, axes that are not quite at right angles.

ITK reads the pixels and, as for ANTs and Slicer, says where they are; here its answer is compared with all that the
file says.
"""

import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip

from common import InputError, RegistrationWarning

HEADERS = ("sform", "qform")
EXACT = 1e-4  # of the products of unit axes: less is what float32 leaves
ROUNDED = 2e-3  # more is a shear, less is an orthogonal scan whose directions were written with three decimals
NOTICED = 0.05  # of a voxel, at the farthest corner: less is not worth a word
UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's metre, millimetre, micrometre in mm


class Nifti(NamedTuple):
    """What a NIfTI file says of itself."""

    shape: tuple[int, ...]
    matrices: dict[str, np.ndarray]  # "sform" and "qform" (RAS mm), those whose code is above 0
    intent: int
    intent_name: str
    intent_values: tuple[float, float, float]
    finite: bool  # whether the values are
    values: np.ndarray | None  # as they are in the file, without slope and intercept
    scaling: tuple[float, float]  # slope and intercept
    spacing: tuple[float, float, float]  # pixdim, in mm
    kind: str  # of the values, by numpy's letter: "f" real numbers, "c" complex ones


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti(path: Path, *, values: bool = True) -> Nifti:
    """Read a NIfTI header, and look at the values.

    ITK fills the missing end of a file that was cut off with 0, and replaces the one NaN, without a word. A file that
    is called .nii.gz and is not compressed is read, as ITK does.

    Args:
        values: also read the values: whether all are there, and finite.

    Raises:
        InputError: not NIfTI, cut off, or NaN or infinite values in what says where the scan is, or scales it.
    """
    try:
        with _opened(path) as stream:
            size = int.from_bytes(stream.read(4), "little")
            stream.seek(0)
            second = 540 in (size, int.from_bytes(size.to_bytes(4, "little"), "big"))
            header = (nib.Nifti2Header if second else nib.Nifti1Header).from_fileobj(stream, check=False)
            if header["sizeof_hdr"] not in (348, 540) or header["magic"].item()[:2] not in (b"n+", b"ni"):
                raise InputError(f"{path}: not an image that can be read, it has no NIfTI header")
            _refuse_faults(path, header)
            proxy = nib.arrayproxy.ArrayProxy(stream, (*_layout(header), 1.0, 0.0), mmap=False)
            array = proxy.get_unscaled() if values else None
            finite = array is None or _finite(header, array)
    except InputError:
        raise
    except Exception as error:  # of the decompression or of the header
        raise InputError(f"{path}: not an image that can be read, the file is cut off ({error})") from error
    scale = np.diag([*[UNITS.get(int(header["xyzt_units"]) & 7, 1.0)] * 3, 1.0])
    matrices = {}
    if header["sform_code"] > 0:
        matrices["sform"] = scale @ header.get_sform().astype(np.float64)
    if header["qform_code"] > 0:
        matrices["qform"] = scale @ _qform(header)
    intent = header["intent_name"].item().decode("latin-1")
    values_of_intent = tuple(float(header[f"intent_p{n}"]) for n in (1, 2, 3))
    scaling = tuple(float(header[name]) for name in ("scl_slope", "scl_inter"))
    spacing = tuple(float(size) for size in np.abs(header["pixdim"][1:4]))
    code = int(header["intent_code"])
    shape, kind = header.get_data_shape(), header.get_data_dtype().kind
    return Nifti(shape, matrices, code, intent, values_of_intent, finite, array, scaling, spacing, kind)


def plain(found: Nifti, *, codes: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
    """Array (1, I, J, K) and affine of a file about which there can be but one opinion; None for any other.

    That is a 3-D scan of real numbers whose sform, qform and spacing agree and whose axes are at right angles. Reading
    it through ITK gives the same; the files that it has rules of its own for are left to it.

    Args:
        codes: of a label map: whole numbers come out as int64. Else float32.
    """
    values, (slope, inter), grid = found.values, found.scaling, plain_grid(found)
    if values is None or values.dtype.kind not in "iuf" or grid is None:
        return None
    size, affine = grid
    scaled = np.isfinite(slope) and slope != 0 and (slope, inter) != (1.0, 0.0)
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 or (codes and scaled):
        return None
    array = values.reshape(size)
    if scaled:
        array = array * slope + inter
    kind = np.int64 if codes and array.dtype.kind in "iu" else np.float64 if codes else np.float32
    return np.ascontiguousarray(array[None], dtype=kind), affine


def plain_grid(found: Nifti) -> tuple[tuple[int, int, int], np.ndarray] | None:
    """Size and affine of a file of real numbers about whose place there can be but one opinion; None for any other."""
    size = found.shape
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) != 3 or min(size) < 2 or not found.matrices or found.kind not in "iuf":
        return None
    affine = found.matrices.get("sform", found.matrices.get("qform"))
    sizes = np.array(found.spacing)
    apart = max(farthest(affine, other, size) for other in found.matrices.values())
    stretched = np.abs(nib.affines.voxel_sizes(affine) / sizes - 1).max()
    plain = skew(affine) <= EXACT and apart <= 1e-3 * sizes.min() and stretched <= 1e-4
    return (size, affine) if plain else None


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    if file.read(2) == b"\x1f\x8b":
        file.close()
        return igzip.open(path)
    file.seek(0)
    return file


def _finite(header: nib.Nifti1Header, values: np.ndarray) -> bool:
    slope, inter = (float(header[name]) for name in ("scl_slope", "scl_inter"))
    if values.dtype.kind not in "fc":
        return True
    scale = np.abs(slope) if np.isfinite(slope) and slope else 1.0
    top = float(np.abs(values).max()) if values.size else 0.0
    return bool(np.isfinite(top) and np.isfinite(np.float32(top * scale + (inter if np.isfinite(inter) else 0.0))))


def _layout(header: nib.Nifti1Header) -> tuple:
    return header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()


def _refuse_faults(path: Path, header: nib.Nifti1Header) -> None:
    """Stop at numbers that say nothing; a slope of NaN means that there is none, where there is no intercept either."""
    told = {"the spacing (pixdim)": header["pixdim"][1:4]}
    if header["sform_code"] > 0:
        told["the sform"] = np.concatenate([header[f"srow_{axis}"] for axis in "xyz"])
    if header["qform_code"] > 0:
        told["the qform's quaternion"] = np.array([header[f"quatern_{part}"] for part in "bcd"])
        told["the qform's origin"] = np.array([header[f"qoffset_{axis}"] for axis in "xyz"])
    for what, numbers in told.items():
        if "quaternion" in what and np.square(numbers).sum() > 1.01:
            raise InputError(f"{path}: {what} is no rotation, it is longer than 1: {_listed(numbers)}")
        if not np.isfinite(numbers).all():
            raise InputError(f"{path}: {what} holds NaN or infinite values: {_listed(numbers)}")
    if not (np.asarray(header["pixdim"][1:4]) != 0).all():
        raise InputError(f"{path}: the spacing (pixdim) must not be 0: {_listed(header['pixdim'][1:4])}")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    unset = np.isnan(slope) and (np.isnan(inter) or inter == 0)
    if not unset and not (np.isfinite(slope) and (np.isfinite(inter) or slope == 0)):
        raise InputError(f"{path}: the slope or intercept of its values is NaN or infinite: {slope}, {inter}")
    if header["sform_code"] > 0 and not header["qform_code"] > 0:
        _refuse_flat(path, header.get_sform().astype(np.float64))


def _listed(numbers: np.ndarray) -> str:
    return ", ".join(f"{float(n):g}" for n in numbers)


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """As NIfTI's own library has it: a quaternion that is longer than 1 is a half turn about its axis."""
    b, c, d = (float(header[f"quatern_{part}"]) for part in "bcd")
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < 1e-7:
        b, c, d = np.array([b, c, d]) / np.linalg.norm([b, c, d])
    turn = nib.quaternions.quat2mat([np.sqrt(rest) if rest >= 1e-7 else 0.0, b, c, d])
    steps = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    steps[2] *= -1 if header["pixdim"][0] < 0 else 1
    return nib.affines.from_matvec(turn * steps, [float(header[f"qoffset_{axis}"]) for axis in "xyz"])


def place(path: Path, found: Nifti, by_itk: np.ndarray, header: str = "") -> np.ndarray:
    """Where a NIfTI scan is: what ITK says, or the header that is asked for.

    ITK takes the sform where its code is 1 and its axes are orthogonal, else the qform. Where only a sheared sform is
    there, ITK has no answer, and the sform is taken.

    Args:
        by_itk: affine_ras (4, 4) of ITK's image.
        header: "sform" or "qform"; "" leaves the choice to ITK.

    Raises:
        InputError: the header that is asked for is not in the file.
    """
    matrices = found.matrices
    if header:
        if header not in matrices:
            has = " and ".join(matrices) or "neither sform nor qform"
            raise InputError(f"{path}: --header {header} is asked for, and the file has {has}")
        chosen, used = matrices[header], header
    elif list(matrices) == ["sform"] and skew(matrices["sform"]) > ROUNDED:
        chosen, used = matrices["sform"], "sform"
    else:
        chosen = by_itk
        away = {name: farthest(by_itk, matrix, found.shape) for name, matrix in matrices.items()}
        used = min(away, key=away.get, default="")
    for name in HEADERS:
        if name in matrices and not header:
            apart = farthest(chosen, matrices[name], found.shape)
            if apart > NOTICED * nib.affines.voxel_sizes(chosen).min():
                which = f"the {used}" if name != used else "its spacing (pixdim)"
                shear = ", whose axes are not at right angles," if skew(matrices[name]) > ROUNDED else ""
                text = f"{path}: read by {which}; the {name}{shear} puts it up to {apart:.3g} mm elsewhere"
                warnings.warn(f"{text} (--header {name})", RegistrationWarning, stacklevel=2)
    return chosen


def skew(affine: np.ndarray) -> float:
    """Largest product of two unit axes: 0 where they are at right angles."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def farthest(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the places that two affines give to a corner of a scan."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], indexing="ij")).reshape(3, -1).T
    apart = nib.affines.apply_affine(one, corners) - nib.affines.apply_affine(other, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def squared(affine: np.ndarray) -> np.ndarray:
    """The affine with the nearest orthogonal axes, the same voxel sizes and the same first voxel.

    With unit axes D = U S V^T: U V^T.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / sizes)
    return nib.affines.from_matvec(left @ right * sizes, affine[:3, 3])


def _refuse_flat(path: str | Path, affine: np.ndarray) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (sizes > 0).all():
        raise InputError(f"{path}: spacing, origin or directions are 0, NaN or infinite: {affine[:3].tolist()}")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise InputError(f"{path}: two axes of the scan have the same direction: {affine[:3, :3].tolist()}")


def settled(path: str | Path, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An affine that can be used: refused where it says nothing, squared up where its directions were rounded.

    A shear (gantry tilt, slices that were shifted against each other) is kept, with a warning.

    Raises:
        InputError: NaN or infinite values, a voxel size of 0, axes that span no volume.
    """
    _refuse_flat(path, affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    off = skew(affine)
    if off <= EXACT:
        return affine
    square = squared(affine)
    moved = farthest(affine, square, shape)
    if off <= ROUNDED:
        if moved > NOTICED * sizes.min():
            text = f"{path}: its directions are rounded; squared up, which moves a corner by {moved:.2g} mm"
            warnings.warn(text, RegistrationWarning, stacklevel=2)
        return square
    angle = np.degrees(np.arcsin(min(off, 1.0)))
    text = f"{path}: its axes are not at right angles, by {angle:.1f} degrees (a shear, as of gantry tilt)"
    warnings.warn(f"{text}; it is read so, and other tools may bend it", RegistrationWarning, stacklevel=2)
    return affine
