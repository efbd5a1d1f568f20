"""DICOM as it comes: which images of a folder make a volume, where each of them is, and their values.

pydicom reads the headers, ITK (GDCM) the pixels, as it decodes the compressed ones too. A series is what has one Series
Instance UID; nothing is read from names of files.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import itk
import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from common import InputError, RegistrationWarning
from common.space.io import LPS_FROM_RAS

UNEVEN_MM = 0.1  # of a series' slice positions: more is a missing slice, not rounding
STRAIGHT = 1e-3  # by which directions of one stack may differ
STRAY = 0.2  # images of other orientations, as a share of the largest stack: so many are a scout's and left out
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


class Frame(NamedTuple):
    """One slice: an image, or a frame of a multi-frame one."""

    file: Path
    number: int  # in the file, from 0
    size: tuple[int, int]  # columns, rows
    position: np.ndarray  # (3) LPS mm of the first pixel
    axes: np.ndarray  # (2, 3) unit vectors (LPS) along a row and along a column
    spacing: tuple[float, float]  # mm between columns, between rows
    scale: tuple[float, float] | None  # slope and intercept of this frame, where the file has them frame by frame
    uid: str  # of the image


class Series(NamedTuple):
    """The images of one Series Instance UID."""

    uid: str
    description: str
    modality: str
    images: list[tuple[Path, pydicom.Dataset]]

    def __str__(self) -> str:
        count = sum(int(header.get("NumberOfFrames") or 1) for _, header in self.images)
        return f"{self.uid} ({self.description or 'no description'}, {self.modality}, {count} images)"


def read(path: Path, wanted: str | Sequence[str] = "") -> tuple[np.ndarray, np.ndarray]:
    """Read the volume of a folder's DICOM series, or of one file with several frames.

    Files that are no images (DICOMDIR, reports, thumbnails, hidden files) are left out, as are copies of an image, and
    a few images of another orientation (a scout), with a `RegistrationWarning`. The folders below are looked into where
    the folder itself holds no DICOM image.

    Args:
        path: folder or file.
        wanted: UID or description of the series, or several such words.

    Returns:
        (1, I, J, K) float32, k along the normal of the slices, and `affine_ras` (4, 4), sheared where slices are
        shifted against each other (gantry tilt).

    Raises:
        InputError: no series, several and none wanted, places that are not known, missing slices, several images at a
            place, pixels that cannot be decoded.
    """
    series = _choose(path, _find(path), [wanted] if isinstance(wanted, str) else [str(word) for word in wanted])
    frames = [frame for file, header in series.images for frame in _frames(path, file, header)]
    frames = _in_order(path, _one_stack(path, _distinct(frames)))
    affine = _affine(frames)
    return _pixels(path, frames)[None], affine


def _find(path: Path) -> list[Series]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    images = list(_images(files))
    if not images and path.is_dir():
        images = list(_images(sorted(p for p in path.rglob("*") if p.is_file())))
    found = defaultdict(list)
    for file, header in images:
        found[str(header.get("SeriesInstanceUID", "without a UID"))].append((file, header))
    return [
        Series(uid, str(each[0][1].get("SeriesDescription", "")).strip(), str(each[0][1].get("Modality", "")), each)
        for uid, each in sorted(found.items())
    ]


def _images(files: Sequence[Path]) -> Iterator[tuple[Path, pydicom.Dataset]]:
    for file in files:
        if file.name.startswith("."):
            continue
        try:
            with file.open("rb") as stream:
                start = stream.read(132)
            # files without the preamble of the standard begin with an element of group 8
            marked = start[128:] == b"DICM"
            if not marked and start[:2] != b"\x08\x00":
                continue
            header = pydicom.dcmread(file, stop_before_pixels=True, force=not marked)
        except (InvalidDicomError, OSError, ValueError, KeyError, AttributeError, NotImplementedError):
            continue  # not DICOM after all
        if header.get("SOPClassUID") != MEDIA_DIRECTORY and header.get("Rows") and header.get("Columns"):
            yield file, header


def _choose(path: Path, found: list[Series], wanted: list[str]) -> Series:
    if not found:
        what = "a folder must hold a DICOM series, and this one holds none" if path.is_dir() else "holds no DICOM image"
        raise InputError(f"{path}: {what}")
    words = [word.strip().lower() for word in wanted if word.strip()]
    chosen = [each for each in found if each.uid in words or each.description.lower() in words]
    if len(chosen) == 1:
        return chosen[0]
    if len(found) == 1:
        if words:
            text = f"{path}: holds one series, {found[0]}, which is not the one asked for by --series"
            warnings.warn(text, RegistrationWarning, stacklevel=2)
        return found[0]
    told = "; ".join(map(str, chosen or found))
    if chosen:
        raise InputError(f"{path}: {len(chosen)} DICOM series fit --series {', '.join(wanted)}, give a UID of: {told}")
    none = f"none of which is {', '.join(wanted)}" if words else "name one by --series, its UID or description"
    raise InputError(f"{path}: holds {len(found)} DICOM series, {none}: {told}")


# ---- where each slice is --------------------------------------------------------------------------------------------


def _frames(path: Path, file: Path, header: pydicom.Dataset) -> list[Frame]:
    if header.get("SOPClassUID") == SEGMENTATION:
        cure = "convert it to label maps first, by dcmqi's segimage2itkimage"
        raise InputError(f"{file}: is a DICOM segmentation, of a structure a frame; {cure}")
    count = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in header:
        groups = list(header.PerFrameFunctionalGroupsSequence)
        if len(groups) != count:
            raise InputError(f"{file}: has {count} frames and the places of {len(groups)}")
        shared = (list(header.get("SharedFunctionalGroupsSequence", [])) or [pydicom.Dataset()])[0]
        return [_enhanced(path, file, header, number, group, shared) for number, group in enumerate(groups)]
    place = _place(path, file, header, _detector(header))
    if count == 1:
        return [Frame(file, 0, *place, None, str(header.get("SOPInstanceUID", file)))]
    size, position, axes, spacing = place
    normal = np.cross(*axes)
    offsets = header.get("GridFrameOffsetVector")  # of a dose
    if offsets is None:
        between = header.get("SpacingBetweenSlices") or header.get("SliceThickness")
        if not between or header.get("Modality") not in ("NM", "PT"):
            raise InputError(f"{file}: has {count} frames, and nothing says where each of them is")
        offsets = np.arange(count) * float(between)
    places = [position + float(offset) * normal for offset in offsets]
    return [Frame(file, n, size, where, axes, spacing, None, f"{file} {n}") for n, where in enumerate(places)]


def _detector(header: pydicom.Dataset) -> pydicom.Dataset:
    """Where nuclear medicine keeps its places."""
    return (list(header.get("DetectorInformationSequence", [])) or [pydicom.Dataset()])[0]


def _enhanced(
    path: Path, file: Path, header: pydicom.Dataset, number: int, group: pydicom.Dataset, shared: pydicom.Dataset
) -> Frame:
    def item(name: str) -> pydicom.Dataset:
        return (list(group.get(name, [])) or list(shared.get(name, [])) or [pydicom.Dataset()])[0]

    places = pydicom.Dataset()
    for name, keyword in zip(("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"), PLACE):
        if keyword in item(name):
            setattr(places, keyword, item(name)[keyword].value)
    values = item("PixelValueTransformationSequence")
    scale = None
    if "PixelValueTransformationSequence" in group and "RescaleSlope" in values:
        scale = float(values.RescaleSlope), float(values.get("RescaleIntercept", 0))
    size, *place = _place(path, file, header, places)
    return Frame(file, number, size, *place, scale, f"{file} {number}")


def _place(path: Path, file: Path, header: pydicom.Dataset, also: pydicom.Dataset) -> tuple:
    """Size, position, axes and spacing of an image, from its header or from `also`."""
    values = {}
    for keyword, length in zip(PLACE, (3, 6, 2)):
        value = header.get(keyword)
        value = also.get(keyword) if value in (None, "") else value
        try:
            numbers = np.array(value, np.float64)
        except (TypeError, ValueError):
            numbers = np.empty(0)
        if numbers.shape != (length,):
            cure = "where its slices lie is not known; convert it with what made it"
            raise InputError(f"{path}: {file.name} has no {keyword}, so {cure}")
        if not np.isfinite(numbers).all():
            raise InputError(f"{path}: the {keyword} of {file.name} is NaN or infinite")
        values[keyword] = numbers
    axes = values["ImageOrientationPatient"].reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if not (np.abs(lengths - 1) < 0.01).all() or abs(axes[0] @ axes[1]) > 0.01:
        fault = f"is no pair of directions: {axes.tolist()}"
        raise InputError(f"{path}: the ImageOrientationPatient of {file.name} {fault}")
    rows, columns = values["PixelSpacing"]  # between rows, between columns
    if min(rows, columns) <= 0:
        raise InputError(f"{path}: the PixelSpacing of {file.name} must be above 0, got {rows:g}, {columns:g}")
    size = int(header.Columns), int(header.Rows)
    return size, values["ImagePositionPatient"], axes / lengths[:, None], (float(columns), float(rows))


# ---- which slices make the volume -----------------------------------------------------------------------------------


def _distinct(frames: list[Frame]) -> list[Frame]:
    """Without copies of an image, as "IM1 (2)" beside "IM1"."""
    return list({frame.uid: frame for frame in reversed(frames)}.values())[::-1]


def _one_stack(path: Path, frames: list[Frame]) -> list[Frame]:
    """The frames of one orientation, size and spacing; a few others, a scout's, are left out with a warning."""
    stacks: list[list[Frame]] = []
    for frame in frames:
        for stack in stacks:
            other = stack[0]
            same = frame.size == other.size and np.allclose(frame.spacing, other.spacing, rtol=1e-3)
            if same and np.abs(frame.axes - other.axes).max() < STRAIGHT:
                stack.append(frame)
                break
        else:
            stacks.append([frame])
    stacks.sort(key=len, reverse=True)
    rest = sum(map(len, stacks[1:]))
    if rest > STRAY * len(stacks[0]):
        told = ", ".join(f"{len(stack)} {_view(stack[0])} of {stack[0].size}" for stack in stacks)
        what = "one series holds images of several orientations or sizes"
        raise InputError(f"{path}: {what}: {told}; give one of them in a folder")
    if rest:
        told = ", ".join(f"{len(stack)} {_view(stack[0])}" for stack in stacks[1:])
        text = f"{path}: {told} image(s) left out, of another orientation or size than the {len(stacks[0])} others"
        warnings.warn(text, RegistrationWarning, stacklevel=2)
    return stacks[0]


def _view(frame: Frame) -> str:
    return ("sagittal", "coronal", "axial")[int(np.abs(np.cross(*frame.axes)).argmax())]


def _in_order(path: Path, frames: list[Frame]) -> list[Frame]:
    """Along the normal of the slices, if they are evenly spaced along one line.

    Raises:
        InputError: a single slice, several at one place, slices that are missing.
    """
    if len(frames) < 2:
        raise InputError(f"{path}: must be a 3-D scan, got a single slice")
    normal = np.cross(*frames[0].axes)
    frames = sorted(frames, key=lambda frame: (float(normal @ frame.position), frame.number))
    gaps = np.diff([frame.position for frame in frames], axis=0)
    lengths = np.linalg.norm(gaps, axis=1)
    same = int((lengths < 1e-3).sum())
    if same:
        what = "as of echoes, phases or repeats; give one of them in a folder"
        raise InputError(f"{path}: {same + 1} of {len(frames)} images lie at the same places as others, {what}")
    # the usual gap, not the mean: one missing slice then shows as what it is
    off = np.linalg.norm(gaps - np.median(gaps, axis=0), axis=1)
    if off.max() > UNEVEN_MM:
        after = frames[int(off.argmax())]
        where = f"behind {after.file.name}" + (f", frame {after.number + 1}" if after.number else "")
        raise InputError(f"{path}: slices are missing or unevenly spaced, by up to {off.max():.2f} mm, {where}")
    return frames


def _affine(frames: list[Frame]) -> np.ndarray:
    first, last = frames[0], frames[-1]
    lps = np.eye(4)
    step = (last.position - first.position) / (len(frames) - 1)
    normal = np.cross(*first.axes)
    along = normal * np.linalg.norm(step)
    # positions are rounded too: along the normal, if that puts no slice elsewhere
    if np.linalg.norm(step - along) * (len(frames) - 1) < UNEVEN_MM:
        step = along
    lps[:3] = np.transpose([first.axes[0] * first.spacing[0], first.axes[1] * first.spacing[1], step, first.position])
    return LPS_FROM_RAS @ lps


# ---- values ---------------------------------------------------------------------------------------------------------


def _pixels(path: Path, frames: list[Frame]) -> np.ndarray:
    columns, rows = frames[0].size
    volume = np.empty((columns, rows, len(frames)), np.float32)
    opened: dict[Path, tuple[np.ndarray, Any]] = {}
    for k, frame in enumerate(frames):
        if frame.file not in opened:
            opened = {frame.file: _decoded(path, frame.file)}  # one file at a time is kept
        values, source = opened[frame.file]
        slice_ = values[frame.number]
        if frame.scale is not None:
            # GDCM gives every frame the first one's slope: back to what is stored, then by the frame's own
            stored = np.rint((slice_ - source.GetRescaleIntercept()) / source.GetRescaleSlope())
            slice_ = stored * frame.scale[0] + frame.scale[1]
        volume[:, :, k] = slice_.T
    return volume


def _decoded(path: Path, file: Path) -> tuple[np.ndarray, Any]:
    """Frames (N, rows, columns) float64 of a file, rescaled by its slope, and GDCM's reader."""
    source = itk.GDCMImageIO.New()
    reader = itk.ImageFileReader[itk.Image[itk.D, 3]].New()
    reader.SetFileName(str(file))
    reader.SetImageIO(source)
    try:
        reader.Update()
    except Exception as error:  # ITK raises several kinds
        syntax = pydicom.dcmread(file, stop_before_pixels=True, force=True).file_meta.get("TransferSyntaxUID")
        how = f"stored as {syntax.name}" if syntax else "of an unknown transfer syntax"
        cure = "decompress it first, by gdcmconv --raw, or by pydicom's Dataset.decompress() what that does not know"
        raise InputError(f"{path}: the pixels of {file.name}, {how}, cannot be decoded; {cure}") from error
    return itk.array_from_image(reader.GetOutput()), source
