"""Transforms as other tools write them: read as point maps from fixed to moving space, or refused with the cure.

Read: MatrixOffsetTransformBase of ITK (c3d_affine_tool, Greedy, ITK-SNAP), plain 4 x 4 matrices whose coordinates are
told (c3d_affine_tool, Greedy, NiftyReg, FSL's flirt), FreeSurfer's .lta, elastix's parameter files, deformation and
displacement fields of NiftyReg and deformation fields of SPM.
"""

import re
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from common import InputError
from common.space import headers, mapping
from common.space.io import LPS_FROM_RAS, read_scan

MATRICES = ("ras", "flirt")
BASE = "MatrixOffsetTransformBase"
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$")
FSL_FIELD, FSL_COEFFICIENTS = 2006, range(2007, 2020)  # NIfTI intent codes
NIFTYREG = {0: "deformation", 1: "displacement"}  # its intent_p1; 2 and above are spline grids and velocities


def read(path: Path, matrix: str = "", scans: tuple[str, str] | None = None) -> mapping.Transform | None:
    """The transform of a file that is not ITK's own; None where it is for ITK to read.

    Args:
        matrix: what a plain 4 x 4 matrix is: "ras" (fixed to moving, RAS mm: c3d_affine_tool, Greedy, NiftyReg) or
            "flirt" (FSL's, moving to fixed).
        scans: paths of the moving and the fixed scan, which FSL's coordinates depend on.

    Raises:
        InputError: another tool's file that is not read here; the sentence says how to convert it.
    """
    with path.open("rb") as file:
        start = file.read(4_000_000)
    if b"\0" in start[:200]:
        return _binary(path) if BASE.encode() in start[:200] else None
    text = start.decode("utf-8", "replace")
    if text.startswith("#Insight Transform File"):
        return _renamed(path, text) if BASE in text else None
    if re.search(r'^\s*\(Transform "', text, re.MULTILINE):
        return _elastix(path, text, set())
    if re.search(r"^\s*nxforms\s*=", text, re.MULTILINE):
        return _lta(path, text)
    if text.startswith("MNI Transform File"):
        cure = f"convert it with lta_convert --inmni {path.name} --outitk OUT.txt"
        raise InputError(f"{path}: an .xfm of MNI's tools; {cure}")
    words = [word for line in text.splitlines() if not line.lstrip().startswith("#") for word in line.split()]
    if len(words) in (12, 16) and all(NUMBER.match(word) for word in words):
        return _plain(path, np.array(words, float), text, matrix, scans)
    return None


# ---- ITK's base class -----------------------------------------------------------------------------------------------


def _renamed(path: Path, text: str) -> mapping.Transform:
    """It has the parameters of an AffineTransform, which ITK's wheels know."""
    from common.space.transform_files import read_itk

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.tfm"
        copy.write_text(text.replace(BASE, "AffineTransform"))
        return read_itk(copy, path)


def _binary(path: Path) -> mapping.Transform:
    """The same in a .mat: two matrices with names, in MATLAB's oldest format."""
    import scipy.io

    try:
        content = {name: np.ravel(values) for name, values in scipy.io.loadmat(path).items() if name[:2] != "__"}
        (numbers,) = (values for name, values in content.items() if name.startswith(BASE))
        rows, shift, centre = numbers[:9].reshape(3, 3), numbers[9:12], content["fixed"][:3]
    except Exception as error:  # scipy raises several kinds
        raise InputError(f"{path}: not a transform that ITK can read") from error
    return _affine_lps(nib.affines.from_matvec(rows, shift + centre - rows @ centre))


def _affine_lps(matrix: np.ndarray) -> mapping.Transform:
    return mapping.affine_transform(LPS_FROM_RAS @ matrix @ LPS_FROM_RAS)


# ---- matrices in a text ---------------------------------------------------------------------------------------------


def _plain(
    path: Path, numbers: np.ndarray, text: str, matrix: str, scans: tuple[str, str] | None
) -> mapping.Transform:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(lines) == 1:
        cure = "convert it with c3d_affine_tool, from its 3 rows in RAS"
        raise InputError(f"{path}: one line of {len(numbers)} numbers, as AFNI's .aff12.1D, is not read; {cure}")
    if matrix not in MATRICES:
        tell = "--matrix ras (c3d_affine_tool, Greedy, NiftyReg) or --matrix flirt (FSL) of `apply`"
        cure = f"c3d_affine_tool {path.name} -oitk OUT.txt (FSL's: -ref FIXED -src MOVING {path.name} -fsl2ras -oitk)"
        what = "a plain matrix does not say what its coordinates are"
        raise InputError(f"{path}: {what}: give {tell}, or convert it by {cure}")
    found = np.vstack([numbers.reshape(-1, 4), [[0, 0, 0, 1]]])[:4]
    if not np.isfinite(found).all() or abs(np.linalg.det(found[:3, :3])) < 1e-9 or (found[3] != [0, 0, 0, 1]).any():
        raise InputError(f"{path}: not an affine matrix that can be inverted")
    if matrix == "ras":
        return mapping.affine_transform(found)
    if scans is None:
        raise InputError(f"{path}: FSL's coordinates are those of two scans, the moving and the fixed one")
    (moving, moving_ras), (fixed, fixed_ras) = (read_scan(scan) for scan in scans)
    there = _fsl(moving.shape[1:], moving_ras), _fsl(fixed.shape[1:], fixed_ras)
    forward = fixed_ras @ np.linalg.inv(there[1]) @ found @ there[0] @ np.linalg.inv(moving_ras)
    return mapping.affine_transform(np.linalg.inv(forward))


def _fsl(size: tuple[int, ...], affine_ras: np.ndarray) -> np.ndarray:
    """Voxels to FSL's coordinates: mm along the axes of the file, the first one turned round where det > 0."""
    matrix = np.diag([*nib.affines.voxel_sizes(affine_ras), 1.0])
    if np.linalg.det(affine_ras[:3, :3]) > 0:
        matrix[0] = [-matrix[0, 0], 0, 0, (size[0] - 1) * matrix[0, 0]]
    return matrix


def _lta(path: Path, text: str) -> mapping.Transform:
    """FreeSurfer's: x_dst = M x_src, in voxels (type 0) or RAS mm (1) of the moving (src) and the fixed (dst) scan."""
    cure = f"convert it with lta_convert --inlta {path.name} --outitk OUT.txt"
    try:
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        fields = [line.partition("=") for line in lines if "=" in line]
        kind = int(next(value for name, _, value in fields if name.strip() == "type"))
        count = int(next(value for name, _, value in fields if name.strip() == "nxforms"))
        start = lines.index("1 4 4") + 1
        matrix = np.array([line.split() for line in lines[start : start + 4]], float).reshape(4, 4)
        volumes = [_volume(lines, which) for which in ("src", "dst")] if kind == 0 else []
    except (ValueError, StopIteration, KeyError, IndexError) as error:
        raise InputError(f"{path}: not an .lta that can be read; {cure}") from error
    if kind not in (0, 1) or count != 1:
        raise InputError(f"{path}: an .lta of type {kind} with {count} transforms is not read; {cure}")
    if kind == 0:
        matrix = volumes[1] @ matrix @ np.linalg.inv(volumes[0])
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise InputError(f"{path}: its matrix has no inverse")
    return mapping.affine_transform(np.linalg.inv(matrix))


def _volume(lines: list[str], which: str) -> np.ndarray:
    """Voxel -> RAS mm of one of an .lta's two scans: FreeSurfer keeps the RAS of the voxel in the middle."""
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{which} volume info"))
    values = {}
    for line in lines[start + 1 : start + 10]:
        name, _, value = line.partition("=")
        values.setdefault(name.strip(), value.split())
    if values["valid"][0] != "1":
        raise ValueError(f"{which} volume is not valid")
    axes = np.array([values[name] for name in ("xras", "yras", "zras")], float).T * np.array(values["voxelsize"], float)
    middle = np.array(values["volume"], float) / 2
    return nib.affines.from_matvec(axes, np.array(values["cras"], float) - axes @ middle)


# ---- elastix --------------------------------------------------------------------------------------------------------


def _elastix(path: Path, text: str, seen: set[Path]) -> mapping.Transform:
    """A parameter file, behind the initial transform that it names: T(x) = T_this(T_initial(x)), LPS mm."""
    cure = f"make a displacement field of it, with transformix -def all -tp {path.name} -out FOLDER"
    values = {}
    for line in text.splitlines():
        if found := re.match(r"\s*\((\w+)\s+(.*)\)\s*(//.*)?$", line):
            values[found[1]] = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', found[2])]
    try:
        if values.get("FixedImageDimension", ["3"]) != ["3"] or values.get("MovingImageDimension", ["3"]) != ["3"]:
            raise InputError(f"{path}: must be a 3-D transform, this one is {values['FixedImageDimension'][0]}-D")
        kind = values["Transform"][0]
        reader = {"BSplineTransform": _bspline, "RecursiveBSplineTransform": _bspline}.get(kind, _linear)
        own = reader(kind, values)
    except InputError:
        raise
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        kind = values.get("Transform", ["unknown"])[0]
        raise InputError(f"{path}: elastix's {kind} is not read, or not all of it is there; {cure}") from error
    names = ("InitialTransformParameterFileName", "InitialTransformParametersFileName")
    initial = next((values[name][0] for name in names if values.get(name)), "NoInitialTransform")
    if initial == "NoInitialTransform":
        return own
    if values.get("HowToCombineTransforms", ["Compose"]) != ["Compose"]:
        raise InputError(f"{path}: adds its transform to its initial one; {cure}")
    places = [Path(initial), path.parent / initial, path.parent / Path(initial.replace("\\", "/")).name]
    before = next((place.resolve() for place in reversed(places) if place.is_file()), None)
    if before is None:
        raise InputError(f"{path}: its initial transform {initial} is not there; lay it beside this file")
    if before in seen | {path.resolve()}:
        raise InputError(f"{path}: its initial transforms name each other")
    first = _elastix(before, before.read_text(errors="replace"), seen | {path.resolve()})
    return mapping.compose(first, own)


def _numbers(values: dict[str, list[str]], name: str, count: int | None = None) -> np.ndarray:
    numbers = np.array(values[name], float)
    if (count is not None and len(numbers) != count) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} has {len(numbers)} values")
    return numbers


def _linear(kind: str, values: dict[str, list[str]]) -> mapping.Transform:
    """x -> M (x - c) + c + t."""
    if kind == "TranslationTransform":
        return _affine_lps(nib.affines.from_matvec(np.eye(3), _numbers(values, "TransformParameters", 3)))
    centre = _numbers(values, "CenterOfRotationPoint", 3)
    if kind == "AffineTransform":
        numbers = _numbers(values, "TransformParameters", 12)
        rows, shift = numbers[:9].reshape(3, 3), numbers[9:]
    elif kind == "EulerTransform":
        numbers = _numbers(values, "TransformParameters", 6)
        about_x, about_y, about_z = (nib.eulerangles.euler2mat(*turn) for turn in np.diag(numbers[:3])[:, ::-1])
        zyx = values.get("ComputeZYX", ["false"])[0] == "true"
        rows, shift = about_z @ (about_y @ about_x if zyx else about_x @ about_y), numbers[3:]
    elif kind == "SimilarityTransform":
        numbers = _numbers(values, "TransformParameters", 7)
        versor = numbers[:3]
        rows = numbers[6] * nib.quaternions.quat2mat([np.sqrt(max(1 - versor @ versor, 0.0)), *versor])
        shift = numbers[3:6]
    else:
        raise ValueError(kind)
    return _affine_lps(nib.affines.from_matvec(rows, shift + centre - rows @ centre))


def _bspline(kind: str, values: dict[str, list[str]]) -> mapping.Transform:
    """ITK's own B-spline has the same coefficients; elastix writes directions column by column."""
    import itk

    from common.space.itk_maps import from_itk

    order = int(values.get("BSplineTransformSplineOrder", ["3"])[0])
    if order != 3 or values.get("UseCyclicTransform", ["false"])[0] == "true":
        raise ValueError(f"order {order}")
    size, index = _numbers(values, "GridSize", 3), _numbers(values, "GridIndex", 3)
    spacing, origin = _numbers(values, "GridSpacing", 3), _numbers(values, "GridOrigin", 3)
    direction = _numbers(values, "GridDirection", 9).reshape(3, 3).T if "GridDirection" in values else np.eye(3)
    origin = origin + direction @ (spacing * index)
    coefficients = _numbers(values, "TransformParameters", int(3 * size.prod()))
    transform = itk.BSplineTransform[itk.D, 3, 3].New()
    told = [*size, *origin, *spacing, *direction.ravel()]
    transform.SetFixedParameters(_parameters(told))
    transform.SetParameters(_parameters(coefficients))
    return from_itk(transform)


def _parameters(numbers: list[float] | np.ndarray) -> object:
    from common.space import itk_classes

    filled = itk_classes.wrapped("OptimizerParameters", "D")(len(numbers))
    for n, number in enumerate(numbers):
        filled.SetElement(n, float(number))
    return filled


# ---- fields ---------------------------------------------------------------------------------------------------------


def read_field(path: Path) -> mapping.Transform | None:
    """A field of NiftyReg or SPM; None for a file that says nothing of the kind.

    Raises:
        InputError: FSL's warps, and what NiftyReg writes of splines and velocities, with what converts them.
    """
    if not headers.is_nifti(path):
        return None
    found = headers.read_nifti(path, values=False)
    if found.intent == FSL_FIELD or found.intent in FSL_COEFFICIENTS:
        what, name, first = "a field", path.name, ""
        if found.intent != FSL_FIELD:
            what, name = "coefficients", "FIELD"
            first = f"fnirtfileutils --in={path.name} --ref=MOVING --out=FIELD, then "
        cure = f"{first}wb_command -convert-warpfield -from-fnirt {name} MOVING -to-itk OUT.nii.gz"
        raise InputError(f"{path}: holds {what} of FSL's fnirt, in coordinates of its own; convert it with {cure}")
    niftyreg, spm = found.intent_name.startswith("NREG_"), found.intent_name.startswith("Mapping")
    if not niftyreg and not spm:
        return None
    kind = "deformation" if spm else NIFTYREG.get(int(found.intent_values[0]))
    if kind is None or found.shape[3:] != (1, 3):
        cure = f"reg_transform -ref FIXED -def {path.name} OUT.nii.gz"
        raise InputError(f"{path}: holds a spline or velocities of NiftyReg; convert it with {cure}")
    affine = found.matrices.get("sform", found.matrices.get("qform"))
    if affine is None:
        raise InputError(f"{path}: has neither sform nor qform, so where its field lies is not known")
    vectors = np.moveaxis(np.asarray(nib.Nifti1Image.from_filename(path).dataobj, np.float64)[:, :, :, 0], -1, 0)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    if kind == "deformation":
        voxels = np.stack(np.meshgrid(*[np.arange(n) for n in found.shape[:3]], indexing="ij"), -1)
        vectors = vectors - np.moveaxis(nib.affines.apply_affine(affine, voxels), -1, 0)
    disp = np.einsum("ab,bijk->aijk", np.linalg.inv(affine[:3, :3]), vectors)
    return mapping.displacement_transform(disp, affine)


def refuse_positions(path: Path, vectors: np.ndarray, affine_ras: np.ndarray) -> None:
    """Stop at a field (K, J, I, 3) that holds where each voxel goes, not how far: its values are nearly their places.

    Raises:
        InputError: it does, and ITK would take it for displacements.
    """
    step = max(max(vectors.shape) // 16, 1)
    some = vectors[::step, ::step, ::step]
    size = np.array(vectors.shape[2::-1])
    voxels = np.stack(np.meshgrid(*[np.arange(0, n, step) for n in size], indexing="ij"), -1)
    places = nib.affines.apply_affine(affine_ras, voxels).transpose(2, 1, 0, 3)
    spread = places - places.mean((0, 1, 2))
    for sign in ((1, 1, 1), (-1, -1, 1)):
        away = some - places * sign
        away = away - away.mean((0, 1, 2))
        if np.square(away).mean() < 0.1 * np.square(spread).mean() and np.square(some).mean() > 0:
            cure = "convert it first, NiftyReg's with reg_transform -disp"
            raise InputError(f"{path}: holds positions (a deformation field), not displacements in mm; {cure}")
